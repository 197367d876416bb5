"""A host that follows VNodes, and what a newer claim finds in its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from claims import Log
from memory_wire import keypair_of
from small_network import small_graph
from test_tenancy import ME, Rig

from p2pnet.core import Tick
from p2pnet.log.history import new_claim
from p2pnet.v1 import common_pb2, log_pb2
from p2pnet.vnode.tenancy import LAPSED_S, QUIET_S
from p2pnet.vnode.tenancy_events import Begin, End

GRAPH = small_graph(replicas=2, clip_norm=1.0)
VNODES = GRAPH.vnodes()
SIZES = {vnode: GRAPH.memory_bytes(vnode) for vnode in VNODES}
HERE = dict.fromkeys(VNODES[:3], ME) | dict.fromkeys(VNODES[3:], "other")
FOLLOWED = dict.fromkeys(VNODES[3:], ME) | dict.fromkeys(VNODES[:3], "other")
PROMOTED = dict.fromkeys(VNODES, ME)


def claim(
    log: Log, placement: Mapping[str, str], followers: Mapping[str, str]
) -> common_pb2.Signed:
    """Decided, with one standby for each of those."""
    entry = new_claim(
        log.history,
        keypair_of("boss"),
        log.manifest,
        placement={vnode: keypair_of(name).peer_id for vnode, name in placement.items()},
        standbys={vnode: [keypair_of(name).peer_id] for vnode, name in followers.items()},
        genesis=None if log.history.claims else log_pb2.Genesis(graph=log.graph.to_json()),
    )
    return log.add(entry)


def started(**limits: Any) -> tuple[Rig, Log]:
    log = Log(GRAPH)
    rig = Rig(log, **limits)
    assert ask(rig, log, claim(log, HERE, FOLLOWED), VNODES[3:]) == ""
    return rig, log


def ask(
    rig: Rig, log: Log, signed: common_pb2.Signed, standbys: Sequence[str] = (), **more: Any
) -> str:
    return rig.code(rig.allocate(log, signed, standbys=standbys, **more))


def begins(rig: Rig) -> list[Begin]:
    return [effect for effect in rig.effects if isinstance(effect, Begin)]


def ends(rig: Rig) -> list[End]:
    return [effect for effect in rig.effects if isinstance(effect, End)]


def test_what_is_followed_takes_memory_and_no_calls_for_the_vnode() -> None:
    rig, log = started(memory_bytes=sum(SIZES.values()))
    [tenant] = rig.core.tenants()
    assert tenant.sizes == {vnode: SIZES[vnode] for vnode in VNODES[:3]}
    assert tenant.following == {vnode: SIZES[vnode] for vnode in VNODES[3:]}
    assert tenant.size_bytes == sum(SIZES.values())
    assert begins(rig)[0].offer.standbys == {
        vnode: (keypair_of(name).peer_id,) for vnode, name in sorted(FOLLOWED.items())
    }
    for vnode in VNODES[3:]:
        no = rig.core.refuse(log.network_id, 1, vnode, rig.now)
        assert no is not None
        assert no.code == common_pb2.REFUSAL_CODE_NOT_HOSTED
        assert no.host == keypair_of("other").peer_id
        assert rig.core.refuse(log.network_id, 1, vnode, rig.now, following=True) is None
    assert rig.core.refuse(log.network_id, 1, "fc1", rig.now, following=True) is None


def test_a_host_without_room_for_what_it_is_to_follow_refuses() -> None:
    log = Log(GRAPH)
    rig = Rig(log, memory_bytes=sum(SIZES.values()) - 1)
    assert ask(rig, log, claim(log, HERE, FOLLOWED), VNODES[3:]) == "NO_MEMORY"


@pytest.mark.parametrize(
    "standbys", [(), VNODES[4:], (*VNODES[3:], "fc1"), (*VNODES[3:], VNODES[3]), ("fc9",)]
)
def test_it_follows_what_the_claim_says_and_nothing_else(standbys: Sequence[str]) -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    assert ask(rig, log, claim(log, HERE, FOLLOWED), standbys) == "BAD_REQUEST"


def test_a_host_may_follow_only() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    signed = claim(log, dict.fromkeys(VNODES, "other"), dict.fromkeys(VNODES, ME))
    assert ask(rig, log, signed, VNODES) == ""
    assert not rig.core.tenants()[0].sizes


def test_a_newer_claim_goes_on_from_what_is_in_memory() -> None:
    rig, log = started()
    signed = claim(log, PROMOTED, {})
    assert ask(rig, log, signed, (), step=3, live_step=5, norms=[0.5]) == ""
    [end] = ends(rig)
    assert (end.vnodes, end.keep) == (VNODES, True)
    assert [begin.live for begin in begins(rig)] == [False, True]
    assert ask(rig, log, signed, (), step=3, live_step=5, norms=[0.5]) == ""  # said twice
    assert len(begins(rig)) == 2


def test_only_what_was_here_under_the_very_claim_before_is_gone_on_from() -> None:
    """A claim between them may have decided other steps; who was not asked cannot know."""
    rig, log = started()
    claim(log, PROMOTED, {})
    signed = claim(log, PROMOTED, {})
    assert ask(rig, log, signed, (), step=3, live_step=5, norms=[0.5]) == "FAILED"
    assert "cannot go on from step 5" in rig.effects[-1].refusal.detail  # type: ignore[union-attr]
    signed = claim(log, PROMOTED, {})
    assert ask(rig, log, signed, (), step=3) == ""  # from the cut it can
    assert not begins(rig)[-1].live


def test_what_was_neither_here_nor_followed_cannot_be_gone_on_from() -> None:
    log = Log(GRAPH)
    rig = Rig(log)
    assert ask(rig, log, claim(log, HERE, {}), ()) == ""
    signed = claim(log, PROMOTED, {})
    assert ask(rig, log, signed, (), step=3, live_step=5, norms=[0.5]) == "FAILED"
    fresh = Rig(log)
    assert ask(fresh, log, signed, (), step=3, live_step=5, norms=[0.5]) == "FAILED"


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 5, "live_step": 5},
        {"step": 6, "live_step": 5},
        {"norms": [0.5]},
        {"live_step": 5, "norms": [0.5, 0.5]},
        {"live_step": 5, "norms": [float("nan")]},
        {"live_step": 5, "norms": [-1.0]},
    ],
)
def test_a_step_to_go_on_from_that_cannot_be(changes: dict[str, Any]) -> None:
    rig, log = started()
    assert ask(rig, log, claim(log, PROMOTED, {}), (), **changes) == "BAD_REQUEST"


def test_networks_without_standbys_keep_nothing_in_memory() -> None:
    graph = small_graph()
    log = Log(graph)
    rig = Rig(log)
    assert ask(rig, log, log.claim("boss", PROMOTED)) == ""
    signed = log.claim("boss", PROMOTED)
    assert ask(rig, log, signed, step=3, live_step=5) == "BAD_REQUEST"
    assert ask(rig, log, signed) == ""
    assert [end.keep for end in ends(rig)] == [False]


def test_what_nobody_goes_on_from_leaves_the_memory_after_a_while() -> None:
    rig, log = started(memory_bytes=sum(SIZES.values()))
    other = Log(small_graph(name="another"))
    rig.logs[other.network_id] = other
    claim(log, dict.fromkeys(VNODES, "other"), {})
    rig.now += QUIET_S
    rig.do(Tick())  # nobody tells it: it asks the log
    rig.answer_reads()
    assert [end.keep for end in ends(rig)] == [True]
    mine = other.claim("boss", dict.fromkeys(VNODES, ME))
    assert rig.code(rig.allocate(other, mine)) == "NO_MEMORY"  # it is still used
    rig.now += LAPSED_S
    assert rig.core.deadline() is not None
    rig.do(Tick())
    assert [end.keep for end in ends(rig)] == [True, False]
    assert rig.code(rig.allocate(other, mine)) == ""
