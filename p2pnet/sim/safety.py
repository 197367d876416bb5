"""What must never happen in a swarm, whatever the faults; judged by who sees everything. Pure.

The cores check themselves (`check()`); here is what no single one can see.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pnet.dht import events as ev
from p2pnet.dht.lookup import QUORUM
from p2pnet.dht.records import OpenRecord
from p2pnet.gossip.events import MemberChanged
from p2pnet.sim.gossip_node import GossipNode
from p2pnet.sim.grow import Peer
from p2pnet.sim.records import Ledger
from p2pnet.sim.world import World

# How much longer than its life a record may be seen: clocks drift by 2 %, each
# holder's and its author's.
_LIFE_FACTOR = 1.05
_LIFE_SLACK_S = 5.0


class SafetyViolation(AssertionError):
    """Something happened that must never happen."""


class MembershipSafety:
    """No node holds an advert that its subject has not signed, and none goes back."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        self._signed: dict[bytes, None] = {}
        self._order: dict[tuple[int, int, str], tuple[int, bool, int]] = {}
        for peer in peers:
            peer.gossip.watchers.append(self._changed)
            self.booted(peer)

    def booted(self, peer: Peer) -> None:
        """A new process has signed its first advert."""
        own = peer.gossip.core.member(peer.peer_id)
        if own is not None:
            self._signed[own.advert.signed.payload] = None

    def _changed(self, node: GossipNode, change: MemberChanged) -> None:
        advert = change.advert
        if change.peer_id == node.peer_id:
            self._signed[advert.signed.payload] = None
            return
        if advert.signed.payload not in self._signed:
            raise SafetyViolation(
                f"{node.machine} took incarnation {advert.incarnation} of a peer that never "
                "signed it"
            )
        process = (node.machine.number, node.machine.boots, change.peer_id)
        if advert.order < self._order.get(process, advert.order):
            raise SafetyViolation(f"{node.machine} went back to an older advert")
        self._order[process] = advert.order


class RecordSafety:
    """No forged record is ever returned, none long expired, and after a quorum no older one.

    A read merges what QUORUM of a key's holders say, so that a record must be seen as
    soon as fewer than QUORUM of them lack it.
    """

    def __init__(self, world: World, peers: Sequence[Peer], ledger: Ledger) -> None:
        self._world = world
        self._peers = peers
        self._ledger = ledger
        self._ranks: dict[tuple[int, int, bytes, str], tuple[int, int, bytes]] = {}
        self.reads = 0
        self.binding = 0  # of them such that a certain record had to be seen

    def sweep(self) -> None:
        """No process goes back to an older record of an author than it held."""
        for peer in self._peers:
            machine, store = peer.machine, peer.dht.core.local.store
            if not machine.alive:
                continue
            held = store.keys()
            for key in held:
                for record in store.get(key, machine.now):
                    at = (machine.number, machine.boots, key, record.author)
                    if record.rank < self._ranks.get(at, record.rank):
                        raise SafetyViolation(f"{machine} went back to an older record")
                    self._ranks[at] = record.rank

    def before(self, key: bytes) -> list[OpenRecord]:
        """What a read that begins now may not miss."""
        due = []
        for author in self._ledger.authors(key):
            held = self._held_by_most(key, author)
            if held is not None:
                due.append(held)
        return due

    def after(
        self,
        key: bytes,
        due: Sequence[OpenRecord],
        result: ev.Records,
        *,
        whole: bool,
    ) -> None:
        """Judges a read. `whole`: every process that ran when it began still does."""
        self.reads += 1
        for record in result.records:
            self._sound(record)
        if not whole or result.answers < QUORUM:
            return
        found = {record.author: record for record in result.records}
        for wanted in due:
            now_held = self._held_by_most(key, wanted.author)
            if now_held is None:
                continue  # it has expired meanwhile
            self.binding += 1
            seen = found.get(wanted.author)
            if seen is None or seen.rank < wanted.rank:
                raise SafetyViolation(
                    f"a read of {result.answers} holders missed a record that all but "
                    f"{QUORUM - 1} of them hold"
                )

    def _sound(self, record: OpenRecord) -> None:
        signed_at = self._ledger.signed_at(record)
        if signed_at is None:
            raise SafetyViolation("a read returned a record that its author never signed")
        age_s = self._world.now - signed_at
        if age_s > record.ttl_s * _LIFE_FACTOR + _LIFE_SLACK_S:
            raise SafetyViolation(
                f"a read returned a record of {record.ttl_s} s after {age_s:.0f} s"
            )

    def _held_by_most(self, key: bytes, author: str) -> OpenRecord | None:
        """The newest that all running machines but fewer than QUORUM hold, or newer ones."""
        running = [peer for peer in self._peers if peer.machine.alive]
        held = []
        for peer in running:
            records = peer.dht.core.local.store.get(key, peer.machine.now)
            held += [record for record in records if record.author == author]
        # Of the ranks in order the one that only QUORUM - 1 are below.
        lacking = len(running) - len(held)
        if lacking >= QUORUM:
            return None
        in_order = sorted(held, key=lambda record: record.rank)
        return in_order[QUORUM - 1 - lacking] if len(in_order) > QUORUM - 1 - lacking else None
