"""What a peer keeps for others: signed records, and hints of providers. Pure.

Both are bounded in every direction, since anybody may put anything that is
signed. Where there are too many keys, those farthest from us give way: other
peers are nearer to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from p2pnet.dht.keyspace import position
from p2pnet.dht.records import AUTHORS_MAX, OpenRecord, merge
from p2pnet.net.network import PeerInfo

RECORD_KEYS_MAX = 4096
AUTHOR_BYTES_MAX = 4 << 20
TOTAL_BYTES_MAX = 64 << 20
MARKS_MAX = 16384
PROVIDER_KEYS_MAX = 4096
PROVIDERS_MAX = 32  # of one key
PROVIDER_LIFE_S = 30 * 60.0


@dataclass(slots=True)
class _Entry:
    record: OpenRecord
    born: float  # `now` minus the age that it came with


class RecordStore:
    """The newest record of each author under each key, while it lives."""

    def __init__(
        self,
        own_position: int,
        *,
        keys_max: int = RECORD_KEYS_MAX,
        author_bytes_max: int = AUTHOR_BYTES_MAX,
        total_bytes_max: int = TOTAL_BYTES_MAX,
        marks_max: int = MARKS_MAX,
    ) -> None:
        self._own = own_position
        self._keys_max = keys_max
        self._author_bytes_max = author_bytes_max
        self._total_bytes_max = total_bytes_max
        self._marks_max = marks_max
        self._entries: dict[bytes, dict[str, _Entry]] = {}
        self._author_bytes: dict[str, int] = {}
        self._total_bytes = 0
        self._size = 0
        # The highest (epoch, sequence) met, beyond expiry: an expired record must
        # not come back as young. The oldest marks go first.
        self._marks: dict[tuple[bytes, str], tuple[int, int]] = {}

    @property
    def size_bytes(self) -> int:
        """What all records take, about."""
        return self._total_bytes

    def keys(self) -> list[bytes]:
        """The keys that have records."""
        return list(self._entries)

    def __len__(self) -> int:
        return self._size

    def put(self, record: OpenRecord, now: float) -> bool:
        """Takes a checked record; True where exactly it is held afterwards.

        A copy of the record that is held changes nothing, whatever age it claims: who
        passes copies on can neither revive it nor make it expire.
        """
        held = self._entries.get(record.key, {}).get(record.author)
        if held is not None:
            if record.rank == held.record.rank:
                return True
            if record.rank < held.record.rank:
                return False
        elif (record.epoch, record.sequence) <= self._marks.get(
            (record.key, record.author), (-1, -1)
        ):
            return False
        if record.expires_in_s <= 0 or not self._make_room(record, held):
            return False
        if held is not None:
            self._remove(record.key, record.author)
        # The signed age bounds what the passer-on says: a copy of an author's
        # contradicting twin must not be younger than what it replaces.
        born = now - record.age_s
        if held is not None and (record.epoch, record.sequence) == (
            held.record.epoch,
            held.record.sequence,
        ):
            born = min(born, held.born)
        self._entries.setdefault(record.key, {})[record.author] = _Entry(record, born)
        self._count(record, +1)
        self._mark(record)
        return True

    def get(self, key: bytes, now: float) -> list[OpenRecord]:
        """What is held under a key, newest first, each with the age that it has by now."""
        aged = (
            replace(entry.record, age_s=max(0.0, now - entry.born))
            for entry in self._entries.get(key, {}).values()
        )
        return merge(record for record in aged if record.expires_in_s > 0)

    def expire(self, now: float) -> None:
        """Drops what has had its time."""
        over = [
            (key, author)
            for key, entries in self._entries.items()
            for author, entry in entries.items()
            if entry.born + entry.record.ttl_s <= now
        ]
        for key, author in over:
            self._remove(key, author)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        records = [e.record for entries in self._entries.values() for e in entries.values()]
        assert self._total_bytes == sum(r.size_bytes for r in records) <= self._total_bytes_max
        assert self._size == len(records)
        for author, size_bytes in self._author_bytes.items():
            held = sum(r.size_bytes for r in records if r.author == author)
            assert 0 < size_bytes == held <= self._author_bytes_max
        assert len(self._entries) <= self._keys_max
        assert len(self._marks) <= self._marks_max
        for key, entries in self._entries.items():
            assert 0 < len(entries) <= AUTHORS_MAX
            assert all(e.record.key == key and e.record.author == a for a, e in entries.items())

    def _make_room(self, record: OpenRecord, replaced: _Entry | None) -> bool:
        """Whether the record fits within every bound, after others gave way to it."""
        freed = replaced.record.size_bytes if replaced else 0
        needed = record.size_bytes - freed
        if self._author_bytes.get(record.author, 0) + needed > self._author_bytes_max:
            return False
        if replaced is None and len(self._entries.get(record.key, ())) >= AUTHORS_MAX:
            return False
        while self._total_bytes + needed > self._total_bytes_max or (
            record.key not in self._entries and len(self._entries) >= self._keys_max
        ):
            farthest = max(self._entries, key=self._distance, default=None)
            if farthest is None or self._distance(record.key) >= self._distance(farthest):
                return False
            for author in list(self._entries[farthest]):
                self._remove(farthest, author)
        return True

    def _distance(self, key: bytes) -> int:
        return position(key) ^ self._own

    def _remove(self, key: bytes, author: str) -> None:
        entries = self._entries[key]
        self._count(entries.pop(author).record, -1)
        if not entries:
            del self._entries[key]

    def _count(self, record: OpenRecord, sign: int) -> None:
        size_bytes = sign * record.size_bytes
        self._total_bytes += size_bytes
        self._size += sign
        left = self._author_bytes.get(record.author, 0) + size_bytes
        if left:
            self._author_bytes[record.author] = left
        else:
            del self._author_bytes[record.author]

    def _mark(self, record: OpenRecord) -> None:
        self._marks.pop((record.key, record.author), None)
        if len(self._marks) >= self._marks_max:
            del self._marks[next(iter(self._marks))]
        self._marks[record.key, record.author] = (record.epoch, record.sequence)


class ProviderStore:
    """Who says that it provides a key: unsigned hints with a short life."""

    def __init__(
        self, *, keys_max: int = PROVIDER_KEYS_MAX, life_s: float = PROVIDER_LIFE_S
    ) -> None:
        self._keys_max = keys_max
        self._life_s = life_s
        self._providers: dict[bytes, dict[str, tuple[PeerInfo, float]]] = {}

    def __len__(self) -> int:
        return len(self._providers)

    def add(self, key: bytes, provider: PeerInfo, now: float) -> None:
        """Takes a hint; where a key or the store is full, the oldest hint goes."""
        of_key = self._providers.pop(key, {})
        of_key.pop(provider.peer_id, None)
        if len(of_key) >= PROVIDERS_MAX:
            del of_key[next(iter(of_key))]
        if len(self._providers) >= self._keys_max:
            del self._providers[next(iter(self._providers))]
        of_key[provider.peer_id] = (provider, now + self._life_s)
        self._providers[key] = of_key

    def get(self, key: bytes, now: float) -> list[PeerInfo]:
        """Who provides a key, the latest to say so first."""
        of_key = self._providers.get(key, {})
        return [peer for peer, until in reversed(list(of_key.values())) if until > now]

    def remove(self, key: bytes, peer_id: str) -> None:
        """A peer provides a key no more."""
        of_key = self._providers.get(key, {})
        of_key.pop(peer_id, None)
        if not of_key:
            self._providers.pop(key, None)

    def expire(self, now: float) -> None:
        """Drops what has had its time."""
        for key in list(self._providers):
            for peer_id, (_, until) in list(self._providers[key].items()):
                if until <= now:
                    self.remove(key, peer_id)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert len(self._providers) <= self._keys_max
        assert all(0 < len(of_key) <= PROVIDERS_MAX for of_key in self._providers.values())
