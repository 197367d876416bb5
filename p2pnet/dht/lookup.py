"""One iterative lookup: who are the peers nearest to a key. Pure.

Maymounkov and Mazieres 2002, section 2.3, with alpha requests at a time. A
lookup ends when the `width` nearest peers have answered. A peer whose answer is
overdue no longer counts as one of the alpha and is passed over, so that silent
peers cost one patience (`rtt.py`) and not a timeout.
"""

from __future__ import annotations

import bisect
import enum
from collections.abc import Sequence
from dataclasses import dataclass

from p2pnet.dht.keyspace import peer_position, position
from p2pnet.dht.wire import ADDRS_MAX
from p2pnet.net.network import PeerInfo

ALPHA = 5
REQUESTS_MAX = 96
# With fewer answers than this and nobody left to ask, overdue ones are waited for.
QUORUM = 3
_TRIES_MAX = 2


class _State(enum.Enum):
    HEARD = enum.auto()
    ASKED = enum.auto()
    OVERDUE = enum.auto()  # asked, and not given up
    ANSWERED = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True)
class _Candidate:
    peer_id: str
    addrs: tuple[str, ...]
    state: _State = _State.HEARD
    holder: bool = False
    tries: int = 0


class Lookup:
    """Converges on `key` from the peers it is told of.

    `holders` > 0 also ends it when that many of the nearest that keep records
    have answered: reading and writing records needs no more.
    """

    def __init__(
        self,
        own_peer_id: str,
        key: bytes,
        *,
        width: int,
        holders: int = 0,
        alpha: int = ALPHA,
        requests_max: int = REQUESTS_MAX,
    ) -> None:
        self.key = key
        self.target = position(key)
        self._own_peer_id = own_peer_id
        self._width = width
        self._holders = holders
        self._alpha = alpha
        self._requests_left = requests_max
        self._candidates: dict[str, _Candidate] = {}
        self._by_distance: list[tuple[int, str]] = []

    def heard(self, peers: Sequence[PeerInfo]) -> None:
        """Peers that the table or an answer names: hints.

        One that failed is tried once more where somebody knows other addresses of it,
        or else whoever answers first could hide a peer behind wrong ones.
        """
        for peer in peers:
            if peer.peer_id == self._own_peer_id:
                continue
            candidate = self._candidates.get(peer.peer_id)
            if candidate is None:
                self._candidates[peer.peer_id] = _Candidate(peer.peer_id, peer.addrs)
                distance = peer_position(peer.peer_id) ^ self.target
                bisect.insort(self._by_distance, (distance, peer.peer_id))
                continue
            new = tuple(addr for addr in peer.addrs if addr not in candidate.addrs)
            if not new or len(candidate.addrs) >= ADDRS_MAX:
                continue
            if candidate.state is _State.FAILED and candidate.tries < _TRIES_MAX:
                candidate.state = _State.HEARD
                candidate.addrs = (new + candidate.addrs)[:ADDRS_MAX]
            else:
                candidate.addrs = (candidate.addrs + new)[:ADDRS_MAX]

    def next(self) -> list[PeerInfo]:
        """Whom to ask now."""
        ask: list[PeerInfo] = []
        flying = sum(c.state is _State.ASKED for c in self._candidates.values())
        nearer = holders = 0  # that answered or may yet
        for _, peer_id in self._by_distance:
            if flying >= self._alpha or self._requests_left <= 0 or self._enough(nearer, holders):
                break
            candidate = self._candidates[peer_id]
            if candidate.state is _State.HEARD:
                candidate.state = _State.ASKED
                candidate.tries += 1
                self._requests_left -= 1
                flying += 1
                ask.append(PeerInfo(peer_id, candidate.addrs))
            if candidate.state in (_State.ANSWERED, _State.ASKED):
                nearer += 1
                holders += candidate.holder
        return ask

    def answered(self, peer_id: str, *, holder: bool) -> None:
        """A peer that `next` named has answered, late or not."""
        candidate = self._candidates[peer_id]
        candidate.state = _State.ANSWERED
        candidate.holder = holder

    def failed(self, peer_id: str) -> None:
        """A peer that `next` named will not answer."""
        self._candidates[peer_id].state = _State.FAILED

    def overdue(self, peer_id: str) -> None:
        """A peer that `next` named takes longer than it should."""
        if self._candidates[peer_id].state is _State.ASKED:
            self._candidates[peer_id].state = _State.OVERDUE

    @property
    def done(self) -> bool:
        """Whether nothing that could still come would better the result by much."""
        answered = holders = overdue = 0
        for _, peer_id in self._by_distance:
            candidate = self._candidates[peer_id]
            if candidate.state is _State.ANSWERED:
                answered += 1
                holders += candidate.holder
                if self._enough(answered, holders):
                    return True
            elif candidate.state is _State.OVERDUE:
                overdue += 1
            elif candidate.state is _State.ASKED or self._may_ask(candidate):
                return False
        return overdue == 0 or answered >= QUORUM

    def nearest(self, *, holders_only: bool = False) -> list[PeerInfo]:
        """Who has answered, nearest first."""
        return [
            PeerInfo(peer_id, self._candidates[peer_id].addrs)
            for _, peer_id in self._by_distance
            if self._candidates[peer_id].state is _State.ANSWERED
            and (self._candidates[peer_id].holder or not holders_only)
        ]

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._candidates

    def reachable(self, peer_id: str) -> PeerInfo | None:
        """What was heard of one peer, unless it was tried and did not answer."""
        candidate = self._candidates.get(peer_id)
        if candidate is None or candidate.state is _State.FAILED:
            return None
        return PeerInfo(peer_id, candidate.addrs)

    @property
    def asked_nobody(self) -> bool:
        """Whether there was nobody to ask."""
        return not self._candidates

    def _may_ask(self, candidate: _Candidate) -> bool:
        return candidate.state is _State.HEARD and self._requests_left > 0

    def _enough(self, answered: int, holders: int) -> bool:
        return answered >= self._width or 0 < self._holders <= holders
