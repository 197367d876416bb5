"""What goes into the Kademlia core and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

from p2pnet.core import Tick
from p2pnet.dht.records import OpenRecord
from p2pnet.dht.wire import Message
from p2pnet.net.network import PeerInfo

# --- what a user of the DHT wants; each ends in one OperationDone -------------


@dataclass(frozen=True, slots=True)
class FindNode:
    """Where is that peer, and who are the nearest to it? Result: Nodes."""

    op_id: int
    peer_id: str
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Get:
    """The records under a key. Result: Records.

    `quorum`: of how many of the nearest holders the answers are merged before the
    result is given, if something was found.
    """

    op_id: int
    key: bytes
    timeout_s: float
    quorum: int = 3


@dataclass(frozen=True, slots=True)
class Put:
    """Stores a checked record. Result: Stored."""

    op_id: int
    record: OpenRecord
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Provide:
    """Says that we provide a key, now and again until Unprovide. Result: Stored."""

    op_id: int
    key: bytes
    timeout_s: float


@dataclass(frozen=True, slots=True)
class FindProviders:
    """Who says that it provides a key? Result: Providers."""

    op_id: int
    key: bytes
    timeout_s: float


Operation = FindNode | Get | Put | Provide | FindProviders


@dataclass(frozen=True, slots=True)
class Unprovide:
    """We provide that key no more."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Keep:
    """Keeps a record of our own alive: puts it, and asks for a newer one in time.

    Where `op_id` is not 0, somebody wants to know what became of the put.
    """

    record: OpenRecord
    op_id: int = 0


@dataclass(frozen=True, slots=True)
class Unkeep:
    """Lets the record of our own under that key run out."""

    key: bytes


# --- what happens -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReplyArrived:
    """The answer to SendRequest. `holder`: the peer announces that it keeps records.

    `addr`: the multiaddr at which the peer was seen to be, "" where that is unknown;
    `addrs`: those at which it says itself that it listens.
    """

    rpc_id: int
    message: Message | None  # None: there is no reply to that request
    holder: bool
    wall_ms: int
    addr: str = ""
    addrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """No answer to SendRequest, or none that makes sense."""

    rpc_id: int


@dataclass(frozen=True, slots=True)
class RequestArrived:
    """A peer asks; a SendReply with this id comes of it at once.

    `addr`: the multiaddr at which the peer was seen to be, "" where that is unknown.
    """

    request_id: int
    peer_id: str
    message: Message
    wall_ms: int
    addr: str = ""


@dataclass(frozen=True, slots=True)
class PeerSeen:
    """A peer is there, and announces that it serves the protocol, or that it does not.

    `addr`: the multiaddr at which it was seen to be, "" where that is unknown.
    """

    peer_id: str
    addrs: tuple[str, ...]
    server: bool
    holder: bool
    addr: str = ""


@dataclass(frozen=True, slots=True)
class PeerMoved:
    """A peer says itself where it is reached."""

    peer_id: str
    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A peer has left or failed."""

    peer_id: str


Event = (
    Operation
    | Unprovide
    | Keep
    | Unkeep
    | ReplyArrived
    | RequestFailed
    | RequestArrived
    | PeerSeen
    | PeerMoved
    | PeerGone
    | Tick
)

# --- effects ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendRequest:
    """To be answered by one ReplyArrived or RequestFailed."""

    rpc_id: int
    peer: PeerInfo
    message: Message
    timeout_s: float


@dataclass(frozen=True, slots=True)
class SendReply:
    """`message` None: there is nothing to say."""

    request_id: int
    message: Message | None


@dataclass(frozen=True, slots=True)
class Refuse:
    """Instead of SendReply: the request makes no sense."""

    request_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """A peer did not answer in time: close its connections."""

    peer_id: str


@dataclass(frozen=True, slots=True)
class Renew:
    """The record that we keep under a key wants a new signature: send a newer Keep."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nearest peers that answered; `target` is where the peer sought is, if known.

    `hops`: how far from our own table the nearest was heard of; `requests`: sent for it.
    """

    closest: tuple[PeerInfo, ...]
    target: PeerInfo | None
    hops: int
    requests: int


@dataclass(frozen=True, slots=True)
class Records:
    """The newest record of each author, newest first; `answers`: holders that were heard."""

    records: tuple[OpenRecord, ...]
    answers: int


@dataclass(frozen=True, slots=True)
class Stored:
    """How many peers took it, ourselves included where we are one of them."""

    holders: int


@dataclass(frozen=True, slots=True)
class Providers:
    """Peers that say they provide the key: hints."""

    peers: tuple[PeerInfo, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """Nobody answered."""

    reason: str


Result = Nodes | Records | Stored | Providers | Failed


@dataclass(frozen=True, slots=True)
class OperationDone:
    """What came of an operation."""

    op_id: int
    result: Result


Effect = SendRequest | SendReply | Refuse | Forget | Renew | OperationDone
