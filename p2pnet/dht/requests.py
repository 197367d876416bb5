"""The requests under way: since when, for whom, and until when each is waited for. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from p2pnet.dht.local import Local
from p2pnet.dht.rtt import TIMEOUT_S_MAX
from p2pnet.dht.searches import Search
from p2pnet.dht.wire import Kind
from p2pnet.net.network import PeerInfo

_GRACE_S = 1.0  # what the shell may be late with a failure
_AT_ONCE = 8  # requests that a peer is expected to answer as fast as one


@dataclass(slots=True)
class Request:
    """One of ours. `operation` None: only the table wants to know.

    `check`: whether a good answer lets the peer into the table; `last`: whether it is
    the last chance of one that is there.
    """

    rpc_id: int
    peer: PeerInfo
    kind: Kind
    operation: Search | None
    check: bool
    last: bool
    sent_at: float
    timeout_s: float
    slow_at: float | None  # None: past
    overdue_at: float | None
    given_up_at: float

    @property
    def next_at(self) -> float:
        """When it changes by itself next."""
        if self.slow_at is not None:
            return self.slow_at
        return self.given_up_at if self.overdue_at is None else self.overdue_at


class Requests:
    """By id. A peer with an overdue request is stalled, as `Local` sees it."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self._requests: dict[int, Request] = {}
        self._last_id = 0
        self._checking: dict[str, None] = {}
        self._at_once: Counter[str] = Counter()  # by peer

    def __len__(self) -> int:
        return len(self._requests)

    def open(
        self,
        peer: PeerInfo,
        kind: Kind,
        operation: Search | None,
        now: float,
        *,
        check: bool = False,
        last: bool = False,
    ) -> Request:
        """A request to be sent now. What else is under way at a peer gives it more time."""
        trips = self._local.round_trips
        busy = 1.0 + self._at_once[peer.peer_id] / _AT_ONCE
        timeout_s = min(busy * trips.timeout_s(peer.peer_id), TIMEOUT_S_MAX)
        hedge_s = trips.hedge_s(peer.peer_id)
        if operation is not None:
            hedge_s = min(hedge_s, operation.hedge_s_max)
        self._last_id += 1
        request = self._requests[self._last_id] = Request(
            rpc_id=self._last_id,
            peer=peer,
            kind=kind,
            operation=operation,
            check=check,
            last=last,
            sent_at=now,
            timeout_s=timeout_s,
            slow_at=None if last else now + busy * hedge_s,
            overdue_at=None if last else now + busy * trips.patience_s(peer.peer_id),
            given_up_at=now + timeout_s + _GRACE_S,
        )
        self._at_once[peer.peer_id] += 1
        if last:
            self._local.stalled(peer.peer_id, +1)
        if check:
            self._checking[peer.peer_id] = None
        return request

    def get(self, rpc_id: int) -> Request | None:
        """One under way, None if it is over."""
        return self._requests.get(rpc_id)

    def close(self, request: Request) -> None:
        """It is under way no more."""
        peer_id = request.peer.peer_id
        del self._requests[request.rpc_id]
        self._at_once[peer_id] -= 1
        if not self._at_once[peer_id]:
            del self._at_once[peer_id]
        if request.overdue_at is None:
            self._local.stalled(peer_id, -1)
        if request.check:
            del self._checking[peer_id]

    def overdue(self, request: Request) -> None:
        """It takes longer than it should."""
        request.overdue_at = None
        self._local.stalled(request.peer.peer_id, +1)

    def under_way(self) -> list[Request]:
        """All of them, the oldest first."""
        return list(self._requests.values())

    def checks(self, peer_id: str) -> bool:
        """Whether it is being found out if that peer answers lookups."""
        return peer_id in self._checking

    def is_last(self, peer_id: str) -> bool:
        """Whether a peer's last chance is under way."""
        return any(r.last and r.peer.peer_id == peer_id for r in self._requests.values())

    @property
    def checks_count(self) -> int:
        """Of how many peers that is being found out."""
        return len(self._checking)

    def check(self) -> None:
        """Raises AssertionError if an invariant does not hold."""
        of_peers = Counter(request.peer.peer_id for request in self._requests.values())
        assert of_peers == self._at_once
        checked = [r.peer.peer_id for r in self._requests.values() if r.check]
        assert sorted(checked) == sorted(self._checking)
        for request in self._requests.values():
            assert request.peer.peer_id != self._local.peer_id, "we ask ourselves"
            assert request.sent_at <= request.next_at <= request.given_up_at
