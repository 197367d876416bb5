"""Standbys: who follows whom, who steps in, and what a host's death then costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from memory_wire import keypair_of
from small_network import SMALL, small_graph
from test_conductor_core import KEYS, A, B, C, D, One

from p2pnet.dht.manifest import network_id_of
from p2pnet.keys import ACCEPTANCE, LOG_ENTRY, MANIFEST
from p2pnet.log.history import History
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.conductor import IMPROVE_S, Conductor, Phase
from p2pnet.orchestrator.costs import HostView
from p2pnet.orchestrator.lost_states import APART_S, LostStates
from p2pnet.orchestrator.planning import Planning
from p2pnet.orchestrator.standbys import choose, left_of, promote
from p2pnet.orchestrator.training import CUT_RETRY_S
from p2pnet.v1 import common_pb2, log_pb2, orchestrator_pb2, pnode_pb2, records_pb2
from p2pnet.vnode.graph import CompiledGraph

GRAPH = small_graph(replicas=2, clip_norm=1.0, cut_every=10)
VNODES = GRAPH.vnodes()
FEEDER = 1
GIB = 1 << 30


def host(name: str, memory: int = GIB, group: str = "") -> HostView:
    return HostView(name, 2.0, memory, 20.0, ip_group=group)


# Who follows


def test_a_standby_is_on_another_host_and_in_another_neighbourhood_where_there_is_room() -> None:
    hosts = [host("a", group="x"), host("b", group="x"), host("c", group="y")]
    placed = dict.fromkeys(VNODES, "a")
    chosen = choose(GRAPH, hosts, placed, current={}, following={})
    assert chosen == dict.fromkeys(VNODES, ("c",))
    assert choose(GRAPH, hosts[:2], placed, current={}, following={}) == dict.fromkeys(
        VNODES, ("b",)
    )
    assert choose(GRAPH, hosts[:1], placed, current={}, following={}) == {}


def test_what_there_is_no_room_for_is_left_out() -> None:
    need = GRAPH.memory_bytes("fc1")
    hosts = [host("a"), host("b", memory=need)]
    chosen = choose(GRAPH, hosts, dict.fromkeys(VNODES, "a"), current={}, following={})
    assert list(chosen) == ["fc1"] or len(chosen) == 1
    # What follows there already is counted in what the host says is used.
    full = [host("a"), host("b", memory=0)]
    again = choose(GRAPH, full, dict.fromkeys(VNODES, "a"), current={}, following=chosen)
    assert again == chosen


def test_the_owners_limit_of_hosts_counts_standbys() -> None:
    hosts = [host(name) for name in "abc"]
    placed = {vnode: "ab"[at % 2] for at, vnode in enumerate(VNODES)}
    chosen = choose(GRAPH, hosts, placed, current={}, following={}, hosts_max=2)
    assert {*chosen} == {*VNODES}
    assert all(chosen[vnode] == ("ba"["ab".index(placed[vnode])],) for vnode in VNODES)


def test_a_whole_group_is_promoted_to_one_host_or_not_at_all() -> None:
    nodes = [dict(node, group="g") for node in _nodes() if node["id"] in ("fc1", "act")]
    graph = small_graph(replicas=3, nodes=[*nodes, *_nodes()[2:]])
    current = dict.fromkeys(graph.vnodes(), "a")
    standbys = dict.fromkeys(graph.vnodes(), ("b", "c"))
    assert promote(graph, current, standbys, {"b", "c"}) == dict.fromkeys(graph.vnodes(), "b")
    assert promote(graph, current, standbys, {"c"}) == dict.fromkeys(graph.vnodes(), "c")
    apart = standbys | {"fc1": ("b",), "act": ("c",)}
    assert promote(graph, current, apart, {"b", "c"}) is None
    assert promote(graph, current, apart, {"a"}) == current
    left = left_of(standbys, dict.fromkeys(graph.vnodes(), "b"), {"b", "c"})
    assert left == dict.fromkeys(graph.vnodes(), ("c",))


def _nodes() -> list[dict[str, Any]]:
    return [dict(node) for node in SMALL["nodes"]]


# The conductor


class Swarm(One):
    """`One` with the shipped planning, hosts that follow, and a feeder."""

    def __init__(
        self, hosts: Sequence[str] = (A, B, C), graph: CompiledGraph = GRAPH, **fields: Any
    ) -> None:
        super().__init__(hosts, **fields)
        self.manifest = self._manifest(graph)
        history = History(network_id_of(self.manifest))
        self.core = Conductor(KEYS[A], history, self.manifest, graph)
        self.planning = Planning(graph)
        self.vnodes = graph.vnodes()
        self.cannot_live: dict[str, None] = {}
        self.follows_not: dict[str, None] = {}
        self.lost_step = -1  # of which nobody finds the states
        self.stores, self.full = True, False
        self.decided_instead: common_pb2.Signed | None = (
            None  # what the next slot turns out to have
        )
        self.busy: dict[str, int] = {}  # with so many VNodes of others

    def _manifest(self, graph: CompiledGraph) -> common_pb2.Signed:
        body = records_pb2.Manifest.FromString(self.manifest.payload)
        body.spec_digest = graph.digest
        return keypair_of("owner").sign(MANIFEST, body.SerializeToString(deterministic=True))

    def answer(self, effect: m.Effect) -> m.Event | None:
        match effect:
            case m.MakePlan(_, _, exclude, probe):
                absent = tuple(peer for peer in probe if peer not in self.hosts)
                usable = [
                    replace(host(peer), vnodes=self.busy.get(peer, 0))
                    for peer in self.hosts
                    if peer not in exclude
                ]
                planned = self.planning.plan(effect, usable, self.now)
                return replace(planned, alive=tuple(self.alive), absent=absent)
            case m.Allocate(peer, request):
                if request.step == self.lost_step and not request.live_step:
                    code = common_pb2.REFUSAL_CODE_STATE_LOST
                    return m.NotAllocated(peer, request.epoch, "fc1 is nowhere to be had", code)
                if request.live_step and peer in self.cannot_live:
                    code = common_pb2.REFUSAL_CODE_FAILED
                    why = f"it cannot go on from step {request.live_step}"
                    return m.NotAllocated(peer, request.epoch, why, code)
                if peer in self.follows_not and not request.vnodes:
                    return m.NotAllocated(peer, request.epoch, "no", 0)
            case m.Beat(peer, request):
                rows = [
                    pnode_pb2.HostedVNode(vnode=vnode)
                    for vnode, at in self.core.placement.items()
                    if at == peer
                ]
                rows += [
                    pnode_pb2.HostedVNode(vnode=row.vnode, standby=True)
                    for row in self.core.locations()
                    if row.standby and row.host == peer and peer not in self.follows_not
                ]
                return m.Beaten(peer, request.epoch, tuple(rows))
            case m.Append() if self.decided_instead is not None:
                entry, self.decided_instead = self.decided_instead, None
                return m.Appended(_said_otherwise(entry))
            case m.Store(peer, epoch, step) if self.full:
                code = common_pb2.REFUSAL_CODE_NO_MEMORY
                return m.NotStored(peer, epoch, step, "no room on its disk", code)
            case m.Store() if not self.stores:
                return None
        return super().answer(effect)

    def agree(self, host: str, request: Any) -> list[common_pb2.Signed]:
        following: dict[str, list[str]] = {}
        for row in request.locations:
            if row.standby:
                following.setdefault(row.vnode, []).append(row.host)
        return [
            KEYS[host].sign(
                ACCEPTANCE,
                records_pb2.Allocation(
                    network_id=request.network_id,
                    vnode=vnode,
                    host=host,
                    epoch=request.epoch,
                    standbys=following.get(vnode, ()),
                ).SerializeToString(),
            )
            for vnode in request.vnodes
        ]

    def begin(self) -> None:
        self.feed(m.Begin("submitted"))
        assert self.core.phase is Phase.READY
        self.feed(m.FeederCame(FEEDER, D))

    def report(self, step: int, *, unfollowed: Sequence[str] = ()) -> None:
        """Every host reports the step."""
        by: dict[str, list[str]] = {}
        for vnode, peer in self.core.placement.items():
            by.setdefault(peer, []).append(vnode)
        for peer, vnodes in by.items():
            report = orchestrator_pb2.ReportRequest(vnode=vnodes[0], vnodes=vnodes)
            report.id.epoch, report.id.step = self.core.epoch, step
            report.held.squares.extend([0.25] * len(vnodes))
            report.held.unfollowed.extend(v for v in unfollowed if v in vnodes)
            report.held.samples = 4
            self.feed(m.ReportArrived(peer, report, 100))

    def steps(self, first: int, last: int, **said: Any) -> None:
        for step in range(first, last + 1):
            self.report(step, **said)

    def dies(self, peer: str) -> None:
        self.hosts.remove(peer)
        self.alive.remove(peer)
        self.feed(m.MemberGone(peer, "has failed"))

    def last_allocated(self) -> dict[str, pnode_pb2.AllocateRequest]:
        asked = [it for it in self.said(m.Allocate) if it.request.epoch == self.core.epoch]
        return {it.host: it.request for it in asked}

    def told(self, what: str) -> list[Any]:
        return [
            getattr(effect.event, what)
            for effect in self.said(m.Tell)
            if effect.event.HasField(what)
        ]


def _said_otherwise(signed: common_pb2.Signed) -> common_pb2.Signed:
    """A claim of the same epoch by the same orchestrator, which is not the same entry."""
    entry = log_pb2.LogEntry.FromString(signed.payload)
    entry.claim.reason = "another time"
    return KEYS[A].sign(LOG_ENTRY, entry.SerializeToString(deterministic=True))


def trained(steps: int = 5, **said: Any) -> Swarm:
    swarm = Swarm()
    swarm.begin()
    swarm.steps(1, steps, **said)
    return swarm


def primary(swarm: Swarm, *, but: str = A) -> str:
    """A host with VNodes other than the orchestrator's."""
    return next(peer for peer in swarm.core.placement.values() if peer != but)


