"""A shell: one network in the hands of this orchestrator, from its first claim on.

Whatever goes wrong (a host gone, a step stuck, a refusal) is dealt with in one
way, which is also how a network begins: look who is there, place, claim the next
epoch, allocate everything under it, start from the last committed cut. Nothing
done under an older epoch can count afterwards, so nothing needs to be undone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from typing import Any

from p2pnet.core import Tick
from p2pnet.errors import P2PNetError, RefusedError, RemoteError, UsageError
from p2pnet.keys import ACCEPTANCE, short, verify
from p2pnet.orchestrator.ledger import (
    Cut,
    Decide,
    EndOfData,
    Event,
    Finished,
    Reported,
    Saved,
    Stalled,
    StepLedger,
)
from p2pnet.orchestrator.network_log import NetworkLog
from p2pnet.orchestrator.placement import HostView, place
from p2pnet.orchestrator.publish import Publisher
from p2pnet.v1 import common_pb2, orchestrator_pb2, pnode_pb2, vnode_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.swarm import Swarm

logger = logging.getLogger(__name__)

LEASE_S = 60
HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 2.0
HEARTBEATS_MISSED_MAX = 2
PROBE_TIMEOUT_S = 1.5
ALLOCATE_TIMEOUT_S = 5.0
SAVE_TIMEOUT_S = 30.0
BLOB_COPIES = 2  # beside the host's own
SHUNNED_S = 15.0  # how long a host that failed us is not placed on
WAIT_FOR_HOSTS_S = 5.0
BATCH_SAMPLES = 256  # what activations are sized for at placement
RELOCATIONS_KEPT = 1000

TrainEvent = orchestrator_pb2.TrainEvent


class Conductor:
    """One network under this node's claim. Lives on the gRPC thread.

    Args:
        states: the states to start from before the first commit; a VNode
            without one is initialised from the graph's seed.
    """

    def __init__(
        self,
        swarm: Swarm,
        log: NetworkLog,
        manifest: common_pb2.Signed,
        graph: CompiledGraph,
        network_id: str,
        states: Mapping[str, common_pb2.BlobRef],
        state_url: str,
    ) -> None:
        self.network_id = network_id
        self.graph = graph
        self.manifest = manifest
        self.states: dict[str, common_pb2.BlobRef] = dict(states)
        self.state = "placing"
        self.detail = ""
        self.epoch = 0
        self.committed_step = 0
        self.placement: dict[str, str] = {}  # VNode -> peer id
        self.relocations: list[orchestrator_pb2.Relocation] = []
        self.steps_decided = 0
        self.step_bytes = 0
        self.health: dict[str, pnode_pb2.HostedVNode] = {}
        self._swarm = swarm
        self._log = log
        self._state_url = state_url
        self._graph_json = graph.to_json()
        self._publisher = Publisher(swarm, network_id, graph.name, manifest, state_url, LEASE_S)
        self._ledger = self._new_ledger()
        self._troubles: asyncio.Queue[str] = asyncio.Queue(maxsize=64)
        self._shunned: dict[str, float] = {}
        self._leaving: list[str] = []
        self._missed: dict[str, int] = {}
        self._ready = asyncio.Event()
        self._changed = asyncio.Event()  # hosts may be there that were not
        self._feeder: asyncio.Queue[TrainEvent] | None = None
        self._dirty = False  # steps after the committed one may be under way
        self._ending = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._noticed_at: float | None = None

    # What the service calls

    async def start(self) -> None:
        """Places the network for the first time, then keeps it going in the background.

        Raises:
            UsageError: the swarm is too small for it.
            P2PNetError: it could not be claimed or placed.
        """
        self._place(await self._hosts(probe=()))  # too small a swarm is said before any claim
        await self._establish("submitted")
        if self.states:  # a submitted model's own weights: into the log before anything else
            await self._save(0, self.epoch)
        self._spawn(self._keep())
        self._spawn(self._heartbeats())

    async def stop(self) -> None:
        """Stops everything in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._log.close()

    def report(self, request: orchestrator_pb2.ReportRequest, size_bytes: int) -> None:
        """A VNode's report of a step: held gradients, or trouble."""
        step = request.id
        self.step_bytes += size_bytes
        if step.epoch != self.epoch:
            return
        if request.HasField("held"):
            held = request.held
            self._feed_ledger(
                Reported(
                    request.vnode, step.epoch, step.step, held.loss, held.correct, held.samples
                )
            )
        elif request.trouble.bad_input:
            self._dirty = True
            self._tell(
                TrainEvent(
                    refused=common_pb2.Refusal(
                        code=common_pb2.REFUSAL_CODE_BAD_REQUEST, detail=request.trouble.reason
                    )
                )
            )
        else:
            self.trouble(f"{request.vnode}: {request.trouble.reason}", request.trouble.host)

    def trouble(self, reason: str, host: str = "") -> None:
        """Something is wrong under the present epoch; `host` is the suspect, if there is one."""
        if self._noticed_at is None:
            self._noticed_at = self._swarm.now()
        if not self._troubles.full():
            self._troubles.put_nowait(reason)
        logger.info("network %s: %s %s", self.graph.name, reason, host and f"({short(host)})")

    def member_gone(self, peer_id: str, why: str) -> None:
        """The membership no longer counts a peer among the living."""
        if peer_id in self.placement.values():
            self.trouble(f"peer {short(peer_id)} {why}", peer_id)

    def member_came(self) -> None:
        """A peer is there that was not."""
        self._changed.set()

    async def leaving(self, peer_id: str) -> None:
        """A host is about to go: saves what is decided, then moves its VNodes away."""
        if peer_id not in self.placement.values():
            return
        self._leaving.append(peer_id)
        if self._feeder is None and self._ready.is_set():
            await self.commit()
        self.trouble(f"peer {short(peer_id)} is leaving", peer_id)
        await self._ready_after(self.epoch)

    async def commit(self) -> None:
        """A cut of the present state, where there is none; raises P2PNetError."""
        await asyncio.wait_for(self._ready.wait(), SAVE_TIMEOUT_S)
        has_all = len(self.states) == len(self.graph.vnodes())
        if self._feeder is None and (self._ledger.decided > self.committed_step or not has_all):
            await self._save(self._ledger.decided, self.epoch)

    async def train(self, begin: orchestrator_pb2.TrainBegin) -> asyncio.Queue[TrainEvent]:
        """Takes a feeder; what it is to be told comes out of the queue.

        Raises:
            RefusedError: another feeder is at work.
        """
        if self._feeder is not None:
            raise RefusedError(
                f"{self.graph.name} is being trained by somebody else: wait until that is done",
                code=common_pb2.REFUSAL_CODE_BUSY,
            )
        self._feeder = asyncio.Queue()
        self._ending = False
        if self._dirty:
            self.trouble("a new training run begins")
            self._ready.clear()
        await self._ready.wait()
        self._dirty = True
        self.state = "training"
        self._ledger = self._new_ledger()
        self._tell(self._ready_event())
        return self._feeder

    def end_of_data(self) -> None:
        """The feeder has no more batches."""
        self._ending = True
        self._feed_ledger(EndOfData())

    async def feeder_left(self) -> None:
        """The feeder's stream is closed."""
        self._feeder = None
        if self.state == "training":
            self.state = "ready"
        step, epoch = self._ledger.decided, self.epoch
        if self._dirty and step > self.committed_step and self._ready.is_set():
            try:  # keep what was decided; a half-done step is dropped at the next epoch
                await self._save(step, epoch)
            except P2PNetError as error:
                logger.info("network %s: cut after the feeder left: %s", self.graph.name, error)

    def status(self) -> orchestrator_pb2.StatusReply:
        """All that there is to say."""
        return orchestrator_pb2.StatusReply(
            network_id=self.network_id,
            name=self.graph.name,
            state=self.state,
            epoch=self.epoch,
            step=self._ledger.decided,
            committed_step=self.committed_step,
            orchestrator=self._swarm.keypair.peer_id,
            vnodes=[self.health[v] for v in self.graph.vnodes() if v in self.health],
            locations=self.locations(),
            relocations=self.relocations,
            states=self.states,
            steps_decided=self.steps_decided,
            step_bytes=self.step_bytes,
            detail=self.detail,
            graph=self._graph_json,
        )

    def locations(self) -> list[pnode_pb2.Location]:
        """Where every VNode lives."""
        return [
            pnode_pb2.Location(vnode=vnode, host=host, epoch=self.epoch)
            for vnode, host in sorted(self.placement.items())
        ]

    # Placing and recovering

    async def _keep(self) -> None:
        while True:
            reason = await self._troubles.get()
            while not self._troubles.empty():
                self._troubles.get_nowait()
            try:
                await self._establish(reason)
            except P2PNetError as error:
                self.state, self.detail = "failed", str(error)
                self._tell(
                    TrainEvent(
                        refused=common_pb2.Refusal(
                            code=common_pb2.REFUSAL_CODE_FAILED, detail=str(error)
                        )
                    )
                )
                logger.error("network %s: %s", self.graph.name, error)
                return

    async def _establish(self, reason: str) -> None:
        """Places everything under a new epoch; returns when all hosts have agreed."""
        started_at = self._noticed_at if self._noticed_at is not None else self._swarm.now()
        self._ready.clear()
        self.state = "recovering" if self.placement else "placing"
        self._swarm.emit("recovering", network=self.graph.name, reason=reason, epoch=self.epoch)
        self._tell(TrainEvent(recovering=orchestrator_pb2.Recovering(reason=reason)))
        attempt = 0
        while True:
            hosts = await self._hosts(probe=sorted(set(self.placement.values())))
            try:
                assignments = self._place(hosts)
            except UsageError as error:
                if not self.placement:
                    raise
                self.state, self.detail = "waiting", str(error)
                await self._wait_for_hosts()
                continue
            self.epoch = await self._log.claim(reason)
            if await self._allocate(assignments):
                break
            attempt += 1
            await asyncio.sleep(min(0.05 * 2**attempt, 2.0))
        self._note_relocations(assignments, reason, started_at)
        self.placement = assignments
        self.detail = ""
        self._missed.clear()
        self._ledger = self._new_ledger()
        self.state = "training" if self._feeder is not None else "ready"
        self._dirty = self._feeder is not None
        while not self._troubles.empty():  # of the epochs before
            self._troubles.get_nowait()
        self._noticed_at = None
        self._ready.set()
        self._swarm.emit(
            "placed", network=self.graph.name, epoch=self.epoch, placement=dict(assignments)
        )
        self._tell(self._ready_event())
        if self._ending:
            self._feed_ledger(EndOfData())

    async def _hosts(self, probe: Sequence[str]) -> list[HostView]:
        """Who can host, by the membership and, for `probe`, by asking them now."""
        answers = await asyncio.gather(*(self._answers(peer_id) for peer_id in probe))
        now = self._swarm.now()
        for peer_id, answered in zip(probe, answers, strict=True):
            if not answered:
                self._shunned[peer_id] = now + SHUNNED_S
        self._shunned = {peer: until for peer, until in self._shunned.items() if until > now}
        return [
            HostView(
                peer_id=member.peer_id,
                cpus=member.cpus,
                memory_free_bytes=member.memory_bytes - member.memory_used_bytes,
                gflops=member.gflops,
                vnodes=member.vnodes,
            )
            for member in self._swarm.members()
            if member.alive
            and member.hosting
            and member.peer_id not in self._shunned
            and member.peer_id not in self._leaving
        ]

    async def _answers(self, peer_id: str) -> bool:
        try:
            await self._swarm.call(
                peer_id,
                "PNode/Describe",
                pnode_pb2.DescribeRequest(),
                pnode_pb2.DescribeReply,
                timeout_s=PROBE_TIMEOUT_S,
            )
        except RemoteError:
            return False
        return True

    def _place(self, hosts: Sequence[HostView]) -> dict[str, str]:
        placement = place(self.graph, hosts, batch_size=BATCH_SAMPLES, current=self.placement)
        return dict(placement.assignments)

    async def _wait_for_hosts(self) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), WAIT_FOR_HOSTS_S)
        except TimeoutError:
            pass

    async def _allocate(self, assignments: Mapping[str, str]) -> bool:
        """Asks every host to take its VNodes under the present epoch."""
        by_host = _by_host(assignments)
        locations = [
            pnode_pb2.Location(vnode=vnode, host=host, epoch=self.epoch)
            for vnode, host in sorted(assignments.items())
        ]

        async def ask(host: str, vnodes: Sequence[str]) -> list[common_pb2.Signed] | None:
            request = pnode_pb2.AllocateRequest(
                network_id=self.network_id,
                epoch=self.epoch,
                manifest=self.manifest,
                graph=self._graph_json,
                vnodes=vnodes,
                lease_s=LEASE_S,
                step=self.committed_step,
                states={v: self.states[v] for v in vnodes if v in self.states},
                locations=locations,
                state_url=self._state_url,
            )
            try:
                reply = await self._swarm.call(
                    host,
                    "PNode/Allocate",
                    request,
                    pnode_pb2.AllocateReply,
                    timeout_s=ALLOCATE_TIMEOUT_S,
                )
                if reply.HasField("refusal"):
                    raise RefusedError(reply.refusal.detail, code=reply.refusal.code)
                if any(verify(ACCEPTANCE, accepted) != host for accepted in reply.acceptances):
                    raise RefusedError("the host signed as somebody else")
            except RemoteError as error:
                logger.info("network %s: %s: %s", self.graph.name, short(host), error)
                self._shunned[host] = self._swarm.now() + SHUNNED_S
                return None
            return list(reply.acceptances)

        answers = await asyncio.gather(*(ask(host, vnodes) for host, vnodes in by_host.items()))
        if any(answer is None for answer in answers):
            return False
        accepted = [acceptance for answer in answers if answer for acceptance in answer]
        await self._publisher.publish(
            self.epoch, accepted, self.graph.vnodes(), self._log.keepers()
        )
        return True

    def _note_relocations(
        self, assignments: Mapping[str, str], reason: str, started_at: float
    ) -> None:
        for vnode, host in sorted(assignments.items()):
            before = self.placement.get(vnode)
            if before not in (None, host):
                relocation = orchestrator_pb2.Relocation(
                    vnode=vnode,
                    from_host=before,
                    to_host=host,
                    epoch=self.epoch,
                    reason=reason,
                    seconds=self._swarm.now() - started_at,
                )
                self.relocations.append(relocation)
                self._swarm.emit(
                    "relocated", vnode=vnode, from_host=before, to_host=host, reason=reason
                )
        del self.relocations[:-RELOCATIONS_KEPT]

    async def _ready_after(self, epoch: int) -> None:
        while not (self._ready.is_set() and self.epoch > epoch):
            await asyncio.sleep(0.05)

    # Steps and cuts

    def _new_ledger(self) -> StepLedger:
        return StepLedger(
            vnodes=tuple(self.graph.vnodes()),
            loss=self.graph.loss.id,
            epoch=self.epoch,
            step=self.committed_step,
            cut_every=self.graph.cut_every,
        )

    def _feed_ledger(self, event: Event) -> None:
        ledger = self._ledger
        for effect in ledger.handle(event, self._swarm.now()):
            if isinstance(effect, Decide):
                self.steps_decided += 1
                self._tell(
                    TrainEvent(
                        decided=orchestrator_pb2.StepDecided(
                            epoch=ledger.epoch,
                            step=effect.step,
                            loss=effect.loss,
                            correct=effect.correct,
                            samples=effect.samples,
                        )
                    )
                )
                self._swarm.emit("decided", network=self.graph.name, step=effect.step)
            elif isinstance(effect, Cut):
                self._spawn(self._cut(effect.step, ledger))
            elif isinstance(effect, Finished):
                self._dirty = False
                self.state = "ready"
                self._tell(
                    TrainEvent(
                        done=orchestrator_pb2.TrainDone(step=effect.step, states=self.states)
                    )
                )
            elif isinstance(effect, Stalled):
                self.trouble(
                    f"step {effect.step} stands still: nothing from {', '.join(effect.missing)}"
                )

    async def _cut(self, step: int, ledger: StepLedger) -> None:
        try:
            await self._save(step, ledger.epoch)
        except P2PNetError as error:
            if ledger is self._ledger:
                self.trouble(f"the cut at step {step} failed: {error}")
            return
        if ledger is self._ledger:
            self._feed_ledger(Saved(step))

    async def _save(self, step: int, epoch: int) -> None:
        """Stores every VNode's state after `step` and commits the cut."""
        spare = [m.peer_id for m in self._swarm.members() if m.alive and m.hosting]

        async def ask(host: str, vnodes: Sequence[str]) -> Mapping[str, common_pb2.BlobRef]:
            others = [p for p in spare if p != host and p not in self._shunned]
            at = sum(host.encode()) % max(1, len(others))
            request = vnode_pb2.SaveRequest(
                network_id=self.network_id,
                epoch=epoch,
                step=step,
                vnodes=vnodes,
                copy_to=(others[at:] + others[:at])[:BLOB_COPIES],
            )
            reply = await self._swarm.call(
                host, "VNode/Save", request, vnode_pb2.SaveReply, timeout_s=SAVE_TIMEOUT_S
            )
            if reply.HasField("refusal"):
                raise RefusedError(reply.refusal.detail, code=reply.refusal.code)
            if sorted(reply.states) != sorted(vnodes):
                raise RefusedError(f"{short(host)} saved other VNodes than it was asked to")
            return reply.states

        by_host = _by_host(self.placement)
        saved = await asyncio.gather(*(ask(host, vnodes) for host, vnodes in by_host.items()))
        if epoch != self.epoch:
            raise RefusedError("a newer epoch has begun meanwhile")
        before = list(self.states.values())
        states = {vnode: ref for states in saved for vnode, ref in states.items()}
        await self._log.commit(epoch, step, states)
        self.committed_step, self.states = step, states
        self._tell(TrainEvent(committed=orchestrator_pb2.Committed(step=step)))
        self._swarm.emit("committed", network=self.graph.name, step=step, epoch=epoch)
        self._spawn(self._retain([*before, *states.values()]))

    async def _retain(self, keep: Sequence[common_pb2.BlobRef]) -> None:
        """Lets holders drop what the last two commits do not name."""
        request = vnode_pb2.RetainRequest(
            network_id=self.network_id, digests=sorted({ref.digest for ref in keep})
        )
        holders = sorted({holder for ref in keep for holder in ref.holders})
        calls: list[Awaitable[object]] = [
            self._swarm.call(
                holder, "Blob/Retain", request, vnode_pb2.RetainReply, timeout_s=PROBE_TIMEOUT_S
            )
            for holder in holders
        ]
        await asyncio.gather(*calls, return_exceptions=True)  # a hint; quotas hold without it

    # Watching

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            deadline = self._ledger.deadline()
            if deadline is not None and self._swarm.now() >= deadline:
                self._feed_ledger(Tick())
            if self._ready.is_set():
                hosts = sorted(_by_host(self.placement).items())
                await asyncio.gather(*(self._heartbeat(h, vnodes) for h, vnodes in hosts))

    async def _heartbeat(self, host: str, vnodes: Sequence[str]) -> None:
        epoch = self.epoch
        request = pnode_pb2.HeartbeatRequest(
            network_id=self.network_id, epoch=epoch, lease_s=LEASE_S
        )
        try:
            reply = await self._swarm.call(
                host,
                "PNode/Heartbeat",
                request,
                pnode_pb2.HeartbeatReply,
                timeout_s=HEARTBEAT_TIMEOUT_S,
            )
        except RemoteError as error:
            self._missed[host] = self._missed.get(host, 0) + 1
            if self._missed[host] >= HEARTBEATS_MISSED_MAX and epoch == self.epoch:
                self.trouble(f"peer {short(host)} misses heartbeats: {error}", host)
            return
        if epoch != self.epoch:
            return
        self._missed[host] = 0
        for hosted in reply.vnodes:
            self.health[hosted.vnode] = hosted
        there = {hosted.vnode for hosted in reply.vnodes if not hosted.error}
        lost = sorted(set(vnodes) - there)
        if reply.HasField("refusal") or lost:
            self.trouble(f"peer {short(host)} no longer runs {', '.join(lost or vnodes)}", host)

    # Small things

    def _ready_event(self) -> TrainEvent:
        return TrainEvent(
            ready=orchestrator_pb2.TrainReady(
                epoch=self.epoch,
                step=self.committed_step,
                locations=self.locations(),
                graph=self._graph_json,
            )
        )

    def _tell(self, event: TrainEvent) -> None:
        if self._feeder is not None:
            self._feeder.put_nowait(event)  # the feeder sends a step at a time, so this is short

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended_task)

    def _ended_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("network %s: a task died", self.graph.name, exc_info=error)
            self.trouble("an error of this orchestrator: see its log")


def _by_host(placement: Mapping[str, str]) -> dict[str, list[str]]:
    by_host: dict[str, list[str]] = {}
    for vnode, host in sorted(placement.items()):
        by_host.setdefault(host, []).append(vnode)
    return by_host
