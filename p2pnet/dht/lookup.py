"""An iterative lookup that liars do not lead astray: whom to ask next, when it is over. Pure.

Maymounkov and Mazieres 2002, section 2.3: ask the nearest known, learn of nearer
ones, until those nearest to the key have answered. On top of that:

- *Disjoint paths* (Baumgart and Mies, "S/Kademlia", ICPADS 2007): what a peer
  names is followed on the path on which that peer was asked, and nobody is asked
  on two. A liar captures its own path; the others go round it.
- *Credit*: a liar can also name peers that do not exist. Who named more than a
  few that fail, and more that fail than answer, is believed no more.
- *IP groups*: of the nearest, only a few of one group count, so that a flood of
  identities from a few addresses does not fill the place; more only where few
  groups are known at all.
- *Hedging* (Dean and Barroso, "The Tail at Scale", CACM 2013): a peer that is slower
  than peers usually are no longer counts as one of the alpha, and another is asked
  beside it. One whose answer is overdue is not waited for: all silent peers together
  cost one patience (`rtt.py`), and not a timeout each.
"""

from __future__ import annotations

import bisect
import enum
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from p2pnet.dht.keyspace import peer_position, position
from p2pnet.dht.routing import UNKNOWN_GROUP, group_limit
from p2pnet.dht.wire import ADDRS_MAX
from p2pnet.net.groups import GroupOf
from p2pnet.net.network import PeerInfo

ALPHA = 5  # of a lookup that wants to see many
PATHS = 8
REQUESTS_MAX = 128
# With fewer answers than this and nobody left to ask, overdue ones are waited for.
QUORUM = 3
GROUP_NEAREST_MAX = 2  # of one IP group among those nearest to a key
_TRIES_MAX = 2
_ADDRS_A_HINT = 6  # so that no one of those who name a peer fills its place with wrong ones
_CREDIT = 6  # failures of whom it named that a peer may have, whoever answers
_REFERRERS_MAX = 8  # remembered of one candidate


class _State(enum.Enum):
    HEARD = enum.auto()
    ASKED = enum.auto()
    OVERDUE = enum.auto()  # asked, and not given up
    ANSWERED = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True)
class _Candidate:
    peer_id: str
    distance: int
    addrs: tuple[str, ...]
    group: str
    path: int
    hops: int  # 0: from our own table
    state: _State = _State.HEARD
    holder: bool = False
    tries: int = 0
    hedged: bool = False
    referrers: list[_Candidate] = field(default_factory=list)  # who named it
    named_failed: int = 0
    named_answered: int = 0


@dataclass(slots=True)
class _Path:
    """The candidates heard of on a path, nearest first, also those asked on another."""

    order: list[tuple[int, str]] = field(default_factory=list)
    flying: int = 0


