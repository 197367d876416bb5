"""The conductor alone: what it makes of events that no whole swarm would bring about so soon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from memory_wire import keypair_of
from small_network import small_graph

from p2pnet.core import Tick
from p2pnet.dht.manifest import network_id_of
from p2pnet.keys import ACCEPTANCE, MANIFEST
from p2pnet.log.history import History, new_claim, parse_entry
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.conductor import Conductor, Phase
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2

GRAPH = small_graph()
NAMES = {name: keypair_of(name).peer_id for name in "abcdefg"}
A, B, C, D = (NAMES[name] for name in "abcd")
KEYS = {keypair_of(name).peer_id: keypair_of(name) for name in NAMES}


def manifest(**fields: Any) -> common_pb2.Signed:
    owner = keypair_of("owner")
    body = records_pb2.Manifest(
        owner=owner.public_key,
        name=GRAPH.name,
        spec_digest=GRAPH.digest,
        any_orchestrator=True,
        keepers=sorted([A, B, C]),
        **fields,
    )
    return owner.sign(MANIFEST, body.SerializeToString(deterministic=True))


class One:
    """A conductor on "a" whose log takes everything and whose hosts agree, unless told."""

    def __init__(self, hosts: Sequence[str] = (A, B), **fields: Any) -> None:
        self.manifest = manifest(**fields)
        self.core = Conductor(KEYS[A], History(network_id_of(self.manifest)), self.manifest, GRAPH)
        self.now = 0.0
        self.hosts = list(hosts)
        self.alive = list(NAMES.values())
        self.log_answers = True
        self.refuses: dict[str, int] = {}  # host -> code
        self.done: list[m.Effect] = []

    def feed(self, *events: m.Event) -> None:
        """Hands in events, and the answers to what comes of them."""
        waiting = list(events)
        while waiting:
            effects = self.core.handle(waiting.pop(0), self.now)
            self.core.check()
            self.done += effects
            for effect in effects:
                if (answer := self.answer(effect)) is not None:
                    waiting.append(answer)

    def run(self, until: float) -> None:
        while (due := self.core.deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self.feed(Tick())
        self.now = until

    def answer(self, effect: m.Effect) -> m.Event | None:
        match effect:
            case m.ReadLog():
                return m.LogRead(()) if self.log_answers else m.LogSilent("nobody answers")
            case m.Append(entry):
                return m.Appended(entry) if self.log_answers else m.NotAppended("no majority")
            case m.MakePlan(purpose, _, exclude):
                usable = [host for host in self.hosts if host not in exclude]
                if purpose is m.Purpose.IMPROVE or not usable:
                    return m.Planned(purpose, None, "no room", tuple(self.alive))
                placement = {v: usable[at % len(usable)] for at, v in enumerate(GRAPH.vnodes())}
                return m.Planned(purpose, placement, "", tuple(self.alive))
            case m.MakeReady(host):
                return m.HostReady(host)
            case m.Allocate(host, request):
                if host in self.refuses:
                    return m.NotAllocated(host, request.epoch, "no", self.refuses[host])
                return m.Allocated(host, request.epoch, tuple(self.agree(host, request)))
            case m.Beat(host, request):
                rows = [records(vnode) for vnode, at in self.core.placement.items() if at == host]
                return m.Beaten(host, request.epoch, tuple(rows))
            case m.Store(host, epoch, step, vnodes):
                states = {
                    vnode: common_pb2.BlobRef(digest=f"{vnode}{step}".encode().ljust(32)[:32])
                    for vnode in vnodes
                }
                return m.Stored(host, epoch, step, states)
            case m.Release(host):
                return m.Released(host, heard=True)
        return None

    def agree(self, host: str, request: Any) -> list[common_pb2.Signed]:
        return [
            KEYS[host].sign(
                ACCEPTANCE,
                records_pb2.Allocation(
                    network_id=request.network_id, vnode=vnode, host=host, epoch=request.epoch
                ).SerializeToString(),
            )
            for vnode in request.vnodes
        ]

    def entries(self) -> list[Any]:
        return [parse_entry(signed) for signed in self.core.history.entries]

    def said(self, kind: type) -> list[Any]:
        return [effect for effect in self.done if isinstance(effect, kind)]


def records(vnode: str) -> Any:
    return pnode_pb2.HostedVNode(vnode=vnode)


def ready(**fields: Any) -> One:
    one = One(**fields)
    one.feed(m.Begin("submitted"))
    assert one.core.phase is Phase.READY
    return one


def test_the_first_claim_says_all_that_a_successor_needs() -> None:
    one = ready()
    [entry] = one.entries()
    assert entry.claim.genesis.graph == GRAPH.to_json()
    assert [entry.claim.hosts[entry.claim.placement[v]] for v in GRAPH.vnodes()] == [
        one.core.placement[v] for v in GRAPH.vnodes()
    ]


def test_a_dead_keeper_is_replaced_though_a_plan_still_counts_it_among_the_living() -> None:
    one = ready(hosts=(B, D))
    [entry] = one.entries()
    assert B in entry.keepers
    one.hosts.remove(B)
    one.feed(m.MemberGone(B, "has failed"))  # one.alive, which plans are made of, lags behind
    assert one.core.phase is Phase.READY
    assert B not in one.entries()[-1].keepers
    one.feed(m.MemberCame(B))
    one.hosts = [C]
    one.feed(m.MemberGone(D, "has failed"))
    assert D not in one.entries()[-1].keepers


def test_what_the_owner_allows_is_kept_to_and_said() -> None:
    one = ready(limits=records_pb2.Limits(claims_max=1))
    one.hosts = [A, C]
    one.feed(m.HostLeaves(7, B))
    [answer] = one.said(m.Answer)
    assert "no more claims" in answer.refusal.detail
    assert one.core.phase is Phase.READY  # and it goes on where it is
    one.feed(m.MemberGone(B, "has failed"))
    assert one.core.phase is Phase.WAITING
    assert "allows 1 claims" in one.core.detail
    assert not one.said(m.Over)


def test_without_a_grant_nothing_is_claimed() -> None:
    owner = keypair_of("owner")
    body = records_pb2.Manifest.FromString(manifest().payload)
    body.any_orchestrator = False
    body.orchestrators.append(B)
    one = One()
    one.manifest = owner.sign(MANIFEST, body.SerializeToString(deterministic=True))
    one.core = Conductor(KEYS[A], History(network_id_of(one.manifest)), one.manifest, GRAPH)
    one.feed(m.Begin("submitted"))
    [over] = one.said(m.Over)
    assert "does not let" in over.reason
    assert not one.said(m.Append)


@pytest.mark.parametrize("code", ["BUSY", "NO_MEMORY"])
def test_a_host_that_says_no_is_tried_again_less_and_less_often(code: str) -> None:
    one = One(hosts=(B,))
    one.refuses[B] = common_pb2.RefusalCode.Value(f"REFUSAL_CODE_{code}")
    one.feed(m.Begin("submitted"))
    one.run(3600.0)
    assert len(one.entries()) < 80  # each try is an entry of the log
    one.refuses.clear()
    one.run(3600.0 + 1000.0)
    assert one.core.phase is Phase.READY


def test_a_log_that_takes_nothing_ends_the_lease_and_nothing_else() -> None:
    one = ready()
    assert one.core.holds(one.now)
    one.log_answers = False
    one.hosts = [A, C]
    one.feed(m.MemberGone(B, "has failed"))
    one.run(100.0)
    assert not one.core.holds(one.now)
    one.log_answers = True
    one.run(200.0)
    assert one.core.holds(one.now)
    assert one.core.phase is Phase.READY


def test_a_keepers_majority_that_is_gone_is_waited_for() -> None:
    one = ready(hosts=(A, D))
    one.log_answers = False
    keepers = one.core.history.keepers
    gone = [peer for peer in keepers if peer not in (A, D)][: len(keepers) // 2 + 1]
    for peer in gone:
        one.alive.remove(peer)
        one.feed(m.MemberGone(peer, "has failed"))
    one.run(300.0)
    assert one.core.phase is Phase.READY  # it hosts and serves meanwhile
    assert len(one.said(m.Beat)) > 400
    one.log_answers = True
    one.alive.append(gone[0])
    one.feed(m.MemberCame(gone[0]))
    one.run(400.0)
    assert len(one.entries()) == 2
    assert not {*gone[1:]} & {*one.entries()[-1].keepers}


def test_every_ask_is_answered_when_it_is_over() -> None:
    one = ready()
    one.log_answers = False
    one.feed(m.CutAsked(1), m.Resign(2))
    other = History(one.core.network_id)
    other.extend(one.core.history.entries)
    claim = new_claim_of(other, D, one.manifest, one.core.placement)
    one.feed(m.LogRead((claim,)))
    if one.core.phase is not Phase.OVER:  # an append was under way, and tells
        one.feed(m.Appended(claim))
    assert one.core.phase is Phase.OVER
    assert {answer.ask for answer in one.said(m.Answer)} == {1, 2}
    one.feed(m.CutAsked(3), m.FeederCame(4, B))
    assert one.said(m.Answer)[-1].ask == 3
    assert one.said(m.Tell)[-1].event.HasField("refused")


def new_claim_of(
    history: History, peer: str, signed: common_pb2.Signed, placement: Mapping[str, str]
) -> common_pb2.Signed:
    return new_claim(
        history,
        KEYS[peer],
        signed,
        placement=placement,
        keepers=history.keepers,
        reason="I want it",
    )
