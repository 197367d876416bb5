"""A shell: forward passes from a client.

A host that has a VNode no longer says where it went, and under which epoch, and the
pass goes there. What fails otherwise is located anew and tried again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import numpy as np

from p2pnet.client.batches import fitted
from p2pnet.client.connection import Patience
from p2pnet.client.session import NetworkInfo, Session
from p2pnet.errors import NotFoundError, RefusedError, UnreachableError, root_of
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array, decode, encode

CHUNK_SAMPLES = 256
CHUNKS_AT_ONCE = 4
HOP_TIMEOUT_S = 5.0
OUTPUT_TIMEOUT_S = 15.0
GIVE_UP_S = 60.0
REDIRECTS_MAX = 4
BUSY_PAUSE_S = 0.05

ReplyT = TypeVar("ReplyT", vnode_pb2.HopReply, vnode_pb2.CollectReply)
Places = dict[str, tuple[str, int]]  # VNode -> (host's peer id, epoch)
_ELSEWHERE = (
    common_pb2.REFUSAL_CODE_STALE_EPOCH,
    common_pb2.REFUSAL_CODE_NOT_HOSTED,
    common_pb2.REFUSAL_CODE_LEASE_EXPIRED,
)


class _Moved(Exception):
    """A VNode is not where we thought it was."""


async def infer(
    session: Session, network: NetworkInfo, graph: CompiledGraph, inputs: Mapping[str, Array]
) -> Array:
    """The network's output for a batch; samples first.

    Raises:
        UsageError: inputs of a wrong shape or dtype.
        RemoteError: the network does not answer for too long.
    """
    arrays = {name: fitted(graph, name, array) for name, array in inputs.items()}
    for name in graph.inputs:
        if name not in arrays:
            raise NotFoundError(f"network {graph.name} also needs the input {name!r}")
    samples = len(next(iter(arrays.values())))
    if samples == 0:
        return np.zeros((0, *graph.tensor(graph.output).shape), dtype=np.float32)
    places = asyncio.Semaphore(CHUNKS_AT_ONCE)

    async def chunk(at: int) -> Array:
        async with places:
            part = {name: array[at : at + CHUNK_SAMPLES] for name, array in arrays.items()}
            return await _until_done(session, network, graph, part)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(chunk(at)) for at in range(0, samples, CHUNK_SAMPLES)]
    except BaseExceptionGroup as errors:
        raise root_of(errors) from None
    return np.concatenate([task.result() for task in tasks])


async def _until_done(
    session: Session, network: NetworkInfo, graph: CompiledGraph, inputs: Mapping[str, Array]
) -> Array:
    patience = Patience(f"an answer of network {graph.name}", GIVE_UP_S)
    told: Places = {}  # what hosts have said, which may be newer than what the DHT says
    while True:
        try:
            return await _once(session, network, graph, inputs, told)
        except (_Moved, UnreachableError, NotFoundError) as error:
            await patience.wait(error)


async def _once(
    session: Session,
    network: NetworkInfo,
    graph: CompiledGraph,
    inputs: Mapping[str, Array],
    told: Places,
) -> Array:
    places = {row.vnode: (row.peer_id, row.epoch) for row in await session.where_is(network)}
    for vnode, (host, epoch) in told.items():
        if vnode not in places or places[vnode][1] < epoch:
            places[vnode] = (host, epoch)
    told.clear()  # believed once: whoever is wrong again has to say so again
    request_id = os.urandom(16)

    async def send(name: str, vnode: str, slot: int, host: str, epoch: int) -> vnode_pb2.HopReply:
        request = vnode_pb2.ForwardRequest(
            network_id=network.network_id,
            epoch=epoch,
            request_id=request_id,
            vnode=vnode,
            source=name,
            slot=slot,
            tensor=encode(inputs[name]),
        )
        return await session.call(
            host, "VNode/Forward", request, vnode_pb2.HopReply, timeout_s=HOP_TIMEOUT_S
        )

    async def feed(name: str, vnode: str, slot: int) -> None:
        if vnode != graph.loss.id:
            await _reach(places, told, vnode, lambda *place: send(name, vnode, slot, *place))

    async def collect(host: str, epoch: int) -> vnode_pb2.CollectReply:
        request = vnode_pb2.CollectRequest(
            network_id=network.network_id, epoch=epoch, request_id=request_id, vnode=graph.output
        )
        return await session.call(
            host, "VNode/Collect", request, vnode_pb2.CollectReply, timeout_s=OUTPUT_TIMEOUT_S
        )

    collecting = asyncio.ensure_future(_reach(places, told, graph.output, collect))
    try:
        edges = [(name, *end) for name in inputs for end in graph.consumers(name)]
        await asyncio.gather(*(feed(*edge) for edge in edges))
        output = await collecting
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
    return decode(output.tensor)


async def _reach(
    places: Places, told: Places, vnode: str, call: Callable[[str, int], Awaitable[ReplyT]]
) -> ReplyT:
    """The answer of a VNode to a call, made wherever it turns out to live.

    Raises:
        RefusedError: it is refused for good.
        _Moved: it is not to be found now.
    """
    if vnode not in places:
        raise _Moved(f"the DHT does not say where {vnode} lives")
    for _ in range(REDIRECTS_MAX):
        host, epoch = places[vnode]
        reply = await call(host, epoch)
        if not reply.HasField("refusal"):
            return reply
        refusal = reply.refusal
        there = (refusal.host or host, refusal.epoch)
        if refusal.code == common_pb2.REFUSAL_CODE_BUSY:
            await asyncio.sleep(BUSY_PAUSE_S)
        elif refusal.code in _ELSEWHERE and refusal.epoch >= epoch and there != (host, epoch):
            places[vnode] = told[vnode] = there
        else:
            _check(reply)
    raise _Moved(f"where {vnode} lives changes too fast")


def _check(reply: vnode_pb2.HopReply | vnode_pb2.CollectReply) -> None:
    """Raises for a refusal: for good, or until the VNode is found elsewhere."""
    refusal = reply.refusal
    if refusal.code in (
        common_pb2.REFUSAL_CODE_BAD_REQUEST,
        common_pb2.REFUSAL_CODE_NOT_GRANTED,
    ):
        raise RefusedError(refusal.detail, code=refusal.code)
    raise _Moved(refusal.detail)
