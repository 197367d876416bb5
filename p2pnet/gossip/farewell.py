"""Leaving: those near us and a few others are told, then we may go. Pure."""

from __future__ import annotations

import random

from p2pnet.gossip.events import Departed, Effect, GossipConfig, State
from p2pnet.gossip.messages import Kinds
from p2pnet.gossip.packing import Packer
from p2pnet.gossip.pending import Pending, Purpose
from p2pnet.gossip.presence import Presence
from p2pnet.gossip.table import Table


class Farewell:
    """Tells that we go, and when all who were told have answered or cannot."""

    def __init__(
        self,
        config: GossipConfig,
        table: Table,
        packer: Packer,
        pending: Pending,
        presence: Presence,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._table = table
        self._packer = packer
        self._pending = pending
        self._presence = presence
        self._rng = rng

    def leave(self, now: float) -> list[Effect]:
        """Tells those who watch us, those whom we watch, and some at random."""
        me = self._table.me
        told = [*self._table.observers(me), *self._table.subjects()]
        told += self._table.sample(self._rng, self._config.fanout, State.ALIVE)
        effects = self._presence.leave(now)
        for peer_id in dict.fromkeys(told):
            data = self._packer.news(Kinds.KIND_NEWS, (me,))
            if data is not None:
                effects.append(self._pending.send(Purpose.FAREWELL, peer_id, data, now))
        return [*effects, *self.departed()]

    def departed(self) -> list[Effect]:
        """A request ended: with the last farewell we are gone."""
        waiting = not self._presence.left or self._pending.any(Purpose.FAREWELL)
        return [] if waiting else [Departed()]
