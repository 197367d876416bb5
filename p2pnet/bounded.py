"""Tables that keep the latest. Pure."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def keep_latest(table: dict[K, V], key: K, value: V, count_max: int) -> None:
    """Puts an item in as the latest; where there are more than `count_max`, the oldest goes."""
    table.pop(key, None)
    table[key] = value
    if len(table) > count_max:
        del table[next(iter(table))]
