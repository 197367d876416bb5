"""A shell: the orchestrator role as gRPC serves it. Any PNode has it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

from p2pnet.dht.manifest import grants, network_id_of, open_manifest
from p2pnet.errors import P2PNetError, RefusedError
from p2pnet.keys import sha256, short
from p2pnet.log.shell import open_log
from p2pnet.net.handlers import Caller, Method, bidi, unary
from p2pnet.orchestrator.conductor import Conductor
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2
from p2pnet.v1 import orchestrator_pb2 as pb
from p2pnet.vnode.graph import CompiledGraph

logger = logging.getLogger(__name__)

NETWORKS_MAX = 256
TRAIN_TIMEOUT_S = 7 * 24 * 3600.0
_FAILED = int(common_pb2.REFUSAL_CODE_FAILED)


class Orchestrator:
    """Every network that this node looks after. Lives on the gRPC thread."""

    def __init__(self, swarm: Swarm, state_url: str = "") -> None:
        self._swarm = swarm
        self._state_url = state_url
        self._networks: dict[str, Conductor] = {}

    def services(self) -> dict[str, Mapping[str, Method]]:
        """What gRPC serves."""
        methods = {
            "Submit": unary(self._submit, pb.SubmitRequest, pb.SubmitReply),
            "Status": unary(self._status, pb.StatusRequest, pb.StatusReply),
            "Resolve": unary(self._resolve, pb.ResolveRequest, pb.ResolveReply),
            "Train": bidi(self._train, pb.TrainCommand, pb.TrainEvent, timeout_s=TRAIN_TIMEOUT_S),
            "Report": unary(self._report, pb.ReportRequest, pb.ReportReply),
            "Commit": unary(self._commit, pb.CommitRequest, pb.CommitReply),
            "Leaving": unary(self._leaving, pb.LeavingRequest, pb.LeavingReply),
        }
        return {"Orchestrator": methods}

    async def close(self) -> None:
        """Stops looking after every network."""
        await asyncio.gather(*(network.stop() for network in self._networks.values()))

    def names(self) -> list[str]:
        """The networks that this node looks after."""
        return sorted(network.graph.name for network in list(self._networks.values()))

    def member_changed(self, peer_id: str, alive: bool, why: str) -> None:
        """What the membership noticed."""
        for network in list(self._networks.values()):
            if alive:
                network.member_came(peer_id)
            else:
                network.member_gone(peer_id, why)

    async def _submit(self, request: pb.SubmitRequest, caller: Caller) -> pb.SubmitReply:
        try:
            conductor = await self._begin(request)
        except P2PNetError as error:
            return pb.SubmitReply(refusal=_refusal(error))
        return pb.SubmitReply(
            network_id=conductor.network_id,
            epoch=conductor.epoch,
            locations=conductor.locations(),
        )

    async def _begin(self, request: pb.SubmitRequest) -> Conductor:
        manifest = open_manifest(request.manifest)
        network_id = network_id_of(request.manifest)
        if (known := self._networks.get(network_id)) is not None:  # said twice: the same answer
            if not known.placement:
                raise RefusedError(
                    f"{manifest.name} is being placed", code=int(common_pb2.REFUSAL_CODE_BUSY)
                )
            return known
        if len(self._networks) >= NETWORKS_MAX:
            raise RefusedError(f"this orchestrator looks after {NETWORKS_MAX} networks already")
        graph = CompiledGraph.from_json(request.graph)
        if sha256(request.graph) != manifest.spec_digest or graph.name != manifest.name:
            raise RefusedError(
                "the graph is not the one that the manifest names",
                code=common_pb2.REFUSAL_CODE_BAD_REQUEST,
            )
        if not grants(manifest, self._swarm.keypair.peer_id):
            raise RefusedError(
                "the network's owner does not let this peer orchestrate it",
                code=common_pb2.REFUSAL_CODE_NOT_GRANTED,
            )
        log = open_log(self._swarm, network_id, request.manifest, self._state_url)
        conductor = Conductor(
            self._swarm, log, request.manifest, graph, network_id, request.states, self._state_url
        )
        self._networks[network_id] = conductor
        try:
            await conductor.start()
        except BaseException:
            del self._networks[network_id]
            await conductor.abandon()
            raise
        return conductor

    def _find(self, network_id: str) -> Conductor | None:
        return self._networks.get(network_id)

    async def _status(self, request: pb.StatusRequest, caller: Caller) -> pb.StatusReply:
        network = self._find(request.network_id)
        if network is None:
            return pb.StatusReply(refusal=_unknown())
        return network.status()

    async def _resolve(self, request: pb.ResolveRequest, caller: Caller) -> pb.ResolveReply:
        network = self._find(request.network_id)
        if network is None:
            return pb.ResolveReply(refusal=_unknown())
        return pb.ResolveReply(
            locations=[
                location
                for location in network.locations()
                if not request.vnodes or location.vnode in request.vnodes
            ]
        )

    async def _report(self, request: pb.ReportRequest, caller: Caller) -> pb.ReportReply:
        network = self._find(request.id.network_id)
        if network is None:
            return pb.ReportReply(refusal=_unknown())
        if network.placement.get(request.vnode) != caller.peer_id:
            # a host that lost the VNode meanwhile, or somebody who never had it
            return pb.ReportReply(
                refusal=common_pb2.Refusal(
                    code=common_pb2.REFUSAL_CODE_STALE_EPOCH,
                    detail="another peer hosts that VNode",
                    epoch=network.epoch,
                )
            )
        network.report(request, request.ByteSize())
        return pb.ReportReply()

    async def _commit(self, request: pb.CommitRequest, caller: Caller) -> pb.CommitReply:
        network = self._find(request.network_id)
        if network is None:
            return pb.CommitReply(refusal=_unknown())
        try:
            await network.commit()
        except P2PNetError as error:
            return pb.CommitReply(refusal=_refusal(error))
        return pb.CommitReply(step=network.cuts.step, states=network.cuts.states)

    async def _leaving(self, request: pb.LeavingRequest, caller: Caller) -> pb.LeavingReply:
        networks = list(self._networks.values())
        moved = await asyncio.gather(
            *(network.leaving(caller.peer_id) for network in networks), return_exceptions=True
        )
        for network, result in zip(networks, moved, strict=True):
            if isinstance(result, Exception):
                logger.warning(
                    "network %s: peer %s goes before its VNodes are moved: %s",
                    network.graph.name, short(caller.peer_id), result or "not in time",
                )  # fmt: skip
        return pb.LeavingReply()

    async def _train(
        self, commands: AsyncIterator[pb.TrainCommand], caller: Caller
    ) -> AsyncGenerator[pb.TrainEvent, None]:
        first = await anext(commands, None)
        if first is None:
            return
        begin = first.begin
        network = self._find(begin.network_id)
        if network is None:
            yield pb.TrainEvent(refused=_unknown())
            return
        try:
            events = await network.train(caller.peer_id)
        except RefusedError as error:
            yield pb.TrainEvent(refused=_refusal(error))
            return

        async def listen() -> None:
            async for command in commands:
                if command.HasField("end"):
                    network.end_of_data(command.end.last_step)
                elif command.HasField("failed") and command.failed.epoch == network.epoch:
                    network.trouble(command.failed.reason, command.failed.host)

        listener = asyncio.ensure_future(listen())
        try:
            while True:
                event = await events.get()
                yield event
                if event.HasField("done") or event.HasField("refused"):
                    return
        finally:
            # Before any await: a client that hangs up cancels this call.
            network.feeder_left(events)
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)


def _refusal(error: P2PNetError) -> common_pb2.Refusal:
    code = error.code if isinstance(error, RefusedError) and error.code else _FAILED
    return common_pb2.Refusal(code=common_pb2.RefusalCode.Name(code), detail=str(error))


def _unknown() -> common_pb2.Refusal:
    return common_pb2.Refusal(
        code=common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK,
        detail="this peer does not orchestrate that network",
    )
