"""Round-trip times between any two peers, foretold from coordinates. Pure.

Vivaldi: Dabek, Cox, Kaashoek, Morris, "Vivaldi: A Decentralized Network
Coordinate System", SIGCOMM 2004, with its height vectors (section 5.4), and the
gravity of Ledlie, Gardner, Seltzer, "Network Coordinates in the Wild", NSDI 2007,
without which all coordinates drift together. The constants are those of serf.

A peer may lie about where it is. What it says is bounded when it is read, one
measurement moves us by a bounded way, and a coordinate decides nothing but an
estimate.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass
from statistics import median

from p2pnet.bounded import keep_latest
from p2pnet.errors import MalformedError
from p2pnet.v1 import gossip_pb2 as pb

AXES = 4
ROUND_TRIP_S_MAX = 10.0
ERROR_MAX = 1.5
_HEIGHT_MIN_S = 1e-5
_ERROR_SHARE = 0.25  # c_e of the paper: how fast the error follows
_MOVE_SHARE = 0.25  # c_c of the paper: how far one measurement moves us
_MOVE_S_MAX = 0.1  # and never further than this
_GRAVITY_RHO_S = 150.0  # Ledlie et al.: the pull to the origin is (length / rho)^2
_RECENT = 3  # of a peer's last so many measurements the median counts (Ledlie et al.)
_PEERS_MAX = 256


@dataclass(frozen=True, slots=True)
class Coordinate:
    """A point and a height over it, in seconds; `error` is relative, 0 (sure) to 1.5."""

    axes: tuple[float, ...] = (0.0,) * AXES
    height: float = _HEIGHT_MIN_S
    error: float = ERROR_MAX

    def round_trip_s(self, other: Coordinate) -> float:
        """The time to `other` and back, as the coordinates have it."""
        return math.dist(self.axes, other.axes) + self.height + other.height


def write_coordinate(coordinate: Coordinate) -> pb.Coordinate:
    """As it travels."""
    return pb.Coordinate(
        axes=coordinate.axes, height=coordinate.height, error=min(1.0, coordinate.error)
    )


def read_coordinate(message: pb.Coordinate) -> Coordinate:
    """Raises MalformedError: not a place that anything on earth can be at."""
    axes = tuple(message.axes)
    within = all(abs(axis) <= ROUND_TRIP_S_MAX for axis in axes)  # False for what is no number
    if len(axes) != AXES or not within:
        raise MalformedError("a coordinate has other axes than a coordinate has")
    if not 0 <= message.height <= ROUND_TRIP_S_MAX or not 0 <= message.error <= ERROR_MAX:
        raise MalformedError("a coordinate's height or error is out of range")
    return Coordinate(axes, message.height, message.error)


class Coordinates:
    """Where we are, and what was measured on the way there."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.here = Coordinate()
        self._measured: dict[str, deque[float]] = {}
        self._heard: dict[str, Coordinate] = {}

    def measured_s(self, peer_id: str) -> float | None:
        """The median of the last round trips to a peer, if we measured any."""
        recent = self._measured.get(peer_id)
        return median(recent) if recent else None

    def heard_of(self, peer_id: str) -> Coordinate | None:
        """Where a peer last told us itself that it is."""
        return self._heard.get(peer_id)

    def hear(self, peer_id: str, there: Coordinate) -> None:
        """A peer says where it is."""
        keep_latest(self._heard, peer_id, there, _PEERS_MAX)

    def measure(self, peer_id: str, round_trip_s: float, there: Coordinate | None) -> None:
        """We asked a peer and its answer took so long; `there` is what it says of itself."""
        if not 0.0 < round_trip_s <= ROUND_TRIP_S_MAX:
            return
        recent = self._measured.get(peer_id)
        if recent is None:
            recent = deque(maxlen=_RECENT)
        recent.append(round_trip_s)
        keep_latest(self._measured, peer_id, recent, _PEERS_MAX)
        if there is not None:
            self.hear(peer_id, there)
            self._move(there, median(recent))

    def _move(self, there: Coordinate, round_trip_s: float) -> None:
        # Figure 3 of the paper. weight: the less sure of the two moves further.
        here = self.here
        weight = here.error / max(here.error + there.error, 1e-9)
        foretold_s = here.round_trip_s(there)
        wrong = abs(foretold_s - round_trip_s) / round_trip_s
        share = _ERROR_SHARE * weight
        error = min(ERROR_MAX, wrong * share + here.error * (1 - share))
        force_s = _MOVE_SHARE * weight * (round_trip_s - foretold_s)
        force_s = max(-_MOVE_S_MAX, min(_MOVE_S_MAX, force_s))
        height, unit = here.height, self._away_from(there)
        apart = math.dist(here.axes, there.axes)
        if apart > 1e-9:  # the height takes its share of the force (section 5.4)
            height += (here.height + there.height) * force_s / apart
            height = min(ROUND_TRIP_S_MAX / 2, max(_HEIGHT_MIN_S, height))
        axes = tuple(a + u * force_s for a, u in zip(here.axes, unit, strict=True))
        kept = max(0.0, 1.0 - math.hypot(*axes) / _GRAVITY_RHO_S**2)
        limit = ROUND_TRIP_S_MAX / 2
        within = tuple(max(-limit, min(limit, axis * kept)) for axis in axes)
        self.here = Coordinate(within, height, error)

    def _away_from(self, there: Coordinate) -> tuple[float, ...]:
        away = tuple(a - b for a, b in zip(self.here.axes, there.axes, strict=True))
        length = math.hypot(*away)
        if length <= 1e-9:  # on top of each other: any way out is good
            away = tuple(self._rng.uniform(-1, 1) for _ in range(AXES))
            length = math.hypot(*away) or 1.0
        return tuple(axis / length for axis in away)
