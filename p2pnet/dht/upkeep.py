"""When the DHT does something by itself: refresh, renew, announce, republish. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

from p2pnet.dht.keyspace import common_prefix_bits
from p2pnet.dht.records import OpenRecord
from p2pnet.dht.routing import K
from p2pnet.dht.store import PROVIDER_LIFE_S
from p2pnet.keys import sha256

REFRESH_S = 600.0
REFRESH_SMALL_S = 60.0  # while the table is so small that the swarm may be splitting
# After joining soon again, then after twice as long each time: peers that join at
# the same time do not know each other yet.
REFRESH_FIRST_S = 2.0
RETRY_S = 5.0
_EXPIRE_S = 10.0
_REPROVIDE_S = PROVIDER_LIFE_S / 3
_REPUBLISH_S_MIN = 20.0
_REPUBLISH_AT_ONCE = 4
# A key with n leading bits of ours takes 2**n tries to find; buckets beyond hold
# only peers that a lookup of ourselves finds anyway.
REFRESH_BITS_MAX = 8


# A record of ours is read back a moment after it was put, and put again where it
# is not found, but not for ever: it will be renewed anyway.
READ_BACK_S = 2.0
_READ_BACKS_MAX = 3


@dataclass(slots=True)
class _Kept:
    record: OpenRecord
    renew_at: float
    read_back_at: float | None = None
    misplaced: int = 0


class Upkeep:
    """Times, and what is due at them. Everything else is the core's to do."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._refresh_at: float | None = None
        self._refresh_s = REFRESH_FIRST_S
        self._expire_at: float | None = None
        self._kept: dict[bytes, _Kept] = {}
        self._provided: dict[bytes, float] = {}
        self._held: dict[bytes, float] = {}
        self._held_from: float | None = None  # none of them is due earlier

    def deadline(self) -> float | None:
        """When something is due next."""
        times = [t for t in (self._refresh_at, self._expire_at) if t is not None]
        for kept in self._kept.values():
            times.append(kept.renew_at)
            if kept.read_back_at is not None:
                times.append(kept.read_back_at)
        times += self._provided.values()
        if self._held_from is not None:
            times.append(self._held_from)
        return min(times, default=None)

    # The routing table

    def joined(self, now: float) -> None:
        """The table has its first peer."""
        self._refresh_at = now
        self._refresh_s = REFRESH_FIRST_S

    def refresh_due(self, now: float, table_size: int) -> bool:
        """Whether to look ourselves up now; if so, the next time is set."""
        if self._refresh_at is None or self._refresh_at > now:
            return False
        wait_s = self._refresh_s * self._rng.uniform(0.9, 1.1)
        self._refresh_at = now + wait_s if table_size else None
        self._refresh_s = min(2 * self._refresh_s, REFRESH_SMALL_S if table_size < K else REFRESH_S)
        return True

    def key_in_bucket(self, own_position: int, bits: int) -> bytes:
        """A random key, in the form of a multihash, that shares `bits` leading bits with us."""
        while True:
            key = b"\x12\x20" + self._rng.randbytes(32)
            if common_prefix_bits(int.from_bytes(sha256(key), "big"), own_position) == bits:
                return key

    # Our own records and what we provide

    def keep(self, record: OpenRecord, now: float) -> None:
        """A record of our own is to be renewed after a third of its life."""
        self._kept[record.key] = _Kept(record, now + record.ttl_s / 3)

    def unkeep(self, key: bytes) -> None:
        """It is renewed no more."""
        self._kept.pop(key, None)

    def keep_failed(self, key: bytes, now: float) -> None:
        """Nobody took it: soon again."""
        kept = self._kept.get(key)
        if kept is not None:
            kept.renew_at = min(kept.renew_at, now + RETRY_S)

    def placed(self, key: bytes, now: float) -> None:
        """It was put: to be read back soon."""
        kept = self._kept.get(key)
        if kept is not None:
            kept.read_back_at = now + READ_BACK_S * self._rng.uniform(0.5, 1.5)

    def read_backs_due(self, now: float) -> list[OpenRecord]:
        """The records of ours to be looked for now."""
        due = [
            k for k in self._kept.values() if k.read_back_at is not None and k.read_back_at <= now
        ]
        for kept in due:
            kept.read_back_at = None
        return [kept.record for kept in due]

    def read_back(self, key: bytes) -> None:
        """It was found."""
        kept = self._kept.get(key)
        if kept is not None:
            kept.misplaced = 0

    def misplaced(self, key: bytes, now: float) -> bool:
        """It was not found where it was put; whether to put it again now."""
        kept = self._kept.get(key)
        if kept is None or kept.misplaced >= _READ_BACKS_MAX:
            return False
        kept.misplaced += 1
        return True

    def renewals_due(self, now: float) -> list[bytes]:
        """The keys whose record wants a new signature; asked for again soon if none comes."""
        due = [key for key, kept in self._kept.items() if kept.renew_at <= now]
        for key in due:
            self._kept[key].renew_at = now + RETRY_S
        return due

    def provide(self, key: bytes, now: float) -> None:
        """To be announced again after a third of a hint's life."""
        self._provided[key] = now + _REPROVIDE_S

    def unprovide(self, key: bytes) -> None:
        """It is announced no more."""
        self._provided.pop(key, None)

    def announcements_due(self, now: float) -> list[bytes]:
        """The keys that we provide and should say so again."""
        due = [key for key, at in self._provided.items() if at <= now]
        for key in due:
            self.provide(key, now)
        return due

    # What we hold for others

    def held(self, key: bytes, ttl_s: float, now: float) -> None:
        """Records under a key were put here; if nobody does so again, we pass them on.

        After half their life, so that a living author, who renews after a third,
        comes first; at a random time, so that of all holders one comes first
        (Maymounkov and Mazieres 2002, section 2.5).
        """
        wait_s = max(ttl_s / 2, _REPUBLISH_S_MIN) * self._rng.uniform(1.0, 1.5)
        self._held[key] = now + wait_s
        if self._held_from is None or now + wait_s < self._held_from:
            self._held_from = now + wait_s

    def holding(self, now: float) -> None:
        """Something is held that will have had its time."""
        if self._expire_at is None:
            self._expire_at = now + _EXPIRE_S

    def republish_due(self, now: float, running: int) -> list[bytes]:
        """A few keys to pass on now, while few are being passed on."""
        if self._held_from is None or self._held_from > now:
            return []
        due = [key for key, at in self._held.items() if at <= now]
        now_on = due[: max(0, _REPUBLISH_AT_ONCE - running)]
        for key in now_on:
            del self._held[key]
        for key in due[len(now_on) :]:
            self._held[key] = now + 1.0
        self._held_from = min(self._held.values(), default=None)
        return now_on

    def expire_due(self, now: float) -> bool:
        """Whether to drop what has had its time."""
        if self._expire_at is None or self._expire_at > now:
            return False
        self._expire_at = None
        return True

    @property
    def kept_count(self) -> int:
        """How many records of our own are kept alive."""
        return len(self._kept)
