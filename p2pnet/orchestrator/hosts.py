"""What speaks for and against the hosts of one network. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from p2pnet.bounded import keep_latest

HEARTBEATS_MISSED_MAX = 2
SHUNNED_S = 15.0  # how long a host that failed us is not placed on; doubles with each time
SHUNNED_MAX_S = 900.0
FAILURES_KEPT = 10_000
BLAMES = 2
BLAMED_MAX = 1_000


class HostBook:
    """Who failed us, who leaves, who misses heartbeats, and who does not know that it lost."""

    def __init__(self) -> None:
        self._shunned: dict[str, float] = {}  # until when
        self._failures: dict[str, int] = {}  # in a row
        self._blamed: dict[str, int] = {}  # how often since the last commit
        self._leaving: dict[str, None] = {}
        self._missed: dict[str, int] = {}
        self._former: dict[str, bool] = {}  # whether it is being told

    def leaves(self, peer_id: str) -> None:
        """The peer is about to go: nothing is placed there any more."""
        self._leaving[peer_id] = None

    def is_leaving(self, peer_id: str) -> bool:
        """Whether the peer has said that it goes."""
        return peer_id in self._leaving

    def came(self, peer_id: str) -> None:
        """The peer is there (again)."""
        self._leaving.pop(peer_id, None)
        self._shunned.pop(peer_id, None)
        self._failures.pop(peer_id, None)

    def shun(self, peer_id: str, now: float) -> None:
        """Nothing is placed there for a while, and each time in a row for longer."""
        self._shunned = {peer: until for peer, until in self._shunned.items() if until > now}
        if peer_id in self._shunned:
            return  # the same failure, seen from another side
        failures = self._failures.get(peer_id, 0)
        keep_latest(self._failures, peer_id, failures + 1, FAILURES_KEPT)
        self._shunned[peer_id] = now + min(SHUNNED_S * 2**failures, SHUNNED_MAX_S)

    def blame(self, host: str, by: str, now: float) -> None:
        """`by` says that it cannot reach a host, which we may reach very well.

        The host is left alone from the second time on, and if that does not help who
        blames, until there is a commit: two that cannot reach each other are not to be
        neighbours, whoever is at fault.
        """
        if host not in self._blamed and len(self._blamed) >= BLAMED_MAX:
            return
        times = self._blamed[host] = self._blamed.get(host, 0) + 1
        if times == BLAMES:
            self.shun(host, now)
        elif times > BLAMES and by:
            self.shun(by, now)

    def forgive(self) -> None:
        """The network gets on: there is a commit."""
        self._blamed.clear()

    def well(self, peer_id: str, now: float) -> bool:
        """Whether nothing speaks against a peer at present."""
        return peer_id not in self._leaving and self._shunned.get(peer_id, 0.0) <= now

    def barred(self, now: float) -> tuple[str, ...]:
        """Who is not to be placed on, sorted."""
        shunned = (peer for peer, until in self._shunned.items() if until > now)
        return tuple(sorted({*shunned, *self._leaving}))

    def answered(self, host: str) -> None:
        """A heartbeat came back."""
        self._missed.pop(host, None)
        self._failures.pop(host, None)

    def missed(self, host: str) -> bool:
        """A heartbeat did not; whether that is one too many."""
        self._missed[host] = self._missed.get(host, 0) + 1
        if self._missed[host] < HEARTBEATS_MISSED_MAX:
            return False
        del self._missed[host]
        return True

    def lost(self, placed: Iterable[str], now_placed: Iterable[str]) -> None:
        """Of the hosts of an older placement, those of no newer one are to be told."""
        for host in placed:
            self._former[host] = False
        for host in now_placed:
            self._former.pop(host, None)

    def to_release(self, alive: Mapping[str, None]) -> list[str]:
        """Former hosts that are there to be told; until they have heard, again and again."""
        to_tell = [host for host, telling in self._former.items() if host in alive and not telling]
        for host in to_tell:
            self._former[host] = True
        return to_tell

    def released(self, host: str, heard: bool) -> None:
        """A former host was told, or could not be."""
        if heard:
            self._former.pop(host, None)
        elif host in self._former:
            self._former[host] = False


def following_by_host(standbys: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The VNodes that each host follows, from who follows each VNode; both sorted."""
    hosts: dict[str, list[str]] = {}
    for vnode in sorted(standbys):
        for host in standbys[vnode]:
            hosts.setdefault(host, []).append(vnode)
    return {host: tuple(hosts[host]) for host in sorted(hosts)}


def all_hosts(
    placement: Mapping[str, str], standbys: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """Who hosts or follows something, sorted."""
    following = (host for hosts in standbys.values() for host in hosts)
    return tuple(sorted(dict.fromkeys((*placement.values(), *following))))


def by_host(placement: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The VNodes of each host, from the host of each VNode; both sorted."""
    hosts: dict[str, list[str]] = {}
    for vnode, host in sorted(placement.items()):
        hosts.setdefault(host, []).append(vnode)
    return {host: tuple(hosts[host]) for host in sorted(hosts)}