def test_the_claim_says_who_follows_and_each_host_is_asked_for_it() -> None:
    swarm = Swarm()
    swarm.begin()
    standbys = swarm.core.history.standbys
    assert sorted(standbys) == sorted(VNODES)
    for vnode, peers in standbys.items():
        assert len(peers) == 1
        assert swarm.core.placement[vnode] not in peers
    for peer, request in swarm.last_allocated().items():
        assert sorted(request.standbys) == sorted(v for v in VNODES if peer in standbys[v])
        assert not request.live_step
        assert [row.vnode for row in request.locations if row.standby] == sorted(VNODES)


def test_a_dead_hosts_vnodes_go_on_where_they_were_followed() -> None:
    swarm = trained(5)
    gone = primary(swarm)
    before, standbys = dict(swarm.core.placement), dict(swarm.core.history.standbys)
    swarm.dies(gone)
    assert swarm.core.phase is Phase.READY
    for vnode in VNODES:
        host = standbys[vnode][0] if before[vnode] == gone else before[vnode]
        assert swarm.core.placement[vnode] == host
    for request in swarm.last_allocated().values():
        assert (request.step, request.live_step) == (0, 5)
        assert list(request.norms) == [pytest.approx((0.25 * len(VNODES)) ** 0.5)]
    ready = swarm.told("ready")[-1]
    assert (ready.step, ready.live_step, ready.epoch) == (0, 5, swarm.core.epoch)
    assert list(ready.norms) == list(swarm.last_allocated()[A].norms)
    # What was decided is not done again, is made safe at once, and goes on.
    assert swarm.core.committed_step == 5
    swarm.report(6)
    assert [decided.step for decided in swarm.told("decided")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("why", ["reported", "standby dead", "no heartbeat row", "leaving"])
def test_a_vnode_that_was_not_followed_at_every_step_is_never_promoted(why: str) -> None:
    """Its standby lacks a step that counts: what it holds is another network's state."""
    swarm = trained(4)
    gone = primary(swarm)
    mine = [vnode for vnode in VNODES if swarm.core.placement[vnode] == gone]
    [standby] = swarm.core.history.standbys[mine[0]]
    if why == "reported":  # once is enough, though it followed later steps
        swarm.report(5, unfollowed=mine[:1])
        swarm.steps(6, 7)
    elif why == "standby dead":
        swarm.hosts.remove(standby)
    elif why == "no heartbeat row":
        swarm.follows_not[standby] = None
        swarm.run(swarm.now + 2.0)
    else:
        swarm.feed(m.HostLeaves(7, standby))
    swarm.dies(gone)
    swarm.run(swarm.now + 10.0)
    assert not any(it.request.live_step for it in swarm.said(m.Allocate))
    if why != "leaving":  # which is a move, with a cut before
        assert swarm.told("ready")[-1].step == 0


def test_nothing_stops_for_a_dead_standby_and_another_is_found_when_there_is_time() -> None:
    swarm = Swarm((A, B))
    swarm.planning = Planning(GRAPH)
    swarm.begin()
    swarm.steps(1, 3)
    only = [B] if B not in swarm.core.placement.values() else []
    if not only:  # both host: then C follows something in a swarm of three
        swarm = trained(3)
    epoch = swarm.core.epoch
    followed = [v for v in VNODES if D in swarm.core.history.standbys.get(v, ())]
    assert not followed
    report_vnode = VNODES[0]
    swarm.report(4, unfollowed=[report_vnode])
    assert swarm.core.epoch == epoch
    assert [note for note in swarm.said(m.Note) if note.event == "unfollowed"]
    swarm.run(swarm.now + IMPROVE_S + 5.0)
    assert swarm.core.epoch == epoch + 1
    assert swarm.core.committed_step == 4  # in good order: nothing is done again
    assert not any(it.request.live_step for it in swarm.said(m.Allocate))
    swarm.report(5)
    swarm.dies(primary(swarm))
    assert swarm.told("ready")[-1].live_step == 5


def test_a_host_that_cannot_go_on_sends_all_back_to_the_cut_and_is_not_blamed() -> None:
    swarm = trained(5)
    gone = primary(swarm)
    left = next(peer for peer in swarm.hosts if peer not in (gone, A))
    swarm.cannot_live[left] = None
    swarm.dies(gone)
    swarm.run(swarm.now + 2.0)
    assert swarm.core.phase is Phase.READY
    tries = [(it.request.epoch, it.request.live_step) for it in swarm.said(m.Allocate)]
    assert (2, 5) in tries
    assert {live for epoch, live in tries if epoch == 3} == {0}
    ready = swarm.told("ready")[-1]
    assert (ready.step, ready.live_step) == (0, 0)
    assert left in swarm.core.placement.values()
    swarm.report(1)
    assert swarm.told("decided")[-1].step == 1


def test_a_standby_that_does_not_agree_is_done_without() -> None:
    swarm = Swarm((A, B, C))
    swarm.busy[C] = 1000
    swarm.follows_not[C] = None
    swarm.begin()
    assert C not in swarm.core.placement.values()
    assert C in swarm.last_allocated()
    assert swarm.core.epoch == 1
    swarm.steps(1, 2)
    followed = [v for v in VNODES if swarm.core.history.standbys[v] != (C,)]
    assert followed  # by A or B
    swarm.dies(B)
    assert not any(it.request.live_step for it in swarm.said(m.Allocate))


def test_another_orchestrator_goes_on_from_the_cut() -> None:
    swarm = trained(5)
    other = Conductor(KEYS[B], swarm.core.history.copy(), swarm.manifest, GRAPH)
    gone = A
    swarm.core, swarm.done = other, []
    swarm.hosts.remove(gone)
    swarm.feed(m.Begin("its orchestrator has failed", epoch=1))
    assert swarm.core.phase is Phase.READY
    assert not any(it.request.live_step for it in swarm.said(m.Allocate))


def test_a_feeder_that_comes_meanwhile_waits_until_what_it_did_not_hear_is_safe() -> None:
    swarm = trained(5)
    swarm.stores = False
    swarm.feed(m.FeederLeft(FEEDER))
    swarm.dies(primary(swarm))
    assert swarm.last_allocated()[A].live_step == 5
    swarm.feed(m.FeederCame(2, D))
    assert len(swarm.told("ready")) == 1
    swarm.stores = True
    for store in [it for it in swarm.said(m.Store) if it.epoch == swarm.core.epoch]:
        event = swarm.answer(store)
        assert event is not None
        swarm.feed(event)
    ready = swarm.told("ready")[-1]
    assert (ready.step, ready.live_step) == (5, 0)


def test_a_feeder_that_comes_before_all_have_agreed_waits_likewise() -> None:
    swarm = trained(5)
    swarm.log_answers = False
    swarm.dies(primary(swarm))
    swarm.feed(m.FeederLeft(FEEDER), m.FeederCame(2, D))
    swarm.log_answers = True
    swarm.run(swarm.now + 30.0)
    assert 5 in [it.request.live_step for it in swarm.said(m.Allocate)]
    ready = swarm.told("ready")
    assert [(it.step, it.live_step) for it in ready] == [(0, 0), (5, 0)]


def test_whoever_fed_all_the_time_is_told_each_result_once() -> None:
    swarm = trained(12)
    assert swarm.core.committed_step == 10
    swarm.dies(primary(swarm))
    assert swarm.told("ready")[-1].live_step == 12
    assert [decided.step for decided in swarm.told("decided")] == [*range(1, 13)]


def test_a_claim_of_ours_in_between_ends_the_way_on_in_memory() -> None:
    """Hosts may have agreed to that one, under which they then had another step in memory."""
    swarm = trained(5)
    swarm.log_answers = False
    swarm.dies(primary(swarm))
    given_up = swarm.said(m.Append)[-1].entry
    swarm.log_answers = True
    swarm.decided_instead = given_up
    swarm.run(swarm.now + 30.0)
    assert swarm.core.phase is Phase.READY
    assert swarm.core.epoch == 3
    assert not any(it.request.live_step for it in swarm.said(m.Allocate))


# States that are lost


def cut_at(swarm: Swarm, steps: int, committed: int) -> None:
    swarm.steps(swarm.core.committed_step + 1, steps)
    assert swarm.core.committed_step == committed


def test_lost_states_cost_one_commit_and_that_is_said_aloud() -> None:
    swarm = Swarm()
    swarm.begin()
    cut_at(swarm, 10, 10)
    cut_at(swarm, 20, 20)
    swarm.lost_step = 20
    swarm.dies(primary(swarm))
    swarm.run(swarm.now + 5.0)
    assert swarm.core.committed_step == 20  # they may be back in a moment
    swarm.run(swarm.now + 10.0)
    rolled = [note for note in swarm.said(m.Note) if note.event == "rolled_back"]
    assert [note.fields["step"] for note in rolled] == [10]
    assert "fc1 is nowhere to be had" in str(rolled[0].fields["reason"])
    assert [it.step for it in swarm.told("committed")] == [10, 20]  # that was no commit
    assert swarm.core.committed_step == 10
    assert swarm.entries()[-1].claim.from_step == 10
    swarm.lost_step = -1
    assert swarm.core.phase is Phase.READY
    assert "back to step 10" in swarm.core.detail
    assert swarm.told("ready")[-1].step == 10
    cut_at(swarm, 20, 20)  # done again
    assert "back to" not in swarm.core.detail


def test_with_nothing_to_go_back_to_the_network_says_so_and_waits_for_a_holder() -> None:
    swarm = Swarm()
    swarm.begin()
    swarm.lost_step = 0
    swarm.dies(primary(swarm))
    swarm.run(swarm.now + 600.0)
    assert swarm.core.state == "lost"
    assert "fc1" in swarm.core.detail
    assert swarm.told("refused")
    assert len(swarm.entries()) < 6  # and it does not go on claiming
    swarm.feed(m.FeederCame(2, D))
    assert len(swarm.told("refused")) == 2


def test_states_that_are_back_in_time_cost_nothing() -> None:
    swarm = Swarm()
    swarm.begin()
    cut_at(swarm, 10, 10)
    cut_at(swarm, 20, 20)
    swarm.lost_step = 20
    swarm.dies(primary(swarm))
    swarm.run(swarm.now + 5.0)
    swarm.lost_step = -1
    swarm.run(swarm.now + 10.0)
    assert swarm.core.phase is Phase.READY
    assert swarm.told("ready")[-1].step == 20
    assert not any(entry.claim.from_step for entry in swarm.entries())


# Disks


def test_full_disks_cost_no_step_and_are_said_aloud() -> None:
    swarm = trained(9)
    swarm.full = True
    swarm.steps(10, 25)
    assert swarm.core.epoch == 1  # nothing begins anew for that
    assert [it.step for it in swarm.told("decided")][-1] == 25
    assert swarm.core.state == "uncommitted"
    assert "no room on its disk" in swarm.core.detail
    assert len(swarm.told("uncommitted")) == 1
    tried = len(swarm.said(m.Store))
    swarm.run(swarm.now + 1.5 * CUT_RETRY_S)
    assert len(swarm.said(m.Store)) > tried  # now and then
    swarm.full = False
    swarm.run(swarm.now + 1.5 * CUT_RETRY_S)
    assert swarm.core.committed_step == 25
    assert swarm.core.state == "training"


# Networks that do not wait for decisions


def local() -> Swarm:
    graph = small_graph(learning="local", cut_every=4)
    swarm = Swarm(graph=graph)
    swarm.begin()
    return swarm


def test_a_local_network_goes_back_to_its_last_cut_when_its_feeder_is_gone() -> None:
    swarm = local()
    swarm.steps(1, 6)
    assert swarm.core.committed_step == 4
    swarm.feed(m.FeederLeft(FEEDER))
    assert swarm.core.phase is Phase.READY
    assert (swarm.core.epoch, swarm.core.committed_step) == (2, 4)
    swarm.feed(m.FeederCame(2, D))
    ready = swarm.told("ready")[-1]
    assert (ready.epoch, ready.step) == (2, 4)
    swarm.steps(5, 8)
    assert swarm.core.committed_step == 8


def test_a_local_cut_that_is_on_its_way_is_waited_for() -> None:
    swarm = local()
    swarm.stores = False
    swarm.steps(1, 5)
    swarm.feed(m.FeederLeft(FEEDER), m.FeederCame(2, D))
    assert len(swarm.told("ready")) == 1
    swarm.stores = True
    for store in swarm.said(m.Store):
        event = swarm.answer(store)
        assert event is not None
        swarm.feed(event)
    assert (swarm.core.epoch, swarm.core.committed_step) == (2, 4)
    assert swarm.told("ready")[-1].step == 4


def test_a_local_network_moves_at_its_next_cut_and_not_before() -> None:
    swarm = local()
    swarm.steps(1, 5)
    leaver = primary(swarm)
    swarm.hosts.append(D)
    swarm.feed(m.HostLeaves(7, leaver))
    assert swarm.core.epoch == 1
    swarm.steps(6, 8)
    assert (swarm.core.epoch, swarm.core.committed_step) == (2, 8)
    assert leaver not in swarm.core.placement.values()
    swarm.steps(9, 9)
    assert swarm.told("decided")[-1].step == 9


def test_states_are_given_up_after_two_tries_some_time_apart() -> None:
    lost = LostStates()
    lost.said(20, 3, "fc1", 100.0)
    assert lost.wait_s(20, 100.0) == APART_S
    assert not lost.certain(20, 100.0 + APART_S)  # one try, however long ago
    lost.said(20, 4, "fc1", 101.0)
    assert not lost.certain(20, 101.0)
    assert lost.certain(20, 100.0 + APART_S)
    assert not lost.certain(30, 100.0 + APART_S)
    assert lost.wait_s(20, 100.0 + APART_S) == 0.0
    lost.said(30, 5, "fc1", 200.0)  # of another commit: all begins anew
    assert not lost.certain(20, 300.0)
    assert not lost.certain(30, 300.0)
