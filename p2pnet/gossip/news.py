"""News pushed to a few random members, at once or with the next ones. Pure.

What is told on the way, on probes and answers, is `packing`'s and `rumours`'.
"""

from __future__ import annotations

import math
import random

from p2pnet.bounded import keep_latest
from p2pnet.gossip.events import GossipConfig, Send, State
from p2pnet.gossip.messages import Kinds
from p2pnet.gossip.packing import Packer
from p2pnet.gossip.pending import Pending, Purpose
from p2pnet.gossip.statements import OpenAccusation, OpenAdvert
from p2pnet.gossip.table import Table

_BURST = 5.0
_ADVERTS_A_S = 1.0
_TOLD_MAX = 4096


class News:
    """What is to be told, and when the next push is due; a client has none."""

    def __init__(
        self,
        config: GossipConfig,
        table: Table,
        packer: Packer,
        pending: Pending,
        rng: random.Random,
        *,
        client: bool,
    ) -> None:
        self._config = config
        self._table = table
        self._packer = packer
        self._pending = pending
        self._rng = rng
        self._client = client
        self._pushed_at = -math.inf
        # How many adverts of each member may be told, and since when it is so.
        self._allowed: dict[str, tuple[float, float]] = {}
        self.push_at: float | None = None  # when `push` is wanted

    def spread(self, statement: OpenAdvert | OpenAccusation, now: float) -> None:
        """This is new."""
        if self._client or not self._may_tell(statement, now):
            return
        self._packer.spread(statement)
        if self.push_at is None:
            self.push_at = max(now, self._pushed_at + self._config.push_interval_s)

    def _may_tell(self, statement: OpenAdvert | OpenAccusation, now: float) -> bool:
        # Whoever signs a new advert every moment shall not keep everybody busy with it:
        # what is not told now, the next exchange of digests brings.
        if isinstance(statement, OpenAccusation):
            return True
        left, at = self._allowed.get(statement.peer_id, (_BURST, now))
        left = min(_BURST, left + _ADVERTS_A_S * (now - at))
        may = left >= 1.0
        keep_latest(self._allowed, statement.peer_id, (left - may, now), _TOLD_MAX)
        return may

    def push(self, now: float) -> list[Send]:
        """Tells a few."""
        self.push_at = None
        self._pushed_at = now
        sends: list[Send] = []
        for peer_id in self._table.sample(self._rng, self._config.fanout, State.ALIVE):
            if not self._pending.full:
                data = self._packer.news(Kinds.KIND_NEWS)
                if data is not None:
                    sends.append(self._pending.send(Purpose.NEWS, peer_id, data, now))
        return sends
