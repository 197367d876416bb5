"""News on its way: each statement is sent a bounded number of times. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from p2pnet.v1 import common_pb2

# (subject, "") for an advert, (subject, accuser) for an accusation
Key = tuple[str, str]


@dataclass(slots=True)
class _Rumour:
    signed: common_pb2.Signed
    sends_left: int
    size_bytes: int


class Rumours:
    """A bounded set of statements; a newer one takes its predecessor's place."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._rumours: dict[Key, _Rumour] = {}

    def __len__(self) -> int:
        return len(self._rumours)

    def add(self, key: Key, signed: common_pb2.Signed, sends: int) -> None:
        """To be sent `sends` times; where there is no room, the oldest makes way."""
        self._rumours.pop(key, None)
        if len(self._rumours) >= self._count_max:
            del self._rumours[next(iter(self._rumours))]
        self._rumours[key] = _Rumour(signed, sends, signed.ByteSize())

    def discard(self, key: Key) -> None:
        """No longer true."""
        self._rumours.pop(key, None)

    def take(self, budget_bytes: int) -> list[tuple[Key, common_pb2.Signed]]:
        """What to put into one message, the least told first; it counts as sent."""
        taken: list[tuple[Key, common_pb2.Signed]] = []
        for key, rumour in sorted(self._rumours.items(), key=lambda item: -item[1].sends_left):
            if rumour.size_bytes > budget_bytes:
                break
            budget_bytes -= rumour.size_bytes
            rumour.sends_left -= 1
            if rumour.sends_left <= 0:
                del self._rumours[key]
            taken.append((key, rumour.signed))
        return taken
