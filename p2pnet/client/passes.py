"""A shell: one forward pass, from a client to the hosts of a network and back.

A host that has a VNode no longer says where it went, and under which epoch, and the
pass goes there. What fails otherwise is for the caller to try again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass

from p2pnet.client.session import NetworkInfo, Session
from p2pnet.errors import MalformedError, NotFoundError, RefusedError, UnreachableError
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array, Buffer, decode, dtype_name, encode

HOP_TIMEOUT_S = 5.0
OUTPUT_TIMEOUT_S = 15.0
REDIRECTS_MAX = 4
BUSY_PAUSE_S = 0.05

_ELSEWHERE = (
    common_pb2.REFUSAL_CODE_STALE_EPOCH,
    common_pb2.REFUSAL_CODE_NOT_HOSTED,
    common_pb2.REFUSAL_CODE_LEASE_EXPIRED,
)
_FOR_GOOD = (
    common_pb2.REFUSAL_CODE_BAD_REQUEST,
    common_pb2.REFUSAL_CODE_NOT_GRANTED,
    common_pb2.REFUSAL_CODE_TOO_LARGE,
    common_pb2.REFUSAL_CODE_CLOSED,
)
REQUEST_ID_BYTES = 16
STANDBY = "standby"  # a row's role in `whereis`

Place = tuple[str, int]  # a host's peer id, and the epoch under which it has the VNode
Answer = tuple[vnode_pb2.HopReply, memoryview | None]


class Astray(Exception):
    """The pass did not come through; another try may. `vnode` and `host`: where, if known."""

    def __init__(self, reason: str, vnode: str = "", host: str = "") -> None:
        super().__init__(reason)
        self.vnode = vnode
        self.host = host


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a sequence that is fed token by token: which, and where it begins.

    The last byte of `session` decides which replicas it goes through.
    """

    session: bytes
    position: int


@dataclass(frozen=True, slots=True)
class _Way:
    """Where one pass goes: `replica` 0 through the VNodes, r through their r-th standbys."""

    replica: int
    places: dict[str, Place]  # by VNode

    def host(self, vnode: str) -> str:
        return self.places.get(vnode, ("", 0))[0]


