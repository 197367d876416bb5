"""What this node says against others, and to whom. Pure."""

from __future__ import annotations

from p2pnet.gossip.events import Accused, Effect
from p2pnet.gossip.news import News
from p2pnet.gossip.packing import Packer
from p2pnet.gossip.pending import Pending, Purpose
from p2pnet.gossip.statements import build_accusation
from p2pnet.gossip.table import Table
from p2pnet.keys import KeyPair


class Accuser:
    """Signs what the detector finds; the table counts it as one voice."""

    def __init__(
        self, keypair: KeyPair, table: Table, packer: Packer, pending: Pending, news: News
    ) -> None:
        self._keypair = keypair
        self._table = table
        self._packer = packer
        self._pending = pending
        self._news = news

    def accuse(self, peer_id: str, failed: bool, now: float) -> list[Effect]:
        """Accuses a member of having failed, or else of being silent."""
        member = self._table.get(peer_id)
        if member is None:
            return []
        accusation = build_accusation(
            self._keypair, peer_id, incarnation=member.advert.incarnation, failed=failed
        )
        changes = self._table.take_accusation(accusation, now)
        if changes is None:
            return []
        effects: list[Effect] = [Accused(peer_id, failed), *changes]
        if failed:
            self._news.spread(accusation, now)
            return effects
        # A suspicion concerns those who may share it; the suspect hears of it when probed.
        data = self._packer.accusation(accusation)
        for observer in self._table.observers(peer_id):
            if observer != self._table.me and not self._pending.full:
                effects.append(self._pending.send(Purpose.NEWS, observer, data, now))
        return effects
