"""Every parser of peers' bytes in the DHT, the membership and the network, as a target.

A `Parser` says what a peer may send to it and which errors it documents. A reader is
made anew for each batch of frames; it takes them one after the other, as a node does.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from random import Random

from dht.dht_samples import (
    CLAIMANT,
    OWNER,
    STRANGER,
    VNODE_KEY,
    WALL_MS,
    accepted,
    allocation,
    allocation_record,
    keypair,
    manifest,
    network_record,
)
from fuzz.mutations import mutated, scrambled
from google.protobuf.message import DecodeError, Message
from libp2p.identity.identify.pb.identify_pb2 import Identify

from p2pnet import keys
from p2pnet.bootstrap import parse_list
from p2pnet.client.trace import in_words
from p2pnet.core import Tick
from p2pnet.dht import events as ev
from p2pnet.dht import snapshot, wire
from p2pnet.dht.canonical import parse_canonical
from p2pnet.dht.core import Kademlia
from p2pnet.dht.hints import Hint
from p2pnet.dht.keyspace import vnode_key
from p2pnet.dht.manifest import network_id_of, open_manifest
from p2pnet.dht.records import open_record, open_set, serialise_set
from p2pnet.dht.store import Mark
from p2pnet.errors import (
    ForgedError,
    LocalError,
    MalformedError,
    P2PNetError,
    RefusedError,
    UnreachableError,
)
from p2pnet.gossip import events as gossip_ev
from p2pnet.gossip import known
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.coordinates import Coordinate
from p2pnet.gossip.membership import Membership
from p2pnet.gossip.messages import Kinds, Summary, SyncResult, read_message, write_message
from p2pnet.gossip.statements import (
    Versions,
    build_accusation,
    build_advert,
    open_accusation,
    open_advert,
)
from p2pnet.net import channel, libp2p, multiaddr, streams
from p2pnet.net.network import PeerInfo
from p2pnet.net.session import SessionTable, make_proof
from p2pnet.net.tls import make_certificate, pem_of
from p2pnet.net.varint import Unframer, frame
from p2pnet.perfetto import chrome_trace
from p2pnet.sealed import seal, unseal
from p2pnet.timeline import mentioned, out_of_order, parse_happening, timeline_of
from p2pnet.v1 import common_pb2, gossip_pb2, kad_pb2, kept_pb2, records_pb2, session_pb2

Read = Callable[[bytes], object]
ReadAsync = Callable[[bytes], Awaitable[object]]


@dataclass(frozen=True)
class Parser:
    """One target. `share`: how many of 100,000 frames go to it."""

    name: str
    share: int
    frame: Callable[[Random], bytes]
    start: Callable[[Random], Read | ReadAsync]
    errors: tuple[type[P2PNetError], ...] = (MalformedError,)
    waits: bool = False  # `start` gives a coroutine function, to be run under trio


def stateless(read: Read) -> Callable[[Random], Read]:
    """A parser that keeps nothing."""
    return lambda rng: read


def written(message: Message) -> bytes:
    """In the canonical way."""
    return message.SerializeToString(deterministic=True)


def signed_of(data: bytes) -> common_pb2.Signed:
    """What the message around a statement has parsed already."""
    try:
        return common_pb2.Signed.FromString(data)
    except DecodeError:
        raise MalformedError("the message around it does not parse") from None


# kad-dht

PEERS = tuple(
    PeerInfo(keypair(n).peer_id, (f"/ip4/192.0.2.{n}/tcp/4001", "/dns4/a.example/tcp/1"))
    for n in range(1, 6)
)
RECORD = open_record(allocation_record(), VNODE_KEY, WALL_MS)
SET = serialise_set([replace(RECORD, age_s=3.5)])
KAD = tuple(
    wire.serialise(message)
    for message in (
        wire.Message(wire.Kind.FIND_NODE, keys.peer_id_bytes(PEERS[0].peer_id), closer=PEERS),
        wire.Message(wire.Kind.GET_VALUE, VNODE_KEY, SET, PEERS),
        wire.Message(wire.Kind.PUT_VALUE, VNODE_KEY, SET),
        wire.Message(wire.Kind.GET_PROVIDERS, VNODE_KEY, None, PEERS, PEERS[:2]),
        wire.Message(wire.Kind.ADD_PROVIDER, VNODE_KEY, None, (), PEERS[:1]),
        wire.Message(wire.Kind.PING),
    )
)
BATCH = wire.join_batch(KAD)
KAD_MESSAGES = tuple(map(kad_pb2.KadMessage.FromString, KAD))


def kad_frame(rng: Random) -> bytes:
    """A kad-dht message; some hold record sets that are wrong inside."""
    if rng.random() < 0.5:
        return mutated(rng, KAD)
    message = scrambled(rng, rng.choice(KAD_MESSAGES))
    if message.HasField("record") and rng.random() < 0.5:
        message.record.key = message.key
        message.record.value = set_frame(rng)
    return written(message)


class DhtPeer:
    """A Kademlia core that is asked, and answered, wrongly. Nothing at all may come out."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.now = 1000.0
        self.last_id = 0
        self.core = Kademlia(keypair(0).peer_id, Random(rng.random()))
        self.under_way: list[ev.SendRequest] = []
        self.operations = 0
        for peer in PEERS:
            self.feed(ev.PeerSeen(peer.peer_id, peer.addrs, True, True))

    def asked(self, data: bytes) -> None:
        """A peer's request: exactly one answer, and one that can be sent."""
        try:
            message = wire.parse(data)
        except MalformedError:
            return
        self.last_id += 1
        asker = self.rng.choice(PEERS).peer_id
        answers = 0
        for effect in self.feed(ev.RequestArrived(self.last_id, asker, message, WALL_MS)):
            if isinstance(effect, ev.SendReply | ev.Refuse):
                answers += 1
                if isinstance(effect, ev.SendReply) and effect.message is not None:
                    wire.serialise(effect.message)
        assert answers == 1

    def answered(self, data: bytes) -> None:
        """A peer's answer to a request of ours."""
        if not self.under_way:
            self.begin()
        request = self.under_way.pop(self.rng.randrange(len(self.under_way)))
        event: ev.Event
        try:
            message = wire.parse(data)
        except MalformedError:
            event = ev.RequestFailed(request.rpc_id)
        else:
            if self.rng.random() < 0.7:
                message = replace(message, kind=request.message.kind)
            holder = self.rng.random() < 0.7
            event = ev.ReplyArrived(request.rpc_id, message, holder, WALL_MS)
        self.feed(event)

    def begin(self) -> None:
        """Asks something, of peers that are there (again)."""
        self.now += 60.0  # silent peers are asked again
        self.feed(Tick())
        for peer in PEERS:
            self.feed(ev.PeerSeen(peer.peer_id, peer.addrs, True, True))
        self.operations += 1
        op_id = self.operations
        self.feed(
            self.rng.choice(
                (
                    ev.Get(op_id, VNODE_KEY, 20.0),
                    ev.FindProviders(op_id, VNODE_KEY, 20.0),
                    ev.FindNode(op_id, keypair(50).peer_id, 20.0),
                    ev.Put(op_id, RECORD, 20.0),
                )
            )
        )
        assert self.under_way, "a lookup that asks nobody"

    def feed(self, event: ev.Event) -> list[ev.Effect]:
        self.now += 0.001
        effects = list(self.core.handle(event, self.now))
        self.under_way += [effect for effect in effects if isinstance(effect, ev.SendRequest)]
        if self.rng.random() < 0.1:
            self.core.check()
        return effects


