"""Placement: memory is never exceeded, the same members give the same plan, load spreads.

Groups stay together, replicas apart, and neighbours near each other where that pays.
"""

from __future__ import annotations

import collections
import itertools
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import p2pnet
from p2pnet.errors import UsageError
from p2pnet.gossip.coordinates import Coordinate
from p2pnet.orchestrator.costs import GFLOPS_A_CPU, STEP_NS
from p2pnet.orchestrator.placement import (
    REJECTED_MAX,
    HostView,
    Placement,
    SwarmTooSmallError,
    place,
)
from p2pnet.orchestrator.predict import predict
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.compiling import compile_graph
from p2pnet.vnode.draft import Draft, Settings, TensorSpec
from p2pnet.vnode.graph import CompiledGraph

GIB = 1 << 30
BATCH_MAX = 32  # what memory is lent for
DIGITS = replace(
    load_spec(Path(p2pnet.__file__).parent / "data" / "digits.yaml"), batch_max=BATCH_MAX
)


def host(name: str, memory: int = GIB, gflops: float = 20.0, vnodes: int = 0) -> HostView:
    return HostView(name, 2.0, memory, gflops, vnodes)


def at(*axes_s: float) -> Coordinate:
    """Somewhere: coordinates in seconds of round trip."""
    return Coordinate((*axes_s, 0.0, 0.0, 0.0)[:4], 0.001, 0.1)


def chain(widths: list[int]) -> CompiledGraph:
    """Linears of these widths, one after the other."""
    drafts = [
        Draft(
            f"fc{number}",
            "Linear",
            {"in_features": widths[number], "out_features": widths[number + 1]},
            (f"fc{number - 1}" if number else "x",),
        )
        for number in range(len(widths) - 1)
    ]
    return compile_graph(
        name="chain",
        inputs={"x": TensorSpec((widths[0],))},
        nodes=drafts,
        loss=Draft("loss", "MSELoss", {}, (drafts[-1].id,)),
        optimizer="Adam",
        optimizer_config={},
        settings=Settings(batch_max=BATCH_MAX),
    )


def used(graph: CompiledGraph, placement: Placement) -> dict[str, int]:
    taken: dict[str, int] = collections.defaultdict(int)
    for vnode, peer in placement.assignments.items():
        taken[peer] += graph.memory_bytes(vnode)
    return taken


def test_six_vnodes_on_five_equal_hosts_use_five() -> None:
    placement = place(DIGITS, [host(f"p{number}") for number in range(5)], batch_size=32)
    assert tuple(placement.assignments) == DIGITS.vnodes()
    assert len(set(placement.assignments.values())) == 5
    assert placement.rejected == ()
    assert all(score > 0 for score in placement.scores.values())


def test_unequal_measurements_of_equal_hosts_do_not_matter_for_a_small_network() -> None:
    hosts = [host(f"p{number}", gflops=5.0 + 11 * number) for number in range(5)]
    assert len(set(place(DIGITS, hosts, batch_size=32).assignments.values())) == 5


def test_a_host_with_little_memory_gets_less() -> None:
    hosts = [host(f"p{number}") for number in range(3)]
    equal = collections.Counter(place(DIGITS, hosts, batch_size=32).assignments.values())
    assert sorted(equal.values()) == [2, 2, 2]
    small = [hosts[0], hosts[1], host("p2", memory=300 << 10)]
    placement = place(DIGITS, small, batch_size=32)
    count = collections.Counter(placement.assignments.values())
    assert count["p2"] <= 1
    assert ("fc1", "p2") in [(vnode, peer) for vnode, peer, _ in placement.rejected]
    reason = next(reason for vnode, _, reason in placement.rejected if vnode == "fc1")
    assert reason == "needs 434.0 KiB, has 300.0 KiB left"


def test_a_slow_or_busy_host_gets_less() -> None:
    wide = chain([1024] * 13)
    hosts = [host("fast", gflops=40.0), host("slow", gflops=2.0)]
    count = collections.Counter(place(wide, hosts, batch_size=256).assignments.values())
    assert count["slow"] < count["fast"] / 3
    busy = [host("idle"), host("busy", vnodes=10)]
    count = collections.Counter(place(DIGITS, busy, batch_size=32).assignments.values())
    assert count == {"idle": 6}


