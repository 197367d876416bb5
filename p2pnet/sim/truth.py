"""What an answer should be, found by looking at every machine. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from p2pnet.dht.keyspace import peer_position, position
from p2pnet.sim.machine import Machine


def nearest(machines: Iterable[Machine], key: bytes, n: int) -> list[str]:
    """The ids of the `n` machines nearest to a key, nearest first."""
    target = position(key)
    ids = (machine.peer_id for machine in machines)
    return heapq.nsmallest(n, ids, lambda peer_id: peer_position(peer_id) ^ target)