# Records

NETWORK_RECORD = network_record(manifest())
SIGNED_RECORDS = (written(RECORD.signed), written(NETWORK_RECORD))
ALLOCATIONS = (allocation(manifest()),)
NETWORKS = (
    records_pb2.NetworkRecord.FromString(
        records_pb2.Record.FromString(NETWORK_RECORD.payload).body
    ),
)
PAYLOADS = tuple(records_pb2.Record.FromString(s.payload) for s in (RECORD.signed, NETWORK_RECORD))
MANIFEST = records_pb2.Manifest.FromString(manifest().payload)


def manifest_frame(rng: Random) -> bytes:
    """A signed manifest."""
    roll = rng.random()
    if roll < 0.4:
        return mutated(rng, (written(manifest()),))
    payload = (
        written(scrambled(rng, MANIFEST)) if roll < 0.8 else mutated(rng, (written(MANIFEST),))
    )
    return written(OWNER.sign(keys.MANIFEST, payload))


def record_frame(rng: Random) -> bytes:
    """A signed record, wrong at one of its four layers and right around it."""
    roll = rng.random()
    if roll < 0.35:
        return mutated(rng, SIGNED_RECORDS)
    if roll < 0.55:
        payload = written(scrambled(rng, rng.choice(PAYLOADS)))
        return written(CLAIMANT.sign(keys.RECORD, payload))
    if roll < 0.65:
        payload = mutated(rng, tuple(map(written, PAYLOADS)))
        return written(CLAIMANT.sign(keys.RECORD, payload))
    if roll < 0.8:
        body = accepted(scrambled(rng, ALLOCATIONS[0]))
    else:
        grant = signed_of(b"")
        while not grant.payload:  # a wrong manifest, with all that names it put right
            try:
                grant = signed_of(manifest_frame(rng))
            except MalformedError:
                continue
        body = accepted(replace_manifest(grant))
    record = records_pb2.Record()
    record.CopyFrom(PAYLOADS[0])
    record.body = body
    record.key = vnode_key(network_id_of(records_grant(body)), "fc1")
    return written(CLAIMANT.sign(keys.RECORD, written(record)))


