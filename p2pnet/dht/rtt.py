"""How long to wait for a peer, from the round trips seen. Pure.

The estimator is RFC 6298's (Jacobson and Karels 1988): with a sample R,
    RTTVAR <- 3/4 RTTVAR + 1/4 |SRTT - R|,   SRTT <- 7/8 SRTT + 1/8 R,
beginning with SRTT = R and RTTVAR = R/2; and SRTT + 4 RTTVAR is how long an
answer may well take. A request that got no answer gives no sample (Karn).
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pnet.bounded import keep_latest

# Past its *hedge* another peer is asked beside the one that was. Past its
# *patience* a lookup no longer waits for an answer, but still takes it. Past its
# *timeout* the peer is given up. The last two are apart because a busy volunteer
# often stalls for a second, and giving it up costs a connection.
HEDGE_S_MAX = 0.4
PATIENCE_S_MIN = 0.03
PATIENCE_S_MAX = 1.0  # RFC 6298's first timeout
TIMEOUT_S_MIN = 2.0
TIMEOUT_S_MAX = 8.0
_TIMEOUT_PATIENCES = 4
_PEERS_MAX = 1024
# The swarm says something of a stranger only after so many samples, and a
# stranger has to be dialled first.
_SAMPLES_MIN = 8
_STRANGER_FACTOR = 2


@dataclass(slots=True)
class _Estimate:
    smoothed_s: float
    variation_s: float

    @staticmethod
    def first(sample_s: float) -> _Estimate:
        return _Estimate(sample_s, sample_s / 2)

    def add(self, sample_s: float) -> None:
        self.variation_s += (abs(self.smoothed_s - sample_s) - self.variation_s) / 4
        self.smoothed_s += (sample_s - self.smoothed_s) / 8

    def limit_s(self) -> float:
        return self.smoothed_s + 4 * self.variation_s


class RoundTrips:
    """One estimate a peer, for the latest 1024, and one over all of them for the others."""

    def __init__(self) -> None:
        self._peers: dict[str, _Estimate] = {}
        self._swarm: _Estimate | None = None
        self._samples = 0

    @property
    def smoothed_s(self) -> float | None:
        """The swarm's smoothed round trip, None before the first."""
        return self._swarm.smoothed_s if self._swarm else None

    def sample(self, peer_id: str, round_trip_s: float) -> None:
        """A peer answered a request after that time."""
        estimate = self._peers.get(peer_id)
        if estimate is None:
            estimate = _Estimate.first(round_trip_s)
        else:
            estimate.add(round_trip_s)
        keep_latest(self._peers, peer_id, estimate, _PEERS_MAX)
        self._samples += 1
        if self._swarm is None:
            self._swarm = _Estimate.first(round_trip_s)
        else:
            self._swarm.add(round_trip_s)

    def hedge_s(self, peer_id: str) -> float:
        """After how many seconds to ask another peer beside that one."""
        return min(self.patience_s(peer_id), HEDGE_S_MAX)

    def patience_s(self, peer_id: str) -> float:
        """After how many seconds an answer of that peer is overdue."""
        return min(max(self._limit_s(peer_id), PATIENCE_S_MIN), PATIENCE_S_MAX)

    def timeout_s(self, peer_id: str) -> float:
        """After how many seconds that peer is given up."""
        wanted_s = _TIMEOUT_PATIENCES * self._limit_s(peer_id)
        return min(max(wanted_s, TIMEOUT_S_MIN), TIMEOUT_S_MAX)

    def _limit_s(self, peer_id: str) -> float:
        # How long an answer may well take.
        estimate = self._peers.get(peer_id)
        if estimate is not None:
            return estimate.limit_s()
        if self._swarm is not None and self._samples >= _SAMPLES_MIN:
            return _STRANGER_FACTOR * self._swarm.limit_s()
        return TIMEOUT_S_MAX  # nothing is known: the peer may be far away, and is to be dialled
