"""Sequences that are fed in parts: continued where they end, or said to be gone."""

from __future__ import annotations

import pytest

from p2pnet.vnode import sessions
from p2pnet.vnode.sessions import Sessions


def fed(table: Sessions, key: str, position: int, tokens: int, now: float = 0.0) -> bool:
    """Feeds a part; whether it was taken."""
    session = table.take(key, position, now)
    if session is None:
        return False
    session.tokens = position + tokens
    session.size_bytes = 10 * session.tokens
    table.put(key, session, now)
    return True


def test_a_part_begins_where_the_cache_ends() -> None:
    table = Sessions()
    assert not fed(table, "a", 3, 1)
    assert fed(table, "a", 0, 4)
    assert fed(table, "a", 4, 1)
    assert fed(table, "a", 5, 2)
    assert table.size_bytes == 70


@pytest.mark.parametrize("position", [3, 5])
def test_a_part_from_elsewhere_ends_the_session(position: int) -> None:
    table = Sessions()
    fed(table, "a", 0, 4)
    assert not fed(table, "a", position, 1)
    assert not fed(table, "a", 4, 1)
    assert fed(table, "a", 0, 5), "it begins anew with all of its tokens"
    assert table.size_bytes == 50


def test_a_part_that_fails_ends_the_session() -> None:
    table = Sessions()
    fed(table, "a", 0, 4)
    assert table.take("a", 4, 0) is not None  # and nothing is put back
    assert not fed(table, "a", 4, 1)


def test_the_least_recently_used_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "BYTES_MAX", 100)
    table = Sessions()
    fed(table, "a", 0, 4)
    fed(table, "b", 0, 4)
    assert fed(table, "a", 4, 1)
    assert fed(table, "c", 0, 4)
    assert not fed(table, "b", 4, 1)
    assert fed(table, "a", 5, 1)
    monkeypatch.setattr(sessions, "SESSIONS_MAX", 2)
    fed(table, "d", 0, 1)
    assert len(table) == 2


def test_what_nobody_uses_is_let_go() -> None:
    table = Sessions()
    fed(table, "a", 0, 4, now=10)
    fed(table, "b", 0, 4, now=20)
    assert table.deadline() == 10 + sessions.IDLE_S
    table.expire(10 + sessions.IDLE_S)
    assert len(table) == 1
    assert not fed(table, "a", 4, 1, now=131)
    assert fed(table, "b", 4, 1, now=131)