def replace_manifest(grant: common_pb2.Signed) -> records_pb2.Allocation:
    """The good allocation of another network."""
    return allocation(grant, network_id=network_id_of(grant))


def records_grant(body: bytes) -> common_pb2.Signed:
    """The manifest in an allocation record's body."""
    signed = common_pb2.Signed.FromString(body)
    return records_pb2.Allocation.FromString(signed.payload).manifest


def set_frame(rng: Random) -> bytes:
    """A record set."""
    if rng.random() < 0.5:
        return mutated(rng, (SET,))
    held = records_pb2.RecordSet(version=rng.choice((1, 1, 1, 0, 2)))
    for _ in range(rng.choice((1, 1, 2, 33))):
        try:
            signed = signed_of(record_frame(rng) if rng.random() < 0.5 else SIGNED_RECORDS[0])
        except MalformedError:
            continue
        held.records.add(record=signed, age_ms=rng.choice((0, 1, 10**6, (1 << 64) - 1)))
    return written(held)


def read_record(data: bytes) -> None:
    """As it stands under the key that it names itself, and under another."""
    signed = signed_of(data)
    try:
        key = records_pb2.Record.FromString(signed.payload).key
    except DecodeError:
        key = VNODE_KEY
    open_record(signed, key, WALL_MS)


CANONICAL = (
    (records_pb2.Record, written(PAYLOADS[0])),
    (records_pb2.Allocation, written(ALLOCATIONS[0])),
    (records_pb2.NetworkRecord, written(NETWORKS[0])),
    (records_pb2.Manifest, written(MANIFEST)),
    (common_pb2.Signed, written(manifest())),
)


def read_canonical(data: bytes) -> None:
    """As each kind of payload; what is accepted has no other form."""
    for kind, _ in CANONICAL:
        try:
            message = parse_canonical(kind, data, 4096)
        except MalformedError:
            continue
        assert written(message) == data


# Addresses and names

ADDRS = (
    "/ip4/192.0.2.7/tcp/4001", f"/ip4/192.0.2.7/tcp/4001/p2p/{OWNER.peer_id}",
    "/ip6/2001:db8::1/tcp/4001", "/dns4/peer.example/tcp/443/tls/ws",
    "/ip4/192.0.2.7/udp/4001/quic-v1", f"/ip4/192.0.2.7/tcp/1/p2p/{OWNER.peer_id}/p2p-circuit",
    "/ip4/192.0.2.7/udp/4001/quic-v1/webtransport/certhash/uEiAkH5a4DPGKUuOBjYw0CgwjvcJCJMD2K_1aluKR_tpevQ",
)  # fmt: skip
RAW_ADDRS = tuple(map(multiaddr.encode, ADDRS))


def text_frame(rng: Random) -> bytes:
    """A multiaddr as text."""
    parts = rng.choice(ADDRS).split("/")
    odd = ("", "tcp", "ip4", "p2p", "99999", "-1", "²", "0x1", "1" * 400, "::1%eth0", "a" * 254,
           "%", "..", "u====", "\x00", OWNER.peer_id, "00004001", "256.1.1.1")  # fmt: skip
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        parts[rng.randrange(len(parts))] = rng.choice(odd)
    if rng.random() < 0.2:
        parts += rng.choices(odd, k=rng.choice((1, 2, 30)))
    return "/".join(parts).encode()


