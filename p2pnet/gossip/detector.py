"""The failure detector: whom to probe now, and whom to accuse of what. Pure.

It never declares anybody failed; it says what this node shall accuse others of,
and the table counts it as one voice.
"""

from __future__ import annotations

import random

from p2pnet.gossip.events import GossipConfig
from p2pnet.gossip.health import LocalHealth, suspicion_s
from p2pnet.gossip.probing import Watch
from p2pnet.gossip.table import Table

_CONFIRMATIONS = 3  # Lifeguard's K: more than these shorten a suspicion no further


class Detector:
    """Watches the members that the table says are ours to watch."""

    def __init__(self, config: GossipConfig, table: Table, rng: random.Random) -> None:
        self._config = config
        self._table = table
        self._rng = rng
        self._health = LocalHealth(config.probe_interval_s)
        self._watches: dict[str, Watch] = {}
        self._subjects: list[str] = []

    @property
    def watched(self) -> list[str]:
        """The peers watched now."""
        return list(self._watches)

    def probe_of(self, peer_id: str) -> int | None:
        """The probe of a peer that is under way, or None."""
        watch = self._watches.get(peer_id)
        return watch.rpc_id if watch else None

    def watch(self, subjects: list[str], now: float) -> None:
        """Watches these from now on, and keeps what is known of those watched already."""
        if subjects is not self._subjects:  # the table keeps one list until it changes
            self._subjects = subjects
            spread_s = self._config.probe_interval_s
            self._watches = {
                peer_id: self._watches.get(peer_id) or Watch(now + self._rng.uniform(0, spread_s))
                for peer_id in subjects
            }

    def late(self, lateness_s: float, now: float) -> None:
        """We ourselves came late: trust ourselves less, or after a stall begin anew."""
        self._health.late(lateness_s, now)
        if lateness_s > self._config.stalled_s:
            for watch in self._watches.values():
                watch.stalled(lateness_s, now)

    def accused(self, now: float) -> None:
        """Others miss us, who are here."""
        self._health.accused(now)

    def look(self, peer_id: str, now: float) -> None:
        """Others accuse a peer: probe it at once, for us to see and for it to hear of it."""
        watch = self._watches.get(peer_id)
        if watch is not None:
            watch.next_at = min(watch.next_at, now)

    def heard(self, peer_id: str) -> None:
        """A peer asked something: it is there."""
        watch = self._watches.get(peer_id)
        if watch is not None:
            watch.answered()

    def broken(self, peer_id: str, now: float) -> None:
        """The connection to a peer went."""
        watch = self._watches.get(peer_id)
        if watch is not None:
            watch.broken(now, self._config)

    def refuted(self, peer_id: str, now: float) -> None:
        """A peer that we accused has a new incarnation."""
        watch = self._watches.get(peer_id)
        if watch is not None:
            watch.refuted(now)

    def to_probe(self, now: float) -> list[str]:
        """Whose probe is due; `probing` says that it is sent."""
        return [p for p, w in self._watches.items() if w.rpc_id is None and w.next_at <= now]

    def probing(self, peer_id: str, rpc_id: int) -> None:
        """A probe is under way."""
        self._watches[peer_id].rpc_id = rpc_id

    def answered(self, peer_id: str, rpc_id: int, sent_at: float, now: float) -> None:
        """A request was answered, a probe or another one."""
        watch = self._watches.get(peer_id)
        if watch is None:
            return
        watch.answered()
        if watch.rpc_id == rpc_id:
            watch.rpc_id = None
            watch.next_at = max(now, sent_at + self._config.probe_interval_s)

    def unanswered(self, peer_id: str, rpc_id: int, sent_at: float, now: float) -> bool | None:
        """A request was not answered. Returns whether to accuse the peer of it.

        True: of having failed; False: of being suspect; None: not at all.
        """
        watch = self._watches.get(peer_id)
        if watch is None or watch.rpc_id != rpc_id:
            return None
        watch.rpc_id = None
        watch.missed(sent_at, now, self._config)
        # While everybody refuses at once, it is rather our own network that is gone.
        if watch.refusing(self._config) and not self.cut_off:
            return True
        if watch.suspected_at is None and watch.silent(now, self._config, self._factor(now)):
            watch.suspected_at = now
            return False
        return None

    @property
    def cut_off(self) -> bool:
        """Whether everybody whom we watch was missed: then it is rather we who are gone."""
        missed = all(watch.misses for watch in self._watches.values())
        return self._config.local_health and len(self._watches) > 1 and missed

    def void(self, peer_id: str, rpc_id: int, now: float) -> None:
        """A request from before a stall of ours ended somehow: that says nothing."""
        watch = self._watches.get(peer_id)
        if watch is not None and watch.rpc_id == rpc_id:
            watch.rpc_id = None
            watch.next_at = now

    def run_out(self, now: float) -> list[str]:
        """The peers whose suspicion has lasted long enough: to be accused of having failed."""
        out = []
        for peer_id, watch in self._watches.items():
            if watch.suspected_at is not None and self._expiry(peer_id, watch, now) <= now:
                watch.suspected_at = None
                out.append(peer_id)
        return out

    def deadline(self, now: float) -> float | None:
        """When a probe is due or a suspicion runs out, as far as can be told now."""
        due = [w.next_at for w in self._watches.values() if w.rpc_id is None]
        due += [
            self._expiry(peer_id, watch, now)
            for peer_id, watch in self._watches.items()
            if watch.suspected_at is not None
        ]
        return min(due, default=None)

    def _expiry(self, peer_id: str, watch: Watch, now: float) -> float:
        assert watch.suspected_at is not None
        others = [p for p in self._table.observers(peer_id) if p != self._table.me]
        # An observer that we miss as well can confirm nothing.
        possible = [p for p in others if p not in self._watches or not self._watches[p].misses]
        confirmed = [a for a in self._table.accusations(peer_id) if a.accuser != self._table.me]
        lasting_s = suspicion_s(
            min(len(confirmed), len(possible)),
            min(_CONFIRMATIONS, len(possible)),
            self._table.live,
            min_s=self._config.suspicion_min_s,
            max_s=self._config.suspicion_max_s,
        )
        return watch.suspected_at + lasting_s * self._factor(now)

    def _factor(self, now: float) -> float:
        # How much longer than normal we wait, for not being sure of ourselves.
        if not self._config.local_health:
            return 1.0
        missing = sum(1 for watch in self._watches.values() if watch.misses)
        crowd = missing > 1 and 2 * missing > len(self._watches)
        return 1.0 + self._health.score(now) + (1.0 if crowd else 0.0)