def test_hosts_of_different_ip_groups_come_first() -> None:
    hosts = [HostView(f"p{n}", 2.0, GIB, 20.0, 0, "same" if n < 5 else "other") for n in range(6)]
    two = chain([8, 8])
    for name in ("a", "b", "c", "d"):
        renamed = compile_graph(
            name=name,
            inputs=two.inputs,
            nodes=[Draft("fc0", "Linear", {"in_features": 8, "out_features": 8}, ("x",))],
            loss=Draft("loss", "MSELoss", {}, ("fc0",)),
            optimizer="Adam",
            optimizer_config={},
        )
        chosen = place(renamed, hosts, batch_size=1).assignments
        assert "p5" in chosen.values()


def test_after_a_loss_only_what_it_hosted_moves() -> None:
    hosts = [host(f"p{number}") for number in range(5)]
    before = place(DIGITS, hosts, batch_size=32).assignments
    counts = collections.Counter(before.values())
    for lost in sorted(counts):
        left = [
            host(
                view.peer_id,
                GIB - sum(
                    DIGITS.memory_bytes(vnode)
                    for vnode, peer in before.items()
                    if peer == view.peer_id
                ),
                vnodes=counts[view.peer_id],
            )
            for view in hosts
        ]  # fmt: skip
        after = place(DIGITS, left, batch_size=32, current=before, exclude=[lost]).assignments
        moved = [vnode for vnode in before if before[vnode] != after[vnode]]
        assert moved == [vnode for vnode in before if before[vnode] == lost]
        assert lost not in after.values()


def test_a_crowd_on_one_host_spreads_when_others_join() -> None:
    before = dict.fromkeys(DIGITS.vnodes(), "p0")
    hosts = [host("p0", vnodes=6), *(host(f"p{number}") for number in range(1, 5))]
    after = place(DIGITS, hosts, batch_size=32, current=before).assignments
    assert len(set(after.values())) >= 4


def test_what_fits_only_when_the_large_goes_first_is_placed() -> None:
    graph = chain([32, 32, 512, 512])
    sizes = [graph.memory_bytes(vnode) for vnode in graph.vnodes()]
    hosts = [host("a", max(sizes), gflops=1000.0), host("b", sum(sizes) - max(sizes))]
    placement = place(graph, hosts, batch_size=1)
    assert placement.assignments["fc2"] == "a"
    assert used(graph, placement) == {"a": hosts[0].memory_free_bytes,
                                         "b": hosts[1].memory_free_bytes}  # fmt: skip


def test_a_swarm_that_is_too_small_is_told_by_how_much() -> None:
    hosts = [host(f"p{number}", memory=400 << 10) for number in range(3)]
    with pytest.raises(SwarmTooSmallError) as error:
        place(DIGITS, hosts, batch_size=32)
    assert str(error.value) == (
        "the swarm is too small: VNode fc1 needs 434.0 KiB and the most that a peer has free is "
        "400.0 KiB; the network needs 2.0 MiB in all, 834.4 KiB more than the 1.2 MiB that 3 "
        "peers have free: 3 more peers with 434.0 KiB free would do, or larger --memory where "
        "peers join"
    )
    total = sum(DIGITS.memory_bytes(vnode) for vnode in DIGITS.vnodes())
    assert error.value.memory_missing_bytes == total - 3 * (400 << 10)
    assert (error.value.peers_missing, error.value.peer_bytes) == (
        3, DIGITS.memory_bytes("fc1"),
    )  # fmt: skip
    more = hosts + [host(f"q{number}", error.value.peer_bytes) for number in range(3)]
    assert place(DIGITS, more, batch_size=32).assignments
    many = [host(f"p{number}", memory=400 << 10) for number in range(9)]
    with pytest.raises(SwarmTooSmallError, match=r"9 peers have 3\.5 MiB free, but in pieces"):
        place(DIGITS, many, batch_size=32)
    assert isinstance(error.value, UsageError)
    for none in ([], [host("p0")]):
        with pytest.raises(SwarmTooSmallError, match="no peer here hosts VNodes"):
            place(DIGITS, none, batch_size=32, exclude=["p0"])