def read_raw_addr(data: bytes) -> None:
    """What is read can be written, and means the same again."""
    text = multiaddr.decode(data)
    assert len(text) <= 4 * multiaddr.MULTIADDR_BYTES_MAX
    if len(text) <= multiaddr.MULTIADDR_BYTES_MAX:
        assert multiaddr.decode(multiaddr.encode(text)) == text


def read_text_addr(data: bytes) -> None:
    """As addresses in adverts and records are read before they are dialled."""
    multiaddr.parse(data.decode(errors="replace"))


def read_peer_id(data: bytes) -> None:
    """As bytes and as text."""
    text = data.decode(errors="replace")
    keys.short(text)
    for read in (keys.peer_id_bytes, keys.public_key_of):
        try:
            read(text)
        except MalformedError:
            continue
    keys.peer_id_bytes(keys.peer_id_from_bytes(data))


def read_list(data: bytes) -> None:
    """A bootstrap list, or the peers that the disk remembers: what is broken is left out."""
    for addr in parse_list(data.decode(errors="replace"), "peers.txt").addrs:
        multiaddr.parse(addr)


# Streams


class Bytes:
    """A `streams.ByteStream` on which a peer has sent all that it will."""

    def __init__(self, data: bytes, rng: Random) -> None:
        self._left = data
        self._rng = rng
        self.written = 0

    async def read(self) -> bytes:
        size = self._rng.choice((1, 3, 20, 4096, 1 << 16))
        data, self._left = self._left[:size], self._left[size:]
        return data

    async def write(self, data: bytes) -> None:
        self.written += len(data)
        assert self.written < 1 << 20, "an answer without an end"

    async def close(self) -> None:
        pass

    async def reset(self) -> None:
        pass

    def usable(self) -> bool:
        return bool(self._left)


HELLO = frame(b"/multistream/1.0.0\n")
ECHO = "/echo/1"
OPENINGS = (
    HELLO + frame(b"/echo/1\n") + frame(b"hello") + frame(b"again"),
    HELLO + frame(b"/nobody/speaks/this\n") + frame(b"/echo/1\n") + frame(b"hello"),
    HELLO + frame(b"ls\n"),
)
ACCEPTED = (HELLO + frame(b"/echo/1\n") + frame(b"hello"), HELLO + frame(b"na\n"))


async def echo(peer_id: str, message: bytes) -> bytes:
    """A handler."""
    return message


def start_answering(rng: Random) -> ReadAsync:
    handlers = {ECHO: streams.answering(echo)}

    async def read(data: bytes) -> None:
        await streams.answer(Bytes(data, rng), STRANGER.peer_id, handlers)

    return read


def start_asking(rng: Random) -> ReadAsync:
    async def read(data: bytes) -> None:
        async def open_stream() -> streams.ByteStream:
            return Bytes(data, rng)

        await streams.Pool(open_stream, ECHO).ask(b"hello", wants_reply=True)

    return read


IDENTIFY = written(
    Identify(
        protocol_version="ipfs/0.1.0",
        agent_version="somebody",
        public_key=bytes.fromhex("08011220") + OWNER.public_key,
        listen_addrs=RAW_ADDRS,
        observed_addr=RAW_ADDRS[0],
        protocols=["/p2pnet/kad/1.0.0", "/ipfs/ping/1.0.0"],
    )
)


def identify_frame(rng: Random) -> bytes:
    """A reply on an identify stream."""
    if rng.random() < 0.2:
        return mutated(rng, (HELLO + frame(b"/ipfs/id/1.0.0\n") + frame(IDENTIFY),))
    if rng.random() < 0.5:
        message = mutated(rng, (IDENTIFY,))
    else:
        message = written(scrambled(rng, Identify.FromString(IDENTIFY)))
    return HELLO + frame(b"/ipfs/id/1.0.0\n") + frame(message)


def start_identify(rng: Random) -> ReadAsync:
    class Muxed:
        def __init__(self, data: bytes) -> None:
            self.data = data

        async def open_stream(self) -> Bytes:
            return Bytes(self.data, rng)

    class Connection:
        peer_id = OWNER.peer_id

        def __init__(self, data: bytes) -> None:
            self.muxed = Muxed(data)

    async def read(data: bytes) -> None:
        await libp2p._ask_identify(Connection(data))  # type: ignore[arg-type]

    return read