class Lookup:
    """Converges on `key` from the peers it is told of.

    It ends when the `width` nearest have answered, and if `holders` > 0 also when
    that many of the nearest that keep records have, each of another IP group:
    reading and writing records needs no more. `narrow` > 0: until `widen` is called,
    on one path, and only that many holders are wanted. `alpha`: requests under way at
    once. `shy`: who is asked only
    where nobody else is left.
    """

    def __init__(
        self,
        own_peer_id: str,
        key: bytes,
        *,
        width: int,
        group_of: GroupOf,
        holders: int = 0,
        narrow: int = 0,
        alpha: int = ALPHA,
        shy: Callable[[str], bool] = lambda peer_id: False,
    ) -> None:
        self.key = key
        self.target = position(key)
        self._own_peer_id = own_peer_id
        self._width = width
        self._holders = holders
        self._narrow = narrow
        self._alpha = alpha
        self._group_of = group_of
        self._shy = shy
        self._requests_left = REQUESTS_MAX
        self._candidates: dict[str, _Candidate] = {}
        self._groups: dict[str, None] = {}
        self._order: list[tuple[int, str]] = []
        self._paths = [_Path() for _ in range(PATHS)]
        self._turn = 0
        self._asked = 0  # candidates that are ASKED
        self._complete = False  # whether all holders that are wanted had answered, at `next`

    # What it is told

    def begin(self, peers: Sequence[PeerInfo]) -> None:
        """What our table knows, nearest first: each path starts from other peers."""
        for index, peer in enumerate(peers):
            self._hear(peer, None, index % PATHS)

    def heard(self, by: str, peers: Sequence[PeerInfo]) -> None:
        """What a peer that answered names: hints."""
        referrer = self._candidates[by]
        idle = [n for n, path in enumerate(self._paths) if not path.order]
        # With few seeds there are fewer paths, until there is something to share out.
        paths = [referrer.path, *idle]
        for index, peer in enumerate(peers):
            self._hear(peer, referrer, paths[index % len(paths)])

    def answered(self, peer_id: str, *, holder: bool, addr: str = "") -> None:
        """A peer that `next` named has answered, late or not; `addr`: where it was seen."""
        candidate = self._candidates[peer_id]
        if candidate.state is not _State.ANSWERED:
            for referrer in candidate.referrers:
                referrer.named_failed -= candidate.state in (_State.OVERDUE, _State.FAILED)
                referrer.named_answered += 1
        self._become(candidate, _State.ANSWERED)
        candidate.holder = holder
        candidate.group = self._group_of(peer_id, addr) if addr else UNKNOWN_GROUP
        self._groups[candidate.group] = None

    def failed(self, peer_id: str) -> None:
        """A peer that `next` named will not answer."""
        candidate = self._candidates[peer_id]
        if candidate.state is not _State.OVERDUE:
            self._blame(candidate)
        self._become(candidate, _State.FAILED)

    def slow(self, peer_id: str) -> None:
        """A peer that `next` named takes longer than most do."""
        candidate = self._candidates[peer_id]
        if candidate.state is _State.ASKED:
            self._hedge(candidate)

    def overdue(self, peer_id: str) -> None:
        """A peer that `next` named takes longer than it should."""
        candidate = self._candidates[peer_id]
        if candidate.state is _State.ASKED:
            self._blame(candidate)
            self._become(candidate, _State.OVERDUE)

    def widen(self) -> None:
        """What was asked of few is asked of all that should know."""
        self._narrow = 0

    # What it says

    def next(self) -> list[PeerInfo]:
        """Whom to ask now."""
        self._complete = self._have_holders()
        if self._complete:
            return []
        ask: list[PeerInfo] = []
        flying = self.flying
        nobody_else = flying == 0
        while flying < (self._narrow or self._alpha) and self._requests_left > 0:
            candidate = self._pick(shy=False)
            if candidate is not None:
                nobody_else = False
            elif nobody_else:
                candidate = self._pick(shy=True)
            if candidate is None:
                break
            candidate.state = _State.ASKED
            self._asked += 1
            candidate.hedged = False
            candidate.tries += 1
            self._paths[candidate.path].flying += 1
            self._requests_left -= 1
            flying += 1
            ask.append(PeerInfo(candidate.peer_id, candidate.addrs))
        return ask

    @property
    def done(self) -> bool:
        """Whether nothing that could still come would better the result by much.

        To be asked when `next` has nobody to ask.
        """
        if self._complete:
            return True
        if self.awaited:
            return False  # who is under way may know nearer ones
        answered = waiting = 0
        for candidate in self._nearest():
            answered += candidate.state is _State.ANSWERED
            waiting += candidate.state is _State.OVERDUE
            if answered >= self._width:
                break
        return waiting == 0 or answered >= QUORUM

    def nearest(self) -> list[PeerInfo]:
        """Who has answered, nearest first, a few of each IP group."""
        answered = [c for c in self._nearest() if c.state is _State.ANSWERED]
        return [PeerInfo(candidate.peer_id, candidate.addrs) for candidate in answered]

    def holders(self) -> list[PeerInfo]:
        """Who has answered and keeps records, nearest first: one of each IP group, and then
        the others."""
        groups: dict[str, None] = {}
        first: list[PeerInfo] = []
        others: list[PeerInfo] = []
        for candidate in self._nearest():
            if candidate.state is _State.ANSWERED and candidate.holder:
                peer = PeerInfo(candidate.peer_id, candidate.addrs)
                (others if candidate.group in groups else first).append(peer)
                groups[candidate.group] = None
        return first + others

    def quorum(self, answers: int, among: int) -> bool:
        """Whether `answers` holders have answered of the `among` nearest, as far as we know.

        Those that are silent are passed over.
        """
        asked = heard = 0
        for candidate in self._diverse(among):
            if candidate.state is _State.ANSWERED and not candidate.holder:
                continue
            asked += 1
            heard += candidate.state is _State.ANSWERED
            if heard >= answers:
                return True
            if asked >= among:
                return False
        return False

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._candidates

    def reachable(self, peer_id: str) -> PeerInfo | None:
        """What was heard of one peer, unless it was tried and did not answer."""
        candidate = self._candidates.get(peer_id)
        if candidate is None or candidate.state is _State.FAILED:
            return None
        return PeerInfo(peer_id, candidate.addrs)

    @property
    def flying(self) -> int:
        """How many requests are under way and not slow."""
        return sum(path.flying for path in self._paths)

    @property
    def awaited(self) -> bool:
        """Whether a request is under way and not overdue."""
        return self._asked > 0

    @property
    def asked_nobody(self) -> bool:
        """Whether there was nobody to ask."""
        return not self._candidates

    @property
    def hops(self) -> int:
        """How far from our own table the nearest that answered was heard of."""
        for _, peer_id in self._order:
            if self._candidates[peer_id].state is _State.ANSWERED:
                return self._candidates[peer_id].hops + 1
        return 0

    @property
    def requests(self) -> int:
        """How many requests were sent."""
        return REQUESTS_MAX - self._requests_left

    # Inside

    def _hear(self, peer: PeerInfo, by: _Candidate | None, path: int) -> None:
        """One hint.

        A peer that failed is tried once more where somebody knows other addresses of
        it, or else whoever answers first could hide a peer behind wrong ones.
        """
        if peer.peer_id == self._own_peer_id:
            return
        candidate = self._candidates.get(peer.peer_id)
        if candidate is None:
            candidate = _Candidate(
                peer_id=peer.peer_id,
                distance=peer_position(peer.peer_id) ^ self.target,
                addrs=peer.addrs if by is None else peer.addrs[:_ADDRS_A_HINT],
                group=self._group_of(peer.peer_id, (peer.addrs or ("",))[0]),
                path=path,
                hops=by.hops + 1 if by else 0,
            )
            self._candidates[peer.peer_id] = candidate
            if by is None:  # that there are groups is for those to say who have been seen
                self._groups[candidate.group] = None
            bisect.insort(self._order, (candidate.distance, peer.peer_id))
        else:
            hinted = peer.addrs[:_ADDRS_A_HINT]
            new = tuple(addr for addr in hinted if addr not in candidate.addrs)
            if new and candidate.state is _State.FAILED and candidate.tries < _TRIES_MAX:
                candidate.state = _State.HEARD
                candidate.addrs = (new + candidate.addrs)[:ADDRS_MAX]
            elif new:
                candidate.addrs = (candidate.addrs + new)[:ADDRS_MAX]
        if by is not None and len(candidate.referrers) < _REFERRERS_MAX:
            candidate.referrers.append(by)
            by.named_answered += candidate.state is _State.ANSWERED
        order = self._paths[path].order
        at = bisect.bisect_left(order, (candidate.distance, candidate.peer_id))
        if at == len(order) or order[at][1] != candidate.peer_id:
            order.insert(at, (candidate.distance, candidate.peer_id))

    def _pick(self, *, shy: bool) -> _Candidate | None:
        """The next to be asked; those whom we would rather not ask only if `shy`."""
        for turn in range(0 if self._narrow else PATHS):
            number = (self._turn + turn) % PATHS
            path = self._paths[number]
            candidate = None if path.flying else self._step(path, shy)
            if candidate is not None:
                candidate.path = number
                self._turn = (number + 1) % PATHS
                return candidate
        # Then those nearest to the key, until as many have answered, or may yet, as we want.
        places, wanted = 0, self._narrow or self._holders or self._width
        for candidate in self._diverse(wanted) if self._holders else self._nearest():
            if candidate.state is _State.HEARD and (shy or not self._shy(candidate.peer_id)):
                return candidate
            if candidate.state is _State.ANSWERED:
                places += candidate.holder or not self._holders
            else:
                places += candidate.state is _State.ASKED and not candidate.hedged
            if places >= wanted:
                break
        return None

    def _step(self, path: _Path, shy: bool) -> _Candidate | None:
        """The nearest on a path, unless somebody has asked it already: then the path is at
        its end."""
        for _, peer_id in path.order:
            candidate = self._candidates[peer_id]
            if candidate.state in (_State.FAILED, _State.OVERDUE):
                continue
            if candidate.state is not _State.HEARD:
                return None
            if not self._credible(candidate):
                continue
            if shy or not self._shy(peer_id):
                return candidate
        return None

    def _nearest(self) -> Iterator[_Candidate]:
        """Those that count, nearest first: believed, not failed, few of each IP group."""
        limit = group_limit(self._width, max(1, len(self._groups)), GROUP_NEAREST_MAX)
        groups: Counter[str] = Counter()
        for _, peer_id in self._order:
            candidate = self._candidates[peer_id]
            state = candidate.state
            if state is _State.FAILED:
                continue
            if state is _State.HEARD and not self._credible(candidate):
                continue
            if state is not _State.OVERDUE:
                groups[candidate.group] += 1
            if groups[candidate.group] <= limit:
                yield candidate

    def _credible(self, candidate: _Candidate) -> bool:
        if candidate.hops == 0:
            return True  # our own table vouches for it
        return any(
            r.named_failed <= _CREDIT or r.named_failed <= r.named_answered
            for r in candidate.referrers
        )

    def _have_holders(self) -> bool:
        """Whether the `holders` nearest of different IP groups that keep records have answered."""
        wanted = self._narrow or self._holders
        if not wanted:
            return False
        holders = 0
        for candidate in self._diverse(wanted):
            if candidate.state is _State.ASKED:
                return False
            if candidate.state is _State.HEARD and not self._shy(candidate.peer_id):
                return False
            holders += candidate.state is _State.ANSWERED and candidate.holder
            if holders >= wanted:
                return True
        return False

    def _diverse(self, n: int) -> Iterator[_Candidate]:
        """As `_nearest`, without the silent, and of each IP group only what `n` of them allow."""
        limit = group_limit(n, max(1, len(self._groups)), 1)
        groups: Counter[str] = Counter()
        for candidate in self._nearest():
            if candidate.state is not _State.OVERDUE:
                groups[candidate.group] += 1
                if groups[candidate.group] <= limit:
                    yield candidate

    def _become(self, candidate: _Candidate, state: _State) -> None:
        if candidate.state is _State.ASKED:
            self._hedge(candidate)
            self._asked -= 1
        candidate.state = state

    def _hedge(self, candidate: _Candidate) -> None:
        """A request holds up its path and the others no more."""
        if not candidate.hedged:
            candidate.hedged = True
            self._paths[candidate.path].flying -= 1

    def _blame(self, candidate: _Candidate) -> None:
        for referrer in candidate.referrers:
            referrer.named_failed += 1
