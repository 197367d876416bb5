"""What a host agrees to, under whose claim, and what it still knows after a restart."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from claims import Log
from memory_wire import keypair_of
from small_network import small_graph

from p2pnet import keys
from p2pnet.core import Tick
from p2pnet.errors import LocalError
from p2pnet.v1 import common_pb2, log_pb2, pnode_pb2, records_pb2
from p2pnet.vnode import standing
from p2pnet.vnode.admission import Limits
from p2pnet.vnode.follower import WAITING_MAX
from p2pnet.vnode.standing import unseal_standing
from p2pnet.vnode.tenancy import (
    HEARD_MAX,
    LOOK_AGAIN_S,
    ORPHANED_S,
    QUIET_S,
    READS_MAX,
    READY_WAITS_S,
    WAITS_S,
    Tenancy,
)
from p2pnet.vnode.tenancy_events import (
    AllocateAsked,
    Begin,
    ClaimShown,
    Drain,
    DropAsked,
    Effect,
    End,
    Event,
    HeartbeatCame,
    LogRead,
    LogSilent,
    NotPersisted,
    Persist,
    ReadLog,
    ReadyAsked,
    Reply,
)

GRAPH = small_graph()
VNODES = GRAPH.vnodes()
ME = "host"
WALL_MS = 1_000_000
SIZE_BYTES = sum(GRAPH.memory_bytes(vnode) for vnode in VNODES)
HERE = dict.fromkeys(VNODES, ME)
AWAY = dict.fromkeys(VNODES, "other")


def limits(**changes: Any) -> Limits:
    fields: dict[str, Any] = {"me": keypair_of(ME).peer_id, "memory_bytes": 2 * SIZE_BYTES}
    return Limits(**(fields | changes))


def request_for(log: Log, claim: common_pb2.Signed, /, **changes: Any) -> pnode_pb2.AllocateRequest:
    entry = log_pb2.LogEntry.FromString(claim.payload)
    hosts, placement = list(entry.claim.hosts), entry.claim.placement
    me = keypair_of(ME).peer_id
    fields: dict[str, Any] = {
        "network_id": log.network_id,
        "epoch": entry.claim.epoch,
        "manifest": log.manifest,
        "graph": log.graph.to_json(),
        "vnodes": [vnode for vnode in log.graph.vnodes() if hosts[placement[vnode]] == me],
        "lease_s": 10,
        "claim": claim,
    }
    return pnode_pb2.AllocateRequest(**(fields | changes))


class Rig:
    """A tenancy whose log reads are answered from logs in hand, when the test says."""

    def __init__(self, *logs: Log, **changes: Any) -> None:
        self.limits = limits(**changes)
        self.core = Tenancy(self.limits)
        self.logs = {log.network_id: log for log in logs}
        self.now = 100.0
        self.disk: dict[str, bytes] = {}
        self.reads: list[ReadLog] = []
        self.replies: dict[int, common_pb2.Refusal | None] = {}
        self.effects: list[Effect] = []
        self._asks = 0

    def do(self, event: Event) -> list[Effect]:
        effects = self.core.handle(event, self.now)
        self.core.check()
        for effect in effects:
            if isinstance(effect, Persist):
                if effect.data is None:
                    self.disk.pop(effect.network_id)
                else:
                    self.disk[effect.network_id] = effect.data
            elif isinstance(effect, ReadLog):
                self.reads.append(effect)
            elif isinstance(effect, Reply):
                assert effect.ask not in self.replies, "answered twice"
                self.replies[effect.ask] = effect.refusal
        assert self.core.dump() == self.disk
        self.effects += effects
        return effects

    def answer_reads(self) -> None:
        while self.reads:
            read = self.reads.pop(0)
            entries = self.logs[read.network_id].entries[read.from_slot - 1 :]
            self.do(LogRead(read.network_id, entries))

    def ask(self, make: Callable[[int], Event]) -> int:
        self._asks += 1
        self.do(make(self._asks))
        return self._asks

    def allocate(
        self, log: Log, claim: common_pb2.Signed, /, by: str = "boss", **changes: Any
    ) -> int:
        request = request_for(log, claim, **changes)
        return self.ask(lambda ask: AllocateAsked(ask, keypair_of(by).peer_id, request, WALL_MS))

    def code(self, ask: int) -> str:
        """The answer: "" for yes."""
        self.answer_reads()
        refusal = self.replies[ask]
        if refusal is None:
            return ""
        assert refusal.detail
        return common_pb2.RefusalCode.Name(refusal.code).removeprefix("REFUSAL_CODE_")

    def restart(self) -> None:
        self.core = Tenancy.load(self.limits, self.disk)
        self.reads.clear()
        self.core.check()

    def hosted(self) -> list[tuple[str, int]]:
        return [(it.claimant, it.epoch) for it in self.core.tenants()]


def test_a_decided_claim_is_followed_and_on_disk_before_the_answer() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    ask = rig.allocate(log, log.claim("boss", HERE))
    claim = log.entries[0]
    assert rig.reads == [ReadLog(log.network_id, log.manifest, 1, (), claim)]
    assert rig.reads[0].at_least == 1
    assert not rig.replies, "answered before the log was asked"
    rig.answer_reads()
    assert [type(effect) for effect in rig.effects] == [ReadLog, Persist, Begin, Reply]
    assert rig.code(ask) == ""
    assert rig.hosted() == [(keypair_of("boss").peer_id, 1)]
    assert rig.core.refuse(log.network_id, 1, "fc1", rig.now) is None


def signed_again(
    claim: common_pb2.Signed, by: str, change: Callable[[log_pb2.LogEntry], None]
) -> common_pb2.Signed:
    entry = log_pb2.LogEntry.FromString(claim.payload)
    change(entry)
    return keypair_of(by).sign(keys.LOG_ENTRY, entry.SerializeToString(deterministic=True))


def renumbered(claim: common_pb2.Signed, epoch: int) -> common_pb2.Signed:
    def change(entry: log_pb2.LogEntry) -> None:
        entry.claim.epoch = epoch

    return signed_again(claim, "boss", change)


OTHER = Log(small_graph(name="other"))
OTHER_CLAIM = OTHER.claim("boss", HERE)

# What is changed of a request that would be agreed to, and the answer.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another network's id": ({"network_id": "0" * 32}, "BAD_REQUEST"),
    "another graph": ({"graph": small_graph(seed=9).to_json()}, "BAD_REQUEST"),
    "no graph": ({"graph": b"{}"}, "BAD_REQUEST"),
    "no VNodes": ({"vnodes": []}, "BAD_REQUEST"),
    "an unknown VNode": ({"vnodes": [*VNODES, "fc9"]}, "BAD_REQUEST"),
    "a VNode twice": ({"vnodes": [*VNODES, VNODES[0]]}, "BAD_REQUEST"),
    "fewer VNodes than the claim says": ({"vnodes": VNODES[1:]}, "BAD_REQUEST"),
    "no lease": ({"lease_s": 0}, "BAD_REQUEST"),
    "a lease for ever": ({"lease_s": 10**6}, "BAD_REQUEST"),
    "another epoch than the claim's": ({"epoch": 2}, "BAD_REQUEST"),
    "no claim": ({"claim": common_pb2.Signed()}, "BAD_REQUEST"),
    "another network's claim": ({"claim": OTHER_CLAIM}, "BAD_REQUEST"),
    "another network's manifest": ({"manifest": OTHER.manifest}, "BAD_REQUEST"),
    "somebody else's claim": ({"by": "rival"}, "BAD_REQUEST"),
    "a claim without a grant": ({"by": "stranger"}, "NOT_GRANTED"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_allocation_that_does_not_fit_together_is_refused_unread(what: str) -> None:
    log = Log(GRAPH, ["boss", "rival"])
    changes, expected = REFUSED[what]
    rig = Rig(log)
    claim = log.claim("boss", HERE)
    assert rig.code(rig.allocate(log, claim, **changes)) == expected
    assert not rig.effects[:-1], "more than an answer"


def unsigned(signed: common_pb2.Signed) -> common_pb2.Signed:
    forged = common_pb2.Signed()
    forged.CopyFrom(signed)
    forged.signature = bytes(64)
    return forged


@pytest.mark.parametrize("what", ["manifest", "claim"])
def test_what_is_not_signed_is_refused(what: str) -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    claim = log.claim("boss", HERE)
    changes: dict[str, Any] = {what: unsigned(log.manifest if what == "manifest" else claim)}
    assert rig.code(rig.allocate(log, claim, **changes)) == "BAD_REQUEST"


def test_a_commit_is_no_claim() -> None:
    log = Log(GRAPH)
    claim = log.claim("boss", HERE)
    rig = Rig(log)
    assert rig.code(rig.allocate(log, claim, claim=log.commit("boss", 5))) == "BAD_REQUEST"


@pytest.mark.parametrize(
    ("of_host", "of_manifest", "expected"),
    [
        pytest.param({"hosts": False}, {}, "NOT_GRANTED", id="hosts nothing"),
        pytest.param({}, {"state_url": "file:///home"}, "NOT_GRANTED", id="another state"),
        pytest.param({"state_url": "file:///home"}, {"state_url": "file:///home"}, "", id="state"),
        pytest.param({"state_url": "file:///home"}, {}, "", id="state on peers"),
        pytest.param({"serves": lambda n, o: "not ours"}, {}, "NOT_IN_SERVICE", id="service"),
        pytest.param({"memory_bytes": SIZE_BYTES - 1}, {}, "NO_MEMORY", id="full"),
        pytest.param({"memory_bytes": SIZE_BYTES}, {}, "", id="just fits"),
        pytest.param(
            {}, {"limits": records_pb2.Limits(expires_at_ms=WALL_MS - 1)}, "NOT_GRANTED", id="over"
        ),
        pytest.param({}, {"limits": records_pb2.Limits(expires_at_ms=WALL_MS)}, "", id="in time"),
        pytest.param({}, {"limits": records_pb2.Limits(hosts_max=1)}, "", id="one host"),
    ],
)
def test_what_a_host_lends_and_to_whom(
    of_host: dict[str, Any], of_manifest: dict[str, Any], expected: str
) -> None:
    log = Log(GRAPH, **of_manifest)
    rig = Rig(log, **of_host)
    assert rig.code(rig.allocate(log, log.claim("boss", HERE))) == expected


def test_more_hosts_than_the_owner_allows() -> None:
    log = Log(GRAPH, limits=records_pb2.Limits(hosts_max=1))
    rig = Rig(log)
    claim = log.proposal("boss", HERE | {"out": "other"})
    assert rig.code(rig.allocate(log, claim)) == "NOT_GRANTED"


def test_a_host_that_leaves_takes_nothing_new() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    first = log.claim("boss", HERE)
    assert rig.code(rig.allocate(log, first)) == ""
    rig.do(Drain())
    assert rig.code(rig.allocate(log, first)) == "", "what is here already stays"
    assert rig.code(rig.allocate(OTHER, OTHER_CLAIM)) == "DRAINING"
    ready = pnode_pb2.ReadyRequest(
        network_id=OTHER.network_id,
        manifest=OTHER.manifest,
        graph=OTHER.graph.to_json(),
        vnodes=VNODES,
    )
    asked = rig.ask(lambda ask: ReadyAsked(ask, keypair_of("boss").peer_id, ready, WALL_MS))
    assert rig.code(asked) == "DRAINING"


def test_getting_ready_asks_for_room_and_a_grant_only() -> None:
    log = Log(GRAPH, ["boss"])
    rig = Rig(log)

    def ready(by: str, **changes: Any) -> str:
        fields: dict[str, Any] = {
            "network_id": log.network_id,
            "manifest": log.manifest,
            "graph": GRAPH.to_json(),
            "vnodes": VNODES,
        }
        request = pnode_pb2.ReadyRequest(**(fields | changes))
        return rig.code(
            rig.ask(lambda ask: ReadyAsked(ask, keypair_of(by).peer_id, request, WALL_MS))
        )

    assert ready("boss") == ""
    assert ready("stranger") == "NOT_GRANTED"
    assert ready("boss", vnodes=["fc9"]) == "BAD_REQUEST"
    rig.limits = limits(memory_bytes=SIZE_BYTES - 1)
    rig.restart()
    assert ready("boss") == "NO_MEMORY"


# The log


def test_a_claim_that_the_log_does_not_have() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    claim = log.proposal("boss", HERE)  # and never decided
    assert rig.code(rig.allocate(log, claim)) == "UNKNOWN_EPOCH"
    assert not rig.disk
    log.add(claim)
    assert rig.code(rig.allocate(log, claim)) == ""
    # an epoch that jumps, in the slot that is next, in one that is taken, far away
    jump = renumbered(log.proposal("boss", HERE), 7)
    assert rig.code(rig.allocate(log, jump)) == "UNKNOWN_EPOCH"
    assert rig.code(rig.allocate(log, renumbered(claim, 7))) == "UNKNOWN_EPOCH"
    assert rig.hosted() == [(keypair_of("boss").peer_id, 1)], "it lives on"
    assert rig.core.refuse(log.network_id, 7, "fc1", rig.now).code == (  # type: ignore[union-attr]
        common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH
    )


def test_the_loser_of_a_race_for_an_epoch() -> None:
    log = Log(GRAPH)
    lost = log.proposal("rival", HERE)
    rig = Rig(log)
    won = log.claim("boss", HERE)
    assert rig.code(rig.allocate(log, lost, "rival")) == "STALE_EPOCH"
    assert not rig.core.tenants()
    assert rig.code(rig.allocate(log, won)) == ""
    assert rig.code(rig.allocate(log, lost, "rival")) == "STALE_EPOCH"
    assert rig.hosted() == [(keypair_of("boss").peer_id, 1)]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_replayed_claim(restarts: bool) -> None:
    log = Log(GRAPH)
    first = log.claim("rival", HERE)
    log.commit("rival", 5)
    second = log.claim("boss", HERE)
    rig = Rig(log)
    assert rig.code(rig.allocate(log, second)) == ""
    if restarts:
        rig.restart()
        rig.logs.clear()  # nobody is asked
    ask = rig.allocate(log, first, "rival")
    assert rig.code(ask) == "STALE_EPOCH"
    refusal = rig.replies[ask]
    assert refusal is not None
    assert refusal.epoch == 2


def test_vnodes_are_not_restored_by_a_restart() -> None:
    log = Log(GRAPH)
    claim = log.claim("boss", HERE)
    rig = Rig(log)
    assert rig.code(rig.allocate(log, claim)) == ""
    rig.restart()
    # A copy of the request that comes late would begin from the wrong step.
    assert rig.code(rig.allocate(log, claim)) == "FAILED"
    assert rig.code(rig.allocate(log, log.claim("boss", HERE))) == ""
    assert rig.hosted() == [(keypair_of("boss").peer_id, 2)]


def test_who_was_a_host_knows_the_network_after_a_restart() -> None:
    log = Log(GRAPH)
    claim = log.claim("boss", HERE)
    rig = Rig(log)
    assert rig.core.claims() == []
    assert rig.code(rig.allocate(log, claim)) == ""
    assert rig.core.claims() == [(claim, False)]
    rig.restart()
    assert rig.core.claims() == [(claim, False)]
    assert called(rig, log, 0) == ("STALE_EPOCH", 1, keypair_of(ME).peer_id)
    assert rig.core.dump() == rig.disk
    # and until a newer claim puts all of it elsewhere
    newer = log.claim("rival", AWAY)
    shown = rig.ask(lambda ask: ClaimShown(ask, keypair_of("rival").peer_id, log.network_id, newer))
    assert rig.code(shown) == ""
    assert rig.core.claims() == []
    rig.restart()
    assert rig.core.claims() == []
    assert called(rig, log, 1) == ("STALE_EPOCH", 2, keypair_of("other").peer_id)


def test_a_very_large_claim_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "NEWEST_BYTES_MAX", 100)
    log = Log(GRAPH)
    rig = Rig(log)
    assert rig.code(rig.allocate(log, log.claim("boss", HERE))) == ""
    rig.restart()
    assert rig.core.claims() == []
    assert rig.code(rig.allocate(log, log.entries[0])) == "FAILED", "but it is known"


def test_a_kept_claim_that_is_another_is_damage() -> None:
    log = Log(GRAPH)
    claim, other = log.claim("boss", HERE), log.claim("boss", HERE)
    rig = Rig(log)
    assert rig.code(rig.allocate(log, other)) == ""
    known = rig.core.standing(log.network_id)
    assert known is not None
    assert unseal_standing(log.network_id, known.seal(other))[0] == known
    for wrong in (claim, common_pb2.Signed(payload=b"x")):
        with pytest.raises(LocalError):
            unseal_standing(log.network_id, known.seal(wrong))


def test_only_what_is_new_of_a_log_is_read() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    assert rig.code(rig.allocate(log, log.claim("boss", HERE))) == ""
    for step in range(1, 20):
        log.commit("boss", step)
    for restarts in (False, True):
        if restarts:
            rig.restart()
        before = len(log.entries)
        claim = log.claim("boss", HERE)
        ask = rig.allocate(log, claim)
        (read,) = rig.reads
        assert read.from_slot == (2 if not restarts else before + 1)
        assert rig.code(ask) == ""


def test_what_is_damaged_on_disk_is_no_knowledge() -> None:
    log = Log(GRAPH)
    first = log.claim("rival", HERE)
    second = log.claim("boss", HERE)
    rig = Rig(log)
    assert rig.code(rig.allocate(log, second)) == ""
    data = rig.disk.pop(log.network_id)
    for damaged in (b"", data[:-1], bytes([data[-1] ^ 1]) + data[1:]):
        core = Tenancy.load(rig.limits, {log.network_id: damaged, "nonsense": data})
        assert not core.dump()
    rig.restart()
    assert rig.code(rig.allocate(log, first, "rival")) == "STALE_EPOCH", "the log tells"


def test_a_log_that_is_silent_or_lies() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    claim = log.claim("boss", HERE)
    for event in (
        LogSilent(log.network_id, "no majority"),
        LogRead(log.network_id, (unsigned(claim),)),
        LogRead(log.network_id, (OTHER_CLAIM,)),
        LogRead(log.network_id, (log.proposal("boss", HERE),)),  # a gap
    ):
        ask = rig.allocate(log, claim)
        rig.reads.clear()
        rig.do(event)
        assert rig.code(ask) == "BUSY"
    assert rig.code(rig.allocate(log, claim)) == ""
    rig.do(LogRead(log.network_id, ()))  # nobody asked
    rig.do(LogRead("0" * 32, ()))


def test_a_network_that_its_owner_has_ended() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    claim = log.claim("boss", HERE)
    assert rig.code(rig.allocate(log, claim)) == ""
    later = log.proposal("boss", HERE)
    log.close("boss")
    assert rig.code(rig.allocate(log, later)) == "CLOSED"
    assert not rig.core.tenants()
    assert End(log.network_id, VNODES) in rig.effects
    rig.restart()
    assert rig.code(rig.allocate(log, claim)) == "CLOSED"
    assert rig.core.refuse(log.network_id, 1, "fc1", rig.now).code == (  # type: ignore[union-attr]
        common_pb2.REFUSAL_CODE_CLOSED
    )


# A long log


def partly(rig: Rig, log: Log, entries: int) -> None:
    """The next of them come in, and there are more."""
    read = rig.reads[0]
    known = rig.core.standing(log.network_id)
    assert known is not None
    rig.do(LogRead(read.network_id, log.entries[known.slot : known.slot + entries], more=True))


def grown(claims: int = 3, commits: int = 4) -> tuple[Log, list[common_pb2.Signed]]:
    log = Log(GRAPH)
    said = []
    for number in range(claims):
        said.append(log.claim("boss", HERE))
        for step in range(1, commits + 1):
            log.commit("boss", number * commits + step)
    return log, said


def test_a_log_that_comes_in_parts_is_known_when_all_is_there() -> None:
    log, (old, _, newest) = grown()
    rig = Rig(log)
    ask = rig.allocate(log, newest)
    partly(rig, log, 3)
    # What was newest in a part of it is not believed.
    replayed = rig.allocate(log, old)
    shown = rig.ask(lambda ask: ClaimShown(ask, keypair_of("boss").peer_id, log.network_id, old))
    partly(rig, log, 10)
    assert not rig.replies
    read = rig.reads.pop()
    rig.do(LogRead(read.network_id, log.entries[13:]))
    assert rig.code(ask) == ""
    assert rig.code(replayed) == "STALE_EPOCH"
    assert rig.code(shown) == "", "he is the newest claimant, too"
    assert rig.hosted() == [(keypair_of("boss").peer_id, 3)]


def test_a_replay_while_a_part_is_known_and_the_read_breaks_off() -> None:
    log, (old, _, newest) = grown()
    rig = Rig(log)
    ask = rig.allocate(log, newest)
    partly(rig, log, 3)
    rig.reads.clear()
    rig.do(LogSilent(log.network_id, "no majority"))
    assert rig.code(ask) == "BUSY"
    ask = rig.allocate(log, old)
    assert [read.from_slot for read in rig.reads] == [4], "it goes on from there"
    assert rig.code(ask) == "STALE_EPOCH"


def test_who_asks_is_not_kept_waiting_for_a_long_log_and_the_read_goes_on() -> None:
    log, (_, _, newest) = grown()
    rig = Rig(log)
    first = rig.allocate(log, newest)
    assert rig.core.deadline() == rig.now + WAITS_S
    rig.now += WAITS_S - 0.1
    second = rig.allocate(log, newest)
    assert rig.do(Tick()) == []
    rig.now += 0.1
    rig.do(Tick())
    assert [rig.replies[first].code, second in rig.replies] == [  # type: ignore[union-attr]
        common_pb2.REFUSAL_CODE_BUSY,
        False,
    ]
    rig.now += WAITS_S
    rig.do(Tick())
    assert rig.replies[second].code == common_pb2.REFUSAL_CODE_BUSY  # type: ignore[union-attr]
    assert rig.core.deadline() is None
    assert len(rig.reads) == 1
    rig.answer_reads()  # and nobody waits
    ask = rig.allocate(log, newest)
    assert [read.from_slot for read in rig.reads] == [len(log.entries) + 1]
    assert rig.code(ask) == ""


def test_what_was_heard_of_networks_that_never_lived_here_is_bounded() -> None:
    logs = [Log(small_graph(seed=seed)) for seed in range(HEARD_MAX + 1)]
    rig = Rig(*logs)
    for log in logs:
        log.claim("boss", HERE)
        assert rig.code(rig.allocate(log, renumbered(log.entries[0], 2))) == "UNKNOWN_EPOCH"
    known = [rig.core.standing(log.network_id) is not None for log in logs]
    assert known == [False] + [True] * HEARD_MAX
    assert not rig.disk


def ready_for(log: Log) -> pnode_pb2.ReadyRequest:
    return pnode_pb2.ReadyRequest(
        network_id=log.network_id,
        manifest=log.manifest,
        graph=log.graph.to_json(),
        vnodes=log.graph.vnodes(),
    )


@pytest.mark.parametrize("how", ["read", "silent", "long", "twice"])
def test_getting_ready_waits_for_the_log_but_does_not_depend_on_it(how: str) -> None:
    log, (_, _, newest) = grown()
    rig = Rig(log)
    boss = keypair_of("boss").peer_id
    ask = rig.ask(lambda ask: ReadyAsked(ask, boss, ready_for(log), WALL_MS))
    assert rig.reads == [ReadLog(log.network_id, log.manifest, 1, ())]
    assert not rig.replies
    if how == "silent":
        rig.reads.clear()
        rig.do(LogSilent(log.network_id, "no majority"))
    elif how == "long":
        rig.now += READY_WAITS_S
        rig.do(Tick())
        assert rig.replies == {ask: None}
        assert rig.reads, "it goes on"
    elif how == "twice":
        again = rig.ask(lambda ask: ReadyAsked(ask, boss, ready_for(log), WALL_MS))
        assert rig.code(again) == ""
    assert rig.code(ask) == ""
    assert rig.code(rig.allocate(log, newest)) == ""
    before = len(rig.effects)
    assert rig.code(rig.ask(lambda ask: ReadyAsked(ask, boss, ready_for(log), WALL_MS))) == ""
    assert len(rig.effects) == before + 1, "what lives here need not be read"


# Several at once


def test_rivals_at_once_while_the_log_is_read() -> None:
    log = Log(GRAPH)
    first, second = log.claim("boss", HERE), log.claim("rival", HERE)
    for order in ([(first, "boss"), (second, "rival")], [(second, "rival"), (first, "boss")]):
        rig = Rig(log)
        asks = {by: rig.allocate(log, claim, by) for claim, by in order}
        assert len(rig.reads) == 1
        rig.answer_reads()
        assert rig.code(asks["boss"]) == "STALE_EPOCH"
        assert rig.code(asks["rival"]) == ""
        assert rig.hosted() == [(keypair_of("rival").peer_id, 2)]


def test_a_claim_decided_after_the_read_began_has_another() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    ask_first = rig.allocate(log, log.claim("boss", HERE))
    entries = log.entries
    ask_second = rig.allocate(log, log.claim("rival", HERE), "rival")
    rig.reads.clear()
    rig.do(LogRead(log.network_id, entries))
    assert rig.replies == {ask_first: None}
    assert [read.from_slot for read in rig.reads] == [2]
    assert rig.code(ask_second) == ""
    assert rig.hosted() == [(keypair_of("rival").peer_id, 2)]


def test_those_who_wait_for_reads_are_counted() -> None:
    logs = [Log(small_graph(seed=seed)) for seed in range(READS_MAX + 1)]
    rig = Rig(*logs)
    claims = [log.claim("boss", HERE) for log in logs]
    asks = [rig.allocate(log, claim) for log, claim in zip(logs, claims, strict=True)]
    assert list(rig.replies) == asks[-1:]
    asks = [rig.allocate(logs[0], claims[0]) for _ in range(WAITING_MAX)]
    assert list(rig.replies) == [asks[0] - 1, asks[-1]]
    assert all(refusal.code == common_pb2.REFUSAL_CODE_BUSY for refusal in rig.replies.values())  # type: ignore[union-attr]
    rig.answer_reads()
    assert len(rig.core.tenants()) == 2, "as many as fit"


# Leases, and letting go


def beat(rig: Rig, log: Log, epoch: int, by: str = "boss", lease_s: int = 10) -> str:
    request = pnode_pb2.HeartbeatRequest(network_id=log.network_id, epoch=epoch, lease_s=lease_s)
    return rig.code(rig.ask(lambda ask: HeartbeatCame(ask, keypair_of(by).peer_id, request)))


def test_what_the_service_no_longer_lists_is_let_go_at_the_next_heartbeat() -> None:
    listed = True
    log = Log(GRAPH)
    rig = Rig(log, serves=lambda network_id, owner: "" if listed else "not ours")
    claim = log.claim("boss", HERE)
    ask = rig.allocate(log, claim)
    rig.answer_reads()
    assert rig.code(ask) == ""
    assert beat(rig, log, 1) == ""
    listed = False
    assert beat(rig, log, 1) == "NOT_IN_SERVICE"
    assert isinstance(rig.effects[-2], End)
    assert not rig.core.tenants()
    assert beat(rig, log, 1, by="stranger") == "STALE_EPOCH"


def drop(rig: Rig, log: Log, epoch: int, *vnodes: str, by: str = "boss") -> str:
    request = pnode_pb2.DropRequest(network_id=log.network_id, epoch=epoch, vnodes=vnodes)
    return rig.code(rig.ask(lambda ask: DropAsked(ask, keypair_of(by).peer_id, request)))


def called(rig: Rig, log: Log, epoch: int, vnode: str = "fc1") -> tuple[str, int, str]:
    refusal = rig.core.refuse(log.network_id, epoch, vnode, rig.now)
    if refusal is None:
        return "", 0, ""
    code = common_pb2.RefusalCode.Name(refusal.code).removeprefix("REFUSAL_CODE_")
    return code, refusal.epoch, refusal.host


def test_leases_and_orphans() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    assert beat(rig, log, 1) == "UNKNOWN_NETWORK"
    claim = log.claim("boss", HERE)
    assert rig.code(rig.allocate(log, claim)) == ""
    rig.now += 9
    assert called(rig, log, 1) == ("", 0, "")
    assert beat(rig, log, 1, by="rival") == "STALE_EPOCH"
    assert beat(rig, log, 0) == "STALE_EPOCH"
    assert beat(rig, log, 2) == "UNKNOWN_EPOCH"
    assert beat(rig, log, 1) == ""
    rig.now += 10
    assert called(rig, log, 1) == ("", 0, "")
    rig.now += 0.1
    assert called(rig, log, 1)[0] == "LEASE_EXPIRED"
    assert beat(rig, log, 1) == "", "it was away for a moment"
    assert called(rig, log, 1) == ("", 0, "")
    assert rig.core.deadline() == rig.now + QUIET_S
    rig.now += 10 + ORPHANED_S
    assert rig.do(Tick()) == [End(log.network_id, VNODES)]
    assert rig.core.deadline() is None
    assert beat(rig, log, 1) == "NOT_HOSTED"
    assert rig.code(rig.allocate(log, claim)) == "FAILED"


def test_a_host_that_hears_nothing_asks_the_log_whether_it_is_replaced() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    assert rig.code(rig.allocate(log, log.claim("boss", HERE))) == ""
    rig.now += QUIET_S - 0.1
    assert beat(rig, log, 1) == ""
    assert rig.do(Tick()) == [], "too early"
    rig.now += QUIET_S
    read = ReadLog(log.network_id, log.manifest, 2, ())
    assert rig.do(Tick()) == [read]
    assert rig.do(Tick()) == [], "one at a time"
    rig.answer_reads()
    assert rig.core.deadline() == rig.now + LOOK_AGAIN_S
    rig.now += LOOK_AGAIN_S
    assert rig.do(Tick()) == [read]
    rig.reads.clear()
    rig.do(LogSilent(log.network_id, "no majority"))
    assert called(rig, log, 1)[0] in ("", "LEASE_EXPIRED"), "who knows"
    rig.now += LOOK_AGAIN_S
    log.claim("rival", AWAY)
    ask = rig.allocate(log, log.claim("third", AWAY | {"out": ME}), "third")
    assert rig.do(Tick()) == [], "it is being read"
    assert rig.code(ask) == ""
    log.claim("rival", AWAY)
    rig.now += QUIET_S
    rig.do(Tick())
    rig.answer_reads()
    assert rig.effects[-2] == End(log.network_id, ("out",))
    assert isinstance(rig.effects[-1], Persist)
    assert called(rig, log, 3, "out") == ("STALE_EPOCH", 4, keypair_of("other").peer_id)
    assert rig.core.deadline() is None


def test_dropping() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    assert drop(rig, log, 1) == ""
    log.claim("boss", HERE)
    claim = log.claim("boss", HERE)
    assert rig.code(rig.allocate(log, claim)) == ""
    assert drop(rig, log, 1) == "", "a message that was long on its way"
    assert drop(rig, log, 1, by="rival") == "STALE_EPOCH"
    assert drop(rig, log, 2, by="rival") == "STALE_EPOCH", "the log was asked"
    assert called(rig, log, 2) == ("", 0, "")
    assert drop(rig, log, 2, "fc1") == ""
    assert called(rig, log, 2)[0] == "NOT_HOSTED"
    assert called(rig, log, 2, "out") == ("", 0, "")
    assert rig.code(rig.allocate(log, claim)) == "FAILED", "part of it is gone"
    assert drop(rig, log, 2) == ""
    assert not rig.core.tenants()
    assert rig.code(rig.allocate(log, claim)) == "FAILED", "a copy that was long on its way"


def test_who_has_moved_a_vnode_tells_its_old_host_and_callers_are_sent_on() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    assert rig.code(rig.allocate(log, log.claim("boss", HERE))) == ""
    log.claim("rival", AWAY)
    assert called(rig, log, 1) == ("", 0, ""), "it has not heard"
    assert drop(rig, log, 1, by="rival") == ""
    assert not rig.core.tenants()
    there = keypair_of("other").peer_id
    assert called(rig, log, 1) == ("STALE_EPOCH", 2, there)
    assert called(rig, log, 2) == ("NOT_HOSTED", 2, there)
    assert beat(rig, log, 1) == "STALE_EPOCH"
    kept = Tenancy.load(rig.limits, rig.disk).standing(log.network_id)
    assert kept is not None
    assert kept.epoch == 2, "and it remembers"


def test_who_says_that_he_orchestrates() -> None:
    log = Log(GRAPH, ["boss", "rival"])
    rig = Rig(log)
    old, new = log.claim("boss", AWAY), log.claim("rival", AWAY)

    def shown(by: str, claim: common_pb2.Signed) -> str:
        me = keypair_of(by).peer_id
        return rig.code(rig.ask(lambda ask: ClaimShown(ask, me, log.network_id, claim)))

    assert shown("rival", new) == ""
    assert shown("boss", old) == "STALE_EPOCH"
    assert shown("boss", new) == "NOT_GRANTED"
    assert shown("boss", log.proposal("boss", AWAY)) == "UNKNOWN_EPOCH"
    assert shown("stranger", log.proposal("stranger", AWAY)) == "NOT_GRANTED"
    assert shown("rival", OTHER_CLAIM) == "NOT_GRANTED"
    assert not rig.disk


def test_a_disk_that_is_full() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    ask = rig.allocate(log, log.claim("boss", HERE))
    read = rig.reads.pop()
    rig.core.handle(LogRead(read.network_id, log.entries), rig.now)
    # The shell, which could not write, carried out nothing after that, and refused.
    assert rig.core.handle(NotPersisted(log.network_id), rig.now) == [End(log.network_id, VNODES)]
    rig.core.check()
    assert not rig.core.tenants()
    assert not rig.core.dump()
    assert ask not in rig.replies
    assert rig.code(rig.allocate(log, log.claim("boss", HERE))) == ""


# All of it, at random


def schedule(seed: int) -> Sequence[str]:
    """One history of rival claimants, restarts and replays; raises where the fence has a hole."""
    rng = random.Random(seed)
    log = Log(GRAPH)
    rig = Rig(log)
    people = ("boss", "rival", "third")
    claims: list[tuple[common_pb2.Signed, str]] = []  # decided, and proposed in vain
    seen: list[str] = []
    accepted: dict[int, str] = {}  # epoch -> who was told yes
    newest = 0  # epoch that was agreed to

    def note() -> None:
        nonlocal newest
        tenants = rig.core.tenants()
        for tenant in tenants:
            assert accepted.setdefault(tenant.epoch, tenant.claimant) == tenant.claimant
            entry = log_pb2.LogEntry.FromString(log.history.entries[0].payload)
            assert entry.claim.epoch == 1
            decided = {claim.epoch: claim.orchestrator for _, claim in log.history.claims}
            assert decided.get(tenant.epoch) == tenant.claimant, "not what the log says"
            assert tenant.epoch >= newest, "an older epoch came back"
            newest = tenant.epoch

    for _ in range(60):
        what = rng.choice(
            ("claim", "race", "allocate", "allocate", "replay", "read", "silent", "restart",
             "commit", "beat", "drop", "tick")
        )  # fmt: skip
        seen.append(what)
        who = rng.choice(people)
        rig.now += rng.random()
        if what == "claim":
            claims.append((log.claim(who, rng.choice((HERE, AWAY))), who))
        elif what == "race":
            claims.append((log.proposal(who, HERE), who))
            winner = rng.choice(people)
            claims.append((log.claim(winner, HERE), winner))
        elif what == "commit" and log.history.claims:
            log.commit(
                next(p for p in people if keypair_of(p).peer_id == log.history.orchestrator),
                (log.history.commit.step if log.history.commit else 0) + 1,
            )
        elif what in ("allocate", "replay") and claims:
            claim, by = claims[-1] if what == "allocate" else rng.choice(claims)
            if request_for(log, claim).vnodes:
                rig.allocate(log, claim, by)
        elif what == "read":
            if rig.reads:
                read = rig.reads.pop(0)
                known = rng.randint(read.from_slot - 1, len(log.entries))  # perhaps an old answer
                parts = list(log.entries[read.from_slot - 1 : known])
                if len(parts) > 1 and rng.random() < 0.5:
                    rig.do(LogRead(read.network_id, tuple(parts[:1]), more=True))
                    note()
                    rig.reads.insert(0, replace(read, from_slot=read.from_slot + 1))
                else:
                    rig.do(LogRead(read.network_id, tuple(parts)))
        elif what == "silent":
            if rig.reads:
                rig.do(LogSilent(rig.reads.pop(0).network_id, "no majority"))
        elif what == "restart":
            rig.restart()
        elif what == "tick":
            rig.now += 2 * rng.random() * LOOK_AGAIN_S
            rig.do(Tick())
        elif what in ("beat", "drop") and log.history.epoch:
            (beat if what == "beat" else drop)(rig, log, rng.randint(1, log.history.epoch), by=who)
        note()
    rig.answer_reads()
    note()
    for _, refusal in rig.replies.items():
        assert refusal is None or refusal.detail
    return seen


@pytest.mark.parametrize("seed", range(150), ids=lambda seed: f"seed{seed}")
def test_whatever_comes_no_two_are_followed_in_one_epoch_and_none_twice(seed: int) -> None:
    schedule(seed)
