"""This node among the members: it tells of itself, answers accusers, and leaves. Pure."""

from __future__ import annotations

import random

from p2pnet.gossip.coordinates import Coordinate
from p2pnet.gossip.detector import Detector
from p2pnet.gossip.events import Description, Effect, GossipConfig
from p2pnet.gossip.news import News
from p2pnet.gossip.ourselves import Ourselves
from p2pnet.gossip.statements import OpenAccusation, OpenAdvert
from p2pnet.gossip.table import Table


class Presence:
    """Our advert, in the table and in the news whenever it changes; a client has none."""

    def __init__(
        self,
        ourselves: Ourselves,
        config: GossipConfig,
        table: Table,
        detector: Detector,
        news: News,
        rng: random.Random,
        *,
        client: bool,
    ) -> None:
        self._ourselves = ourselves
        self._config = config
        self._table = table
        self._detector = detector
        self._news = news
        self._rng = rng
        self._client = client

    @property
    def left(self) -> bool:
        """True once we said that we go."""
        return self._ourselves.left

    @property
    def refute_at(self) -> float | None:
        """When `refute` is wanted."""
        return self._ourselves.refute_at

    def describe(self, description: Description, now: float) -> list[Effect]:
        """We are different from now on."""
        return self._tell(now) if self._ourselves.describe(description) else []

    def moved(self, here: Coordinate, now: float) -> list[Effect]:
        """We measured where we are; most such moves are not worth telling."""
        # All members together tell about one such move a second, however many they are.
        pause_s = max(
            self._config.coordinate_s, self._config.coordinate_member_s * self._table.live
        )
        pause_s *= self._rng.uniform(0.5, 1.5)
        moved = not self._client and self._ourselves.moved(here, now, pause_s)
        return self._tell(now) if moved else []

    def met(self, advert: OpenAdvert, now: float) -> list[Effect]:
        """An advert in our name came by."""
        return self._tell(now) if not self._client and self._ourselves.met(advert) else []

    def accused(self, accusation: OpenAccusation, now: float) -> list[Effect]:
        """Somebody accuses us, who are here."""
        if self._client:
            return []
        # One that nobody counts is answered all the same, for views may differ; but
        # rarely, or any stranger could have all of us tell of each of us for ever.
        counts = self._table.counts(accusation, now)
        if not self._ourselves.accused(accusation.incarnation, now, counts=counts):
            return []
        if counts:
            self._detector.accused(now)
        self._table.refuted(accusation, now)
        return self.refute(now)  # at once, for the answer to carry it

    def refute(self, now: float) -> list[Effect]:
        """Refutes what we are accused of, if it is time."""
        return self._tell(now) if self._ourselves.refute(now) else []

    def leave(self, now: float) -> list[Effect]:
        """We go."""
        self._ourselves.leave()
        return self._tell(now)

    def _tell(self, now: float) -> list[Effect]:
        if self._client:
            return []
        advert = self._ourselves.advert()
        changes = self._table.take_advert(advert, now)
        if changes is None:
            return []
        self._news.spread(advert, now)
        return list(changes)
