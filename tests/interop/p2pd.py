"""A real Go libp2p daemon (p2pd), run and asked over its control socket.

The protocol is that of github.com/libp2p/go-libp2p-daemon/blob/master/specs/CONTROL.md:
protobuf messages, each after its length as a varint. Few fields of few messages are
needed, so they are written and read by number.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from p2pnet.keys import peer_id_bytes, peer_id_from_bytes
from p2pnet.net import multiaddr
from p2pnet.net.network import PeerInfo
from p2pnet.net.varint import Unframer, encode_varint, frame

KAD = "/ipfs/kad/1.0.0"  # what the daemon speaks; it cannot be told otherwise
ASK_S = 20.0
START_S = 20.0
_REPLY_BYTES_MAX = 1 << 20

# Request.type
_IDENTIFY, _CONNECT, _DHT, _LIST_PEERS = 0, 1, 4, 5
# DHTRequest.type
_FIND_PEER, _FIND_PROVIDERS, _CLOSEST_PEERS, _PROVIDE = 0, 2, 3, 8
_DHT_END = 2  # DHTResponse.type

Fields = dict[int, list[int | bytes]]


class GoError(Exception):
    """What the daemon says went wrong."""


@dataclass(frozen=True)
class Daemon:
    """A daemon that is up. Its methods raise GoError."""

    peer_id: str
    addr: str
    control: Path

    @property
    def bootstrap(self) -> str:
        """A multiaddr to start from."""
        return f"{self.addr}/p2p/{self.peer_id}"

    def connect(self, peer: PeerInfo) -> None:
        """Has it dial a peer."""
        where = _field(1, peer_id_bytes(peer.peer_id))
        where += b"".join(_field(2, multiaddr.encode(addr)) for addr in peer.addrs)
        self._ask(_field(1, _CONNECT) + _field(2, where))

    def connected(self) -> list[str]:
        """Who is connected to it."""
        return [_peer(raw).peer_id for raw in self._ask(_field(1, _LIST_PEERS)).get(6, [])]

    def find_peer(self, peer_id: str) -> PeerInfo | None:
        """Where a peer is, by its DHT; None where nobody knows, or it knows nobody yet."""
        try:
            reply = self._ask_dht(_field(1, _FIND_PEER) + _field(2, peer_id_bytes(peer_id)))
        except GoError:
            return None
        (dht,) = reply[5]
        (raw,) = _fields(dht)[2]
        return _peer(raw)

    def providers(self, cid: bytes, count: int) -> list[PeerInfo]:
        """Who provides a CID, by its DHT: returns when `count` were found, or all."""
        request = _field(1, _FIND_PROVIDERS) + _field(3, cid) + _field(6, count)
        return [_peer(fields[2][0]) for fields in self._ask_dht_for_many(request)]

    def closest(self, key: bytes) -> list[str]:
        """Who is nearest to a key."""
        found = self._ask_dht_for_many(_field(1, _CLOSEST_PEERS) + _field(4, key))
        return [peer_id_from_bytes(_bytes(fields[3][0])) for fields in found]

    def provide(self, cid: bytes) -> None:
        """Has it say that it provides a CID."""
        self._ask_dht(_field(1, _PROVIDE) + _field(3, cid))

    def _ask_dht(self, request: bytes) -> Fields:
        return self._ask(_field(1, _DHT) + _field(5, request + _field(7, int(ASK_S))))

    def _ask_dht_for_many(self, request: bytes) -> list[Fields]:
        request = _field(1, _DHT) + _field(5, request + _field(7, int(ASK_S)))
        with _conversation(self.control, request) as replies:
            _checked(next(replies))
            found: list[Fields] = []
            for reply in replies:
                fields = _fields(reply)
                if fields[1] == [_DHT_END]:
                    return found
                found.append(fields)
        raise GoError("the daemon hung up")

    def _ask(self, request: bytes) -> Fields:
        with _conversation(self.control, request) as replies:
            return _checked(next(replies))


@contextmanager
def daemon(binary: Path) -> Iterator[Daemon]:
    """A daemon that serves its DHT on loopback and knows nobody; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="p2pd") as directory:
        control = Path(directory, "s")  # short: a socket's path has 108 bytes
        command = [
            str(binary), "-dhtServer", "-forceReachabilityPublic", "-b=false", "-relay=false",
            "-hostAddrs", "/ip4/127.0.0.1/tcp/0", "-listen", f"/unix{control}",
        ]  # fmt: skip
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"HOME": directory, "PATH": os.environ.get("PATH", "")},
            text=True,
        )
        try:
            assert process.stdout is not None
            said: list[str] = []
            peer_id = addr = ""
            for line in process.stdout:  # ends when the daemon does
                said.append(line)
                if line.startswith("Peer ID:"):
                    peer_id = line.split()[-1]
                elif line.startswith("/ip4/"):
                    addr = line.strip()
                    break
            assert peer_id, f"p2pd did not start: {said}"
            yield Daemon(peer_id, addr, control)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@contextmanager
def _conversation(control: Path, request: bytes) -> Iterator[Iterator[bytes]]:
    with socket.socket(socket.AF_UNIX) as talk:
        talk.settimeout(ASK_S + 5)
        talk.connect(str(control))
        talk.sendall(frame(request))
        yield _messages(talk)


def _messages(talk: socket.socket) -> Iterator[bytes]:
    unframer = Unframer(_REPLY_BYTES_MAX)
    while data := talk.recv(1 << 16):
        yield from unframer.feed(data)
    raise GoError("the daemon hung up")


def _checked(reply: bytes) -> Fields:
    fields = _fields(reply)
    if fields.get(1) != [0]:
        (error,) = fields.get(2, [b"\x0a\x00"])
        raise GoError(_bytes(_fields(error)[1][0]).decode())
    return fields


def _peer(raw: int | bytes) -> PeerInfo:
    fields = _fields(raw)
    peer_id = peer_id_from_bytes(_bytes(fields[1][0]))
    return PeerInfo(peer_id, multiaddr.readable(map(_bytes, fields.get(2, [])), peer_id, 64))


# Protobuf's encoding (protobuf.dev/programming-guides/encoding): varints and byte strings


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    return encode_varint(number << 3 | 2) + frame(value)


def _fields(message: int | bytes) -> Fields:
    raw = _bytes(message)
    fields: Fields = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    while at < len(raw):
        tag = varint()
        value: int | bytes = varint()
        if tag & 7 == 2:
            size = int(value)
            value = raw[at : at + size]
            at += size
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value