def start_unframing(rng: Random) -> Read:
    def read(data: bytes) -> None:
        unframer, at = Unframer(1024), 0
        while at < len(data):
            size = rng.choice((1, 2, 7, 100, 4096))
            for message in unframer.feed(data[at : at + size]):
                assert len(message) <= 1024
            at += size

    return read


# Membership

HERE = Coordinate((0.01, 0.02, 0.0, 0.0), 0.001, 0.3)
MEMBERS = tuple(keypair(n) for n in range(60, 64))
ADVERTS = tuple(
    build_advert(
        key,
        incarnation=5,
        sequence=n,
        addrs=ADDRS[:3],
        grpc_targets=("192.0.2.7:4002",),
        grpc_certificate=bytes(300),
        coordinate=HERE,
        capabilities=Capabilities(cpus=4.0, memory_bytes=1 << 32, arch="x86_64", devices=("cpu",)),
    )
    for n, key in enumerate(MEMBERS)
)
ADVERT_PAYLOADS = tuple(gossip_pb2.Advert.FromString(a.signed.payload) for a in ADVERTS)
ACCUSATIONS = tuple(
    build_accusation(a, b.peer_id, incarnation=5, failed=failed)
    for a, b, failed in ((MEMBERS[0], MEMBERS[1], True), (MEMBERS[2], MEMBERS[1], False))
)
GOSSIP = tuple(
    write_message(
        kind,
        Versions(),
        adverts=[advert.raw for advert in ADVERTS],
        accusations=[accusation.raw for accusation in ACCUSATIONS],
        detail="why",
        summary=Summary(2, 1, (bytes(8), bytes(range(8)))),
        result=SyncResult((0, 3), True, 9),
        coordinate=HERE,
    )
    for kind in (Kinds.KIND_PROBE, Kinds.KIND_SYNC, Kinds.KIND_NEWS, Kinds.KIND_PROBE_ACK,
                 Kinds.KIND_SYNC_REPLY)
)  # fmt: skip
GOSSIP_MESSAGES = tuple(map(gossip_pb2.GossipMessage.FromString, GOSSIP))


def advert_frame(rng: Random) -> bytes:
    """A signed advert."""
    roll, n = rng.random(), rng.randrange(len(MEMBERS))
    if roll < 0.4:
        return mutated(rng, [written(advert.signed) for advert in ADVERTS])
    good = ADVERT_PAYLOADS[n]
    payload = written(scrambled(rng, good)) if roll < 0.85 else mutated(rng, (written(good),))
    return written(MEMBERS[n].sign(keys.ADVERT, payload))


def accusation_frame(rng: Random) -> bytes:
    """A signed accusation."""
    roll, good = rng.random(), rng.choice(ACCUSATIONS)
    if roll < 0.4:
        return mutated(rng, (written(good.signed),))
    message = gossip_pb2.Accusation.FromString(good.signed.payload)
    payload = written(scrambled(rng, message)) if roll < 0.85 else mutated(rng, (written(message),))
    return written(rng.choice(MEMBERS).sign(keys.ACCUSATION, payload))


def gossip_frame(rng: Random) -> bytes:
    """A gossip message, wrong itself or in its statements."""
    roll = rng.random()
    if roll < 0.35:
        return mutated(rng, GOSSIP)
    message = gossip_pb2.GossipMessage()
    message.CopyFrom(rng.choice(GOSSIP_MESSAGES))
    if roll < 0.65:
        return written(scrambled(rng, message))
    for statements, make in (
        (message.adverts, advert_frame), (message.accusations, accusation_frame)
    ):  # fmt: skip
        try:
            statements[rng.randrange(len(statements))].CopyFrom(signed_of(make(rng)))
        except MalformedError:
            continue
    return written(message)


