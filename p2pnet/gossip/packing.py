"""What goes into a message: the table's and the rumours' statements, within bounds. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

from p2pnet.gossip.events import GossipConfig, State
from p2pnet.gossip.messages import Kind, Parcel, write_message
from p2pnet.gossip.rumours import Rumours
from p2pnet.gossip.statements import OpenAccusation, OpenAdvert, Versions
from p2pnet.gossip.table import Table


class Packer:
    """Writes messages of each kind."""

    def __init__(
        self,
        config: GossipConfig,
        table: Table,
        rng: random.Random,
        versions: Versions,
        *,
        client: bool,
    ) -> None:
        self._config = config
        self._table = table
        self._rng = rng
        self._versions = versions
        self._client = client
        self._rumours = Rumours(config.rumours_max)

    def spread(self, statement: OpenAdvert | OpenAccusation) -> None:
        """To be told a number of times from now on."""
        # As in SWIM, a multiple of log n sends reach everybody with high probability.
        sends = 2 * math.ceil(math.log2(self._table.live + 2))
        if isinstance(statement, OpenAdvert):
            self._rumours.add((statement.peer_id, ""), statement.signed, sends)
        else:
            self._rumours.add((statement.subject, statement.accuser), statement.signed, sends)

    def refuted(self, accusations: Iterable[OpenAccusation]) -> None:
        """No longer to be told."""
        for accusation in accusations:
            self._rumours.discard((accusation.subject, accusation.accuser))

    def probe(self, kind: Kind, peer_id: str, newer: Iterable[str] = ()) -> bytes:
        """A probe of a peer or an answer to it: what it is accused of, and news.

        `newer` are members of whom it was seen to know too little.
        """
        parcel = Parcel(self._config.statements_bytes_max)
        self._member(parcel, peer_id)
        for known_better in newer:
            self._member(parcel, known_better, advert=True)
        self._news(parcel, self._config.piggyback_bytes_max)
        return self._written(kind, parcel)

    def news(self, kind: Kind, first: Iterable[str] = ()) -> bytes | None:
        """The members `first`, and as much news as fits; None if there is none at all."""
        parcel = Parcel(self._config.statements_bytes_max)
        for peer_id in first:
            self._member(parcel, peer_id, advert=True)
        self._news(parcel, parcel.left_bytes)
        something = parcel.adverts or parcel.accusations
        return self._written(kind, parcel) if something else None

    def everything(self, kind: Kind, first: Iterable[str]) -> bytes:
        """The table, beginning with `first`; of one too large the newest half and a slice.

        A client has nothing to tell.
        """
        parcel = Parcel(self._config.statements_bytes_max)
        if self._client:
            return self._written(kind, parcel)
        for peer_id in first:
            self._member(parcel, peer_id, advert=True)
        for member in self._table.newest():
            half = 2 * parcel.left_bytes < self._config.statements_bytes_max
            if half or not self._member(parcel, member.peer_id, advert=True):
                break
        if len(parcel.adverts) < len(self._table):
            for member in self._table.slice(self._rng.randrange(len(self._table))):
                if not self._member(parcel, member.peer_id, advert=True):
                    break
        return self._written(kind, parcel)

    def _news(self, parcel: Parcel, budget_bytes: int) -> None:
        for (_, accuser), signed in self._rumours.take(min(budget_bytes, parcel.left_bytes)):
            if accuser:
                parcel.accusation(signed)
            else:
                parcel.advert(signed)

    def _member(self, parcel: Parcel, peer_id: str, *, advert: bool = False) -> bool:
        # What is held of a member: its advert where it is asked for, or is its end,
        # and its accusations; False if not all of it fits.
        member = self._table.get(peer_id)
        if member is None:
            return True
        packed = True
        if advert or member.state is State.LEFT:
            packed = parcel.advert(member.advert.signed)
        for accusation in self._table.accusations(peer_id):
            packed = parcel.accusation(accusation.signed) and packed
        return packed

    def _written(self, kind: Kind, parcel: Parcel) -> bytes:
        return write_message(
            kind,
            self._versions,
            adverts=parcel.adverts,
            accusations=parcel.accusations,
            client=self._client,
        )
