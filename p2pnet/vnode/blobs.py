"""A shell: states of VNodes as blobs, here and on other peers (DESIGN D12).

A state is stored here and copied to other PNodes before a commit names it; one
that is needed is taken from here, or from whichever holder still lives. With
`--state URL` it is stored there instead.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)

from p2pnet import clock
from p2pnet.data.blobs import BlobStore, NoRoomError, open_state
from p2pnet.dht.manifest import check_network_id
from p2pnet.errors import (
    ForgedError,
    NotFoundError,
    RefusedError,
    RemoteError,
    ResourceError,
    UnreachableError,
)
from p2pnet.keys import sha256, short
from p2pnet.net.handlers import Caller, Method, client_stream, server_stream, unary
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.blob_ages import BlobAges
from p2pnet.vnode.network import refusal

logger = logging.getLogger(__name__)

CHUNK_BYTES = 512 << 10  # measured best between 256 KiB and 1 MiB
BLOB_BYTES_MAX = 4 << 30
BLOBS_BYTES_MAX = 64 << 30  # on this disk, and in a shared directory
TRANSFER_TIMEOUT_S = 20.0
SAY_AGAIN_S = 600.0

# (network id, caller, its claim) -> why it is not believed to orchestrate that network, or None.
Vouch = Callable[[str, str, common_pb2.Signed], Awaitable[common_pb2.Refusal | None]]


class BlobKeeper:
    """The blobs of this node.

    Lives on the gRPC thread; files are touched, and large bytes hashed, in worker threads.

    Attributes:
        vouch: who may say which states of a network are of use; nobody, where it is not set.
    """

    def __init__(self, store: BlobStore, swarm: Swarm) -> None:
        self._store = store
        self._swarm = swarm
        self.vouch: Vouch | None = None
        self._say_again_at = -math.inf
        store.tidy()
        # The disk knows the wall clock, and all else goes by the node's.
        ago_s = clock.wall_ms() / 1000 - swarm.now()
        self._ages = BlobAges(
            {bytes.fromhex(digest): at - ago_s for digest, at in store.written_at().items()}
        )

    def services(self) -> dict[str, Mapping[str, Method]]:
        """What gRPC serves."""
        return {
            "Blob": {
                "Put": client_stream(
                    self._put, vnode_pb2.BlobChunk, vnode_pb2.BlobPutReply, timeout_s=300
                ),
                "Get": server_stream(
                    self._get, vnode_pb2.BlobGetRequest, vnode_pb2.BlobChunk, timeout_s=300
                ),
                "Retain": unary(self._retain, vnode_pb2.RetainRequest, vnode_pb2.RetainReply),
            }
        }

    async def store(
        self, data: bytes, network_id: str, copy_to: Sequence[str], state_url: str
    ) -> common_pb2.BlobRef:
        """Stores a state here and at `copy_to`; the reference names who has it now.

        Raises:
            ResourceError: it could not be stored at all.
        """
        digest = await asyncio.to_thread(sha256, data)
        ref = common_pb2.BlobRef(digest=digest, size_bytes=len(data))
        if state_url:
            shared = open_state(state_url, BLOBS_BYTES_MAX)
            await asyncio.to_thread(shared.put, data, digest.hex())
            return ref
        full: ResourceError | None = None
        try:
            await self._keep(network_id, data, digest)
            ref.holders.append(self._swarm.keypair.peer_id)
        except ResourceError as error:  # copies elsewhere are as good
            self._say_not_kept(error)
            full = error

        async def copy(peer_id: str) -> None:
            await self._swarm.put_blob(
                peer_id,
                data,
                network_id=network_id,
                timeout_s=TRANSFER_TIMEOUT_S,
                digest=digest,
            )

        results = await asyncio.gather(*map(copy, copy_to), return_exceptions=True)
        for peer_id, result in zip(copy_to, results, strict=True):
            if result is None:
                ref.holders.append(peer_id)
            elif isinstance(result, RemoteError):
                logger.info("no copy of a state on %s: %s", short(peer_id), result)
            else:
                raise result
        if not ref.holders:
            raise full or ResourceError("nobody took the state")
        if copy_to and ref.holders == [self._swarm.keypair.peer_id]:
            raise ResourceError("no other peer took a copy of the state")
        return ref

    async def fetch(self, ref: common_pb2.BlobRef, network_id: str, state_url: str) -> bytes:
        """A state, from here or from a holder; it has the digest that `ref` names.

        Raises:
            RefusedError: with code STATE_LOST: nobody has it. The store at `state_url` has not
                got it, or spoiled; or so has every peer that held it and is still here.
            UnreachableError: somebody who may have it does not answer.
            ResourceError: the store at `state_url` does not answer.
        """
        if state_url:
            shared = open_state(state_url, BLOB_BYTES_MAX)
            try:
                return await asyncio.to_thread(shared.get, ref.digest.hex())
            except NotFoundError as error:
                raise _lost(str(error)) from error
        unsure = 0  # whether it is lost: those who could have it and have not said no
        try:
            return await asyncio.to_thread(self._store.get, ref.digest.hex())
        except NotFoundError:
            pass
        except ResourceError as error:
            logger.warning("a state that may be here is not to be had: %s", error)
            unsure += 1
        here = dict.fromkeys(m.peer_id for m in self._swarm.members() if m.alive)
        for holder in ref.holders:
            if holder == self._swarm.keypair.peer_id:
                continue
            try:
                data = await self._swarm.get_blob(holder, ref.digest, timeout_s=TRANSFER_TIMEOUT_S)
            except RemoteError as error:
                logger.info("a state is not to be had from %s: %s", short(holder), error)
                unsure += holder in here and not _has_not(error)
                continue
            try:
                await self._keep(network_id, data, ref.digest)
            except ResourceError as error:  # a full disk does not stop the VNode
                self._say_not_kept(error)
            return data
        if unsure:
            raise UnreachableError(
                f"a state is not to be had now: {unsure} of the peers that may have it do not "
                "answer"
            )
        raise _lost(f"none of the {len(ref.holders)} peers that held a state has it")

    async def prefetch(
        self, refs: Sequence[common_pb2.BlobRef], network_id: str
    ) -> tuple[bytes, ...]:
        """Fetches states that may soon be wanted; the digests of those that were not here.

        Raises as `fetch`.
        """
        new = []
        for ref in refs:
            if not await asyncio.to_thread(self._store.has, ref.digest.hex()):
                new.append(ref.digest)
            await self.fetch(ref, network_id, "")
        return tuple(new)

    async def release(self, digests: Sequence[bytes], network_id: str) -> None:
        """Drops states that were fetched ahead for a network, which has not come."""
        for digest in digests:
            if self._ages.release(network_id, digest):
                await asyncio.to_thread(self._store.drop, digest.hex())

    async def _keep(self, network_id: str, data: bytes, digest: bytes) -> None:
        """Stores a blob of that digest, if need be in the place of what no commit names."""
        while True:
            try:
                await asyncio.to_thread(self._store.put, data, digest.hex())
            except NoRoomError:
                old = self._ages.oldest_unnamed(self._swarm.now())
                if old is None:
                    raise
                await asyncio.to_thread(self._store.drop, old.hex())
            else:
                self._ages.put(network_id, digest, self._swarm.now())
                return

    def _say_not_kept(self, error: ResourceError) -> None:
        """Aloud at times, and not for each state that there is no room for."""
        now = self._swarm.now()
        aloud = now >= self._say_again_at
        if aloud:
            self._say_again_at = now + SAY_AGAIN_S
        level = logging.WARNING if aloud else logging.INFO
        logger.log(level, "a state could not be kept here: %s", error)

    async def _put(
        self, chunks: AsyncIterator[vnode_pb2.BlobChunk], caller: Caller
    ) -> vnode_pb2.BlobPutReply:
        data, first = bytearray(), None
        async for chunk in chunks:
            if first is None:
                first = chunk
                check_network_id(first.network_id)
            data += chunk.data
            if first.size_bytes > BLOB_BYTES_MAX or len(data) > first.size_bytes:
                return _no(common_pb2.REFUSAL_CODE_BAD_REQUEST, "more bytes than were announced")
        whole, digest = await asyncio.to_thread(finished, data)
        if first is None or digest != first.digest:
            return _no(common_pb2.REFUSAL_CODE_BAD_REQUEST, "not the bytes that the digest names")
        try:
            await self._keep(first.network_id, whole, first.digest)
        except ResourceError as error:
            return _no(common_pb2.REFUSAL_CODE_NO_MEMORY, str(error))
        return vnode_pb2.BlobPutReply()

    async def _get(
        self, request: vnode_pb2.BlobGetRequest, caller: Caller
    ) -> AsyncGenerator[vnode_pb2.BlobChunk, None]:
        try:
            data = await asyncio.to_thread(self._store.get, request.digest.hex())
        except NotFoundError as error:
            no = refusal(common_pb2.REFUSAL_CODE_STATE_LOST, str(error))
            yield vnode_pb2.BlobChunk(refusal=no)
            return
        for chunk in chunks_of(data, request.digest, ""):
            yield chunk

    async def _retain(
        self, request: vnode_pb2.RetainRequest, caller: Caller
    ) -> vnode_pb2.RetainReply:
        check_network_id(request.network_id)
        no: common_pb2.Refusal | None = refusal(
            common_pb2.REFUSAL_CODE_NOT_GRANTED, "this peer takes nobody's word for it"
        )
        if self.vouch is not None:
            no = await self.vouch(request.network_id, caller.peer_id, request.claim)
        if no is not None:
            return vnode_pb2.RetainReply(refusal=no)
        for digest in self._ages.retain(request.network_id, request.digests, self._swarm.now()):
            await asyncio.to_thread(self._store.drop, digest.hex())
        return vnode_pb2.RetainReply()


def chunks_of(data: bytes, digest: bytes, network_id: str) -> Iterator[vnode_pb2.BlobChunk]:
    """A blob cut up for the wire; the first chunk, which is always there, says what it is."""
    yield vnode_pb2.BlobChunk(
        digest=digest, size_bytes=len(data), data=data[:CHUNK_BYTES], network_id=network_id
    )
    for at in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
        yield vnode_pb2.BlobChunk(data=data[at : at + CHUNK_BYTES])


def finished(data: bytearray) -> tuple[bytes, bytes]:
    """A blob that has come in whole, and its SHA-256. Takes long: for a thread."""
    whole = bytes(data)
    return whole, sha256(whole)


def _lost(detail: str) -> RefusedError:
    return RefusedError(detail, code=common_pb2.REFUSAL_CODE_STATE_LOST)


def _has_not(error: RemoteError) -> bool:
    """Whether a peer has shown that it has not got a state, nor ever will by itself."""
    lost = isinstance(error, RefusedError) and error.code == common_pb2.REFUSAL_CODE_STATE_LOST
    return lost or isinstance(error, ForgedError)


def _no(code: common_pb2.RefusalCode, detail: str) -> vnode_pb2.BlobPutReply:
    return vnode_pb2.BlobPutReply(refusal=refusal(code, detail))
