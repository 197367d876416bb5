"""Network coordinates: they foretell round trips, and no lie takes them far."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet.errors import MalformedError
from p2pnet.gossip.coordinates import (
    AXES,
    ROUND_TRIP_S_MAX,
    Coordinate,
    Coordinates,
    read_coordinate,
    write_coordinate,
)
from p2pnet.v1 import gossip_pb2 as pb

SEED = 5


def world(count: int) -> tuple[list[tuple[float, float]], list[Coordinates]]:
    rng = random.Random(SEED)
    places = [(rng.uniform(0, 0.1), rng.uniform(0, 0.1)) for _ in range(count)]
    return places, [Coordinates(random.Random(n)) for n in range(count)]


def round_trip_s(a: tuple[float, float], b: tuple[float, float]) -> float:
    return 0.01 + math.dist(a, b)  # 5 ms of access link at each end


def wrongness(places: list[tuple[float, float]], nodes: list[Coordinates]) -> float:
    """The median of how far the foretold are off, as a share of the truth."""
    wrong = [
        abs(nodes[a].here.round_trip_s(nodes[b].here) - round_trip_s(places[a], places[b]))
        / round_trip_s(places[a], places[b])
        for a in range(len(nodes))
        for b in range(a)
    ]
    return sorted(wrong)[len(wrong) // 2]


def settle(rounds: int, liars: int = 0) -> float:
    places, nodes = world(30)
    rng = random.Random(SEED)
    for _ in range(rounds):
        for number, node in enumerate(nodes):
            other = rng.choice([n for n in range(len(nodes)) if n != number])
            there = nodes[other].here
            if other < liars:
                there = Coordinate((9.0,) * AXES, 9.0, 0.0)
            node.measure(str(other), round_trip_s(places[number], places[other]), there)
    return wrongness(places[liars:], nodes[liars:])


def test_the_foretold_are_within_a_tenth_of_the_truth() -> None:
    assert settle(5) > 0.2
    assert settle(200) < 0.1


def test_a_coordinate_travels() -> None:
    here = Coordinate((0.5, -0.25, 0.0, 0.125), 0.0625, 0.5)
    assert read_coordinate(write_coordinate(here)) == here
    fresh = read_coordinate(write_coordinate(Coordinate()))
    assert fresh.error == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        pb.Coordinate(),
        pb.Coordinate(axes=[0.0] * 5),
        pb.Coordinate(axes=[math.nan] * AXES),
        pb.Coordinate(axes=[math.inf, 0, 0, 0]),
        pb.Coordinate(axes=[11.0, 0, 0, 0]),
        pb.Coordinate(axes=[0.0] * AXES, height=-0.1),
        pb.Coordinate(axes=[0.0] * AXES, height=math.nan),
        pb.Coordinate(axes=[0.0] * AXES, error=math.inf),
    ],
)
def test_a_place_that_nothing_can_be_at_is_malformed(bad: pb.Coordinate) -> None:
    with pytest.raises(MalformedError):
        read_coordinate(bad)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.tuples(*[st.floats(-ROUND_TRIP_S_MAX, ROUND_TRIP_S_MAX, width=32)] * AXES),
            st.floats(0, ROUND_TRIP_S_MAX, width=32),
            st.floats(0, 1, width=32),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=30,
    )
)
def test_no_lie_takes_us_off_the_earth(
    lies: list[tuple[tuple[float, ...], float, float, float]],
) -> None:
    ours = Coordinates(random.Random(SEED))
    for axes, height, error, took_s in lies:
        before = ours.here
        ours.measure("liar", took_s, Coordinate(axes, height, error))
        assert math.dist(before.axes, ours.here.axes) <= 0.1 + 1e-3
        read_coordinate(write_coordinate(ours.here))


def test_the_median_of_the_last_measurements_counts() -> None:
    ours = Coordinates(random.Random(SEED))
    assert ours.measured_s("peer") is None
    for took_s in (0.05, 3.0, 0.06):
        ours.measure("peer", took_s, None)
    assert ours.measured_s("peer") == 0.06
    for number in range(1000):
        ours.measure(str(number), 0.1, None)
    assert ours.measured_s("peer") is None  # so many are kept, and no more