class Passes:
    """Forward passes of one client through one network. Lives on an asyncio loop.

    Keep it for as long as the network is asked anything: it remembers where VNodes live.
    """

    def __init__(self, session: Session, network: NetworkInfo, graph: CompiledGraph) -> None:
        self.graph = graph
        self._session = session
        self._network = network
        self._ways: list[dict[str, Place]] = []  # by replica; empty: to be asked
        self._told: dict[str, Place] = {}  # by hosts, who may know newer ones than the DHT
        self._turn = os.urandom(1)[0]  # whose it is, of the replicas
        self._edges = tuple(
            (name, node, slot)
            for name in graph.inputs
            for node, slot in graph.consumers(name)
            if not graph.takes_target(node)
        )

    async def once(self, inputs: Mapping[str, Array], part: Part | None = None) -> Array:
        """The network's output, samples first.

        Where all VNodes have standbys, passes take turns between them; the parts of a
        sequence stay where the first one went.

        Raises:
            Astray: it has not come; where VNodes live is asked anew for the next try.
            RefusedError: a host says that these inputs can never be right.
            UsageError: the local node is gone.
        """
        try:
            ways = await self._located()
            self._turn += part is None
            replica = (self._turn if part is None else part.session[-1]) % len(ways)
            return await self._once(inputs, part, _Way(replica, dict(ways[replica])))
        except (Astray, MalformedError, NotFoundError, UnreachableError) as error:
            self._ways = []
            if isinstance(error, Astray):
                raise
            raise Astray(str(error)) from None

    async def _located(self) -> list[dict[str, Place]]:
        if self._ways:
            return self._ways
        rows = await self._session.where_is(self._network)
        places: dict[str, Place] = {}
        standbys: dict[str, list[Place]] = {}
        for row in rows:
            if row.role == STANDBY:
                standbys.setdefault(row.vnode, []).append((row.peer_id, row.epoch))
            else:
                places[row.vnode] = (row.peer_id, row.epoch)
        for vnode, told in self._told.items():
            if vnode not in places or places[vnode][1] < told[1]:
                places[vnode] = told
        self._told = {}  # believed once: whoever is wrong again has to say so again
        others = min((len(standbys.get(vnode, ())) for vnode in places), default=0)
        self._ways = [places]
        self._ways += [{vnode: standbys[vnode][r] for vnode in places} for r in range(others)]
        return self._ways

    async def _once(self, inputs: Mapping[str, Array], part: Part | None, way: _Way) -> Array:
        graph = self.graph
        request_id = os.urandom(REQUEST_ID_BYTES)
        sent = {name: encode(array) for name, array in inputs.items()}
        outlet = graph.home(graph.output)
        answering = next(  # an input of the very host that makes the output
            (edge for edge in self._edges if way.host(graph.home(edge[1])) == way.host(outlet)),
            None,
        )

        async def feed(name: str, node: str, slot: int) -> Answer:
            head, payload = sent[name]
            answers = (name, node, slot) == answering
            request = vnode_pb2.ForwardRequest(
                network_id=self._network.network_id,
                request_id=request_id,
                vnode=node,
                source=name,
                slot=slot,
                tensor=head,
                session=part.session if part is not None else b"",
                position=part.position if part is not None else 0,
                collect=answers,
                replica=way.replica,
            )
            timeout_s = OUTPUT_TIMEOUT_S if answers else HOP_TIMEOUT_S
            return await self._reach(way, graph.home(node), request, payload, timeout_s)

        async def collect() -> Answer:
            request = vnode_pb2.CollectRequest(
                network_id=self._network.network_id,
                request_id=request_id,
                vnode=graph.output,
                replica=way.replica,
            )
            return await self._reach(way, outlet, request, None, OUTPUT_TIMEOUT_S)

        asked = [feed(*edge) for edge in self._edges]
        if answering is None:
            asked.append(collect())
        answers = await _all(asked)
        outputs = [answer for answer in answers if answer[0].HasField("tensor")]
        if not outputs:  # the host that was to answer does not make the output any more
            outputs = [await collect()]
        return self._checked(outputs[0], inputs)

    def _checked(self, answer: Answer, inputs: Mapping[str, Array]) -> Array:
        """The output, if it is one: a host may answer anything."""
        reply, payload = answer
        name, array = next(iter(inputs.items()))
        spec = self.graph.tensor(self.graph.output)
        shape = spec.shape
        if array.shape[1:] != self.graph.tensor(name).shape:  # a part of a sequence
            shape = (array.shape[1], *shape[1:])
        said = (tuple(reply.tensor.shape), dtype_name(reply.tensor))
        if said != ((len(array), *shape), spec.dtype):
            raise Astray("a host answers with something that is no output", self.graph.output)
        return decode(reply.tensor, payload, bytes_max=len(array) * spec.size_bytes)

    async def _reach(
        self,
        way: _Way,
        vnode: str,
        request: vnode_pb2.ForwardRequest | vnode_pb2.CollectRequest,
        payload: Buffer | None,
        timeout_s: float,
    ) -> Answer:
        """The answer of a VNode's host, wherever that turns out to be."""
        if vnode not in way.places:
            raise Astray(f"the DHT does not say where {vnode} lives", vnode)
        for _ in range(REDIRECTS_MAX):
            host, request.epoch = way.places[vnode]
            try:
                answer = await self._session.hop(host, request, payload, timeout_s=timeout_s)
            except UnreachableError as error:
                raise Astray(str(error), vnode, host) from None
            if not answer[0].HasField("refusal"):
                return answer
            refusal = answer[0].refusal
            there = (refusal.host or host, refusal.epoch)
            moved = refusal.code in _ELSEWHERE and refusal.epoch >= request.epoch
            if refusal.code == common_pb2.REFUSAL_CODE_BUSY:
                await asyncio.sleep(BUSY_PAUSE_S)
            elif moved and there != (host, request.epoch) and not way.replica:
                way.places[vnode] = self._told[vnode] = there
            elif refusal.code in _FOR_GOOD:
                raise RefusedError(refusal.detail, code=refusal.code, host=host)
            else:
                raise Astray(refusal.detail, vnode, host)
        raise Astray(f"where {vnode} lives changes too fast", vnode)


async def _all(asked: Sequence[Coroutine[None, None, Answer]]) -> list[Answer]:
    """All answers, or the first error; nothing is left running."""
    if len(asked) == 1:
        return [await asked[0]]
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
