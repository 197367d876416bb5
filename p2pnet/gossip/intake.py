"""What others say, verified and taken: into the table, and on into the news. Pure."""

from __future__ import annotations

from p2pnet.gossip.detector import Detector
from p2pnet.gossip.events import Effect
from p2pnet.gossip.messages import Message
from p2pnet.gossip.news import News
from p2pnet.gossip.packing import Packer
from p2pnet.gossip.presence import Presence
from p2pnet.gossip.statements import (
    OpenAccusation,
    OpenAdvert,
    open_accusation,
    open_advert,
    raw_of,
)
from p2pnet.gossip.table import Table
from p2pnet.keys import peer_id_of


class Intake:
    """Hands each statement to whom it concerns; those about us to our `presence`."""

    def __init__(
        self, table: Table, detector: Detector, packer: Packer, news: News, presence: Presence
    ) -> None:
        self._table = table
        self._detector = detector
        self._packer = packer
        self._news = news
        self._presence = presence

    def verified(self, message: Message) -> tuple[list[OpenAdvert], list[OpenAccusation]]:
        """The statements of a message, less the adverts that are known already.

        Raises:
            MalformedError, ForgedError: one of them is none.
        """
        adverts = []
        for signed in message.adverts:
            held = self._table.entry(peer_id_of(signed.public_key))
            # Else known, and verified then; but one who is gone is told of again.
            if held is None or not held.state.live or held.advert.raw != raw_of(signed):
                adverts.append(open_advert(signed))
        return adverts, [open_accusation(signed) for signed in message.accusations]

    def take(
        self,
        adverts: list[OpenAdvert],
        accusations: list[OpenAccusation],
        now: float,
        *,
        news: bool,
    ) -> tuple[list[str], list[Effect]]:
        """Returns of whom we know better, and what changed.

        News are passed on; of what comparing two tables brought up only what changes
        a member already known: what a newcomer learns is no news to others.
        """
        effects: list[Effect] = []
        older: list[str] = []
        for advert in adverts:
            held = self._table.entry(advert.peer_id)
            if advert.peer_id == self._table.me:
                effects += self._presence.met(advert, now)
            elif held is not None and held.advert.order > advert.order:
                older.append(advert.peer_id)
            elif held is not None and held.advert.order == advert.order:
                if not held.state.live:  # whoever tells of it does not know that it is gone
                    older.append(advert.peer_id)
            else:
                effects += self._take_advert(advert, now, spread=news or held is not None)
        for accusation in accusations:
            if accusation.subject == self._table.me:
                effects += self._presence.accused(accusation, now)
            else:
                effects += self._take_accusation(accusation, now)
        return older, effects

    def _take_advert(self, advert: OpenAdvert, now: float, *, spread: bool) -> list[Effect]:
        held = self._table.entry(advert.peer_id)
        accusations = self._table.accusations(advert.peer_id)
        changes = self._table.take_advert(advert, now)
        if changes is None:
            return []
        if held is not None and advert.incarnation > held.advert.incarnation:
            self._packer.refuted(accusations)
            if any(a.accuser == self._table.me for a in accusations):
                self._detector.refuted(advert.peer_id, now)
        if spread:
            self._news.spread(advert, now)
        return list(changes)

    def _take_accusation(self, accusation: OpenAccusation, now: float) -> list[Effect]:
        changes = self._table.take_accusation(accusation, now)
        if changes is None:
            return []
        if accusation.failed:
            self._news.spread(accusation, now)
        self._detector.look(accusation.subject, now)
        return list(changes)
