"""A shell: what a client does, through a node's control socket and straight to the peers.

The node says who is there and where things live; tensors, weights and training
go to the peers themselves. Everything here runs on an asyncio loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from p2pnet.clock import wall_ms
from p2pnet.data.blobs import open_state, path_of
from p2pnet.dht.keyspace import network_key, peer_position, position
from p2pnet.dht.manifest import network_id_of
from p2pnet.errors import (
    NotFoundError,
    RefusedError,
    RemoteError,
    UnreachableError,
    UsageError,
)
from p2pnet.keys import MANIFEST, KeyPair, sha256, short
from p2pnet.net.channel import Stream, unix_channel
from p2pnet.net.dialer import PeerContact, TcpDialer
from p2pnet.v1 import common_pb2, control_pb2, gossip_pb2, orchestrator_pb2, records_pb2
from p2pnet.vnode.blobs import BLOBS_BYTES_MAX
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.transfer import get_blob, put_blob

ReplyT = TypeVar("ReplyT", bound=Message)

CONTROL_TIMEOUT_S = 30.0
SUBMIT_TIMEOUT_S = 60.0
TRANSFER_TIMEOUT_S = 60.0
SETTLE_S = 5.0  # how long a client that has just joined waits to hear who is there
BLOB_COPIES = 3


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """A network as its record in the DHT says."""

    network_id: str
    name: str
    orchestrator: str
    vnodes: tuple[str, ...]
    epoch: int
    state_url: str


class Session:
    """A connection to a node's control socket, and calls to peers."""

    def __init__(self, socket: Path) -> None:
        self._control = unix_channel(socket)
        self._dialer = TcpDialer(KeyPair.from_seed(os.urandom(32)))
        self._contacts: dict[str, PeerContact] = {}

    async def close(self) -> None:
        """Ends every connection."""
        await self._dialer.close()
        await self._control.close()

    async def control(
        self,
        method: str,
        request: Message,
        reply_type: type[ReplyT],
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> ReplyT:
        """A call to the node itself.

        Raises:
            UsageError: the node is gone, or says that what is asked for cannot be.
        """
        try:
            return await self._control.call(
                f"Control/{method}", request, reply_type, timeout_s=timeout_s
            )
        except UnreachableError as error:
            raise UsageError(f"the local node does not answer: {error}") from None

    def control_stream(
        self, method: str, reply_type: type[ReplyT], timeout_s: float
    ) -> AbstractAsyncContextManager[Stream[ReplyT]]:
        """A stream from the node itself, for `async with`."""
        return self._control.stream(f"Control/{method}", reply_type, timeout_s=timeout_s)

    # Peers

    async def members(self) -> Sequence[control_pb2.MemberRow]:
        """Who is here, as the node sees it."""
        reply = await self.control(
            "Members", control_pb2.MembersRequest(settle_s=SETTLE_S), control_pb2.MembersReply
        )
        return list(reply.members)

    async def contact(self, peer_id: str) -> PeerContact:
        """How to reach a peer; raises UnreachableError if nobody knows it."""
        if peer_id not in self._contacts:
            reply = await self.control(
                "Peer", control_pb2.PeerRequest(peer_id=peer_id), control_pb2.PeerReply
            )
            if not reply.HasField("advert"):
                raise UnreachableError(f"peer {short(peer_id)} is not known here")
            advert = gossip_pb2.Advert.FromString(reply.advert.payload)
            self._contacts[peer_id] = PeerContact(
                peer_id, tuple(advert.grpc_targets), advert.grpc_certificate
            )
        return self._contacts[peer_id]

    async def call(
        self,
        peer_id: str,
        method: str,
        request: Message,
        reply_type: type[ReplyT],
        *,
        timeout_s: float,
    ) -> ReplyT:
        """A call to a peer; raises as `net.dialer.Dialer.call`."""
        contact = await self.contact(peer_id)
        try:
            return await self._dialer.call(
                contact, method, request, reply_type, timeout_s=timeout_s
            )
        except UnreachableError:
            self._contacts.pop(peer_id, None)  # it may have come back elsewhere
            raise

    async def stream(
        self, peer_id: str, method: str, reply_type: type[ReplyT], timeout_s: float
    ) -> AbstractAsyncContextManager[Stream[ReplyT]]:
        """A stream to a peer, for `async with await`."""
        contact = await self.contact(peer_id)
        return self._dialer.stream(contact, method, reply_type, timeout_s=timeout_s)

    # Networks

    async def find(self, name: str) -> NetworkInfo:
        """The network of that name or id.

        Raises:
            NotFoundError: there is none.
            UsageError: there are several of that name.
        """
        reply = await self.control(
            "FindNetwork", control_pb2.FindNetworkRequest(name=name), control_pb2.FindNetworkReply
        )
        found: dict[str, NetworkInfo] = {}
        for signed in reply.records:
            record = records_pb2.Record.FromString(signed.payload)
            network = records_pb2.NetworkRecord.FromString(record.body)
            known = found.get(network.network_id)
            if known is None or known.epoch < network.epoch:
                found[network.network_id] = NetworkInfo(
                    network.network_id,
                    network.name,
                    network.orchestrator,
                    tuple(network.vnodes),
                    network.epoch,
                    network.state_url,
                )
        if not found:
            raise NotFoundError(
                f"there is no network {name!r} here: submit one with `p2pnet submit SPEC`, or "
                "check the name"
            )
        if len(found) > 1:
            ids = ", ".join(sorted(found))
            raise UsageError(f"several networks are named {name!r}: say which by its id, {ids}")
        return next(iter(found.values()))

    async def where_is(
        self, network: NetworkInfo, vnodes: Sequence[str] = ()
    ) -> Sequence[control_pb2.WhereIsRow]:
        """Where VNodes live, as the DHT says; raises NotFoundError for an unknown one."""
        unknown = [vnode for vnode in vnodes if vnode not in network.vnodes]
        if unknown:
            raise NotFoundError(
                f"network {network.name} has no VNode {unknown[0]!r}: it has "
                f"{', '.join(network.vnodes)}"
            )
        request = control_pb2.WhereIsRequest(
            network_id=network.network_id, vnodes=vnodes or network.vnodes
        )
        reply = await self.control("WhereIs", request, control_pb2.WhereIsReply)
        return list(reply.rows)

    async def status(self, network: NetworkInfo) -> orchestrator_pb2.StatusReply:
        """What the network's orchestrator says of it; raises RemoteError."""
        reply = await self.call(
            network.orchestrator,
            "Orchestrator/Status",
            orchestrator_pb2.StatusRequest(network_id=network.network_id),
            orchestrator_pb2.StatusReply,
            timeout_s=CONTROL_TIMEOUT_S,
        )
        raise_refusal(reply)
        return reply

    async def submit(
        self,
        graph: CompiledGraph,
        owner: KeyPair,
        states: Mapping[str, bytes],
        orchestrator: str = "",
    ) -> NetworkInfo:
        """Submits a network and waits until it is placed.

        Args:
            states: VNodes' states to start from (safetensors), where it is not the seed.
            orchestrator: the peer to look after it; by default the local node, or
                for a client the member whose id is closest to the network's.

        Raises:
            UsageError: the name is taken, or the swarm is too small.
            RemoteError: the orchestrator cannot be reached or refuses.
        """
        try:
            taken = await self.find(graph.name)
        except NotFoundError:
            pass
        else:
            raise UsageError(
                f"a network named {graph.name!r} is here already ({taken.network_id}): give "
                "yours another name"
            )
        manifest = owner.sign(
            MANIFEST,
            records_pb2.Manifest(
                owner=owner.public_key,
                name=graph.name,
                spec_digest=graph.digest,
                any_orchestrator=True,
                created_at_ms=wall_ms(),
                nonce=os.urandom(16),
                micro_batches=graph.micro_batches,
                compute_threads=1,
            ).SerializeToString(deterministic=True),
        )
        network_id = network_id_of(manifest)
        peer_id = orchestrator or await self._choose_orchestrator(network_id)
        request = orchestrator_pb2.SubmitRequest(
            manifest=manifest,
            graph=graph.to_json(),
            states=await self._ship(network_id, states),
        )
        reply = await self.call(
            peer_id,
            "Orchestrator/Submit",
            request,
            orchestrator_pb2.SubmitReply,
            timeout_s=SUBMIT_TIMEOUT_S,
        )
        if reply.HasField("refusal"):
            raise UsageError(f"{graph.name} cannot be placed: {reply.refusal.detail}")
        return NetworkInfo(network_id, graph.name, peer_id, graph.vnodes(), reply.epoch, "")

    async def _choose_orchestrator(self, network_id: str) -> str:
        info = await self.control("Info", control_pb2.InfoRequest(), control_pb2.InfoReply)
        alive = [peer for peer, _ in await self._alive()]
        if info.peer_id in alive:
            return str(info.peer_id)
        if not alive:
            raise UsageError(
                "no peer of the network can be reached: check the bootstrap list, or start a "
                "node with `p2pnet join`"
            )
        target = position(network_key(network_id))
        return min(alive, key=lambda peer: peer_position(peer) ^ target)

    async def _alive(self) -> list[tuple[str, gossip_pb2.Advert]]:
        alive = []
        for row in await self.members():
            advert = gossip_pb2.Advert.FromString(row.advert.payload)
            if row.state == "alive" and advert.grpc_targets and advert.capabilities.hosting:
                alive.append((advert.peer_id, advert))
        return alive

    async def _ship(
        self, network_id: str, states: Mapping[str, bytes]
    ) -> dict[str, common_pb2.BlobRef]:
        if not states:
            return {}
        holders = [peer for peer, _ in await self._alive()][:BLOB_COPIES]
        refs: dict[str, common_pb2.BlobRef] = {}
        for vnode, data in sorted(states.items()):
            ref = common_pb2.BlobRef(digest=sha256(data), size_bytes=len(data))
            for holder in holders:
                try:
                    await put_blob(
                        self._dialer,
                        await self.contact(holder),
                        data,
                        network_id=network_id,
                        timeout_s=TRANSFER_TIMEOUT_S,
                    )
                except RemoteError:
                    continue
                ref.holders.append(holder)
            if not ref.holders:
                raise UnreachableError(f"no peer took the weights of {vnode}")
            refs[vnode] = ref
        return refs

    # States

    async def cut(self, network: NetworkInfo) -> Mapping[str, common_pb2.BlobRef]:
        """The states of the last commit; one is made where there is none at the present step."""
        reply = await self.call(
            network.orchestrator,
            "Orchestrator/Commit",
            orchestrator_pb2.CommitRequest(network_id=network.network_id),
            orchestrator_pb2.CommitReply,
            timeout_s=SUBMIT_TIMEOUT_S,
        )
        raise_refusal(reply)
        return reply.states

    async def fetch(self, ref: common_pb2.BlobRef, state_url: str) -> bytes:
        """A state from one of its holders, or from the network's store.

        Raises:
            UnreachableError: none of them has it.
            UsageError: the store cannot be read from here.
        """
        if state_url:
            if not path_of(state_url).is_dir():  # a record's word; nothing is made for it here
                raise UsageError(f"the states are in {state_url}, which cannot be read from here")
            return await asyncio.to_thread(
                open_state(state_url, BLOBS_BYTES_MAX).get, ref.digest.hex()
            )
        for holder in ref.holders:
            try:
                return await get_blob(
                    self._dialer,
                    await self.contact(holder),
                    ref.digest,
                    timeout_s=TRANSFER_TIMEOUT_S,
                )
            except RemoteError:
                continue
        raise UnreachableError(f"none of the {len(ref.holders)} peers that held a state has it")


def raise_refusal(reply: object) -> None:
    """Raises RefusedError if a reply carries a refusal."""
    refusal = getattr(reply, "refusal", None)
    if isinstance(reply, Message) and refusal is not None and reply.HasField("refusal"):
        raise RefusedError(
            refusal.detail, code=refusal.code, epoch=refusal.epoch, host=refusal.host
        )