class Gossiper:
    """A membership core that is asked, and answered, wrongly."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.now = 1000.0
        self.core = Membership(
            keypair(59), incarnation=7, now=self.now, rng=Random(rng.random()),
            description=gossip_ev.Description(addrs=ADDRS[:1]),
        )  # fmt: skip

    def asked(self, data: bytes) -> None:
        """A peer's request: one answer, or the documented error."""
        try:
            effects = self.handle(gossip_ev.Request(self.rng.choice(MEMBERS).peer_id, data))
        finally:
            if self.rng.random() < 0.05:
                self.core.check()
        assert sum(isinstance(effect, gossip_ev.Reply) for effect in effects) == 1

    def answered(self, data: bytes) -> None:
        """A peer's answer to a sync or a probe: whatever it is, nothing comes out."""
        if self.rng.random() < 0.5:
            effects = self.handle(gossip_ev.SyncWith(self.rng.choice(MEMBERS).peer_id))
        else:
            self.now += 1.0
            effects = self.handle(Tick())
        for effect in effects:
            if isinstance(effect, gossip_ev.Send):
                fitting = self._fitting(effect.message, data)
                self.handle(gossip_ev.Answered(effect.rpc_id, fitting))
        if self.rng.random() < 0.05:
            self.core.check()

    def _fitting(self, asked: bytes, data: bytes) -> bytes:
        """Mostly of the kind that was asked for, so that the rest of it is looked at."""
        if self.rng.random() < 0.3:
            return data
        sync = gossip_pb2.GossipMessage.FromString(asked).kind == Kinds.KIND_SYNC
        try:
            message = gossip_pb2.GossipMessage.FromString(data)
        except DecodeError:
            return data
        message.kind = Kinds.KIND_SYNC_REPLY if sync else Kinds.KIND_PROBE_ACK
        return written(message)

    def handle(self, event: gossip_ev.Event) -> list[gossip_ev.Effect]:
        self.now += 0.01
        return list(self.core.handle(event, self.now))


# Sessions and certificates

CERTIFICATE = make_certificate()
CHALLENGE = session_pb2.ChallengeReply(
    nonce=bytes(32), versions=common_pb2.VersionRange(min=1, max=1)
)
PROOF = session_pb2.SessionProof(
    nonce=bytes(32), certificate_digest=bytes(32), versions=CHALLENGE.versions
)
OPEN = session_pb2.OpenRequest(proof=OWNER.sign(keys.SESSION, written(PROOF)))


def session_frame(rng: Random) -> bytes:
    """A challenge, or a proof."""
    roll = rng.random()
    if roll < 0.3:
        return mutated(rng, (written(CHALLENGE), written(OPEN)))
    if roll < 0.5:
        return written(scrambled(rng, CHALLENGE))
    if roll < 0.6:
        return written(scrambled(rng, OPEN))
    wrong = written(scrambled(rng, PROOF)) if roll < 0.9 else mutated(rng, (written(PROOF),))
    return written(session_pb2.OpenRequest(proof=OWNER.sign(keys.SESSION, wrong)))


def start_session(rng: Random) -> Read:
    table = SessionTable(bytes(32), nonces_max=16, sessions_max=16)

    def tried(read: Callable[[], object]) -> None:
        try:
            read()
        except (MalformedError, ForgedError, RefusedError):
            pass

    def read(data: bytes) -> None:
        kinds = session_pb2.ChallengeRequest, session_pb2.OpenRequest, session_pb2.ChallengeReply
        tried(lambda: table.challenge(channel.parse(kinds[0], data), 1.0, bytes(32)))
        tried(lambda: table.open(channel.parse(kinds[1], data), 1.0, rng.randbytes(32)))
        tried(lambda: make_proof(OWNER, channel.parse(kinds[2], data), bytes(32)))
        table.check()

    return read


# What is on our own disk, after whatever has happened to it

KNOWN = known.serialise([known.Known(advert, WALL_MS) for advert in ADVERTS])
HELD = snapshot.serialise(
    snapshot.Held(
        [(RECORD, "192.0.2.0/24")],
        [Mark(VNODE_KEY, CLAIMANT.peer_id, 1, 2, 3.0, "192.0.2.0/24")],
        [Hint(VNODE_KEY, PEERS[0], 5.0, "192.0.2.0/24")],
    ),
    WALL_MS,
)


def disk_frame(kind: bytes, good: bytes, message: type[Message]) -> Callable[[Random], bytes]:
    """A file: damaged, or with a digest that holds over contents that are wrong."""
    body = unseal(kind, 1, good)

    def make(rng: Random) -> bytes:
        roll = rng.random()
        if roll < 0.2:
            return mutated(rng, (good,))
        wrong = written(scrambled(rng, message.FromString(body)))
        return seal(kind, 1, mutated(rng, (body,)) if roll < 0.6 else wrong)

    return make


def read_snapshot(data: bytes) -> None:
    """All of its parts."""
    for held in snapshot.parse(data, lambda: WALL_MS):
        assert all(record.expires_in_s > 0 for record, _ in held.records)


# Events of others, for a trace

