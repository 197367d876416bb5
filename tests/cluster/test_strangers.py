"""Strangers at the ports of real nodes: refused, told why where that helps, and survived."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from typing import Any

import grpc
import grpc.aio
import pytest
import trio
from swarm import Node, Swarm

from p2pnet.errors import VersionError
from p2pnet.gossip.messages import read_message, write_message
from p2pnet.gossip.shell import PROTOCOL as GOSSIP
from p2pnet.gossip.statements import Versions
from p2pnet.keys import KeyPair
from p2pnet.net.channel import CHANNEL_OPTIONS
from p2pnet.net.dialer import PeerContact, TcpDialer
from p2pnet.net.libp2p import open_network
from p2pnet.net.multiaddr import parse
from p2pnet.net.tls import SERVER_NAME
from p2pnet.v1 import gossip_pb2, pnode_pb2

LONG_S = 30.0
STRANGER = KeyPair.from_seed(b"s" * 32)
DESCRIBE = "/p2pnet.v1.PNode/Describe"


def contact(node: Node) -> PeerContact:
    """How to reach a node's gRPC, as its advert says."""
    found: PeerContact = node.client.run(node.client.session.contact(node.peer_id))
    return found


async def describe(node: Node, versions: tuple[int, int] = (1, 1)) -> pnode_pb2.DescribeReply:
    """An honest call of a stranger's."""
    dialer = TcpDialer(STRANGER, versions=versions)
    try:
        return await dialer.call(
            contact(node),
            "PNode/Describe",
            pnode_pb2.DescribeRequest(),
            pnode_pb2.DescribeReply,
            timeout_s=LONG_S,
        )
    finally:
        await dialer.close()


def assert_well(node: Node) -> None:
    """It runs, its peers count on it, and both its ports answer."""
    assert node.process.popen.poll() is None
    assert node.peer_id in node.alive()
    asyncio.run(describe(node))

    async def main() -> None:
        with trio.fail_after(LONG_S):
            async with open_network(STRANGER, listen=()) as network:
                assert await network.identify(node.addr, timeout_s=LONG_S) == node.peer_id

    trio.run(main)


def garbage(kind: str) -> bytes:
    rng = random.Random(kind)
    return {
        "nothing": b"",
        "noise": rng.randbytes(64 * 1024),
        "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "tls": bytes.fromhex("1603010200010001fc0303") + rng.randbytes(512),
        "multistream, then noise": b"\x13/multistream/1.0.0\n" + rng.randbytes(4096),
        "http2, then noise": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(4096),
    }[kind]


@pytest.mark.parametrize("port", ["libp2p", "grpc"])
def test_a_node_survives_garbage(calm: Swarm, port: str) -> None:
    node = calm.nodes[0]
    target = parse(node.addr).where if port == "libp2p" else node.ready["grpc"]
    number = int(target.rpartition("/" if port == "libp2p" else ":")[2])
    kinds = ["nothing", "noise", "http", "tls", "multistream, then noise", "http2, then noise"]
    with_patience = [socket.create_connection(("127.0.0.1", number)) for _ in range(5)]
    try:
        for kind in kinds:
            with socket.create_connection(("127.0.0.1", number), timeout=LONG_S) as stranger:
                try:
                    stranger.sendall(garbage(kind))
                    stranger.shutdown(socket.SHUT_WR)
                    while stranger.recv(65536):
                        pass
                except OSError:
                    pass  # hung up on, which is right
        assert_well(node)
    finally:
        for quiet in with_patience:
            quiet.close()
    assert node.process.err == ""


@pytest.mark.parametrize("secured", [False, True], ids=["plaintext", "unauthenticated"])
def test_a_grpc_client_that_proves_nothing_is_refused(calm: Swarm, secured: bool) -> None:
    node = calm.nodes[0]
    certificate = ssl.DER_cert_to_PEM_cert(contact(node).certificate_der).encode()

    async def call() -> grpc.StatusCode:
        target = node.ready["grpc"]
        if secured:
            options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME))
            credentials = grpc.ssl_channel_credentials(certificate)
            channel = grpc.aio.secure_channel(target, credentials, options=options)
        else:
            channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        async with channel:
            try:
                describe_raw: Any = channel.unary_unary(DESCRIBE)
                await describe_raw(b"", timeout=LONG_S)
            except grpc.aio.AioRpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    code = asyncio.run(call())
    assert code is (grpc.StatusCode.UNAUTHENTICATED if secured else grpc.StatusCode.UNAVAILABLE)
    assert_well(node)


def test_a_grpc_caller_of_another_protocol_version_is_told(calm: Swarm) -> None:
    with pytest.raises(VersionError, match=r"no protocol version in common.* 1.* 2 to 3"):
        asyncio.run(describe(calm.nodes[0], versions=(2, 3)))
    assert_well(calm.nodes[0])


def test_a_peer_of_another_protocol_version_is_told(calm: Swarm) -> None:
    node = calm.nodes[0]

    async def main() -> bytes:
        with trio.fail_after(LONG_S):
            async with open_network(STRANGER, listen=()) as network:
                peer_id = await network.identify(node.addr, timeout_s=LONG_S)
                kind = gossip_pb2.GossipMessage.KIND_SYNC
                hello = write_message(kind, Versions(2, 3))
                return await network.request(peer_id, GOSSIP, hello, timeout_s=LONG_S)

    reply = read_message(trio.run(main))
    assert reply.kind == gossip_pb2.GossipMessage.KIND_REFUSED
    assert reply.versions == Versions(1, 1)
    assert "speaks gossip version 1, you speak 2 to 3" in reply.detail
    assert not reply.adverts
    assert_well(node)
    assert STRANGER.peer_id not in node.alive()
