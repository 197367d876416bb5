"""Who takes a network over when its orchestrator is gone, and when. A pure core (DESIGN D6).

The keepers of a network's log and the hosts of its VNodes know it, and all of them know
each other from its last claim. The living ones whom the owner has granted it rank
themselves by the XOR distance of their ids to the network's, and the first in rank
acts at once, the next a turn later. That saves races and is not needed for safety:
when two claim, the log decides.

An orchestrator's lease ends when the membership no longer counts it among the
living, or when it has not answered for its network for a while, though its process
may live.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pnet.core import Tick
from p2pnet.dht.keyspace import network_key, peer_position, position
from p2pnet.keys import short

ASK_EVERY_S = 2.0
ASKERS = 3  # the first in rank ask the orchestrator whether it still is
SILENT_MAX = 3  # unanswered asks in a row
DENIED_MAX = 2  # answers in a row that it is not, or not any more
TURN_S = 1.5  # between one rank and the next
TRY_S = 20.0  # how long a try may take before the next
STRANGER_S = 10.0  # an orchestrator that this process has not met yet may still turn up
NETWORKS_MAX = 1024
_GONE = "is gone"
UNRANKED = 16  # the rank of whoever is neither keeper nor host


@dataclass(frozen=True, slots=True)
class Known:
    """A network that this node knows of, as its log's last claim says.

    `candidates`: its keepers and hosts whom the owner lets orchestrate, sorted.
    """

    network_id: str
    epoch: int
    orchestrator: str
    candidates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """A network that is closed, or of which this node keeps nothing any more."""

    network_id: str


@dataclass(frozen=True, slots=True)
class Alive:
    """The living members, by peer id; this node among them."""

    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeaseHeld:
    """The orchestrator says that it is, since the claim of that epoch."""

    network_id: str
    peer_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class LeaseDenied:
    """It answers that it is not."""

    network_id: str
    peer_id: str


@dataclass(frozen=True, slots=True)
class LeaseSilent:
    """It does not answer."""

    network_id: str
    peer_id: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A takeover of ours came to nothing: not granted, or the log was not to be read."""

    network_id: str


Event = Known | Forget | Alive | LeaseHeld | LeaseDenied | LeaseSilent | Failed | Tick


