"""Blobs over gRPC, in chunks: what a node and a client both do."""

from __future__ import annotations

import asyncio

from p2pnet.errors import ForgedError, RefusedError, UnreachableError
from p2pnet.keys import sha256
from p2pnet.net.dialer import Dialer, PeerContact
from p2pnet.v1 import vnode_pb2
from p2pnet.vnode.blobs import BLOB_BYTES_MAX, chunks_of, finished
from p2pnet.vnode.network import clip


async def put_blob(
    dialer: Dialer,
    contact: PeerContact,
    data: bytes,
    *,
    network_id: str,
    timeout_s: float,
    digest: bytes = b"",
) -> None:
    """Gives a peer a copy of `data`, whose SHA-256 is worked out if it is not given.

    Raises:
        UnreachableError: no connection, or not in time.
        RefusedError: the peer takes no more.
    """
    digest = digest or await asyncio.to_thread(sha256, data)
    async with dialer.stream(
        contact, "Blob/Put", vnode_pb2.BlobPutReply, timeout_s=timeout_s
    ) as stream:
        for chunk in chunks_of(data, digest, network_id):
            await stream.write(chunk)
        await stream.done_writing()
        reply = await stream.read(timeout_s=timeout_s)
    if reply is None:
        raise UnreachableError("the peer broke off a transfer")
    if reply.HasField("refusal"):
        raise RefusedError(reply.refusal.detail, code=reply.refusal.code)


async def get_blob(
    dialer: Dialer, contact: PeerContact, digest: bytes, *, timeout_s: float
) -> bytes:
    """Fetches a blob by its SHA-256.

    Raises:
        UnreachableError: no connection, or not in time.
        RefusedError: the peer does not have it (code STATE_LOST), or has no time for it.
        ForgedError: it sent something else.
    """
    data = bytearray()
    async with dialer.stream(
        contact, "Blob/Get", vnode_pb2.BlobChunk, timeout_s=timeout_s
    ) as stream:
        await stream.write(vnode_pb2.BlobGetRequest(digest=digest))
        await stream.done_writing()
        while (chunk := await stream.read(timeout_s=timeout_s)) is not None:
            if chunk.HasField("refusal"):
                raise RefusedError(clip(chunk.refusal.detail), code=chunk.refusal.code)
            data += chunk.data
            if len(data) > BLOB_BYTES_MAX:
                raise ForgedError("a peer sent more bytes than any state has")
    whole, sent = await asyncio.to_thread(finished, data)
    if sent != digest:
        raise ForgedError("a peer sent other bytes than the digest names")
    return whole
