"""A shell: what a client does, through a node's control socket and straight to the peers.

The node says who is there and where things live; tensors, weights and training go to the
peers themselves. Everything here runs on an asyncio loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from p2pnet.client.link import LOOK_FURTHER
from p2pnet.client.networks import NetworkInfo, Networks, raise_refusal
from p2pnet.client.terms import Terms, new_manifest
from p2pnet.clock import wall_ms
from p2pnet.data.blobs import is_state_there, open_state
from p2pnet.dht.manifest import network_id_of
from p2pnet.errors import (
    NotFoundError,
    P2PNetError,
    RefusedError,
    RemoteError,
    UnreachableError,
    UsageError,
)
from p2pnet.keys import KeyPair, sha256, short
from p2pnet.log.keepers import first_keepers
from p2pnet.v1 import common_pb2, control_pb2, orchestrator_pb2, pnode_pb2
from p2pnet.vnode.blobs import BLOBS_BYTES_MAX
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.transfer import get_blob, put_blob

__all__ = ["NetworkInfo", "Session"]

logger = logging.getLogger(__name__)

SUBMIT_TIMEOUT_S = 65.0
DESCRIBE_TIMEOUT_S = 5.0
ORCHESTRATORS_TRIED = 4
CUT_TIMEOUT_S = 65.0
TRANSFER_TIMEOUT_S = 60.0
BLOB_COPIES = 3


class Session(Networks):
    """A connection to a node's control socket, and all that a client does over it."""

    async def submit(
        self,
        graph: CompiledGraph,
        owner: KeyPair,
        states: Mapping[str, bytes],
        orchestrator: str = "",
        terms: Terms | None = None,
    ) -> NetworkInfo:
        """Submits a network and waits until it is placed.

        Where the orchestrator dies meanwhile, the next is asked with the same manifest, so
        that there is never a second network.

        Args:
            states: VNodes' states to start from (safetensors), where it is not the seed.
            orchestrator: the peer to look after it; by default the local node, or
                for a client the member whose id is closest to the network's name.

        Raises:
            UsageError: the name is taken, the terms cannot be, or the swarm is too small.
            RemoteError: no orchestrator can be reached.
        """
        terms = terms or Terms()
        terms.check()
        try:
            taken = await self.find(graph.name)
        except NotFoundError:
            pass
        else:
            raise UsageError(
                f"a network named {graph.name!r} is here already ({taken.network_id}), or was "
                "within the last minute or two: give yours another name"
            )
        alive = await self.hosting()
        candidates = await self._candidates(graph.name, alive, orchestrator, terms)
        chosen, state_url = await self._describe_first(candidates, orchestrator)
        manifest = new_manifest(
            owner,
            graph,
            terms,
            keepers=first_keepers(graph.name, alive, terms.allow),
            state_url=state_url,
            now_ms=wall_ms(),
            nonce=os.urandom(16),
        )
        network_id = network_id_of(manifest)
        info = NetworkInfo(
            network_id, graph.name, chosen, graph.vnodes(), 0, state_url, manifest=manifest
        )
        request = orchestrator_pb2.SubmitRequest(
            manifest=manifest,
            graph=graph.to_json(),
            states=await self._ship(network_id, states, alive),
        )
        others = [peer for peer in candidates if peer != chosen]
        return await self._submit(info, request, [chosen, *others[: ORCHESTRATORS_TRIED - 1]])

    async def _submit(
        self,
        info: NetworkInfo,
        request: orchestrator_pb2.SubmitRequest,
        candidates: Sequence[str],
    ) -> NetworkInfo:
        problem: P2PNetError | None = None
        for peer_id in candidates:
            if problem is not None:
                logger.warning(
                    "asking %s to orchestrate %s: %s", short(peer_id), info.name, problem
                )
            try:
                reply = await self.call(
                    peer_id,
                    "Orchestrator/Submit",
                    request,
                    orchestrator_pb2.SubmitReply,
                    timeout_s=SUBMIT_TIMEOUT_S,
                )
                raise_refusal(reply)
                return replace(info, orchestrator=peer_id, epoch=reply.epoch)
            except UnreachableError as error:
                problem = error
            except RefusedError as error:
                if error.code == common_pb2.REFUSAL_CODE_STALE_EPOCH:
                    # One that was asked before has claimed it, or who follows it: as well.
                    status = await self.status(info)
                    return replace(info, orchestrator=status.orchestrator, epoch=status.epoch)
                if error.code not in (*LOOK_FURTHER, common_pb2.REFUSAL_CODE_NOT_IN_SERVICE):
                    raise UsageError(f"{info.name} cannot be placed: {error}") from None
                problem = error
        assert problem is not None
        if isinstance(problem, RefusedError):
            raise UsageError(f"{info.name} cannot be placed: {problem}")
        raise problem

    async def _candidates(
        self, name: str, alive: Sequence[str], wanted: str, terms: Terms
    ) -> list[str]:
        if not alive:
            raise UsageError(
                "no peer of the network can be reached: check the bootstrap list, or start a "
                "node with `p2pnet join`"
            )
        if wanted:
            if terms.allow and wanted not in terms.allow:
                raise UsageError(f"{wanted} is to orchestrate it, and is not among those allowed")
            # Asked also where it does not seem to be here: the membership may be behind.
            return terms.candidates(list(dict.fromkeys([*alive, wanted])), name, wanted)
        info = await self.control("Info", control_pb2.InfoRequest(), control_pb2.InfoReply)
        return terms.candidates(alive, name, info.peer_id)

    async def _describe_first(self, candidates: Sequence[str], wanted: str) -> tuple[str, str]:
        """The first candidate that answers, and where it keeps states; (peer, URL)."""
        problem: RemoteError | None = None
        for peer_id in candidates[:ORCHESTRATORS_TRIED]:
            try:
                reply = await self.call(
                    peer_id,
                    "PNode/Describe",
                    pnode_pb2.DescribeRequest(),
                    pnode_pb2.DescribeReply,
                    timeout_s=DESCRIBE_TIMEOUT_S,
                )
                return peer_id, reply.state_url
            except RemoteError as error:
                problem = error
                if wanted:
                    break
        assert problem is not None
        raise problem

    async def _ship(
        self, network_id: str, states: Mapping[str, bytes], alive: Sequence[str]
    ) -> dict[str, common_pb2.BlobRef]:
        if not states:
            return {}
        holders = alive[:BLOB_COPIES]
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
        reply = await self.ask(
            network,
            "Orchestrator/Commit",
            orchestrator_pb2.CommitRequest(network_id=network.network_id),
            orchestrator_pb2.CommitReply,
            timeout_s=CUT_TIMEOUT_S,
        )
        return reply.states

    async def fetch(self, ref: common_pb2.BlobRef, state_url: str) -> bytes:
        """A state from one of its holders, or from the network's store.

        Raises:
            UnreachableError: none of them has it.
            UsageError: the store cannot be read from here.
        """
        if state_url:
            if not is_state_there(state_url):  # a record's word; nothing is made for it here
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
