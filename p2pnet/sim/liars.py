"""Machines that lie: each class is one way to. Pure.

They speak the real protocols, on machines like all others: their connections, keys and
addresses are honest, what they say is not. Put in place of an honest node, e.g.
`SilentPeer(world.machine())`.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from p2pnet.dht.keyspace import peer_position, position
from p2pnet.dht.wire import PEERS_MAX, Kind, Message
from p2pnet.dht.wire import parse as parse_kad
from p2pnet.dht.wire import serialise as serialise_kad
from p2pnet.gossip.messages import Kinds, write_message
from p2pnet.gossip.statements import OpenAdvert, Versions, build_accusation
from p2pnet.net.network import PeerInfo
from p2pnet.sim.connections import Silence
from p2pnet.sim.dht_node import PROTOCOL as KAD_PROTOCOL
from p2pnet.sim.dht_node import RECORD_PROTOCOL, DhtNode
from p2pnet.sim.gossip_node import PROTOCOL as GOSSIP_PROTOCOL
from p2pnet.sim.machine import Machine


class Liar(ABC):
    """A program without a core. `announced`: what else it says that it speaks."""

    def __init__(self, machine: Machine, protocol: str, *announced: str) -> None:
        self.machine = machine
        self.protocol = protocol
        self.asked = 0
        machine.announces += announced
        machine.install(self)

    @property
    def peer_id(self) -> str:
        """Its own, which is real."""
        return self.machine.peer_id

    def boot(self) -> None:  # noqa: B027
        """See `Program`."""

    def connected(self, peer_id: str, addr: str) -> None:  # noqa: B027
        """See `Program`."""

    def disconnected(self, peer_id: str) -> None:  # noqa: B027
        """See `Program`."""

    @abstractmethod
    def serve(self, peer_id: str, payload: object) -> object:
        """See `Program`."""

    def size_bytes(self, payload: object) -> int:
        """See `Program`."""
        if isinstance(payload, Message):
            return len(serialise_kad(payload))
        return len(payload) if isinstance(payload, bytes) else 0


class DhtLiar(Liar):
    """Serves the DHT; `lie` makes the answer to a message."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, KAD_PROTOCOL, RECORD_PROTOCOL)

    def serve(self, peer_id: str, payload: object) -> object:
        """See `Program`."""
        self.asked += 1
        wired = isinstance(payload, bytes)
        message = parse_kad(payload) if isinstance(payload, bytes) else payload
        assert isinstance(message, Message)
        answer = None if message.kind is Kind.ADD_PROVIDER else self.lie(peer_id, message)
        return serialise_kad(answer) if wired and isinstance(answer, Message) else answer

    @abstractmethod
    def lie(self, peer_id: str, message: Message) -> Message | Silence:
        """The answer."""

    def announce(self, node: DhtNode) -> None:
        """Makes itself known to an honest node, as anybody may."""
        node.meet(self.machine)


class SilentPeer(DhtLiar):
    """Accepts connections and never answers."""

    def lie(self, peer_id: str, message: Message) -> Message | Silence:
        """See `DhtLiar`."""
        return Silence()


class LyingRouter(DhtLiar):
    """Answers in perfect form, and names peers of its choice: well-formed lies.

    `names(key)`: whom it names, e.g. its accomplices (`nearest_of`).
    """

    def __init__(self, machine: Machine, names: Callable[[bytes], Sequence[PeerInfo]]) -> None:
        super().__init__(machine)
        self._names = names

    def lie(self, peer_id: str, message: Message) -> Message | Silence:
        """See `DhtLiar`."""
        closer = tuple(self._names(message.key))[:PEERS_MAX]
        if message.kind is Kind.PUT_VALUE:  # acknowledges, and drops it
            return Message(message.kind, message.key, value=message.value, closer=closer)
        return Message(message.kind, message.key, closer=closer)


class FalseAccuser(Liar):
    """A member that answers probes, and accuses whom it is told to.

    It has an advert of its own (`advert`), so that it is a member among others; its
    accusations are signed by it, as they must be to be heard.
    """

    def __init__(self, machine: Machine, advert: OpenAdvert) -> None:
        super().__init__(machine, GOSSIP_PROTOCOL)
        self.advert = advert

    def serve(self, peer_id: str, payload: object) -> object:
        """See `Program`."""
        self.asked += 1
        return write_message(Kinds.KIND_PROBE_ACK, Versions(), adverts=[self.advert.raw])

    def tell(self, to: Sequence[Machine], message: bytes) -> None:
        """Sends gossip to machines that it knows the addresses of."""
        for other in to:
            self.machine.world.wire.request(
                self.machine,
                other.peer_id,
                GOSSIP_PROTOCOL,
                message,
                timeout_s=5.0,
                addrs=(other.addr,),
                done=lambda reply, who: None,
            )

    def accuse(
        self, subject: str, incarnation: int, to: Sequence[Machine], *, failed: bool = True
    ) -> None:
        """Says of a member that it has failed (or is suspect)."""
        accusation = build_accusation(
            self.machine.key, subject, incarnation=incarnation, failed=failed
        )
        news = write_message(
            Kinds.KIND_NEWS,
            Versions(),
            adverts=[self.advert.raw],
            accusations=[accusation.raw],
        )
        self.tell(to, news)


def nearest_of(peers: Sequence[PeerInfo]) -> Callable[[bytes], Sequence[PeerInfo]]:
    """Of a pool of names those nearest to a key."""

    def names(key: bytes) -> Sequence[PeerInfo]:
        target = position(key)
        return heapq.nsmallest(PEERS_MAX, peers, lambda p: peer_position(p.peer_id) ^ target)

    return names
