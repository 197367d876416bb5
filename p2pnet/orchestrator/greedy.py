"""One greedy placement: VNode by VNode, each where it adds least. Pure; see `placement`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from p2pnet.orchestrator.costs import (
    Distances,
    HostView,
    flops_of,
    hop_ns,
    sources_of,
    targets_of,
)
from p2pnet.orchestrator.loads import FOREVER_NS, Loads, Work
from p2pnet.orchestrator.nearness import Arrival, Nearness
from p2pnet.orchestrator.shortage import SwarmTooSmallError, too_small
from p2pnet.orchestrator.unit import Unit, units_of
from p2pnet.units import format_size
from p2pnet.vnode.graph import CompiledGraph, Node

# A VNode stays where it is unless another host would be done in half the time:
# moving it costs its neighbours a lookup and the swarm a copy of its state.
STAY_FACTOR = 2
REJECTED_MAX = 1_000
_ALIKE_SHIFT = 3  # hosts within an eighth of the best are as good
_CHECKS_MAX = 100_000


class Ground:
    """What all placements of a network onto the same hosts begin from."""

    def __init__(
        self,
        graph: CompiledGraph,
        hosts: Sequence[HostView],
        batch_size: int,
        replicas: Mapping[str, int],
    ) -> None:
        self.graph = graph
        self.batch_size = batch_size
        self.units = units_of(graph, batch_size, replicas)
        self.loads = Loads(graph.name, hosts, (unit.work for unit in self.units))
        self.distances = Distances(self.loads.hosts)
        self.near: dict[int, list[int]] = {}
        self.sources = {vnode: sources_of(graph, vnode) for vnode in graph.vnodes()}
        self.groups = [host.ip_group or host.peer_id for host in self.loads.hosts]


class Greedy:
    """A placement in the making.

    `begin_at` is a host that the network's inputs are taken to come from.
    """

    def __init__(
        self, ground: Ground, current: Mapping[str, str], begin_at: str | None = None
    ) -> None:
        self.assignments: dict[str, str] = {}
        self.scores: dict[str, float] = {}
        self.replicas: dict[str, list[str]] = {}
        self.rejected: list[tuple[str, str, str]] = []
        self._unplaced: list[Unit] = []
        self._ground = ground
        self._graph, self._batch = ground.graph, ground.batch_size
        self._distances, self._groups = ground.distances, ground.groups
        self._loads = loads = ground.loads.copy()
        self._nearness = Nearness(loads, ground.distances, ground.near)
        self._begin_at = None if begin_at is None else loads.leaf_of[begin_at]
        self._crowd: dict[str, int] = {}  # VNodes of this network by IP group
        self._at: dict[str, tuple[int, int]] = {}  # by VNode: its host, when it is done
        self._checks_left = _CHECKS_MAX
        # Where each VNode is now, and what of its host's load and memory that takes.
        self._now: dict[str, tuple[int, int, int]] = {}
        for unit in ground.units:
            for node in unit.nodes:
                leaf = loads.leaf_of.get(current.get(node.id, ""))
                if leaf is not None:
                    need = self._graph.memory_bytes(node.id)
                    flops = flops_of(self._graph, node.id) * self._batch
                    cost = loads.cost_ns(leaf, Work(1, need, flops))
                    self._now[node.id] = leaf, cost, need
                    # Its host's own count has the VNode in it, but nothing else of it.
                    loads.charge(leaf, cost - loads.path_ns(leaf, 1, 0), 0)

    def place_all(self, units: Sequence[Unit], leaves: Sequence[int] | None = None) -> bool:
        """Places them in this order; False where one, or a replica, fits nowhere.

        `leaves`: on these hosts, one for each; else where it is best.
        """
        for unit, leaf in zip(units, leaves or itertools.repeat(None), strict=False):
            self._place(unit, leaf)
        if any(self._loads.free_bytes(leaf) < 0 for leaf in leaves or ()):
            return False
        for unit in units:
            for _ in range(unit.replicas):
                self._place_replica(unit)
        return not self._unplaced

    def too_small(self) -> SwarmTooSmallError:
        """Why it did not go."""
        hosts = self._loads.hosts
        kept = sum(need for _, _, need in self._now.values())  # ours already, so free for us
        return too_small(
            [(unit.nodes[0].id, unit.work.memory_bytes) for unit in self._unplaced],
            sum(unit.work.memory_bytes * (1 + unit.replicas) for unit in self._ground.units),
            [host.memory_free_bytes for host in hosts],
            kept,
        )

    def leaf_of(self, unit: Unit) -> int:
        """The host that a placed unit is on."""
        return self._loads.leaf_of[self.assignments[unit.nodes[0].id]]

    def stays(self, unit: Unit) -> bool:
        """Whether all of a placed unit is where it was before."""
        leaf = self.leaf_of(unit)
        return all(self._now.get(node.id, (-1,))[0] == leaf for node in unit.nodes)

    def left(self) -> tuple[list[int], list[int]]:
        """For each host: how long it is busy with all that is placed, and its free memory."""
        return self._loads.busy[:], self._loads.all_free_bytes()

    def _place(self, unit: Unit, given: int | None) -> None:
        loads, work = self._loads, unit.work
        homes = [self._now[node.id] for node in unit.nodes if node.id in self._now]
        for home, cost, need in homes:
            loads.charge(home, -cost, -need)
        self._note_rejected(unit)
        arrivals = self._arrivals(unit)
        onward = self._onward(unit)
        leaf = self._choose(work, arrivals, onward) if given is None else given
        if leaf is None:
            self._unplaced.append(unit)
            return
        adds_ns = self._adds_ns(leaf, work, arrivals, onward)
        if given is None and homes and loads.free_bytes(homes[0][0]) >= work.memory_bytes:
            at_home_ns = self._adds_ns(homes[0][0], work, arrivals, onward)
            if at_home_ns <= STAY_FACTOR * adds_ns:
                leaf, adds_ns = homes[0][0], at_home_ns
        self._put(unit, leaf)
        for node in unit.nodes:
            self.assignments[node.id] = loads.hosts[leaf].peer_id
            self.scores[node.id] = round(adds_ns / 1e6, 3)
            done = max((at + hop for at, hop in self._inputs(node, leaf)), default=0)
            flops = flops_of(self._graph, node.id) * self._batch
            self._at[node.id] = leaf, done + loads.path_ns(leaf, 1, flops)

    def _place_replica(self, unit: Unit) -> None:
        """On a host that has it not yet; in an IP group that has it not yet, if there is one."""
        loads, first = self._loads, unit.nodes[0].id
        if first not in self.assignments:
            return
        taken = [self.assignments[first], *self.replicas.get(first, ())]
        groups = [self._groups[loads.leaf_of[peer_id]] for peer_id in taken]
        spare = None
        for _, leaf in loads.first(unit.work):
            if loads.hosts[leaf].peer_id in taken:
                continue
            if self._groups[leaf] not in groups:
                break
            spare = leaf if spare is None else spare
        else:
            if spare is None:
                self._unplaced.append(unit)
                return
            leaf = spare
        self._put(unit, leaf)
        for node in unit.nodes:
            self.replicas.setdefault(node.id, []).append(loads.hosts[leaf].peer_id)

    def _put(self, unit: Unit, leaf: int) -> None:
        work, group = unit.work, self._groups[leaf]
        self._loads.charge(leaf, self._loads.cost_ns(leaf, work), work.memory_bytes)
        self._crowd[group] = self._crowd.get(group, 0) + work.vnodes

    # The choice

    def _adds_ns(
        self,
        leaf: int,
        work: Work,
        arrivals: Sequence[Arrival],
        onward: Sequence[tuple[int, int]],
    ) -> int:
        wait = self._nearness.waits_ns([leaf], arrivals, onward)[0]
        return self._loads.finish_ns(leaf, work) + wait

    def _choose(
        self,
        work: Work,
        arrivals: Sequence[Arrival],
        onward: Sequence[tuple[int, int]],
    ) -> int | None:
        """The leaf of the best host, None if it fits nowhere."""
        loads = self._loads
        found: dict[int, int] = {}
        far_ns = 0
        if arrivals or onward:
            near = self._nearness.candidates(arrivals, work)
            waits = self._nearness.waits_ns(near, arrivals, onward)
            for leaf, wait in zip(near, waits, strict=True):
                found[leaf] = loads.wanted_ns(leaf, work) + wait
            if near and arrivals:
                # Who is not next to where the last comes from is as far from it as they are.
                far_ns = self._distances.row(arrivals[0][1])[near[-1]]
        within_ns = _alike(min(found.values())) - far_ns if found else FOREVER_NS
        for wanted, leaf in itertools.islice(loads.first(work, within_ns), 1):
            found[leaf] = wanted + self._nearness.waits_ns([leaf], arrivals, onward)[0]
        if not found:
            return None
        most = _alike(min(found.values()))
        return min(
            (self._crowd.get(self._groups[leaf], 0), total, loads.rank[leaf], leaf)
            for leaf, total in found.items()
            if total <= most
        )[-1]

    def _arrivals(self, unit: Unit) -> list[Arrival]:
        """(when, from which host, bytes) of each input that another VNode gives, latest first."""
        if not self._distances.matter:
            return []
        here = {node.id for node in unit.nodes}
        arrivals = sorted(
            (
                (self._at[ref][1], self._at[ref][0], self._size_bytes(ref))
                for node in unit.nodes
                for ref in self._ground.sources[node.id]
                if ref in self._at and ref not in here
            ),
            reverse=True,
        )
        if not arrivals and self._begin_at is not None:
            return [(0, self._begin_at, 0)]
        return arrivals

    def _onward(self, unit: Unit) -> list[tuple[int, int]]:
        """(at which host, bytes) of who takes its outputs and has not been placed anew yet."""
        if not self._distances.matter or not self._now:
            return []
        here = {node.id for node in unit.nodes}
        return [
            (self._now[vnode][0], self._size_bytes(node.id))
            for node in unit.nodes
            for vnode in targets_of(self._graph, node.id)
            if vnode in self._now and vnode not in self._at and vnode not in here
        ]

    def _inputs(self, node: Node, leaf: int) -> list[tuple[int, int]]:
        if not self._distances.matter:
            return []
        row = self._distances.row(leaf)
        return [
            (self._at[ref][1], hop_ns(row[self._at[ref][0]], self._size_bytes(ref)))
            for ref in self._ground.sources[node.id]
            if ref in self._at
        ]

    def _size_bytes(self, ref: str) -> int:
        return self._graph.node(ref).output.size_bytes * self._batch

    def _note_rejected(self, unit: Unit) -> None:
        # For people, so for swarms that a person can read.
        if unit.work.memory_bytes <= self._loads.least_free_bytes:
            return
        if self._checks_left <= 0 or len(self.rejected) >= REJECTED_MAX:
            return
        free = self._loads.all_free_bytes()
        self._checks_left -= len(free)
        need = format_size(unit.work.memory_bytes)
        whole = f" with the group {unit.nodes[0].group}" if len(unit.nodes) > 1 else ""
        for leaf in [leaf for leaf, left in enumerate(free) if left < unit.work.memory_bytes]:
            reason = f"needs {need}{whole}, has {format_size(max(0, free[leaf]))} left"
            peer_id = self._loads.hosts[leaf].peer_id
            self.rejected += [(node.id, peer_id, reason) for node in unit.nodes]


def _alike(ns: int) -> int:
    return ns + (ns >> _ALIKE_SHIFT)
