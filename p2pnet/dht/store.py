"""What a peer keeps for others: signed records. Pure.

Bounded in every direction, since anybody may put anything that is signed. Each
record is charged to the *source* that it first came from, an IP group. Where there
is too much, the source that has the most gives way, and of its records the one
farthest from us: other peers are nearer to it.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from p2pnet.dht.hints import PROVIDER_LIFE_S, PROVIDERS_MAX, ProviderStore
from p2pnet.dht.keyspace import position
from p2pnet.dht.records import AUTHORS_MAX, OpenRecord, merge
from p2pnet.dht.shares import Shares

__all__ = ["PROVIDERS_MAX", "PROVIDER_LIFE_S", "Mark", "ProviderStore", "RecordStore"]

RECORDS_MAX = 16384
AUTHOR_BYTES_MAX = 4 << 20
TOTAL_BYTES_MAX = 64 << 20
MARKS_MAX = 16384


@dataclass(frozen=True, slots=True)
class Mark:
    """The rank of the newest record that was held of an author, and is no longer.

    `age_s`: how old that record would be by now. `subject`: that record's.
    """

    key: bytes
    author: str
    epoch: int
    sequence: int
    age_s: float
    source: str
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class _Past:
    rank: tuple[int, int]
    born: float
    subject: str | None = None


_NEVER = _Past((-1, -1), math.inf)


@dataclass(slots=True)
class _Entry:
    record: OpenRecord
    born: float  # `now` minus the age that it came with
    source: str

    @property
    def past(self) -> _Past:
        record = self.record
        return _Past((record.epoch, record.sequence), self.born, record.subject)


_Place = tuple[int, bytes, str]  # how far from us, key, author


class RecordStore:
    """The newest record of each author under each key, while it lives."""

    def __init__(
        self,
        own_position: int,
        *,
        records_max: int = RECORDS_MAX,
        author_bytes_max: int = AUTHOR_BYTES_MAX,
        total_bytes_max: int = TOTAL_BYTES_MAX,
        marks_max: int = MARKS_MAX,
    ) -> None:
        self._own = own_position
        self._records_max = records_max
        self._author_bytes_max = author_bytes_max
        self._total_bytes_max = total_bytes_max
        self._entries: dict[bytes, dict[str, _Entry]] = {}
        # Per source its records, the nearest to us first.
        self._of_source: dict[str, list[_Place]] = {}
        self._source_bytes: Counter[str] = Counter()
        self._author_bytes: Counter[str] = Counter()
        self._total_bytes = 0
        self._size = 0
        # The highest (epoch, sequence) met of what is held no longer, and since when it
        # was: an expired record must not come back as young, nor an older one at all.
        self._marks: Shares[tuple[bytes, str], _Past] = Shares(marks_max)
        # The highest epoch met of a subject, by whomever: whose claim is over shall not be
        # believed again when the records of who came after him have run out.
        self._fences: Shares[tuple[bytes, str], int] = Shares(marks_max)
        self.changes = 0  # how often anything did

    @property
    def size_bytes(self) -> int:
        """What all records take, about."""
        return self._total_bytes

    def keys(self) -> list[bytes]:
        """The keys that have records."""
        return list(self._entries)

    def __len__(self) -> int:
        return self._size

    def put(self, record: OpenRecord, now: float, source: str = "") -> bool:
        """Takes a checked record from a source; True where exactly it is held afterwards.

        A copy of the record that is held changes nothing, whatever age it claims: who
        passes copies on can neither revive it nor make it expire.
        """
        at = (record.key, record.author)
        if self._is_over(record):
            return False
        held = self._entries.get(record.key, {}).get(record.author)
        if held is not None:
            if record.rank == held.record.rank:
                return held.born + record.ttl_s > now
            if record.rank < held.record.rank:
                return False
            source = held.source  # as in `Shares.put`
        sifted = self.sift([record], now, source)
        held = self._entries.get(record.key, {}).get(record.author)  # it may just have given way
        if not sifted or not self._make_room(record, held, source):
            return False
        born = now - sifted[0].age_s
        if held is not None:
            self._remove(*at)
        self._marks.pop(at)
        self._add(_Entry(record, born, source))
        return True

    def sift(self, records: Iterable[OpenRecord], now: float, source: str = "") -> list[OpenRecord]:
        """Of checked records that others passed on, those that live by what we remember.

        Without those older than what is or was held here, and none of them younger
        than it is here, or would be; nor is an author's contradicting twin of it. None is
        of an epoch that is over, by what was met here or by the others.
        """
        good: list[OpenRecord] = []
        for record in records:
            held = self._entries.get(record.key, {}).get(record.author)
            past = held.past if held else self._marks.get((record.key, record.author)) or _NEVER
            if (record.epoch, record.sequence) == past.rank:
                record = replace(record, age_s=max(record.age_s, now - past.born))
            if (record.epoch, record.sequence) >= past.rank and 0 <= record.age_s < record.ttl_s:
                good.append(record)
        for record in good:
            self._fence(record.key, record.subject, record.epoch, source)
        return [record for record in good if not self._is_over(record)]

    def get(self, key: bytes, now: float) -> list[OpenRecord]:
        """What is held under a key, newest first, each with the age that it has by now."""
        aged = (_aged(entry, now) for entry in self._entries.get(key, {}).values())
        return merge(record for record in aged if record.expires_in_s > 0)

    def held(self, now: float) -> list[tuple[OpenRecord, str]]:
        """All that lives, with its age and source; the nearest to us first.

        What does not is dropped, so that `marks` has it.
        """
        self.expire(now)
        all_of = [entry for entries in self._entries.values() for entry in entries.values()]
        all_of.sort(key=lambda e: (self._distance(e.record.key), e.record.author))
        return [(_aged(entry, now), entry.source) for entry in all_of]

    def marks(self, now: float) -> list[Mark]:
        """What is remembered of records held no longer, the oldest first."""
        return [
            Mark(key, author, *past.rank, max(0.0, now - past.born), source, past.subject)
            for (key, author), past, source in self._marks.items()
        ]

    def remember(self, mark: Mark, now: float) -> None:
        """Takes a mark from before a restart."""
        self._fence(mark.key, mark.subject, mark.epoch, mark.source)
        at, rank = (mark.key, mark.author), (mark.epoch, mark.sequence)
        known = (self._marks.get(at) or _NEVER).rank
        if rank > known and mark.author not in self._entries.get(mark.key, {}):
            self.changes += 1
            self._marks.put(at, _Past(rank, now - mark.age_s, mark.subject), mark.source)

    def expire(self, now: float) -> None:
        """Drops what has had its time."""
        over = [
            (key, author)
            for key, entries in self._entries.items()
            for author, entry in entries.items()
            if entry.born + entry.record.ttl_s <= now
        ]
        for key, author in over:
            self._give_up(key, author)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        self._marks.check()
        self._fences.check()
        authors: Counter[str] = Counter()
        sources: Counter[str] = Counter()
        size = 0
        for key, entries in self._entries.items():
            assert 0 < len(entries) <= AUTHORS_MAX
            for author, entry in entries.items():
                assert (entry.record.key, entry.record.author) == (key, author)
                assert self._place(entry.record) in self._of_source[entry.source]
                assert (key, author) not in self._marks
                assert not self._is_over(entry.record)
                authors[author] += entry.record.size_bytes
                sources[entry.source] += entry.record.size_bytes
                size += 1
        assert self._size == size == sum(map(len, self._of_source.values())) <= self._records_max
        assert self._author_bytes == authors
        assert self._source_bytes == sources
        assert self._total_bytes == sources.total() <= self._total_bytes_max
        assert max(authors.values(), default=0) <= self._author_bytes_max

    def _is_over(self, record: OpenRecord) -> bool:
        """Whether a newer claim than the record's was met."""
        if record.subject is None:
            return False
        return record.epoch < (self._fences.get((record.key, record.subject)) or 0)

    def _fence(self, key: bytes, subject: str | None, epoch: int, source: str) -> None:
        if subject is None or epoch <= (self._fences.get((key, subject)) or 0):
            return
        self._fences.put((key, subject), epoch, source)
        for entry in list(self._entries.get(key, {}).values()):
            if self._is_over(entry.record):
                self._give_up(key, entry.record.author)

    def _make_room(self, record: OpenRecord, replaced: _Entry | None, source: str) -> bool:
        """Whether the record fits within every bound, after others gave way to it."""
        needed = record.size_bytes - (replaced.record.size_bytes if replaced else 0)
        if self._author_bytes[record.author] + needed > self._author_bytes_max:
            return False
        if replaced is None and not self._make_room_under(record.key, source):
            return False
        while self._total_bytes + needed > self._total_bytes_max or (
            replaced is None and self._size >= self._records_max
        ):
            largest = max(self._of_source, key=lambda s: self._source_bytes[s], default=source)
            if self._source_bytes[largest] <= self._source_bytes[source] + needed:
                largest = source
            if largest not in self._of_source:
                return False
            distance, key, author = self._of_source[largest][-1]
            if largest == source and self._distance(record.key) >= distance:
                return False
            self._give_up(key, author)
        return True

    def _make_room_under(self, key: bytes, source: str) -> bool:
        """Whether one more author fits under a key, after the latest of a source gave way.

        Newcomers displace nobody, but for a source that has taken more places than
        it would then leave to this one.
        """
        entries = self._entries.get(key, {})
        if len(entries) < AUTHORS_MAX:
            return True
        places = Counter(entry.source for entry in entries.values())
        greedy, taken = max(places.items(), key=lambda item: item[1])
        if taken < places[source] + 2:
            return False
        self._give_up(key, [a for a, entry in entries.items() if entry.source == greedy][-1])
        return True

    def _distance(self, key: bytes) -> int:
        return position(key) ^ self._own

    def _place(self, record: OpenRecord) -> _Place:
        return (self._distance(record.key), record.key, record.author)

    def _give_up(self, key: bytes, author: str) -> None:
        """Holds a record no longer, and remembers its rank."""
        entry = self._remove(key, author)
        self._marks.put((key, author), entry.past, entry.source)

    def _add(self, entry: _Entry) -> None:
        record = entry.record
        self._entries.setdefault(record.key, {})[record.author] = entry
        bisect.insort(self._of_source.setdefault(entry.source, []), self._place(record))
        self._count(entry, +1)

    def _remove(self, key: bytes, author: str) -> _Entry:
        entries = self._entries[key]
        entry = entries.pop(author)
        if not entries:
            del self._entries[key]
        of_source = self._of_source[entry.source]
        del of_source[bisect.bisect_left(of_source, self._place(entry.record))]
        if not of_source:
            del self._of_source[entry.source]
        self._count(entry, -1)
        return entry

    def _count(self, entry: _Entry, sign: int) -> None:
        self.changes += 1
        size_bytes = sign * entry.record.size_bytes
        self._total_bytes += size_bytes
        self._size += sign
        for counts, name in (
            (self._author_bytes, entry.record.author),
            (self._source_bytes, entry.source),
        ):
            counts[name] += size_bytes
            if not counts[name]:
                del counts[name]


def _aged(entry: _Entry, now: float) -> OpenRecord:
    return replace(entry.record, age_s=max(0.0, now - entry.born))
