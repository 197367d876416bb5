"""Anti-entropy: now and then digests are compared with one random member. Pure.

It mends what news missed (Demers et al., PODC 1987, section 1.3). Who asks sends a
summary; the answer holds what differs in the buckets that it tells; and the rest is
what the asker knows of those and the other does not. A ring that one summary does
not cover takes several rounds, each from where the last one ended.
"""

from __future__ import annotations

import random

from p2pnet.gossip.digests import depth_for
from p2pnet.gossip.events import Effect, GossipConfig, Send, State, Synced
from p2pnet.gossip.messages import Message
from p2pnet.gossip.packing import Packer
from p2pnet.gossip.pending import Asked, Pending, Purpose
from p2pnet.gossip.statements import raw_of
from p2pnet.gossip.table import Table


class Syncing:
    """When to compare, with whom, and from which bucket on."""

    def __init__(
        self,
        config: GossipConfig,
        table: Table,
        packer: Packer,
        pending: Pending,
        rng: random.Random,
        now: float,
    ) -> None:
        self._config = config
        self._table = table
        self._packer = packer
        self._pending = pending
        self._rng = rng
        self._rounds = 0
        self._pause_s = config.sync_interval_s
        self._cursor = 0  # the bucket that the next sync begins with
        self._members_told = 0  # how many live members another said to know
        self.at = now + self._pause_s * rng.uniform(0.5, 1.5)  # when a round is due

    def soon(self, now: float) -> None:
        """We may have missed much."""
        self.at = min(self.at, now)

    def round(self, now: float, *, left: bool) -> list[Send]:
        """A round is due; who has left asks nobody."""
        self._pause_s = min(2 * self._pause_s, self._config.sync_interval_s)
        self.at = now + self._pause_s * self._rng.uniform(0.8, 1.2)
        if left or self._pending.full:
            return []
        chosen = self._table.sample(self._rng, 1, State.ALIVE, State.SUSPECT)
        self._rounds += 1
        if self._rounds % 3 == 0 or not chosen:
            # Two halves of a split network hold each other to have failed:
            # somebody has to look.
            chosen += self._table.sample(self._rng, 1, State.FAILED)
        return [self.sync(peer_id, now) for peer_id in chosen]

    def sync(self, peer_id: str, now: float) -> Send:
        """Asks one peer."""
        depth = depth_for(max(self._table.live, min(self._members_told, self._config.members_max)))
        summary = self._packer.summary(self._cursor, depth)
        data = self._packer.sync(peer_id, summary)
        return self._pending.send(Purpose.SYNC, peer_id, data, now, summary)

    def synced(self, asked: Asked, message: Message, now: float, *, grown: bool) -> list[Effect]:
        """A peer answered, and what it told is taken; `grown` if of members unknown before."""
        effects: list[Effect] = [Synced(asked.peer_id)]
        summary, result = asked.summary, message.result
        assert summary is not None
        buckets = 1 << summary.depth
        span = len(summary.digests)
        told = [
            index
            for index in dict.fromkeys(result.told)
            if index < buckets and (index - summary.first) % buckets < span
        ]
        rest = self._packer.rest(
            summary.depth, told, {raw_of(s) for s in (*message.adverts, *message.accusations)}
        )
        if rest is not None:
            effects.append(self._pending.send(Purpose.REST, asked.peer_id, rest, now))
        self._members_told = result.members
        self._cursor = summary.first + span
        if result.more:
            self._cursor = told[-1] + 1 if told else summary.first
        if grown:  # there may be more; where there surely is, at once
            self._pause_s = self._config.sync_again_s
            self.soon(now if result.more else now + self._pause_s)
        return effects