@dataclass(frozen=True, slots=True)
class AskLease:
    """Ask a peer whether it orchestrates a network: LeaseHeld, LeaseDenied or LeaseSilent."""

    network_id: str
    peer_id: str


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Claim the network; `epoch` is that of the claim that has lapsed."""

    network_id: str
    epoch: int
    reason: str


Effect = AskLease | TakeOver


@dataclass(slots=True)
class _Watched:
    known: Known
    since: float
    met: bool = False  # its orchestrator was among the living
    lapsed_at: float | None = None  # when its lease ended
    reason: str = ""
    silent: int = 0
    denied: int = 0
    ask_at: float = 0.0
    asking: bool = False
    trying_until: float = 0.0


class Succession:
    """All networks that this node would take over. `me`: its peer id."""

    def __init__(self, me: str) -> None:
        self._me = me
        self._alive: dict[str, None] = {me: None}
        self._networks: dict[str, _Watched] = {}

    def handle(self, event: Event, now: float) -> list[Effect]:
        """See `p2pnet.core.Core`."""
        match event:
            case Known():
                self._learn(event, now)
            case Forget(network_id):
                self._networks.pop(network_id, None)
            case Alive(peers):
                self._alive = dict.fromkeys((*peers, self._me))
            case LeaseHeld() | LeaseDenied() | LeaseSilent():
                self._answered(event, now)
            case Failed(network_id):
                watched = self._networks.get(network_id)
                if watched is not None:
                    watched.trying_until = now + TURN_S * (1 + self._rank(watched))
            case Tick():
                pass
        return self._look(now)

    def deadline(self) -> float | None:
        """See `p2pnet.core.Core`."""
        times = []
        for watched in self._networks.values():
            if watched.lapsed_at is not None:
                times.append(max(self._turn(watched), watched.trying_until))
            elif not watched.asking and self._asks(watched):
                times.append(watched.ask_at)
            elif watched.known.orchestrator not in self._alive:
                times.append(watched.since + STRANGER_S)
        return min(times, default=None)

    def check(self) -> None:
        """See `p2pnet.core.Core`."""
        assert len(self._networks) <= NETWORKS_MAX
        assert self._me in self._alive

    def known(self, network_id: str) -> Known | None:
        """What is known of a network."""
        watched = self._networks.get(network_id)
        return None if watched is None else watched.known

    # What was learned

    def _learn(self, known: Known, now: float) -> None:
        watched = self._networks.get(known.network_id)
        if watched is None:
            if len(self._networks) < NETWORKS_MAX:
                self._watch(known, now)
        elif known.epoch > watched.known.epoch:
            self._watch(known, now)
        elif known.epoch == watched.known.epoch:
            watched.known = known

    def _watch(self, known: Known, now: float) -> None:
        # Its orchestrator may just be allocating: it is asked in a while.
        self._networks[known.network_id] = _Watched(known, now, ask_at=now + ASK_EVERY_S)

    def _answered(self, event: LeaseHeld | LeaseDenied | LeaseSilent, now: float) -> None:
        watched = self._networks.get(event.network_id)
        if watched is None or watched.known.orchestrator != event.peer_id:
            return
        watched.asking = False
        watched.ask_at = now + ASK_EVERY_S
        if isinstance(event, LeaseHeld):
            watched.silent = watched.denied = 0
            watched.lapsed_at = None
        elif isinstance(event, LeaseDenied):
            watched.silent, watched.denied = 0, watched.denied + 1
            if watched.denied >= DENIED_MAX:
                self._lapse(watched, "no longer looks after it", now)
        else:
            watched.silent += 1
            if watched.silent >= SILENT_MAX:
                self._lapse(watched, "does not answer for it", now)

    def _lapse(self, watched: _Watched, why: str, now: float) -> None:
        if watched.lapsed_at is None:
            watched.lapsed_at = now
            watched.reason = f"orchestrator {short(watched.known.orchestrator)} {why}"

    # What is to be done

    def _look(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for watched in list(self._networks.values()):
            orchestrator = watched.known.orchestrator
            if orchestrator in self._alive:
                watched.met = True
                if watched.reason.endswith(_GONE):  # it is back, and may look after it again
                    watched.lapsed_at, watched.reason = None, ""
                    watched.ask_at = min(watched.ask_at, now)
            elif watched.met or now >= watched.since + STRANGER_S:
                self._lapse(watched, _GONE, now)
            if watched.lapsed_at is not None:
                if now >= max(self._turn(watched), watched.trying_until):
                    effects += self._try(watched, now)
            elif not watched.asking and now >= watched.ask_at and self._asks(watched):
                watched.asking = True
                effects.append(AskLease(watched.known.network_id, orchestrator))
        return effects

    def _asks(self, watched: _Watched) -> bool:
        # Ourselves, too: a process that has restarted does not look after what it did.
        orchestrator = watched.known.orchestrator
        if orchestrator == self._me:
            return True
        return orchestrator in self._alive and self._rank(watched) < ASKERS

    def _try(self, watched: _Watched, now: float) -> list[Effect]:
        watched.trying_until = now + TRY_S
        known = watched.known
        return [TakeOver(known.network_id, known.epoch, watched.reason)]

    def _turn(self, watched: _Watched) -> float:
        assert watched.lapsed_at is not None
        return watched.lapsed_at + TURN_S * self._rank(watched)

    def _rank(self, watched: _Watched) -> int:
        """Of this node among the living candidates."""
        target = position(network_key(watched.known.network_id))
        mine = peer_position(self._me) ^ target
        known = watched.known
        if self._me not in known.candidates:
            return UNRANKED
        return sum(
            1
            for peer in known.candidates
            if peer in self._alive
            and peer != known.orchestrator
            and peer_position(peer) ^ target < mine
        )


def candidates_of(
    keepers: Sequence[str], hosts: Sequence[str], granted: Sequence[str] | None
) -> tuple[str, ...]:
    """Who may take a network over: keepers and hosts whom the owner has granted (None: all)."""
    known = dict.fromkeys((*keepers, *hosts))
    return tuple(sorted(peer for peer in known if granted is None or peer in granted))
