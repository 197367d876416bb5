"""How this node comes to doubt the members that it watches. Pure.

Two ways to a verdict. A member that is *silent* is suspected after three missed
probes, and failed once the suspicion has run out unrefuted. A member that
*refuses* (its connection broke and dialling it again fails at once) is accused
of having failed after two refusals in a row: its machine answers, its process
does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pnet.gossip.events import GossipConfig

_BACKOFF_MAX = 3


@dataclass(slots=True)
class Watch:
    """What is known of one watched member between its probes."""

    next_at: float
    rpc_id: int | None = None  # the probe under way
    misses: int = 0  # in a row
    refusals: int = 0  # in a row
    missing_since: float = 0.0  # when the first missed probe was sent
    suspected_at: float | None = None  # since when our own suspicion runs
    backoff: int = 0  # how often our accusations were refuted without an answer

    def answered(self) -> None:
        """It is there. What it was accused of it has been told, and refutes itself."""
        self.misses = self.refusals = self.backoff = 0
        self.suspected_at = None

    def refuted(self, now: float) -> None:
        """A new incarnation: whom we cannot reach but others can, we accuse more slowly."""
        self.backoff = min(self.backoff + 1, _BACKOFF_MAX)
        self.misses = self.refusals = 0
        self.suspected_at = None
        self.next_at = max(self.next_at, now)

    def missed(self, sent_at: float, now: float, config: GossipConfig) -> None:
        """A probe got no answer."""
        if self.misses == 0:
            self.missing_since = sent_at
        self.misses += 1
        if now - sent_at < config.fast_failure_s:
            self.refusals += 1
            pause = config.fast_retry_s
            if self.refusals >= config.fast_failures << self.backoff:
                pause = config.probe_interval_s
            self.next_at = now + pause
        else:
            self.refusals = 0
            self.next_at = max(now, sent_at + config.probe_interval_s)

    def broken(self, now: float, config: GossipConfig) -> None:
        """Its connection went: look at once, the second time after a moment."""
        pause = config.fast_retry_s if self.misses else 0.0
        self.next_at = min(self.next_at, now + pause)

    def stalled(self, lateness_s: float, now: float) -> None:
        """It was we who were not there: nothing of what was missed counts."""
        self.misses = self.refusals = 0
        self.next_at = now
        if self.suspected_at is not None:
            self.suspected_at += lateness_s

    def silent(self, now: float, config: GossipConfig, factor: float) -> bool:
        """True if it has missed enough probes for long enough to be suspected."""
        scaled = config.misses << self.backoff
        lasting_s = scaled * config.probe_interval_s * factor
        return self.misses >= scaled and now - self.missing_since >= lasting_s

    def refusing(self, config: GossipConfig) -> bool:
        """True if it has refused often enough to be accused."""
        return self.refusals >= config.fast_failures << self.backoff
