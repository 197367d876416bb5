"""Nobody is condemned unheard: who is about to be held failed is asked itself. Pure.

Not at once: most who are here will have refuted before, and one that all n members
ask has n to answer. An answer prolongs the time to refute; a refusal ends it.
"""

from __future__ import annotations

import heapq
import random

from p2pnet.gossip.coordinates import Coordinates
from p2pnet.gossip.events import GossipConfig, MemberChanged, Send
from p2pnet.gossip.messages import Kinds
from p2pnet.gossip.packing import Packer
from p2pnet.gossip.pending import Asked, Pending, Purpose
from p2pnet.gossip.table import Table


class Inquiries:
    """When to ask which convict."""

    def __init__(
        self,
        config: GossipConfig,
        table: Table,
        packer: Packer,
        pending: Pending,
        coordinates: Coordinates,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._table = table
        self._packer = packer
        self._pending = pending
        self._coordinates = coordinates
        self._rng = rng
        self._due: list[tuple[float, str]] = []  # a heap

    def deadline(self) -> float | None:
        """When `ask` is wanted."""
        return self._due[0][0] if self._due else None

    def plan(self, now: float) -> None:
        """Takes in whom the table convicted: each is asked about half of its time through."""
        for until, peer_id in self._table.convicted:
            wait_s = (until - now) * self._rng.uniform(0.4, 0.6)
            heapq.heappush(self._due, (now + wait_s, peer_id))
        self._table.convicted.clear()

    def ask(self, now: float) -> list[Send]:
        """Asks those that are due and convicts still."""
        sends: list[Send] = []
        while self._due and self._due[0][0] <= now:
            peer_id = heapq.heappop(self._due)[1]
            entry = self._table.entry(peer_id)
            convicted = entry is not None and entry.refutes_until is not None
            if convicted and not self._pending.full:
                data = self._packer.probe(Kinds.KIND_PROBE, peer_id, self._coordinates.here)
                sends.append(self._pending.send(Purpose.INQUIRY, peer_id, data, now))
        return sends

    def unanswered(self, asked: Asked, now: float) -> list[MemberChanged]:
        """One asked did not answer: whose machine refused is gone, else it is asked again."""
        if now - asked.sent_at < self._config.fast_failure_s:
            return self._table.refused(asked.peer_id, now)
        heapq.heappush(self._due, (now, asked.peer_id))
        return []