hosts_strategy = st.lists(
    st.builds(
        HostView,
        peer_id=st.text("abcdef", min_size=1, max_size=4),
        cpus=st.sampled_from([0.0, 0.5, 2.0, 64.0]),
        memory_free_bytes=st.integers(0, 6 << 20),
        gflops=st.floats(0, 1000),
        vnodes=st.integers(0, 5),
        ip_group=st.sampled_from(["", "a", "b"]),
        trust=st.sampled_from([1.0, 1.0, 0.5, 0.0]),
        coordinate=st.sampled_from([None, at(0.0, 0.0), at(0.08, 0.0), at(0.0, 0.2), at(0.3, 0.1)]),
    ),
    max_size=12,
    unique_by=lambda view: view.peer_id,
)


def outcome(graph: CompiledGraph, hosts: list[HostView], batch_size: int) -> Placement | str:
    try:
        return place(graph, hosts, batch_size=batch_size)
    except SwarmTooSmallError as error:
        return str(error)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    hosts=hosts_strategy,
    widths=st.lists(st.integers(1, 300), min_size=2, max_size=9),
    batch_size=st.integers(1, 64),
    seed=st.integers(0, 9),
)
def test_memory_holds_and_order_does_not_matter(
    hosts: list[HostView], widths: list[int], batch_size: int, seed: int
) -> None:
    graph = chain(widths)
    rng = random.Random(seed)
    placement = outcome(graph, hosts, batch_size)
    assert outcome(graph, rng.sample(hosts, len(hosts)), batch_size) == placement
    if isinstance(placement, str):
        return
    free = {view.peer_id: view.memory_free_bytes for view in hosts}
    taken = used(graph, placement)
    assert all(taken[peer] <= free[peer] for peer in taken)

    # And again from a random assignment, whose memory is counted as used.
    current = {vnode: rng.choice(hosts).peer_id for vnode in graph.vnodes()}
    moved = place(graph, hosts, batch_size=batch_size, current=current)
    held = used(graph, Placement(current, {}, ()))
    taken = used(graph, moved)
    assert all(taken[peer] <= free[peer] + held[peer] for peer in taken)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(hosts=hosts_strategy)
def test_each_goes_where_it_would_be_done_first(hosts: list[HostView]) -> None:
    """The tree search against looking at every host."""
    hosts = [replace(view, trust=1.0, coordinate=None) for view in hosts]
    one = chain([64, 64])
    try:
        score = place(one, hosts, batch_size=8).scores["fc0"]
    except SwarmTooSmallError:
        return
    node = one.node("fc0")
    need = one.memory_bytes("fc0")
    flops = 8 * (node.flops_forward + node.flops_backward)
    finish = [
        STEP_NS * (view.vnodes + 1)
        + int(flops / (max(0.1, view.gflops or GFLOPS_A_CPU * view.cpus)))
        + STEP_NS * need // view.memory_free_bytes
        for view in hosts
        if view.memory_free_bytes >= need
    ]
    # Of those that are within an eighth of the best, the least crowded IP group.
    assert min(finish) - 1000 <= round(score * 1e6) <= min(finish) * 9 / 8 + 1000


def test_a_large_network_on_a_large_swarm() -> None:
    """Its time is `make bench`'s to tell; here only that it is not the product of both."""
    rng = random.Random(1)
    graph = chain([64] * 3_000)
    hosts = [
        replace(
            host(f"p{n}", rng.choice([1, 8, 1024]) << 20, rng.uniform(1, 100)),
            coordinate=at(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)),
        )
        for n in range(500)
    ]
    started = time.process_time()
    placement = place(graph, hosts, batch_size=32)
    assert time.process_time() - started < 20  # a bound for the slowest of machines
    assert len(placement.assignments) == 3_000
    assert len(placement.rejected) <= REJECTED_MAX
    free = {view.peer_id: view.memory_free_bytes for view in hosts}
    assert all(taken <= free[peer] for peer, taken in used(graph, placement).items())


