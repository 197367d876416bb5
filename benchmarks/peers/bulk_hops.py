"""Payloads over p2pnet's hops: the wire of a node without the node.

python -m benchmarks.peers.bulk_hops serve
python -m benchmarks.peers.bulk_hops send PEER_ID TARGET CERTIFICATE_HEX
"""

from __future__ import annotations

import asyncio
import secrets
import sys

from benchmarks.peers import bulk, talk
from p2pnet.keys import KeyPair
from p2pnet.net.dialer import PeerContact, TcpDialer
from p2pnet.net.handlers import Caller
from p2pnet.net.hop_frames import Request
from p2pnet.net.rpc_server import RpcServer
from p2pnet.net.tls import make_certificate
from p2pnet.v1 import vnode_pb2
from p2pnet.vnode.hops_server_shell import HopsServer
from p2pnet.vnode.hops_shell import Hops

_TIMEOUT_S = 30.0


async def serve() -> None:
    """Takes what comes until its driver is gone."""

    async def hop(
        request: Request, payload: memoryview | None, caller: Caller
    ) -> tuple[vnode_pb2.HopReply, None]:
        assert payload is not None
        assert payload.nbytes == bulk.SIZE_BYTES
        return vnode_pb2.HopReply(), None

    keypair = KeyPair.from_seed(secrets.token_bytes(32))
    certificate = make_certificate()
    server = RpcServer(certificate)
    hops = HopsServer(hop, lambda request: bulk.SIZE_BYTES)
    server.add("VNode", {"Hops": hops.method})
    target = await server.start("127.0.0.1:0")
    talk.say(arguments=[keypair.peer_id, target, certificate.cert_der.hex()])
    await asyncio.to_thread(talk.listen)
    await hops.close()
    await server.stop(0.0)


async def send(peer_id: str, target: str, certificate: str) -> None:
    """Sends when it is told to."""
    contact = PeerContact(peer_id, (target,), bytes.fromhex(certificate))
    dialer = TcpDialer(KeyPair.from_seed(secrets.token_bytes(32)))
    hops = Hops(dialer)
    payload = bulk.payload()

    async def once() -> None:
        reply, _ = await hops.hop(contact, vnode_pb2.TrainRequest(), payload, timeout_s=_TIMEOUT_S)
        assert not reply.HasField("refusal"), reply.refusal

    try:
        await bulk.obey(once)
    finally:
        await hops.close()
        await dialer.close()


if __name__ == "__main__":
    asyncio.run(serve() if sys.argv[1] == "serve" else send(*sys.argv[2:]))
