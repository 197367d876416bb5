"""RFC 6298's estimator against figures worked out by hand."""

from __future__ import annotations

import pytest

from p2pnet.dht.rtt import (
    PATIENCE_S_MAX,
    PATIENCE_S_MIN,
    TIMEOUT_S_MAX,
    TIMEOUT_S_MIN,
    RoundTrips,
)


@pytest.mark.parametrize(
    ("samples", "limit_s"),
    [
        # SRTT = R, RTTVAR = R/2: R + 4 R/2
        ((0.1,), 0.3),
        # RTTVAR = 3/4 0.05 + 1/4 0 = 0.0375, SRTT = 0.1
        ((0.1, 0.1), 0.25),
        # RTTVAR = 3/4 0.05 + 1/4 0.1 = 0.0625, SRTT = 0.1 + 0.1/8 = 0.1125
        ((0.1, 0.2), 0.3625),
        ((0.001,), PATIENCE_S_MIN),
        ((2.0,), PATIENCE_S_MAX),
    ],
)
def test_patience(samples: tuple[float, ...], limit_s: float) -> None:
    trips = RoundTrips()
    for sample in samples:
        trips.sample("a", sample)
    assert trips.patience_s("a") == pytest.approx(limit_s)


def test_a_stranger_is_judged_by_the_swarm_once_that_is_known() -> None:
    trips = RoundTrips()
    assert trips.patience_s("stranger") == PATIENCE_S_MAX
    assert trips.smoothed_s is None
    for n in range(8):
        trips.sample(f"peer {n}", 0.01)
    assert trips.smoothed_s == pytest.approx(0.01)
    assert trips.patience_s("stranger") < 0.1


def test_a_timeout_is_clamped() -> None:
    trips = RoundTrips()
    trips.sample("near", 0.001)
    trips.sample("far", 30.0)
    assert trips.timeout_s("near") == TIMEOUT_S_MIN
    assert TIMEOUT_S_MIN < trips.timeout_s("far") <= TIMEOUT_S_MAX


def test_the_latest_peers_are_remembered_and_no_more() -> None:
    trips = RoundTrips()
    trips.sample("first", 0.2)
    for n in range(1024):
        trips.sample(f"peer {n}", 0.001)
    assert trips.patience_s("peer 5") == PATIENCE_S_MIN
    assert trips.patience_s("first") < 0.2, "forgotten: judged as a stranger"