# Distance, groups, replicas, trust


def far_apart(count: int, distance_s: float) -> list[HostView]:
    """Half of them here, half there."""
    return [
        replace(host(f"p{n}"), coordinate=at(distance_s * (n % 2)), ip_group=f"g{n}")
        for n in range(count)
    ]


def hops(graph: CompiledGraph, placement: Placement, hosts: list[HostView]) -> int:
    """Edges between the two halves."""
    side = {view.peer_id: view.coordinate for view in hosts}
    return sum(
        side[placement.assignments[ref]] != side[placement.assignments[vnode]]
        for vnode in graph.vnodes()
        for ref in graph.node(vnode).inputs
        if ref in placement.assignments
    )


def test_near_peers_are_preferred_where_the_way_is_long() -> None:
    graph = chain([64] * 9)
    hosts = far_apart(8, 0.2)
    assert hops(graph, place(graph, hosts, batch_size=32), hosts) == 0
    # The same, no farther than noise: nobody is preferred.
    hosts = far_apart(8, 0.004)
    assert len(set(place(graph, hosts, batch_size=32).assignments.values())) == 8


def test_a_long_way_is_gone_where_computing_takes_longer() -> None:
    graph = chain([1024] * 8)
    slow = [replace(view, gflops=0.5) for view in far_apart(6, 0.05)]
    placement = place(graph, slow, batch_size=256)
    assert len(set(placement.assignments.values())) == 6
    assert hops(graph, placement, slow) > 0


def test_after_a_loss_its_vnodes_go_near_to_their_neighbours() -> None:
    graph = chain([64] * 9)
    hosts = far_apart(12, 0.2)
    before = place(graph, hosts, batch_size=32).assignments
    lost = before["fc3"]
    counts = collections.Counter(before.values())
    left = [replace(view, vnodes=counts[view.peer_id]) for view in hosts]
    after = place(graph, left, batch_size=32, current=before, exclude=[lost])
    assert hops(graph, after, hosts) == 0
    assert [vnode for vnode in before if before[vnode] != after.assignments[vnode]] == [
        vnode for vnode in before if before[vnode] == lost
    ]


def test_next_to_nothing_moves_where_nothing_happens() -> None:
    """Neighbours that are placed already hold a VNode where it is, also those after it."""
    rng = random.Random(5)
    graph = chain([64] * 60)
    hosts = [
        replace(host(f"p{n}"), coordinate=at(rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1)))
        for n in range(20)
    ]
    before = place(graph, hosts, batch_size=32).assignments
    after = place(graph, hosts, batch_size=32, current=before).assignments
    assert sum(before[vnode] != after[vnode] for vnode in before) <= 1


def test_a_host_that_does_not_say_where_it_is_counts_as_far() -> None:
    graph = chain([64] * 5)
    hosts = [replace(host(f"p{n}"), coordinate=at(0.0)) for n in range(3)]
    hosts += [replace(host(f"q{n}"), coordinate=at(0.2)) for n in range(3)]
    silent = replace(host("silent"))
    placement = place(graph, [*hosts, silent], batch_size=32)
    assert "silent" not in placement.assignments.values()
    # Where nobody does, none is far.
    alone = [replace(view, coordinate=None) for view in hosts] + [silent]
    assert len(set(place(graph, alone, batch_size=32).assignments.values())) == 5


def grouped(groups: dict[str, str], nodes: int = 6) -> CompiledGraph:
    """A chain of Linears of which some are in groups."""
    drafts = [
        Draft(
            f"fc{n}",
            "Linear",
            {"in_features": 64, "out_features": 64},
            (f"fc{n - 1}" if n else "x",),
            groups.get(f"fc{n}", ""),
        )
        for n in range(nodes)
    ]
    return compile_graph(
        name="grouped",
        inputs={"x": TensorSpec((64,))},
        nodes=drafts,
        loss=Draft("loss", "MSELoss", {}, (drafts[-1].id,), groups.get("loss", "")),
        optimizer="SGD",
        optimizer_config={},
    )


