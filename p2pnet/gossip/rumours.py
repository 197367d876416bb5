"""News on its way: each statement is sent a bounded number of times. Pure."""

from __future__ import annotations

# (subject, "") for an advert, (subject, accuser) for an accusation
Key = tuple[str, str]


class Rumours:
    """A bounded set of raw statements; a newer one takes its predecessor's place."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._left: dict[Key, int] = {}  # how often it is still to be sent; the oldest first
        self._levels: dict[int, dict[Key, bytes]] = {}  # the same, by how often

    def __len__(self) -> int:
        return len(self._left)

    def add(self, key: Key, raw: bytes, sends: int) -> None:
        """To be sent `sends` times; where there is no room, the oldest makes way."""
        self.discard(key)
        if len(self._left) >= self._count_max:
            self.discard(next(iter(self._left)))
        self._left[key] = sends
        self._levels.setdefault(sends, {})[key] = raw

    def discard(self, key: Key) -> None:
        """No longer true."""
        left = self._left.pop(key, None)
        if left is not None:
            self._drop(key, left)

    def take(self, budget_bytes: int) -> list[tuple[Key, bytes]]:
        """What to put into one message, the least told first; it counts as sent."""
        taken: list[tuple[Key, bytes]] = []
        for left in sorted(self._levels, reverse=True):
            for key, raw in tuple(self._levels[left].items()):
                if len(raw) > budget_bytes:
                    self._told(taken)
                    return taken
                budget_bytes -= len(raw)
                taken.append((key, raw))
        self._told(taken)
        return taken

    def _told(self, taken: list[tuple[Key, bytes]]) -> None:
        for key, raw in taken:
            left = self._left[key]
            self._drop(key, left)
            if left > 1:
                self._left[key] = left - 1
                self._levels.setdefault(left - 1, {})[key] = raw
            else:
                del self._left[key]

    def _drop(self, key: Key, left: int) -> None:
        level = self._levels[left]
        del level[key]
        if not level:
            del self._levels[left]
