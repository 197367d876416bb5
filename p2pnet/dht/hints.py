"""Who says that it provides a key: unsigned hints with a short life. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from p2pnet.dht.shares import Shares
from p2pnet.net.network import PeerInfo

HINTS_MAX = 16384
PROVIDERS_MAX = 32  # of one key
PROVIDED_MAX = 2048  # by one peer
PROVIDER_LIFE_S = 30 * 60.0
_ADDRS_MAX = 4  # of one provider, and how long each
_ADDR_CHARS_MAX = 256


@dataclass(frozen=True, slots=True)
class Hint:
    """One provider of one key. `age_s`: since it last said so."""

    key: bytes
    provider: PeerInfo
    age_s: float
    source: str


class ProviderStore:
    """One hint a key and peer. Where there are too many, as in `shares.py`.

    The bounds of one key and of one peer hold too: of a key, the source with the
    most hints gives way; a peer beyond its own quota drives out its own oldest.
    """

    def __init__(
        self,
        *,
        hints_max: int = HINTS_MAX,
        provided_max: int = PROVIDED_MAX,
        life_s: float = PROVIDER_LIFE_S,
    ) -> None:
        self._provided_max = provided_max
        self._life_s = life_s
        self._hints: Shares[tuple[bytes, str], tuple[PeerInfo, float]] = Shares(hints_max)
        self._by_key: dict[bytes, dict[str, str]] = {}  # peers with their sources, latest last
        self._by_peer: dict[str, dict[bytes, None]] = {}
        self.changes = 0  # how often anything did

    def __len__(self) -> int:
        """How many keys have a provider."""
        return len(self._by_key)

    def add(
        self, key: bytes, provider: PeerInfo, now: float, source: str = "", *, age_s: float = 0.0
    ) -> None:
        """Takes a hint; a hint of that peer for that key is renewed by it."""
        if not 0 <= age_s < self._life_s:
            return
        peer_id = provider.peer_id
        short = [addr for addr in provider.addrs if len(addr) <= _ADDR_CHARS_MAX]
        provider = PeerInfo(peer_id, tuple(short[:_ADDRS_MAX]))
        source = self._by_key.get(key, {}).get(peer_id, source)
        self.remove(key, peer_id)
        of_key = self._by_key.get(key, {})
        if len(of_key) >= PROVIDERS_MAX:
            counts = Counter([*of_key.values(), source])
            greedy = max(counts, key=lambda name: counts[name])
            crowding = (peer for peer, of in of_key.items() if of == greedy)
            self.remove(key, next(crowding, next(iter(of_key))))
        of_peer = self._by_peer.get(peer_id, {})
        if len(of_peer) >= self._provided_max:
            self.remove(next(iter(of_peer)), peer_id)
        self._by_key.setdefault(key, {})[peer_id] = source
        self._by_peer.setdefault(peer_id, {})[key] = None
        self.changes += 1
        gone = self._hints.put((key, peer_id), (provider, now + self._life_s - age_s), source)
        if gone is not None:
            self._forget(*gone)

    def get(self, key: bytes, now: float) -> list[PeerInfo]:
        """Who provides a key, the latest to say so first."""
        found = (self._hints.get((key, peer)) for peer in reversed(self._by_key.get(key, {})))
        return [hint[0] for hint in found if hint is not None and hint[1] > now]

    def held(self, now: float) -> list[Hint]:
        """All hints that live, the oldest first."""
        return [
            Hint(key, provider, max(0.0, now + self._life_s - until), source)
            for (key, _), (provider, until), source in self._hints.items()
            if until > now
        ]

    def remove(self, key: bytes, peer_id: str) -> None:
        """A peer provides a key no more."""
        if self._hints.pop((key, peer_id)) is not None:
            self._forget(key, peer_id)

    def expire(self, now: float) -> None:
        """Drops what has had its time."""
        for key, peer_id in [at for at, (_, until), _ in self._hints.items() if until <= now]:
            self.remove(key, peer_id)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        self._hints.check()
        assert all(0 < len(of_key) <= PROVIDERS_MAX for of_key in self._by_key.values())
        assert all(0 < len(of) <= self._provided_max for of in self._by_peer.values())
        assert sum(map(len, self._by_key.values())) == len(self._hints)
        assert sum(map(len, self._by_peer.values())) == len(self._hints)
        assert all(at[0] in self._by_peer[at[1]] for at, _, _ in self._hints.items())

    def _forget(self, key: bytes, peer_id: str) -> None:
        self.changes += 1
        of_key, of_peer = self._by_key[key], self._by_peer[peer_id]
        del of_key[peer_id], of_peer[key]
        if not of_key:
            del self._by_key[key]
        if not of_peer:
            del self._by_peer[peer_id]
