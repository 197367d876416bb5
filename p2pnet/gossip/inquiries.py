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

_FULL_S = 0.1  # until it is tried again, where too many requests are under way
_SLACK_S = 0.2  # what an answer may take beyond its time


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
        self._asked: dict[str, None] = {}  # convicts that had their chance to answer
        self._under_way: dict[str, None] = {}

    def deadline(self) -> float | None:
        """When `ask` is wanted."""
        return self._due[0][0] if self._due else None

    def plan(self, now: float) -> None:
        """Takes in whom the table convicted: each is asked about half of its time through."""
        for until, peer_id in self._table.convicted:
            self._asked.pop(peer_id, None)
            wait_s = (until - now) * self._rng.uniform(0.4, 0.6)
            heapq.heappush(self._due, (now + wait_s, peer_id))
        self._table.convicted.clear()

    def ask(self, now: float) -> list[Send]:
        """Asks those that are due and convicts still."""
        sends: list[Send] = []
        while self._due and self._due[0][0] <= now:
            peer_id = heapq.heappop(self._due)[1]
            entry = self._table.entry(peer_id)
            if peer_id in self._under_way:
                continue  # one question at a time
            if entry is None or entry.refutes_until is None:
                self._asked.pop(peer_id, None)
            elif self._pending.full:
                self.again(peer_id, now + _FULL_S)
                break
            else:
                if peer_id not in self._asked:
                    self._asked[peer_id] = None
                    self._table.hear(peer_id, now + self._config.probe_timeout_s + _SLACK_S)
                self._under_way[peer_id] = None
                data = self._packer.probe(Kinds.KIND_PROBE, peer_id, self._coordinates.here)
                sends.append(self._pending.send(Purpose.INQUIRY, peer_id, data, now))
        return sends

    def again(self, peer_id: str, at: float) -> None:
        """One is to be asked again."""
        self._under_way.pop(peer_id, None)
        heapq.heappush(self._due, (at, peer_id))

    def answered(self, peer_id: str, now: float) -> None:
        """One asked is here: it has its time once more, and is asked once more in it."""
        self._asked.pop(peer_id, None)
        self._table.answered(peer_id, now)
        self.again(peer_id, now + self._table.window_s / 2)

    def unanswered(self, asked: Asked, now: float, *, cut_off: bool) -> list[MemberChanged]:
        """One asked did not answer: whose machine refused is gone, else it is asked again.

        `cut_off`: we reach nobody, so that a refusal may be our own network's.
        """
        if now - asked.sent_at < self._config.fast_failure_s and not cut_off:
            self._asked.pop(asked.peer_id, None)
            self._under_way.pop(asked.peer_id, None)
            return self._table.refused(asked.peer_id, now)
        self.again(asked.peer_id, now + (_FULL_S if cut_off else 0.0))
        return []
