"""A shell: the orchestrator role as gRPC serves it. Any PNode has it.

A node looks after the networks that were submitted to it or that it took over
(`ConductedNetwork`), and watches over those that it only keeps or hosts (`Heir`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping

from google.protobuf.message import DecodeError

from p2pnet.bounded import keep_latest
from p2pnet.dht.manifest import grants, network_id_of, open_manifest
from p2pnet.dht.service import Serves, anything
from p2pnet.errors import P2PNetError, RefusedError
from p2pnet.keys import sha256, short
from p2pnet.log.history import History
from p2pnet.log.shell import Log, open_log
from p2pnet.net.handlers import Caller, Method, bidi, unary
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.conductor import Conductor
from p2pnet.orchestrator.conductor_shell import ConductedNetwork
from p2pnet.orchestrator.heir import Heir
from p2pnet.orchestrator.planner import Planner
from p2pnet.orchestrator.publish import Publisher
from p2pnet.orchestrator.sightings import Sighting, closed_by_owner, of_manifest
from p2pnet.orchestrator.watching import LEASE_S
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, log_pb2, records_pb2
from p2pnet.v1 import orchestrator_pb2 as pb
from p2pnet.vnode.graph import CompiledGraph

logger = logging.getLogger(__name__)

NETWORKS_MAX = 256
FORMER_MAX = 256
LOGS_MAX = 8
SUCCESSORS_ASKED = 4
TRAIN_TIMEOUT_S = 7 * 24 * 3600.0
SETTLE_TIMEOUT_S = 50.0
COMMIT_TIMEOUT_S = 60.0
LEAVE_TIMEOUT_S = 14.0
RESIGN_TIMEOUT_S = 6.0
SUCCEED_TIMEOUT_S = 6.0
CANCEL_TIMEOUT_S = 40.0

UNKNOWN = common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK
BUSY = common_pb2.REFUSAL_CODE_BUSY
NOT_GRANTED = common_pb2.REFUSAL_CODE_NOT_GRANTED

# Every network that this node keeps, hosts, or has seen otherwise.
Sightings = Callable[[], Iterable[Sighting]]


class Orchestrator:
    """Every network that this node looks after. Lives on the gRPC thread."""

    def __init__(
        self,
        swarm: Swarm,
        state_url: str = "",
        *,
        sightings: Sightings = tuple,
        serves: Serves = anything,
    ) -> None:
        self._swarm = swarm
        self._state_url = state_url
        self._serves = serves
        self._networks: dict[str, ConductedNetwork] = {}
        self._logs: dict[str, Log] = {}  # that are or were being read for a takeover
        self._reading: dict[str, None] = {}
        self._former: dict[str, m.Over] = {}
        self._draining = False
        self._tasks = TaskSet("the orchestrator role")
        self._heir = Heir(
            swarm, sightings, holds=self._holds, take_over=self._take_over, state_url=state_url
        )

    def services(self) -> dict[str, Mapping[str, Method]]:
        """What gRPC serves."""
        methods = {
            "Submit": unary(
                self._submit, pb.SubmitRequest, pb.SubmitReply, timeout_s=SETTLE_TIMEOUT_S + 10
            ),
            "Status": unary(self._status, pb.StatusRequest, pb.StatusReply),
            "Resolve": unary(self._resolve, pb.ResolveRequest, pb.ResolveReply),
            "Train": bidi(self._train, pb.TrainCommand, pb.TrainEvent, timeout_s=TRAIN_TIMEOUT_S),
            "Report": unary(self._report, pb.ReportRequest, pb.ReportReply),
            "Commit": unary(self._commit, pb.CommitRequest, pb.CommitReply),
            "Leaving": unary(self._leaving, pb.LeavingRequest, pb.LeavingReply),
            "Lease": unary(self._lease, pb.LeaseRequest, pb.LeaseReply),
            "Succeed": unary(self._succeed, pb.SucceedRequest, pb.SucceedReply),
            "Cancel": unary(self._cancel, pb.CancelRequest, pb.CancelReply),
        }
        return {"Orchestrator": methods}

    def start(self) -> None:
        """Begins to watch over the networks that this node does not look after."""
        self._heir.start()

    async def close(self) -> None:
        """Stops looking after every network."""
        await self._heir.close()
        await self._tasks.close()
        await asyncio.gather(*(log.close() for log in self._logs.values()))
        await asyncio.gather(*(network.stop() for network in list(self._networks.values())))

    async def resign(self) -> list[str]:
        """Hands every network over to the next in rank; returns the names of those left behind."""
        self._draining = True
        networks = list(self._networks.values())
        handed = await asyncio.gather(*(self._hand_over(network) for network in networks))
        return [
            network.core.graph.name
            for network, done in zip(networks, handed, strict=True)
            if not done
        ]

    def names(self) -> list[str]:
        """The networks that this node looks after."""
        return sorted(network.core.graph.name for network in list(self._networks.values()))

    def member_changed(self, peer_id: str, alive: bool, why: str) -> None:
        """What the membership noticed."""
        event = m.MemberCame(peer_id) if alive else m.MemberGone(peer_id, why)
        for network in list(self._networks.values()):
            network.feed(event)
        self._heir.members_changed()

    # Taking networks

    async def _submit(self, request: pb.SubmitRequest, caller: Caller) -> pb.SubmitReply:
        try:
            core = await self._begin(request)
        except P2PNetError as error:
            return pb.SubmitReply(refusal=_refusal(error))
        return pb.SubmitReply(
            network_id=core.network_id, epoch=core.epoch, locations=core.locations()
        )

    async def _begin(self, request: pb.SubmitRequest) -> Conductor:
        manifest = open_manifest(request.manifest)
        network_id = network_id_of(request.manifest)
        network = self._networks.get(network_id)
        if network is None:  # else it is said twice, and gets the same answer
            graph = await asyncio.to_thread(CompiledGraph.from_json, request.graph)
            if sha256(request.graph) != manifest.spec_digest or graph.name != manifest.name:
                raise RefusedError(
                    "the graph is not the one that the manifest names",
                    code=common_pb2.REFUSAL_CODE_BAD_REQUEST,
                )
            network = self._networks.get(network_id)  # it may have come again meanwhile
        if network is None:
            history = History(network_id)
            network = self._conduct(request.manifest, manifest, graph, history, request.states)
            network.feed(m.Begin("submitted"))
        try:
            await asyncio.wait_for(network.settled.wait(), SETTLE_TIMEOUT_S)
        except TimeoutError:
            core = network.core
            raise RefusedError(
                f"{manifest.name} is submitted, but {core.state} for now: {core.detail or 'wait'} "
                f"(`p2pnet status {manifest.name}` tells more)",
                code=common_pb2.REFUSAL_CODE_BUSY,
            ) from None
        if network.over is not None:
            raise RefusedError(network.over.reason, code=network.over.code)
        return network.core

    async def _take_over(
        self, sighting: Sighting, reason: str, handed_by: str = ""
    ) -> ConductedNetwork:
        """Reads the log, checks the grant, and begins to claim, unless somebody has since.

        `handed_by`: who wants to hand it over; the log has to say that it is his.

        Raises:
            P2PNetError: this node may not, cannot, or need not.
        """
        network_id = sighting.network_id
        if (network := self._networks.get(network_id)) is not None:
            return network
        self._may(network_id, sighting.charter)
        history = await self._read(sighting)
        if handed_by and history.orchestrator != handed_by:
            raise RefusedError("another orchestrator has that network", code=UNKNOWN)
        if history.genesis is None:
            raise RefusedError("its log cannot be read from the beginning", code=UNKNOWN)
        graph = await asyncio.to_thread(CompiledGraph.from_json, history.genesis.graph)
        if (network := self._networks.get(network_id)) is not None:
            return network
        network = self._conduct(sighting.manifest, sighting.charter, graph, history, {})
        network.feed(m.Begin(reason, history.epoch if handed_by else sighting.epoch))
        return network

    async def _read(self, sighting: Sighting) -> History:
        """A network's log, read on from where the last try stopped: it may be long.

        The `Log` is kept for whoever goes on, or tries again.

        Raises:
            RefusedError: too many are being read (code BUSY).
            UnreachableError: it cannot be read.
        """
        network_id = sighting.network_id
        if network_id not in self._logs and len(self._logs) >= LOGS_MAX:
            # Of tries that have failed, the oldest makes room.
            idle = next((it for it in self._logs if it not in self._reading), None)
            if idle is None:
                raise RefusedError("this peer reads many logs just now", code=BUSY)
            await self._logs.pop(idle).close()
        log = self._logs.get(network_id)
        if log is None:
            log = open_log(self._swarm, network_id, sighting.manifest, keepers=sighting.keepers)
            self._logs[network_id] = log
        self._reading[network_id] = None
        try:
            return (await log.history()).copy()
        finally:
            self._reading.pop(network_id, None)

    def _may(self, network_id: str, charter: records_pb2.Manifest) -> None:
        """Raises RefusedError where this node is not to orchestrate a network."""
        if self._draining:
            raise RefusedError("this peer is leaving", code=common_pb2.REFUSAL_CODE_DRAINING)
        if len(self._networks) >= NETWORKS_MAX:
            raise RefusedError(f"this orchestrator looks after {NETWORKS_MAX} networks already")
        if not grants(charter, self._swarm.keypair.peer_id):
            raise RefusedError(
                "the network's owner does not let this peer orchestrate it", code=NOT_GRANTED
            )
        if charter.state_url not in ("", self._state_url):
            # Nobody but this machine's user says which of its directories are written.
            raise RefusedError(
                f"this peer was not started with --state {charter.state_url}", code=NOT_GRANTED
            )
        if why := self._serves(network_id, charter.owner):
            raise RefusedError(why, code=common_pb2.REFUSAL_CODE_NOT_IN_SERVICE)

    def _conduct(
        self,
        signed: common_pb2.Signed,
        charter: records_pb2.Manifest,
        graph: CompiledGraph,
        history: History,
        states: Mapping[str, common_pb2.BlobRef],
    ) -> ConductedNetwork:
        network_id = history.network_id
        assert network_id not in self._networks
        self._may(network_id, charter)
        log = self._logs.pop(network_id, None) or open_log(self._swarm, network_id, signed)
        network = ConductedNetwork(
            self._swarm,
            Conductor(self._swarm.keypair, history, signed, graph, states=states),
            log,
            Publisher(self._swarm, network_id, graph.name, signed, charter.state_url, LEASE_S),
            Planner(self._swarm, graph, hosts_max=charter.limits.hosts_max),
            self._over,
        )
        self._networks[network_id] = network
        self._former.pop(network_id, None)
        return network

    def _over(self, network: ConductedNetwork, over: m.Over) -> None:
        core = network.core
        if self._networks.get(core.network_id) is network:
            del self._networks[core.network_id]
            keep_latest(self._former, core.network_id, over, FORMER_MAX)
        self._heir.over(core.history)
        self._tasks.spawn(self._stop_later(network))

    async def _stop_later(self, network: ConductedNetwork) -> None:
        # What it said last (to feeders, to hosts) goes out before it is gone.
        await asyncio.sleep(RESIGN_TIMEOUT_S)
        await network.stop()

    def _holds(self, network_id: str) -> int:
        """The epoch under which this node looks after a network; 0: it does not."""
        network = self._networks.get(network_id)
        return 0 if network is None else max(1, network.core.epoch)

    # Handing networks over

    async def _hand_over(self, network: ConductedNetwork) -> bool:
        core = network.core
        try:
            await network.ask(m.Resign, RESIGN_TIMEOUT_S)
        except (P2PNetError, TimeoutError) as error:
            logger.warning(
                "network %s is left as it is: %s", core.graph.name, error or "no commit in time"
            )
            self._networks.pop(core.network_id, None)
            await network.stop()
        if core.history.closing is not None:
            return True
        request = pb.SucceedRequest(
            network_id=core.network_id,
            epoch=core.history.epoch,
            keepers=core.history.keepers,
            manifest=core.manifest,
        )
        for peer_id in self._heir.successors(core.history)[:SUCCESSORS_ASKED]:
            try:
                reply = await self._swarm.call(
                    peer_id,
                    "Orchestrator/Succeed",
                    request,
                    pb.SucceedReply,
                    timeout_s=SUCCEED_TIMEOUT_S,
                )
            except P2PNetError as error:
                logger.info("peer %s was not asked to succeed: %s", short(peer_id), error)
                continue
            if not reply.HasField("refusal"):
                return True
        return False

    async def _succeed(self, request: pb.SucceedRequest, caller: Caller) -> pb.SucceedReply:
        sighting = of_manifest(
            request.manifest, request.epoch, caller.peer_id, list(request.keepers)[:16]
        )
        if sighting is None or sighting.network_id != request.network_id:
            return pb.SucceedReply(refusal=_bad("the manifest is not that network's"))
        known = self._heir.sighting(request.network_id)
        if known is not None and known.epoch > request.epoch:
            return pb.SucceedReply(refusal=_bad("another orchestrator has that network"))
        try:
            reason = f"orchestrator {short(caller.peer_id)} hands it over"
            network = await self._take_over(sighting, reason, handed_by=caller.peer_id)
            await asyncio.wait_for(network.settled.wait(), SUCCEED_TIMEOUT_S)
        except P2PNetError as error:
            return pb.SucceedReply(refusal=_refusal(error))
        except TimeoutError:
            pass  # it goes on trying
        return pb.SucceedReply(epoch=network.core.epoch)

    async def _lease(self, request: pb.LeaseRequest, caller: Caller) -> pb.LeaseReply:
        network = self._networks.get(request.network_id)
        if network is None:
            return pb.LeaseReply(refusal=self._unknown(request.network_id))
        if not network.core.holds(self._swarm.now()):
            detail = "the network's log takes nothing of this orchestrator"
            return pb.LeaseReply(
                refusal=common_pb2.Refusal(code=common_pb2.REFUSAL_CODE_BUSY, detail=detail)
            )
        return pb.LeaseReply(epoch=network.core.epoch, lease_s=LEASE_S)

    # Asking

    async def _status(self, request: pb.StatusRequest, caller: Caller) -> pb.StatusReply:
        network = self._networks.get(request.network_id)
        if network is None:
            return pb.StatusReply(refusal=self._unknown(request.network_id))
        return network.core.status()

    async def _resolve(self, request: pb.ResolveRequest, caller: Caller) -> pb.ResolveReply:
        network = self._networks.get(request.network_id)
        if network is None:
            return pb.ResolveReply(refusal=self._unknown(request.network_id))
        return pb.ResolveReply(
            locations=[
                location
                for location in network.core.locations()
                if not request.vnodes or location.vnode in request.vnodes
            ]
        )

    async def _report(self, request: pb.ReportRequest, caller: Caller) -> pb.ReportReply:
        network = self._networks.get(request.id.network_id)
        if network is None:
            return pb.ReportReply(refusal=self._unknown(request.id.network_id))
        core = network.core
        if core.placement.get(request.vnode) != caller.peer_id or request.id.epoch < core.epoch:
            # a host that lost the VNode meanwhile, or somebody who never had it
            return pb.ReportReply(
                refusal=common_pb2.Refusal(
                    code=common_pb2.REFUSAL_CODE_STALE_EPOCH,
                    detail="another peer hosts that VNode, or under a newer epoch",
                    epoch=core.epoch,
                )
            )
        network.feed(m.ReportArrived(caller.peer_id, request, request.ByteSize()))
        return pb.ReportReply()

    async def _commit(self, request: pb.CommitRequest, caller: Caller) -> pb.CommitReply:
        network = self._networks.get(request.network_id)
        if network is None:
            return pb.CommitReply(refusal=self._unknown(request.network_id))
        try:
            await network.ask(m.CutAsked, COMMIT_TIMEOUT_S)
        except (P2PNetError, TimeoutError) as error:
            return pb.CommitReply(refusal=_refusal(error))
        return pb.CommitReply(step=network.core.committed_step, states=network.core.states)

    async def _leaving(self, request: pb.LeavingRequest, caller: Caller) -> pb.LeavingReply:
        return pb.LeavingReply(moved=await self.move_away(caller.peer_id))

    async def move_away(self, peer_id: str) -> int:
        """Moves every VNode away from a host that goes; returns how many there were."""
        networks = [network for network in self._networks.values() if network.core.needs(peer_id)]
        return sum(await asyncio.gather(*(self._move_away(it, peer_id) for it in networks)))

    async def _move_away(self, network: ConductedNetwork, peer_id: str) -> int:
        before = sum(1 for host in network.core.placement.values() if host == peer_id)
        try:
            await network.ask(lambda ask: m.HostLeaves(ask, peer_id), LEAVE_TIMEOUT_S)
        except (P2PNetError, TimeoutError) as error:
            logger.warning(
                "network %s: peer %s goes before its VNodes are moved: %s",
                network.core.graph.name, short(peer_id), error or "not in time",
            )  # fmt: skip
            return 0
        return before

    async def _cancel(self, request: pb.CancelRequest, caller: Caller) -> pb.CancelReply:
        network_id = _cancelled(request)
        network = self._networks.get(network_id)
        if network is None:
            return pb.CancelReply(refusal=self._unknown(network_id))
        try:
            await network.ask(
                lambda ask: m.CancelAsked(ask, request.cancellation), CANCEL_TIMEOUT_S
            )
        except (P2PNetError, TimeoutError) as error:
            return pb.CancelReply(refusal=_refusal(error))
        return pb.CancelReply()

    # Training

    async def _train(
        self, commands: AsyncIterator[pb.TrainCommand], caller: Caller
    ) -> AsyncGenerator[pb.TrainEvent, None]:
        first = await anext(commands, None)
        if first is None:
            return
        network_id = first.begin.network_id
        network = self._networks.get(network_id)
        if network is None:
            yield pb.TrainEvent(refused=self._unknown(network_id))
            return
        feeder, events = network.feeder_comes(caller.peer_id)

        async def listen() -> None:
            async for command in commands:
                if command.HasField("end"):
                    network.feed(m.FeederEnds(feeder, command.end.last_step))
                elif command.HasField("failed"):
                    failed = command.failed
                    network.feed(m.FeederFailed(feeder, failed.epoch, failed.host, failed.reason))

        listener = asyncio.ensure_future(listen())
        try:
            while True:
                event = await events.get()
                yield event
                if event.HasField("done") or event.HasField("refused"):
                    return
        finally:
            # Before any await: a client that hangs up cancels this call.
            network.feeder_left(feeder)
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)

    def _unknown(self, network_id: str) -> common_pb2.Refusal:
        """Why a network is not looked after here; `host` is who does, where that is known."""
        over = self._former.get(network_id)
        if over is not None and over.code == common_pb2.REFUSAL_CODE_CLOSED:
            return common_pb2.Refusal(code=common_pb2.REFUSAL_CODE_CLOSED, detail=over.reason)
        known = self._heir.sighting(network_id)
        if known is not None and known.closed:
            detail = closed_by_owner(known.charter.name, known.why)
            return common_pb2.Refusal(code=common_pb2.REFUSAL_CODE_CLOSED, detail=detail)
        me = self._swarm.keypair.peer_id
        elsewhere = known is not None and known.orchestrator != me
        detail = "this peer does not orchestrate that network"
        if over is not None:
            detail += f" any more: {over.reason}"
        return common_pb2.Refusal(
            code=UNKNOWN,
            detail=detail,
            epoch=known.epoch if known is not None and elsewhere else 0,
            host=known.orchestrator if known is not None and elsewhere else "",
        )


def _cancelled(request: pb.CancelRequest) -> str:
    """Which network a cancellation is for; "" for what is none."""
    try:
        return log_pb2.Cancellation.FromString(request.cancellation.payload).network_id
    except DecodeError:
        return ""


def _refusal(error: Exception) -> common_pb2.Refusal:
    code = error.code if isinstance(error, RefusedError) else 0
    return common_pb2.Refusal(
        code=common_pb2.RefusalCode.Name(code or common_pb2.REFUSAL_CODE_FAILED),
        detail=str(error) or "not in time",
    )


def _bad(detail: str) -> common_pb2.Refusal:
    return common_pb2.Refusal(code=common_pb2.REFUSAL_CODE_BAD_REQUEST, detail=detail)