def test_a_group_goes_to_one_host_or_nowhere() -> None:
    graph = grouped({"fc0": "ends", "loss": "ends", "fc3": "middle", "fc4": "middle"})
    each = graph.memory_bytes("fc0")
    hosts = [host(f"p{n}", memory=2 * each) for n in range(5)]
    placed = place(graph, hosts, batch_size=8).assignments
    assert placed["fc0"] == placed["loss"]
    assert placed["fc3"] == placed["fc4"]
    small = [host(f"p{n}", memory=2 * each - 1) for n in range(9)]
    with pytest.raises(SwarmTooSmallError, match="VNode fc3 needs"):
        place(graph, small, batch_size=8)
    # A group moves as a whole when its host is lost.
    after = place(graph, hosts, batch_size=8, current=placed, exclude=[placed["fc3"]]).assignments
    assert after["fc3"] == after["fc4"] != placed["fc3"]


def test_replicas_are_on_other_hosts_and_in_other_ip_groups_where_there_are() -> None:
    hosts = [HostView(f"p{n}", 2.0, GIB, 20.0, 0, f"g{n // 3}") for n in range(9)]
    group = {view.peer_id: view.ip_group for view in hosts}
    wanted = {"fc1": 2, "loss": 3}
    placement = place(DIGITS, hosts, batch_size=32, replicas=wanted)
    assert {vnode: len(more) for vnode, more in placement.replicas.items()} == wanted
    for vnode, more in placement.replicas.items():
        all_of_it = [placement.assignments[vnode], *more]
        assert len(set(all_of_it)) == len(all_of_it)
        assert len({group[peer] for peer in all_of_it}) == 3
    with pytest.raises(SwarmTooSmallError):
        place(DIGITS, hosts[:3], batch_size=32, replicas={"fc1": 3})


def test_whom_nobody_trusts_gets_nothing_and_who_is_trusted_less_gets_less() -> None:
    graph = chain([64] * 11)
    hosts = [host("a"), replace(host("b"), trust=0.25), replace(host("c"), trust=0.0)]
    placement = place(graph, hosts, batch_size=8)
    count = collections.Counter(placement.assignments.values())
    assert count["c"] == 0
    assert 0 < count["b"] <= count["a"] / 3
    assert ("fc0", "c", "not trusted") in placement.rejected
    with pytest.raises(SwarmTooSmallError, match="no peer here hosts"):
        place(graph, [replace(host("c"), trust=float("nan"))], batch_size=8)


def test_ip_groups_share_among_hosts_that_are_alike() -> None:
    # Eight of ten hosts are in one group, slightly faster than the two others.
    hosts = [
        HostView(f"p{n}", 2.0, GIB, 20.5 if n < 8 else 20.0, 0, "same" if n < 8 else f"g{n}")
        for n in range(10)
    ]
    placed = place(chain([64, 64, 64]), hosts, batch_size=32).assignments
    assert len([peer for peer in placed.values() if peer < "p8"]) == 1


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    hosts=hosts_strategy,
    groups=st.dictionaries(
        st.sampled_from([f"fc{n}" for n in range(6)] + ["loss"]), st.sampled_from(["g", "h"])
    ),
    copies=st.dictionaries(st.sampled_from(["fc0", "fc5", "loss"]), st.integers(0, 2)),
    seed=st.integers(0, 9),
)
def test_groups_stay_together_and_replicas_apart(
    hosts: list[HostView], groups: dict[str, str], copies: dict[str, int], seed: int
) -> None:
    graph = grouped(groups)
    try:
        placement = place(graph, hosts, batch_size=4, replicas=copies)
    except SwarmTooSmallError:
        return
    shuffled = random.Random(seed).sample(hosts, len(hosts))
    assert place(graph, shuffled, batch_size=4, replicas=copies) == placement
    by_group: dict[str, set[str]] = collections.defaultdict(set)
    taken: dict[str, int] = collections.defaultdict(int)
    for vnode, peer in placement.assignments.items():
        more = placement.replicas.get(vnode, ())
        assert len({peer, *more}) == 1 + len(more) >= 1 + copies.get(vnode, 0)
        for one in (peer, *more):
            taken[one] += graph.memory_bytes(vnode)
        if group := groups.get(vnode):
            by_group[group].add(peer)
    assert all(len(peers) == 1 for peers in by_group.values())
    free = {view.peer_id: view.memory_free_bytes for view in hosts if view.trust > 0}
    assert all(taken[peer] <= free[peer] for peer in taken)


