"""What a training step costs, and where: what placement, prediction and rebalancing share. Pure.

A view is rows of `HostView`, and everything is reckoned from it in whole nanoseconds, so
that sums do not depend on their order and two orchestrators with the same rows compute the
same. A row is what the peer's own advert says, coordinate included: adverts are gossiped
and so the same everywhere, while what one node has measured itself is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from p2pnet.gossip.coordinates import AXES, Coordinate
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph

# What a step costs a VNode beside its FLOPs. Its kernels and its optimizer take 0.5 ms (64 and
# 256 wide Linears with Adam in one stage, one core); the rest has small networks share hosts
# by count, so that the loss of one takes little, and a noisy measurement of speed decides nothing.
STEP_NS = 3_000_000
# What an edge between two hosts costs beside its round trip, an activation there and its
# gradient back, once a micro-batch: a hop of 1 KiB takes 0.58 ms, and of 128 KiB both ways
# 0.6 ms of CPU on each side (docs/performance.md); 16 MiB go at 240 to 390 MB/s.
EDGE_NS = 1_000_000
EDGE_CPU_NS = 600_000
NEAR_BYTES_PER_S = 300_000_000
CPU_BYTES_PER_S = 700_000_000
# Of a host that has not measured its speed yet, for each CPU that it lends.
GFLOPS_A_CPU = 4.0
GFLOPS_MIN, GFLOPS_MAX = 0.1, 1e6
TRUST_MIN = 0.01
# Round trips are told apart in steps of this. What is below is the same place: of a
# coordinate on a busy machine as much is noise.
NEAR_NS = 10_000_000
# Between places, where nobody has measured it: the uplink of a good home line, 100 Mbit/s.
LINK_BYTES_PER_S = 12_500_000


@dataclass(frozen=True, slots=True)
class HostView:
    """A PNode that can host.

    `memory_free_bytes` and `vnodes` are as it says itself, so they include what
    it hosts of this network already. `gflops` is 0 where it was not measured. `trust`: 1 is
    neutral, one of half that counts as half as fast, nothing goes to one of 0.
    """

    peer_id: str
    cpus: float
    memory_free_bytes: int
    gflops: float
    vnodes: int = 0
    ip_group: str = ""
    trust: float = 1.0
    coordinate: Coordinate | None = None
    suspect: bool = False  # somebody says that it is gone, and this is not settled yet


def trust_of(host: HostView) -> float:
    """Above 0, at most 1."""
    return max(TRUST_MIN, min(host.trust, 1.0))


def speed_of(host: HostView) -> float:
    """In GFLOP/s, which are FLOPs a nanosecond; less where it is trusted less."""
    gflops = host.gflops if host.gflops > 0 else GFLOPS_A_CPU * host.cpus
    # In this order NaN, which a peer may send, becomes the least.
    return max(GFLOPS_MIN, min(gflops, GFLOPS_MAX)) * trust_of(host)


def step_ns(host: HostView) -> int:
    """What a VNode costs there beside its FLOPs."""
    return int(STEP_NS / trust_of(host))


def flops_of(graph: CompiledGraph, vnode: str) -> int:
    """Of one sample, forward and back, through every node of the VNode."""
    nodes = map(graph.node, graph.entries(vnode))
    return sum(node.flops_forward + node.flops_backward for node in nodes)


def sources_of(graph: CompiledGraph, vnode: str) -> tuple[str, ...]:
    """The VNodes that give the inputs of its nodes, each once; itself and inputs left out."""
    refs = (ref for entry in graph.entries(vnode) for ref in graph.node(entry).inputs)
    homes = (graph.home(ref) for ref in refs if ref not in graph.inputs and ref != TARGET)
    return tuple(dict.fromkeys(home for home in homes if home != vnode))


def targets_of(graph: CompiledGraph, vnode: str) -> tuple[str, ...]:
    """The VNodes that take the outputs of its nodes, each once; itself left out."""
    ends = (end for entry in graph.entries(vnode) for end, _ in graph.consumers(entry))
    return tuple(dict.fromkeys(home for end in ends if (home := graph.home(end)) != vnode))


def hop_ns(round_trip_ns: int, size_bytes: int) -> int:
    """What the way of an edge between two places costs: an activation there, its gradient back."""
    if not round_trip_ns:
        return 0
    return round_trip_ns + 2 * size_bytes * 1_000_000_000 // LINK_BYTES_PER_S


def edge_ns(round_trip_ns: int, size_bytes: int) -> int:
    """How long what is behind an edge between two hosts waits for it, the way included."""
    near_ns = 2 * size_bytes * 1_000_000_000 // NEAR_BYTES_PER_S
    return EDGE_NS + (hop_ns(round_trip_ns, size_bytes) or near_ns)


def edge_cpu_ns(host: HostView, size_bytes: int) -> int:
    """What an edge to or from another host takes of a host's own time."""
    cpu_ns = EDGE_CPU_NS + 2 * size_bytes * 1_000_000_000 // CPU_BYTES_PER_S
    return int(cpu_ns / trust_of(host))


class Distances:
    """Round trips between hosts, by their index, from coordinates (Vivaldi).

    A host that does not say where it is counts as being as far from everybody as those
    that do are from each other on average.
    """

    def __init__(self, hosts: Sequence[HostView]) -> None:
        self._places = [None if h.coordinate is None else _micros(h.coordinate) for h in hosts]
        self._rows: dict[int, list[int]] = {}
        # By peer id, which is a hash, neighbours in this order are pairs drawn at random.
        order = sorted(range(len(hosts)), key=lambda index: hosts[index].peer_id)
        known = [place for index in order if (place := self._places[index]) is not None]
        pairs = [_apart_ns(a, [b])[0] for a, b in pairwise(known)]
        # Rounded up, so that nobody is near to two places that are far from each other.
        self._unknown_ns = -(-sum(pairs) // max(1, len(pairs) * NEAR_NS)) * NEAR_NS
        self._silent = [index for index, place in enumerate(self._places) if place is None]
        self._filled = [place or _NOWHERE for place in self._places]
        self.matter = any(pairs)

    def between_ns(self, one: int, other: int) -> int:
        """From one host to another and back; a multiple of NEAR_NS."""
        if one == other or not self.matter:
            return 0
        here, there = self._places[one], self._places[other]
        return self._unknown_ns if here is None or there is None else _apart_ns(here, [there])[0]

    def row(self, index: int) -> list[int]:
        """From one host to every host, in ns; multiples of NEAR_NS."""
        row = self._rows.get(index)
        if row is None:
            here = self._places[index]
            if here is None:
                row = [self._unknown_ns] * len(self._places)
            else:
                row = _apart_ns(here, self._filled)
                for silent in self._silent:
                    row[silent] = self._unknown_ns
            row[index] = 0
            self._rows[index] = row
        return row


_Place = tuple[tuple[int, ...], int]  # axes and height, µs
_NOWHERE: _Place = ((0,) * AXES, 0)


def _micros(coordinate: Coordinate) -> _Place:
    return tuple(round(axis * 1e6) for axis in coordinate.axes), round(coordinate.height * 1e6)


def _apart_ns(here: _Place, places: Sequence[_Place]) -> list[int]:
    # Of whole numbers below 2^26 the root of the sum of squares is never so close to a half
    # that the last bit, which may differ between machines, decides how it is rounded.
    axes, height = here
    near_us, dist = NEAR_NS // 1000, math.dist
    return [(round(dist(axes, there)) + height + up) // near_us * NEAR_NS for there, up in places]
