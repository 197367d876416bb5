"""How fast one IP group may make us store things: a token bucket a sender. Pure."""

from __future__ import annotations

# An orchestrator renews the records of its VNodes all at once, and a bulk put
# comes in one go: much at once is honest, much for long is not.
TOKENS_PER_S = 200.0
TOKENS_MAX = 2000.0
SENDERS_MAX = 4096
PUT_BYTES_A_TOKEN = 4 << 10  # a put costs one token, and one more for each of these


class SenderRates:
    """What each sender has left. Those beyond `senders_max` have one bucket in common."""

    def __init__(
        self,
        *,
        per_s: float = TOKENS_PER_S,
        burst: float = TOKENS_MAX,
        senders_max: int = SENDERS_MAX,
    ) -> None:
        self._per_s = per_s
        self._burst = burst
        self._senders_max = senders_max
        self._buckets: dict[str, tuple[float, float]] = {}  # left, and when; last used last
        self._others = (burst, 0.0)

    def take(self, sender: str, cost: float, now: float) -> bool:
        """Whether a sender may do something that costs so much; if so, it is paid for."""
        held = self._buckets.pop(sender, None)
        known = held is not None or self._has_room(now)
        tokens, since = held or ((self._burst, now) if known else self._others)
        tokens = min(self._burst, tokens + self._per_s * max(0.0, now - since))
        may = cost <= tokens
        left = (tokens - cost if may else tokens, now)
        if known:
            self._buckets[sender] = left
        else:
            self._others = left
        return may

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        assert len(self._buckets) <= self._senders_max
        assert all(0.0 <= tokens <= self._burst for tokens, _ in self._buckets.values())

    def _has_room(self, now: float) -> bool:
        # A bucket that is full again says nothing. Others are not forgotten, or a
        # sender could have a new one by way of many other names.
        if len(self._buckets) < self._senders_max:
            return True
        sender = next(iter(self._buckets))
        tokens, since = self._buckets[sender]
        if tokens + self._per_s * (now - since) < self._burst:
            return False
        del self._buckets[sender]
        return True