SCRIPT = """
import random
from p2pnet.gossip.coordinates import Coordinate
from p2pnet.orchestrator.placement import HostView, place
from p2pnet.vnode.compiling import from_json
import sys
rng = random.Random(3)
hosts = [HostView(f"p{n}", 2.0, rng.choice([1, 4, 64]) << 20, rng.uniform(1, 90), rng.randrange(4),
                  f"g{n % 7}", rng.choice([1.0, 0.5]),
                  Coordinate((rng.uniform(-.1, .1), rng.uniform(-.1, .1), 0.0, 0.0), 0.002, 0.1))
         for n in range(40)]
graph = from_json(sys.stdin.buffer.read())
print(place(graph, hosts, batch_size=32, replicas={"loss": 2}))
"""


def test_every_process_computes_the_same() -> None:
    graph = chain([64] * 30).to_json()
    said = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input=graph,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "12345")
    }
    assert len(said) == 1
    assert b"assignments" in said.pop()


# Quality, by what a placement is to make small


def best_s(graph: CompiledGraph, hosts: list[HostView]) -> float:
    """The least cost of all placements there are."""
    vnodes = graph.vnodes()
    need = [graph.memory_bytes(vnode) for vnode in vnodes]
    found = []
    for choice in itertools.product(hosts, repeat=len(vnodes)):
        taken: collections.Counter[str] = collections.Counter()
        for view, size in zip(choice, need, strict=True):
            taken[view.peer_id] += size
        if all(taken[view.peer_id] <= view.memory_free_bytes for view in hosts):
            where = {vnode: view.peer_id for vnode, view in zip(vnodes, choice, strict=True)}
            found.append(predict(graph, hosts, where, batch_size=32).cost_s)
    return min(found)


def small_case(seed: int, tight: bool) -> tuple[CompiledGraph, list[HostView]]:
    rng = random.Random(seed)
    graph = chain([rng.choice([8, 64, 512, 1500]) for _ in range(rng.randint(2, 4))])
    most = max(graph.memory_bytes(vnode) for vnode in graph.vnodes())
    hosts = [
        HostView(
            f"p{n}", 2.0, rng.choice([1, 2, 5]) * most if tight else GIB,
            rng.choice([1.0, 5.0, 20.0, 100.0]), rng.choice([0, 0, 1, 10]), f"g{rng.randrange(3)}",
            1.0, at(rng.choice([0.0, 0.03, 0.1]), rng.choice([0.0, 0.05])),
        )
        for n in range(rng.randint(2, 4))
    ]  # fmt: skip
    return graph, hosts


@pytest.mark.parametrize("tight", [False, True], ids=["ample", "tight"])
def test_it_is_near_to_the_best_of_all_placements(tight: bool) -> None:
    """Within twice the best where memory is ample; nearly always where it is not."""
    ratios = []
    for seed in range(60):
        graph, hosts = small_case(seed, tight)
        try:
            placed = place(graph, hosts, batch_size=32).assignments
        except SwarmTooSmallError:
            continue
        cost_s = predict(graph, hosts, placed, batch_size=32).cost_s
        ratios.append(cost_s / best_s(graph, hosts))
    assert len(ratios) > 50
    assert sum(ratios) / len(ratios) < 1.2
    assert sum(ratio > 2 for ratio in ratios) <= (2 if tight else 0)


@pytest.mark.parametrize("hosts_max", [1, 2, 3])
def test_on_so_many_hosts_as_the_owner_allows(hosts_max: int) -> None:
    graph = chain([64] * 9)
    swarm = [host(name) for name in "abcdef"]
    placed = place(graph, swarm, batch_size=32, hosts_max=hosts_max)
    assert len({*placed.assignments.values()}) <= hosts_max
    current = placed.assignments
    again = place(graph, swarm, batch_size=32, current=current, hosts_max=hosts_max)
    assert {*again.assignments.values()} == {*current.values()}
