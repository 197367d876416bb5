"""The hybrid logical clock: causes come before effects whatever the wall clocks say."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnet.causality import APART_KEPT, Causality
from p2pnet.errors import MalformedError
from p2pnet.hlc import (
    AHEAD_MS_MAX,
    COUNTER_MAX,
    WALL_MS_MAX,
    HybridClock,
    Timestamp,
    parse_timestamp,
)

HOUR_MS = 3_600_000
NOW_MS = 1_764_000_000_000
timestamps = st.builds(
    Timestamp, st.integers(0, WALL_MS_MAX), st.integers(0, COUNTER_MAX)
)  # any that the text can say


@given(timestamps, timestamps)
def test_the_text_sorts_as_the_timestamps_do(one: Timestamp, other: Timestamp) -> None:
    assert parse_timestamp(str(one)) == one
    assert (str(one) < str(other)) == (one < other)


@pytest.mark.parametrize(
    "text",
    ["", "now", "019a0c5f3a20", "019a0c5f3a20-003", "019A0C5F3A20-0003", "019a0c5f3a20-0003 ",
     "019a0c5f3a20-0003\n", "+19a0c5f3a20-0003", "०१९a0c5f3a20-0003", "019a0c5f3a20-00033"],
)  # fmt: skip
def test_what_is_no_timestamp_is_malformed(text: str) -> None:
    with pytest.raises(MalformedError):
        parse_timestamp(text)


@given(st.text(max_size=30))
def test_any_text_parses_or_is_malformed(text: str) -> None:
    try:
        assert str(parse_timestamp(text)) == text
    except MalformedError:
        pass


@given(st.lists(st.tuples(st.integers(0, 3 * HOUR_MS), st.booleans(), timestamps), max_size=50))
def test_it_never_goes_back_and_stays_near_the_wall_clock(
    moves: list[tuple[int, bool, Timestamp]],
) -> None:
    clock = HybridClock()
    last, highest = Timestamp(0, 0), 0
    for wall, hears, heard in moves:
        highest = max(highest, NOW_MS + wall)
        if hears:
            clock.merge(heard, NOW_MS + wall)
        now = clock.tick(NOW_MS + wall)
        assert now > last
        # A full counter takes a millisecond more: one for each move at most.
        assert now.wall_ms <= highest + AHEAD_MS_MAX + len(moves)
        assert not hears or heard.wall_ms > NOW_MS + wall + AHEAD_MS_MAX or now > heard
        last = now


def test_a_clock_that_stands_still_or_goes_back_counts() -> None:
    clock = HybridClock()
    first = clock.tick(NOW_MS)
    assert clock.tick(NOW_MS) == Timestamp(NOW_MS, 1)
    assert clock.tick(NOW_MS - HOUR_MS) == Timestamp(NOW_MS, 2)
    assert clock.tick(NOW_MS + 1) == Timestamp(NOW_MS + 1, 0)
    assert first == Timestamp(NOW_MS, 0)


def test_a_full_counter_takes_the_next_millisecond() -> None:
    clock = HybridClock()
    assert clock.merge(Timestamp(NOW_MS, COUNTER_MAX), NOW_MS)
    assert clock.tick(NOW_MS) == Timestamp(NOW_MS + 1, 0)


@pytest.mark.parametrize("seed", range(20))
def test_happened_before_implies_order_with_clocks_an_hour_wrong(seed: int) -> None:
    """Random messages among nodes whose clocks are up to an hour wrong and jump about."""
    rng = Random(seed)
    count = 6
    clocks = [HybridClock() for _ in range(count)]
    wrong = [rng.randint(-HOUR_MS, HOUR_MS) for _ in range(count)]
    wrong[:2] = [-HOUR_MS, HOUR_MS]
    # An event's causes: how many events of each node it can know of (a vector clock).
    known = [[0] * count for _ in range(count)]
    events: list[tuple[Timestamp, int, list[int]]] = []
    on_the_way: list[tuple[Timestamp, list[int], int]] = []
    true_ms = NOW_MS
    for _ in range(400):
        true_ms += rng.choice((0, 0, 1, 50, 5000))
        node = rng.randrange(count)
        if rng.random() < 0.02:
            wrong[node] = rng.randint(-HOUR_MS, HOUR_MS)
        wall = true_ms + wrong[node]
        due = [letter for letter in on_the_way if letter[2] == node]
        if due and rng.random() < 0.6:
            letter = rng.choice(due)
            on_the_way.remove(letter)
            assert clocks[node].merge(letter[0], wall), "honest clocks are never too far ahead"
            known[node] = [max(a, b) for a, b in zip(known[node], letter[1], strict=True)]
        at = clocks[node].tick(wall)
        known[node][node] += 1
        events.append((at, node, list(known[node])))
        if rng.random() < 0.7:
            on_the_way.append((at, list(known[node]), rng.randrange(count)))
    for at, node, mine in events:
        for other_at, _, theirs in events:
            if theirs[node] >= mine[node] and theirs != mine:  # ours happened before theirs
                assert at < other_at


def test_who_is_too_far_ahead_drags_nobody_along_and_is_told_once() -> None:
    now = [NOW_MS]
    told: list[tuple[str, float]] = []
    causality = Causality(lambda: now[0])
    causality.on_apart = lambda peer_id, ahead_s: told.append((peer_id, ahead_s))
    before = causality.outgoing()
    for _ in range(3):
        causality.incoming(str(Timestamp(NOW_MS + AHEAD_MS_MAX + 1000, 0)), "liar")
    assert told == [("liar", AHEAD_MS_MAX / 1000 + 1)]
    assert before < causality.outgoing() < str(Timestamp(NOW_MS + 1, 0))
    honest = str(Timestamp(NOW_MS + 2 * HOUR_MS, 7))
    causality.incoming(honest, "an hour fast, and we an hour slow")
    assert causality.outgoing() > honest
    assert len(told) == 1


@pytest.mark.parametrize("said", [None, b"\xff", b"019a0c5f3a20-0003", "", "x" * 9000, 7])
def test_what_is_no_timestamp_on_the_wire_is_ignored(said: object) -> None:
    causality = Causality(lambda: NOW_MS)
    causality.incoming(said, "peer")
    assert causality.outgoing() == str(Timestamp(NOW_MS, 0))


def test_only_so_many_peers_are_told_of() -> None:
    told: list[str] = []
    causality = Causality(lambda: NOW_MS)
    causality.on_apart = lambda peer_id, ahead_s: told.append(peer_id)
    for number in range(APART_KEPT + 10):
        causality.incoming(str(Timestamp(WALL_MS_MAX, 0)), f"peer {number}")
    assert len(told) == APART_KEPT
