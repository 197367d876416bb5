"""When peers to start from are tried: at once, then ever more rarely, for ever, a few at a time."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from p2pnet import tries
from p2pnet.tries import AT_ONCE, RETRY_MAX_S, Tries

NAMES = [f"peer {n}" for n in range(40)]


def never(name: str) -> bool:
    """Everybody has to be tried."""
    return False


def live(
    them: Tries, until: float, *, reached: bool = False, alone: bool = False, now: float = 0.0
) -> list[tuple[float, str]]:
    """Tries whoever is due, each for a second, until a time; who was tried when."""
    tried: list[tuple[float, str]] = []
    while now < until:
        for name in them.due(now, never):
            tried.append((now, name))
            them.ended(name, now + 1.0, reached=reached, alone=alone)
        deadline = them.deadline()
        assert deadline is not None
        now = max(now + 0.001, deadline)
    return tried


def test_all_are_tried_at_once_but_only_a_few_together() -> None:
    them = Tries(NAMES, random.Random(1), 0.0)
    first = them.due(0.0, never)
    assert len(first) == AT_ONCE
    assert them.due(100.0, never) == []
    assert them.deadline() is None, "somebody has to come back first"
    assert not them.all_tried
    for name in first:
        them.ended(name, 0.0, reached=False, alone=True)
    second = them.due(0.0, never)
    assert len(second) == AT_ONCE
    assert not set(first) & set(second)


def test_the_order_is_the_seeds() -> None:
    orders = [Tries(NAMES, random.Random(n), 0.0).due(0.0, never) for n in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("alone", "cap_s"), [(True, tries.ALONE_MAX_S), (False, RETRY_MAX_S)])
def test_who_does_not_answer_is_tried_ever_more_rarely_and_for_ever(
    alone: bool, cap_s: float
) -> None:
    day_s = 24 * 3600.0
    tried = live(Tries(["a"], random.Random(3), 0.0), day_s, alone=alone)
    waits = [b - a - 1.0 for (a, _), (b, _) in itertools.pairwise(tried)]
    assert waits[0] < 1.0
    assert 0.75 * cap_s <= max(waits) <= 1.25 * cap_s
    assert tried[-1][0] > day_s - 2 * cap_s
    assert len(tried) <= 20 + day_s / (0.75 * cap_s)
    assert len(set(waits[-20:])) == 20, "jittered"


def test_a_peer_that_answers_and_is_no_member_is_not_pestered() -> None:
    tried = live(Tries(["a"], random.Random(3), 0.0), 3600.0, reached=True)
    assert len(tried) < 30


def test_who_is_a_member_is_not_tried_and_at_once_when_it_is_none_any_more() -> None:
    them = Tries(["a", "b"], random.Random(0), 0.0)
    members = {"a": True, "b": True}
    assert them.due(0.0, members.__getitem__) == []
    assert them.all_tried
    deadline = them.deadline()
    assert deadline is not None
    assert 0 < deadline <= 1.25 * tries.WATCH_S
    members["a"] = False
    assert them.due(100.0, members.__getitem__) == ["a"]
    them.ended("a", 101.0, reached=False, alone=False)
    deadline = them.deadline()
    assert deadline is not None
    assert deadline < 102.0


def test_who_was_a_member_begins_anew() -> None:
    them = Tries(["a"], random.Random(0), 0.0)
    live(them, 5000.0)
    assert them.due(10_000.0, lambda name: True) == []
    assert them.due(20_000.0, never) == ["a"]
    them.ended("a", 20_001.0, reached=False, alone=False)
    assert them.due(20_002.0, never) == ["a"]


def test_nobody_starves() -> None:
    counts = Counter(name for _, name in live(Tries(NAMES, random.Random(4), 0.0), 3600.0))
    assert set(counts) == set(NAMES)
    assert max(counts.values()) - min(counts.values()) <= 5


def test_who_was_not_tried_yet_comes_before_who_was() -> None:
    them, tried = Tries(NAMES, random.Random(5), 0.0), Counter[str]()
    for step in range(6):
        for name in them.due(100.0 + step, never):
            tried[name] += 1
            them.ended(name, 100.0 + step, reached=False, alone=True)
        if step < 2:
            assert max(tried.values()) == 1
    assert set(tried) == set(NAMES)


def test_nobody_to_try() -> None:
    them = Tries([], random.Random(0), 0.0)
    assert them.due(0.0, never) == []
    assert them.all_tried
    assert them.deadline() is None
