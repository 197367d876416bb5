"""Payloads over bare gRPC with TLS: one stream that stays open, chunks as they are, no protobuf.

python -m benchmarks.peers.bulk_grpc serve
python -m benchmarks.peers.bulk_grpc send TARGET CERTIFICATE_HEX
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from benchmarks.peers import bulk, talk
from p2pnet.net.tls import SERVER_NAME, make_certificate

_PATH = "/bench.Bulk/Send"
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


async def serve() -> None:
    """Takes what comes until its driver is gone."""

    async def take(requests: AsyncIterator[bytes], context: Any) -> None:
        received = 0
        async for chunk in requests:
            received += len(chunk)
            if received == bulk.SIZE_BYTES:
                received = 0
                await context.write(b"")

    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Send": grpc.stream_stream_rpc_method_handler(take)
    }
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bulk", handlers),))
    certificate = make_certificate()
    pair = certificate.key_pem, certificate.cert_pem
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    await server.start()
    talk.say(arguments=[f"127.0.0.1:{port}", certificate.cert_pem.hex()])
    await asyncio.to_thread(talk.listen)
    await server.stop(0)


async def send(target: str, certificate: str) -> None:
    """Sends when it is told to."""
    credentials = grpc.ssl_channel_credentials(bytes.fromhex(certificate))
    options = (*_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME))
    data = bulk.payload()
    chunks = [data[at : at + bulk.CHUNK_BYTES] for at in range(0, len(data), bulk.CHUNK_BYTES)]
    async with grpc.aio.secure_channel(target, credentials, options=options) as channel:
        send_stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        send_stream = channel.stream_stream(_PATH)
        call = send_stream()

        async def once() -> None:
            for chunk in chunks:
                await call.write(chunk)
            assert await call.read() == b""

        await bulk.obey(once)


if __name__ == "__main__":
    asyncio.run(serve() if sys.argv[1] == "serve" else send(*sys.argv[2:]))
