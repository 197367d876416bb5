"""A bounded table in which whoever takes up the most gives way first. Pure.

Identities are free: a table that drops its oldest item when it is full can be
flushed by anybody who makes enough of them. Here each item is charged to the
source that it came from (an IP group, see `net/groups.py`), and the oldest item of
the source that has the most gives way. So a source that floods the table drives
out its own; to drive out another's m of n items, n/m sources are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Shares(Generic[K, V]):
    """Items by key, the latest put last, each with the source that it is charged to."""

    def __init__(self, items_max: int) -> None:
        self._items_max = items_max
        self._items: dict[K, tuple[V, str]] = {}
        self._of: dict[str, dict[K, None]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: K) -> bool:
        return key in self._items

    def get(self, key: K) -> V | None:
        """What is kept under a key, or None."""
        found = self._items.get(key)
        return found[0] if found else None

    def items(self) -> Iterator[tuple[K, V, str]]:
        """Keys, values and sources, the oldest first."""
        for key, (value, source) in self._items.items():
            yield key, value, source

    def count(self, source: str) -> int:
        """How many items are charged to a source."""
        return len(self._of.get(source, ()))

    def put(self, key: K, value: V, source: str) -> K | None:
        """Keeps an item, as the latest; returns the key of the one that gave way, if one did.

        An item that is there already stays charged to its first source: who passes on
        what is another's shall not have it in its own share, to drive it out with that.
        """
        held = self._items.get(key)
        if held is not None:
            source = held[1]
            self.pop(key)
        self._items[key] = (value, source)
        self._of.setdefault(source, {})[key] = None
        if len(self._items) <= self._items_max:
            return None
        largest = max(self._of.values(), key=len)
        oldest = next(iter(largest))
        self.pop(oldest)
        return oldest

    def pop(self, key: K) -> V | None:
        """Drops an item; returns it, or None where there was none."""
        found = self._items.pop(key, None)
        if found is None:
            return None
        value, source = found
        of_source = self._of[source]
        del of_source[key]
        if not of_source:
            del self._of[source]
        return value

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert len(self._items) <= self._items_max
        assert sum(map(len, self._of.values())) == len(self._items)
        assert all(self._items[key][1] == source for source in self._of for key in self._of[source])
        assert all(self._of.values())
