"""When a placement is so much better than the present one that it is worth a move. Pure.

Moving stops a network for a moment, and a view is a guess: what was a gain half a minute
ago may be none now, and two networks that both flee to the idle host meet there. So a move
is proposed only where the foretold step gets shorter by a factor *and* by a time, where
this has been so for a while, where it pays back what moving costs, and after a pause, of
the network and of each VNode; and only so many an hour. It is never a step backwards in
safety: not to hosts that are trusted less, not more of the network into one IP group, not
onto hosts without memory for the newcomers while those who go are still there, and not
while one of the hosts is suspected or missing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from p2pnet.errors import UsageError
from p2pnet.orchestrator.costs import (
    LINK_BYTES_PER_S,
    HostView,
    flops_of,
    speed_of,
    step_ns,
    trust_of,
)
from p2pnet.orchestrator.placement import place
from p2pnet.orchestrator.predict import least_step_s, predict
from p2pnet.vnode.graph import CompiledGraph

HOUR_S = 3600.0
RESTART_S = 2.0  # a claim, the allocations, and the feeder's way back


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """How sure a gain has to be."""

    factor: float = 1.5  # of the step's time
    gain_s: float = 0.02  # a step
    held_s: float = 90.0  # so long the gain has been there, whenever it was looked for
    payback_s: float = 300.0  # of training, by which the move has cost nothing
    pause_s: float = 600.0  # since the last relocation of anything, by whatever reason
    vnode_pause_s: float = 1800.0  # since that of the same VNode
    moves_an_hour: int = 3


@dataclass(frozen=True, slots=True)
class Move:
    """A better placement of the whole network, and what speaks for it."""

    placement: Mapping[str, str]
    moved: tuple[str, ...]  # VNodes
    before_s: float  # a step
    after_s: float
    reason: str


def improve(
    graph: CompiledGraph,
    hosts: Sequence[HostView],
    current: Mapping[str, str],
    *,
    batch_size: int,
    hysteresis: Hysteresis = Hysteresis(),
) -> Move | None:
    """The best move there is now, by the factor, the gain, the payback and the safety rules.

    `hosts` are those that may be used, with what they host now, this network included.
    """
    by_id = {host.peer_id: host for host in hosts}
    used = [by_id.get(current.get(vnode, "")) for vnode in graph.vnodes()]
    now_on = [host for host in used if host is not None]
    if len(now_on) < len(used) or any(host.suspect for host in now_on):
        return None
    floor = max(trust_of(host) for host in now_on)
    on = frozenset(host.peer_id for host in now_on)
    choice = [
        host
        for host in hosts
        if host.peer_id in on or (trust_of(host) >= floor and not host.suspect)
    ]
    empty = _without(graph, choice, current)
    before = predict(graph, empty, current, batch_size=batch_size)
    least_s = least_step_s(graph, empty, batch_size=batch_size)
    if not _pays(before.step_s, least_s, hysteresis):
        return None
    # Few go where the others stay; if that is not enough, all may.
    for rows, stay in ((choice, current), (empty, None)):
        try:
            placed = place(graph, rows, batch_size=batch_size, current=stay).assignments
        except UsageError:
            continue
        placed = _spread(graph, by_id, current, placed, batch_size)
        after = predict(graph, empty, placed, batch_size=batch_size)
        moved = tuple(vnode for vnode in graph.vnodes() if placed[vnode] != current[vnode])
        cost_s = RESTART_S + graph.cut_every / 2 * before.step_s
        cost_s += sum(graph.node(vnode).state_bytes for vnode in moved) / LINK_BYTES_PER_S
        if (
            _pays(before.step_s, after.step_s, hysteresis, cost_s)
            and _has_room(graph, by_id, placed, moved)
            and _as_safe(by_id, current, placed)
        ):
            reason = (
                f"a step would take {after.step_s * 1e3:.0f} ms instead of "
                f"{before.step_s * 1e3:.0f}"
            )
            return Move(placed, moved, before.step_s, after.step_s, reason)
    return None


def _pays(before_s: float, after_s: float, rules: Hysteresis, cost_s: float = 0.0) -> bool:
    gain_s = before_s - after_s
    return (
        gain_s >= rules.gain_s
        and before_s >= rules.factor * after_s
        and cost_s * before_s <= gain_s * rules.payback_s
    )


class Rebalancer:
    """Whether to move a network now. Asked every half minute or so, for as long as it lives.

    It sees by itself what has been moved since it was asked last, by whomever.
    """

    def __init__(
        self,
        graph: CompiledGraph,
        *,
        batch_size: int,
        hysteresis: Hysteresis = Hysteresis(),
    ) -> None:
        self._graph = graph
        self._batch = batch_size
        self._hysteresis = hysteresis
        self._seen: Mapping[str, str] = {}
        self._relocated_at: float | None = None
        self._moved_at: dict[str, float] = {}
        self._better_since: float | None = None
        self._wanted: frozenset[str] = frozenset()  # to move, ever since
        self._proposed: deque[float] = deque(maxlen=max(1, hysteresis.moves_an_hour))
        self._looked_at: tuple[tuple[HostView, ...], Mapping[str, str]] | None = None
        self._found: Move | None = None

    def improve(
        self, hosts: Sequence[HostView], current: Mapping[str, str], now: float
    ) -> Move | None:
        """A move that is worth it now, or None. `hosts` as for `improve`."""
        rules = self._hysteresis
        self._notice(current, now)
        found = self._look(hosts, current)
        if found is None:
            self._better_since = None
            return None
        # A gain that is another one each time has not been there for a while.
        same = [vnode for vnode in found.moved if vnode in self._wanted]
        if self._better_since is None or not same:
            self._better_since = now
            same = list(found.moved)
        self._wanted = frozenset(same)
        rested = self._relocated_at is None or now - self._relocated_at >= rules.pause_s
        tired = any(
            now - self._moved_at.get(vnode, float("-inf")) < rules.vnode_pause_s
            for vnode in found.moved
        )
        spent = len(self._proposed) == self._proposed.maxlen and now - self._proposed[0] < HOUR_S
        if now - self._better_since < rules.held_s or not rested or tired or spent:
            return None
        self._proposed.append(now)
        self._relocated_at = now  # whether or not it comes to it
        self._better_since = None
        return found

    def _notice(self, current: Mapping[str, str], now: float) -> None:
        moved = [vnode for vnode in current if self._seen.get(vnode) not in (None, current[vnode])]
        for vnode in moved:
            self._moved_at[vnode] = now
        if moved:
            self._relocated_at = now
        self._seen = dict(current)

    def _look(self, hosts: Sequence[HostView], current: Mapping[str, str]) -> Move | None:
        """Looks again only where something is different: a large network takes a second."""
        view = tuple(sorted(hosts, key=lambda host: host.peer_id)), dict(current)
        if view != self._looked_at:
            self._looked_at = view
            self._found = improve(
                self._graph,
                view[0],
                current,
                batch_size=self._batch,
                hysteresis=self._hysteresis,
            )
        return self._found


def _without(
    graph: CompiledGraph, hosts: Sequence[HostView], current: Mapping[str, str]
) -> list[HostView]:
    """The same hosts as if nothing of this network were there."""
    ours: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for vnode in graph.vnodes():
        ours[current[vnode]] += 1
        kept[current[vnode]] += graph.memory_bytes(vnode)
    return [
        replace(
            host,
            vnodes=max(0, host.vnodes - ours[host.peer_id]),
            memory_free_bytes=host.memory_free_bytes + kept[host.peer_id],
        )
        for host in hosts
    ]


def _has_room(
    graph: CompiledGraph,
    hosts: Mapping[str, HostView],
    placed: Mapping[str, str],
    moved: Sequence[str],
) -> bool:
    """VNodes are loaded at their new hosts before those that go from there are dropped."""
    arriving: Counter[str] = Counter()
    for vnode in moved:
        arriving[placed[vnode]] += graph.memory_bytes(vnode)
    return all(need <= hosts[peer_id].memory_free_bytes for peer_id, need in arriving.items())


def _as_safe(
    hosts: Mapping[str, HostView], current: Mapping[str, str], placed: Mapping[str, str]
) -> bool:
    if any(trust_of(hosts[placed[v]]) < trust_of(hosts[current[v]]) for v in placed):
        return False
    _, largest = _largest_group(hosts, placed)
    return largest <= _group_max(hosts, current)


def _spread(
    graph: CompiledGraph,
    hosts: Mapping[str, HostView],
    current: Mapping[str, str],
    placed: Mapping[str, str],
    batch_size: int,
) -> Mapping[str, str]:
    """The same without the moves that are worth least into an IP group that would have too many."""
    group, largest = _largest_group(hosts, placed)
    too_many = largest - _group_max(hosts, current)
    if too_many <= 0:
        return placed

    def saves(vnodes: Sequence[str]) -> float:
        flops = batch_size * sum(flops_of(graph, vnode) for vnode in vnodes)
        old, new = hosts[current[vnodes[0]]], hosts[placed[vnodes[0]]]
        busy = (old.vnodes - new.vnodes) * len(vnodes)
        return flops / speed_of(old) - flops / speed_of(new) + busy * step_ns(old)

    units: dict[tuple[str, str], list[str]] = {}
    for vnode in graph.vnodes():
        if placed[vnode] != current[vnode] and _group(hosts[placed[vnode]]) == group:
            name = graph.node(vnode).group
            units.setdefault(("group", name) if name else ("", vnode), []).append(vnode)
    out = dict(placed)
    for _, unit in sorted((saves(unit), unit) for unit in units.values()):
        if too_many > 0 and _group(hosts[current[unit[0]]]) != group:
            out.update({vnode: current[vnode] for vnode in unit})
            too_many -= len(unit)
    return out


def _group(host: HostView) -> str:
    return host.ip_group or host.peer_id


def _group_max(hosts: Mapping[str, HostView], current: Mapping[str, str]) -> int:
    """How many VNodes one IP group may have: half of them, or what one has already."""
    return max(_largest_group(hosts, current)[1], len(current) // 2)


def _largest_group(hosts: Mapping[str, HostView], placement: Mapping[str, str]) -> tuple[str, int]:
    """The IP group with most VNodes, and how many these are."""
    groups = Counter(_group(hosts[peer]) for peer in placement.values())
    return max(groups.items(), key=lambda item: (item[1], item[0]))
