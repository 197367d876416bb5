"""What is missing where a network does not fit into a swarm. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from p2pnet.errors import UsageError
from p2pnet.units import format_size


class SwarmTooSmallError(UsageError):
    """The network does not fit into the memory that is free.

    `memory_missing_bytes` is how much there would have to be more of it, 0 where there is
    enough but in too small pieces; `peers_missing` is how many further peers would do, each
    with `peer_bytes` free: as much as the largest here, or as the largest VNode needs.
    """

    def __init__(
        self, text: str, *, memory_missing_bytes: int, peers_missing: int, peer_bytes: int
    ) -> None:
        super().__init__(text)
        self.memory_missing_bytes = memory_missing_bytes
        self.peers_missing = peers_missing
        self.peer_bytes = peer_bytes


def too_small(
    unplaced: Sequence[tuple[str, int]],
    total_bytes: int,
    free_bytes: Sequence[int],
    ours_bytes: int,
) -> SwarmTooSmallError:
    """The error for people.

    Args:
        unplaced: (VNode, bytes) of what was left over, at least one.
        total_bytes: what the whole network needs.
        free_bytes: of each host that was there.
        ours_bytes: of what these hosts have in use, what is this network's already.
    """
    largest = max(free_bytes, default=0)
    each = max(largest, max(need for _, need in unplaced))
    peers = _bins([need for _, need in unplaced], each)
    missing = max(0, total_bytes - sum(free_bytes) - ours_bytes)
    more = f"{peers} more peer" if peers == 1 else f"{peers} more peers"
    if not free_bytes:
        text = (
            f"no peer here hosts VNodes: start one with `p2pnet join`; the network needs "
            f"{format_size(total_bytes)}, on one peer or on several"
        )
        return SwarmTooSmallError(
            text, memory_missing_bytes=missing, peers_missing=peers, peer_bytes=each
        )
    have = "1 peer has" if len(free_bytes) == 1 else f"{len(free_bytes)} peers have"
    free = format_size(sum(free_bytes) + ours_bytes)
    if missing:
        lack = f"{format_size(missing)} more than the {free} that {have} free"
    else:
        lack = f"and {have} {free} free, but in pieces that are too small or too few"
    vnode, need = unplaced[0]
    most = f"and the most that a peer has free is {format_size(largest)}"
    if need <= largest:
        most = "and finds no room once the others are placed"
    text = (
        f"the swarm is too small: VNode {vnode} needs {format_size(need)} {most}; "
        f"the network needs {format_size(total_bytes)} in all, {lack}: "
        f"{more} with {format_size(each)} free would do, or larger --memory where peers join"
    )
    return SwarmTooSmallError(
        text, memory_missing_bytes=missing, peers_missing=peers, peer_bytes=each
    )


def _bins(needs: Sequence[int], size: int) -> int:
    """How many boxes of that size hold them all: next fit, the largest first."""
    boxes, room = 0, 0
    for need in sorted(needs, reverse=True):
        if need > room:
            boxes, room = boxes + 1, size
        room -= need
    return boxes