EVENTS = tuple(
    json.dumps({"event": name, "at": "019ab5dd7e33-0002", "wall_ms": WALL_MS, **fields}).encode()
    for name, fields in (
        ("claimed", {"network_id": "ab" * 16, "epoch": 2, "reason": "submitted"}),
        ("placed", {"placement": {"fc1": OWNER.peer_id}, "node": OWNER.peer_id}),
        ("allocated", {"vnodes": ["fc1", "out"], "epoch": 2, "loss": 1.5, "more": None}),
    )
)


def read_event(data: bytes) -> None:
    """An event, which is text on the wire, and everything that a trace makes of it."""
    event = parse_happening(data.decode(errors="replace"), OWNER.peer_id)
    timeline = timeline_of([event])
    json.dumps(chrome_trace(timeline))
    out_of_order(timeline.happenings)
    mentioned(timeline.happenings, [OWNER.peer_id])
    assert in_words(event.fields).isprintable()


PARSERS = (
    Parser("kad-dht message", 14_000, kad_frame, stateless(wire.parse)),
    Parser("DHT request", 6_000, kad_frame, lambda rng: DhtPeer(rng).asked, errors=()),
    Parser("DHT reply", 5_000, kad_frame, lambda rng: DhtPeer(rng).answered, errors=()),
    Parser(
        "record set", 3_000, set_frame,
        stateless(lambda data: open_set(data, VNODE_KEY, WALL_MS)),
    ),
    Parser("record", 7_000, record_frame, stateless(read_record), (MalformedError, ForgedError)),
    Parser(
        "manifest", 4_000, manifest_frame,
        stateless(lambda data: open_manifest(signed_of(data))), (MalformedError, ForgedError),
    ),
    Parser(
        "canonical payload", 5_000,
        lambda rng: mutated(rng, [data for _, data in CANONICAL]), stateless(read_canonical),
    ),
    Parser(
        "multiaddr as bytes", 8_000, lambda rng: mutated(rng, RAW_ADDRS), stateless(read_raw_addr)
    ),
    Parser("multiaddr as text", 5_000, text_frame, stateless(read_text_addr)),
    Parser("list of peers", 2_000, lambda rng: b"\n".join(text_frame(rng) for _ in range(4)),
           stateless(read_list), errors=()),
    Parser("peer id", 4_000, lambda rng: mutated(rng, (keys.peer_id_bytes(OWNER.peer_id),
           OWNER.peer_id.encode())), stateless(read_peer_id)),
    Parser("varint frames", 6_000, lambda rng: mutated(rng, OPENINGS), start_unframing),
    Parser("stream that a peer opens", 2_500, lambda rng: mutated(rng, OPENINGS), start_answering,
           waits=True),
    Parser("stream that we open", 2_500, lambda rng: mutated(rng, ACCEPTED), start_asking,
           (MalformedError, UnreachableError), waits=True),
    Parser("identify message", 2_000, identify_frame, start_identify,
           (MalformedError, UnreachableError), waits=True),
    Parser("gossip message", 6_000, gossip_frame, stateless(read_message)),
    Parser("advert", 4_000, advert_frame, stateless(lambda data: open_advert(signed_of(data))),
           (MalformedError, ForgedError)),
    Parser("accusation", 3_000, accusation_frame,
           stateless(lambda data: open_accusation(signed_of(data))), (MalformedError, ForgedError)),
    Parser("gossip request", 3_000, gossip_frame, lambda rng: Gossiper(rng).asked,
           (MalformedError, ForgedError)),
    Parser("gossip answer", 3_000, gossip_frame, lambda rng: Gossiper(rng).answered, errors=()),
    Parser("event", 2_000, lambda rng: mutated(rng, EVENTS), stateless(read_event)),
    Parser("session", 2_000, session_frame, start_session, errors=()),
    Parser("batch of requests", 2_000, lambda rng: mutated(rng, (BATCH,)),
           stateless(wire.parse_batch)),
    Parser("peers on disk", 1_500, disk_frame(known.KIND, KNOWN, kept_pb2.KeptPeers),
           stateless(known.parse), (LocalError,)),
    Parser("records on disk", 1_500, disk_frame(snapshot.KIND, HELD, kept_pb2.KeptStore),
           stateless(read_snapshot), (LocalError,)),
    Parser("certificate", 3_000, lambda rng: mutated(rng, (CERTIFICATE.cert_der,)),
           stateless(pem_of)),
)  # fmt: skip
