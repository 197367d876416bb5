"""What goes into a message: the table's and the rumours' statements, within bounds. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

from p2pnet.gossip.coordinates import Coordinate
from p2pnet.gossip.digests import depth_for
from p2pnet.gossip.events import GossipConfig, State
from p2pnet.gossip.messages import Kind, Kinds, Parcel, Summary, SyncResult, write_message
from p2pnet.gossip.roster import Entry
from p2pnet.gossip.rumours import Rumours
from p2pnet.gossip.statements import OpenAccusation, OpenAdvert, Versions
from p2pnet.gossip.table import Table

_MORE_SENDS = 4
_COARSE = 4  # so many of our buckets in one of another's


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
        # Told ln n + c times by each that hears it, news miss one of n with a chance of
        # e**-c (Kermarrec, Massoulie, Ganesh, TPDS 2003); `digests` mend that.
        sends = math.ceil(math.log(self._table.live + 1)) + _MORE_SENDS
        if isinstance(statement, OpenAdvert):
            self._rumours.add((statement.peer_id, ""), statement.raw, sends)
        else:
            self._rumours.add((statement.subject, statement.accuser), statement.raw, sends)

    def refuted(self, accusations: Iterable[OpenAccusation]) -> None:
        """No longer to be told."""
        for accusation in accusations:
            self._rumours.discard((accusation.subject, accusation.accuser))

    def probe(
        self,
        kind: Kind,
        peer_id: str,
        here: Coordinate | None = None,
        newer: Iterable[str] = (),
    ) -> bytes:
        """A probe of a peer or an answer to it: what it is accused of, and news.

        `newer` are members of whom it was seen to know too little.
        """
        parcel = Parcel(self._config.statements_bytes_max)
        self._member(parcel, peer_id)
        for known_better in newer:
            self._member(parcel, known_better, advert=True)
        self._news(parcel, self._config.piggyback_bytes_max)
        return self._written(kind, parcel, coordinate=here)

    def news(self, kind: Kind, first: Iterable[str] = ()) -> bytes | None:
        """The members `first`, and as much news as fits; None if there is none at all."""
        parcel = Parcel(self._config.statements_bytes_max)
        for peer_id in first:
            self._member(parcel, peer_id, advert=True)
        self._news(parcel, parcel.left_bytes)
        something = parcel.adverts or parcel.accusations
        return self._written(kind, parcel) if something else None

    def accusation(self, accusation: OpenAccusation) -> bytes:
        """One accusation, for those whom it concerns."""
        parcel = Parcel(self._config.statements_bytes_max)
        parcel.accusation(accusation.raw)
        return self._written(Kinds.KIND_NEWS, parcel)

    def summary(self, first: int, depth: int) -> Summary:
        """Digests of the buckets from `first` on, as many as a message may hold."""
        count = min(1 << depth, self._config.digests_max)
        first %= 1 << depth
        digests = self._table.roster.digests
        indexes = ((first + step) % (1 << depth) for step in range(count))
        return Summary(depth, first, tuple(digests.get(depth, index) for index in indexes))

    def sync(self, peer_id: str, summary: Summary) -> bytes:
        """Asks for what is different, and says who we are and what the peer is accused of."""
        parcel = Parcel(self._config.statements_bytes_max)
        for first in (self._table.me, peer_id):
            self._member(parcel, first, advert=True)
        return self._written(Kinds.KIND_SYNC, parcel, summary=summary)

    def sync_reply(self, peer_id: str, theirs: Summary, older: Iterable[str]) -> bytes:
        """What we know in the buckets that differ from theirs, bucket by bucket."""
        parcel = Parcel(self._config.statements_bytes_max)
        for first in (self._table.me, peer_id, *older):
            self._member(parcel, first, advert=True)
        result = self._tell(parcel, theirs)
        return self._written(Kinds.KIND_SYNC_REPLY, parcel, result=result)

    def rest(self, depth: int, told: Iterable[int], theirs: set[bytes]) -> bytes | None:
        """What we know of these buckets that another does not, who told all it has; None: nothing.

        `theirs` are the statements that it told.
        """
        parcel = Parcel(self._config.statements_bytes_max)
        for index in told:
            for _, entry in self._table.roster.live_within(depth, index):
                if entry.advert.raw not in theirs:
                    parcel.advert(entry.advert.raw)
                for accusation in entry.accusations:
                    if accusation.failed and accusation.raw not in theirs:
                        parcel.accusation(accusation.raw)
        something = (parcel.adverts or parcel.accusations) and not self._client
        return self._written(Kinds.KIND_SYNC_REST, parcel) if something else None

    def _tell(self, parcel: Parcel, theirs: Summary) -> SyncResult:
        live = self._table.live
        if self._client:
            return SyncResult((), False, live)
        # One who knows few cuts the ring coarsely: then we go by ours, for a part to fit.
        depth = max(theirs.depth, depth_for(live))
        finer = 1 << (depth - theirs.depth)
        told: list[int] = []
        for index, digest in zip(_indexes(theirs), theirs.digests, strict=True):
            if self._alike(theirs.depth, index, digest, finer):
                continue
            for part in range(index * finer, (index + 1) * finer):
                if not self._bucket(parcel, depth, part):
                    return SyncResult(tuple(told), True, live)
            told.append(index)
        return SyncResult(tuple(told), False, live)

    def _alike(self, depth: int, index: int, digest: bytes, finer: int) -> bool:
        # A digest over a large part of a large table is dear, and will hardly be the same.
        if finer > _COARSE:
            return False
        return self._table.roster.digests.get(depth, index) == digest

    def _bucket(self, parcel: Parcel, depth: int, index: int) -> bool:
        """Packs a bucket; of one larger than a message the newest and some at random."""
        entries = [entry for _, entry in self._table.roster.live_within(depth, index)]
        statements = [s for entry in entries for s in _statements(entry)]
        whole = parcel.room(statements)
        if not whole and parcel.left_bytes > self._config.statements_bytes_max // 2:
            newest = sorted(entries, key=lambda entry: -entry.since)[: len(entries) // 4]
            entries = newest + self._rng.sample(entries, len(entries))
        elif not whole:
            return False
        for entry in entries:
            parcel.advert(entry.advert.raw)
            for raw in _statements(entry)[1:]:
                parcel.accusation(raw)
        return whole

    def _news(self, parcel: Parcel, budget_bytes: int) -> None:
        for (_, accuser), raw in self._rumours.take(min(budget_bytes, parcel.left_bytes)):
            if accuser:
                parcel.accusation(raw)
            else:
                parcel.advert(raw)

    def _member(self, parcel: Parcel, peer_id: str, *, advert: bool = False) -> None:
        # What is held of a member: its advert where it is asked for, or is its end,
        # and its accusations.
        entry = self._table.entry(peer_id)
        if entry is not None:
            self._entry(parcel, entry, advert=advert or entry.state is State.LEFT)

    def _entry(self, parcel: Parcel, entry: Entry, *, advert: bool = True) -> None:
        if advert:
            parcel.advert(entry.advert.raw)
        for accusation in entry.accusations:
            parcel.accusation(accusation.raw)

    def _written(
        self,
        kind: Kind,
        parcel: Parcel,
        *,
        summary: Summary | None = None,
        result: SyncResult | None = None,
        coordinate: Coordinate | None = None,
    ) -> bytes:
        silent = self._client  # it has nothing to tell
        return write_message(
            kind,
            self._versions,
            adverts=() if silent else parcel.adverts,
            accusations=() if silent else parcel.accusations,
            client=self._client,
            summary=summary,
            result=result,
            coordinate=coordinate,
        )


def _indexes(summary: Summary) -> list[int]:
    return [(summary.first + step) % (1 << summary.depth) for step in range(len(summary.digests))]


def _statements(entry: Entry) -> list[bytes]:
    return [entry.advert.raw, *(a.raw for a in entry.accusations if a.failed)]
