"""A shell: one network in the hands of this orchestrator, from its first claim on.

Whatever goes wrong (a host gone, a step stuck, a refusal) is dealt with in one
way, which is also how a network begins: look who is there, place, claim the next
epoch, allocate everything under it, start from the last committed cut. Nothing
done under an older epoch can count afterwards, so nothing needs to be undone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from p2pnet.core import Tick
from p2pnet.errors import P2PNetError, RefusedError, RemoteError, UnreachableError, UsageError
from p2pnet.keys import short
from p2pnet.log.shell import NetworkLog
from p2pnet.orchestrator.cuts import Cuts
from p2pnet.orchestrator.hosts import Hosts, by_host
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
from p2pnet.orchestrator.placement import place
from p2pnet.orchestrator.publish import Publisher
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, orchestrator_pb2, pnode_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.network import BATCH_SAMPLES

logger = logging.getLogger(__name__)

LEASE_S = 60
HEARTBEAT_S = 1.0
WAIT_S = 5.0  # for hosts, or for the log's keepers, before looking again
FUTILE_MAX = 3
FIRST_TRIES = 5  # for a network that was never placed
BACKOFF_MAX_S = 2.0
READY_TIMEOUT_S = 30.0
LEAVE_TIMEOUT_S = 12.0
REASON_CHARS_MAX = 200
OUR_ERROR = "an error of this orchestrator: see its log"
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
        self.state = "placing"
        self.detail = ""
        self.epoch = 0
        self.placement: dict[str, str] = {}  # VNode -> peer id
        self.hosts = Hosts(swarm, graph.name)
        self.cuts = Cuts(swarm, log, self.hosts, network_id, graph, states)
        self._swarm = swarm
        self._log = log
        self._state_url = state_url
        self._publisher = Publisher(swarm, network_id, graph.name, manifest, state_url, LEASE_S)
        self._relocations: list[orchestrator_pb2.Relocation] = []
        self._health: dict[str, pnode_pb2.HostedVNode] = {}
        self._steps_decided = 0
        self._futile = 0  # recoveries since the last commit
        self._step_bytes = 0
        self._ledger = self._new_ledger()
        self._troubles: asyncio.Queue[str] = asyncio.Queue(maxsize=64)
        self._noticed_at: float | None = None  # since when something is wrong
        self._ready = asyncio.Event()
        self._changed = asyncio.Event()  # a peer is there that was not
        self._feeder: asyncio.Queue[TrainEvent] | None = None
        self._dirty = False  # steps after the committed one may be under way
        self._last_step: int | None = None  # of the feeder, once it has no more batches
        self._last_cut: asyncio.Task[None] | None = None  # after the last feeder has left
        self._last_decided: orchestrator_pb2.StepDecided | None = None
        self._feeder_peer = ""
        self._tasks = TaskSet(f"network {graph.name}", lambda error: self.trouble(OUR_ERROR))

    # What the service calls

    async def start(self) -> None:
        """Places the network for the first time, then keeps it going in the background.

        Raises:
            UsageError: the swarm is too small for it.
            RemoteError: it could not be claimed or placed.
        """
        await self._placement(probe=False)  # too small a swarm is said before any claim
        await self._establish("submitted")
        if self.cuts.states:  # a submitted model's own weights: into the log before all else
            await self.cuts.make(self.placement, self.epoch, 0)
        self._tasks.spawn(self._keep())
        self._tasks.spawn(self._watch())

    async def stop(self) -> None:
        """Stops everything in the background."""
        await self._tasks.close()
        await self._log.close()

    async def abandon(self) -> None:
        """Stops, takes back what was published, and lets hosts go that have agreed."""
        await self.stop()
        await self._publisher.close()
        self.hosts.lost(list(self.placement.values()), [])
        await self.hosts.release(
            pnode_pb2.DropRequest(network_id=self.network_id, epoch=self.epoch)
        )

    def report(self, request: orchestrator_pb2.ReportRequest, size_bytes: int) -> None:
        """A VNode's report of a step: held gradients, or trouble."""
        step = request.id
        self._step_bytes += size_bytes
        if step.epoch != self.epoch:
            return
        if request.HasField("held"):
            held = request.held
            self._feed_ledger(
                Reported(
                    request.vnode, step.epoch, step.step, held.loss, held.correct, held.samples
                )
            )
            return
        trouble, reason = request.trouble, request.trouble.reason[:REASON_CHARS_MAX]
        if trouble.bad_input:
            self._dirty = True
            self._refuse_feeder(common_pb2.REFUSAL_CODE_BAD_REQUEST, reason)
            return
        if not trouble.host:  # its own failure
            self.hosts.shun(self.placement[request.vnode])
        self.trouble(f"{request.vnode}: {reason}", trouble.host)

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

    def member_came(self, peer_id: str) -> None:
        """A peer is there that was not."""
        self.hosts.came(peer_id)
        self._changed.set()

    async def leaving(self, peer_id: str) -> None:
        """A host is about to go: commits what is decided, then moves its VNodes away.

        Raises:
            TimeoutError: the network is not placed anew in time.
            P2PNetError: what is decided could not be committed.
        """
        if peer_id not in self.placement.values() or self.state == "lost":
            return
        self.hosts.leaves(peer_id)
        async with asyncio.timeout(LEAVE_TIMEOUT_S):
            await self._ready.wait()
            if self._feeder is None and self._undecided_work():  # a feeder replays it
                await self.commit()
            self._ready.clear()
            self.trouble(f"peer {short(peer_id)} is leaving", peer_id)
            await self._ready.wait()

    async def commit(self) -> None:
        """A cut of the present state, where there is none; raises P2PNetError."""
        try:
            await asyncio.wait_for(self._ready.wait(), READY_TIMEOUT_S)
        except TimeoutError:
            raise UnreachableError(
                f"{self.graph.name} is {self.state} for too long: {self.detail}"
            ) from None
        if self._feeder is None and not (self.cuts.committed and not self._undecided_work()):
            await self.cuts.make(self.placement, self.epoch, self._ledger.decided)
        if not self.cuts.committed:
            raise RefusedError(
                f"{self.graph.name} has no cut yet: ask again when it has trained for "
                f"{self.graph.cut_every} steps",
                code=int(common_pb2.REFUSAL_CODE_BUSY),
            )

    async def train(self, peer_id: str) -> asyncio.Queue[TrainEvent]:
        """Takes a feeder; what it is to be told comes out of the queue.

        Raises:
            RefusedError: another feeder is at work.
        """
        if self._feeder is not None and peer_id == self._feeder_peer:
            # It comes back by another way, before we have noticed that it was gone.
            self._refuse_feeder(common_pb2.REFUSAL_CODE_BUSY, "the feeder has come back")
            self.feeder_left(self._feeder)
        if self._feeder is None and self._last_cut is not None:
            await asyncio.wait((self._last_cut,))  # of the feeder before: we go on from there
        if self._feeder is not None:
            raise RefusedError(
                f"{self.graph.name} is being trained by somebody else: wait until that is done",
                code=int(common_pb2.REFUSAL_CODE_BUSY),
            )
        self._feeder = asyncio.Queue()
        self._feeder_peer = peer_id
        self._last_step = None
        if self._dirty:  # half a step of the feeder before may be under way: begin an epoch
            self._ready.clear()
            self.trouble("a new training run begins")
        elif self._ready.is_set():
            self._feeder_may_begin()
        return self._feeder  # else it is told at the end of what is going on

    def end_of_data(self, last_step: int) -> None:
        """The feeder has no more batches after that of `last_step`."""
        self._last_step = last_step
        self._feed_ledger(EndOfData(last_step))

    def feeder_left(self, feeder: asyncio.Queue[TrainEvent]) -> None:
        """A feeder's stream is closed."""
        if feeder is not self._feeder:  # it is here again already
            return
        self._feeder = None
        if self.state == "training":
            self.state = "ready"
        if self._ready.is_set() and self._undecided_work():
            # not in the call of the feeder, which is cancelled if it hangs up first
            self._last_cut = self._tasks.spawn(self._cut_the_rest(self.epoch, self._ledger.decided))

    async def _cut_the_rest(self, epoch: int, step: int) -> None:
        """Keeps what was decided; a half-done step is dropped at the next epoch."""
        try:
            await self.cuts.make(self.placement, epoch, step)
        except P2PNetError as error:
            logger.info("network %s: no cut at the end: %s", self.graph.name, error)

    def locations(self) -> list[pnode_pb2.Location]:
        """Where every VNode lives."""
        return [
            pnode_pb2.Location(vnode=vnode, host=host, epoch=self.epoch)
            for vnode, host in sorted(self.placement.items())
        ]

    def status(self) -> orchestrator_pb2.StatusReply:
        """All that there is to say."""
        return orchestrator_pb2.StatusReply(
            network_id=self.network_id,
            name=self.graph.name,
            state=self.state,
            epoch=self.epoch,
            step=self._ledger.decided,
            committed_step=self.cuts.step,
            orchestrator=self._swarm.keypair.peer_id,
            vnodes=[self._health[v] for v in self.graph.vnodes() if v in self._health],
            locations=self.locations(),
            relocations=self._relocations,
            states=self.cuts.states,
            steps_decided=self._steps_decided,
            step_bytes=self._step_bytes,
            detail=self.detail,
            graph=self.graph.to_json(),
        )

    # Placing and recovering

    async def _keep(self) -> None:
        """Deals with one trouble after the other, for as long as the network is ours."""
        while True:
            reason = await self._troubles.get()
            if self._futile > FUTILE_MAX:  # each try is an entry of the log
                await asyncio.sleep(min(0.1 * 2 ** (self._futile - FUTILE_MAX), WAIT_S))
            self._futile += 1
            try:
                await self._establish(reason)
            except RefusedError as error:  # another orchestrator has it now
                self.state, self.detail = "lost", str(error)
                self._refuse_feeder(common_pb2.REFUSAL_CODE_STALE_EPOCH, str(error))
                logger.error("network %s: %s", self.graph.name, error)
                await self._publisher.close()
                return
            except Exception as error:  # no majority of keepers, say, or an error of ours
                if not isinstance(error, P2PNetError):
                    logger.exception("network %s: %s", self.graph.name, OUR_ERROR)
                self._wait_because(error)
                await self._wait_for_peers()
                self.trouble(reason)

    async def _establish(self, reason: str) -> None:
        """Places everything under a new epoch; returns when all hosts have agreed."""
        noticed_at = self._noticed_at if self._noticed_at is not None else self._swarm.now()
        self._ready.clear()
        self.state = "recovering" if self.placement else "placing"
        self._swarm.emit("recovering", network=self.graph.name, reason=reason, epoch=self.epoch)
        self._tell(TrainEvent(recovering=orchestrator_pb2.Recovering(reason=reason)))
        tries = 0
        while True:
            try:
                placement = await self._placement(probe=True)
            except UsageError as error:
                if not self.placement:
                    raise
                self._wait_because(error)
                await self._wait_for_peers()
                continue
            self.epoch = await self._log.claim(reason)
            if await self._allocate(placement):
                break
            # Some may have agreed, and are not chosen again.
            self.hosts.lost(list(placement.values()), list(self.placement.values()))
            tries += 1
            if not self.placement and tries >= FIRST_TRIES:
                raise UnreachableError("the chosen hosts did not agree to host it; try again")
            await asyncio.sleep(min(0.05 * 2**tries, BACKOFF_MAX_S))
        self._note_relocations(placement, reason, noticed_at)
        self.hosts.lost(list(self.placement.values()), list(placement.values()))
        self.placement = placement
        while not self._troubles.empty():  # of the epochs before; heartbeats see what is left
            self._troubles.get_nowait()
        self._noticed_at = None
        self.state, self.detail = "ready", ""
        self._dirty = False
        self._ledger = self._new_ledger()
        self._swarm.emit("placed", network=self.graph.name, epoch=self.epoch, placement=placement)
        self._ready.set()
        if self._feeder is not None:
            self._feeder_may_begin()

    async def _placement(self, *, probe: bool) -> dict[str, str]:
        present = sorted(set(self.placement.values())) if probe else []
        hosts = await self.hosts.usable(present)
        placed = place(self.graph, hosts, batch_size=BATCH_SAMPLES, current=self.placement)
        return dict(placed.assignments)

    async def _allocate(self, placement: Mapping[str, str]) -> bool:
        """Asks every host to take its VNodes under the present epoch; says so in the DHT."""
        locations = [
            pnode_pb2.Location(vnode=vnode, host=host, epoch=self.epoch)
            for vnode, host in sorted(placement.items())
        ]
        states = self.cuts.states
        requests = {
            host: pnode_pb2.AllocateRequest(
                network_id=self.network_id,
                epoch=self.epoch,
                manifest=self.manifest,
                graph=self.graph.to_json(),
                vnodes=vnodes,
                lease_s=LEASE_S,
                step=self.cuts.step,
                states={vnode: states[vnode] for vnode in vnodes if vnode in states},
                locations=locations,
                state_url=self._state_url,
            )
            for host, vnodes in by_host(placement).items()
        }
        accepted = await self.hosts.allocate(requests)
        if accepted is None:
            return False
        await self._publisher.publish(
            self.epoch, accepted, self.graph.vnodes(), self._log.keepers()
        )
        return True

    def _note_relocations(
        self, placement: Mapping[str, str], reason: str, noticed_at: float
    ) -> None:
        for vnode, host in sorted(placement.items()):
            before = self.placement.get(vnode)
            if before is None or before == host:
                continue
            relocation = orchestrator_pb2.Relocation(
                vnode=vnode,
                from_host=before,
                to_host=host,
                epoch=self.epoch,
                reason=reason,
                seconds=self._swarm.now() - noticed_at,
            )
            self._relocations.append(relocation)
            self._swarm.emit(
                "relocated", vnode=vnode, from_host=before, to_host=host, reason=reason
            )
        del self._relocations[:-RELOCATIONS_KEPT]

    def _wait_because(self, error: Exception) -> None:
        self.state, self.detail = "waiting", str(error)
        logger.warning("network %s waits: %s", self.graph.name, error)

    async def _wait_for_peers(self) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(WAIT_S):
                await self._changed.wait()
        except TimeoutError:
            pass

    # Steps and cuts

    def _new_ledger(self) -> StepLedger:
        return StepLedger(
            vnodes=tuple(self.graph.vnodes()),
            loss=self.graph.loss.id,
            epoch=self.epoch,
            step=self.cuts.step,
            cut_every=self.graph.cut_every,
        )

    def _undecided_work(self) -> bool:
        return self._ledger.decided > self.cuts.step

    def _feeder_may_begin(self) -> None:
        self.state = "training"
        self._dirty = True
        self._ledger = self._new_ledger()
        ready = orchestrator_pb2.TrainReady(
            epoch=self.epoch,
            step=self.cuts.step,
            locations=self.locations(),
            graph=self.graph.to_json(),
        )
        self._tell(TrainEvent(ready=ready))
        decided = self._last_decided
        if decided is not None and decided.step == self.cuts.step:
            # It may have been committed, and the feeder cut off before it heard of it.
            decided.epoch = self.epoch
            self._tell(TrainEvent(decided=decided))
        if self._last_step is not None:
            self._feed_ledger(EndOfData(self._last_step))

    def _feed_ledger(self, event: Event) -> None:
        ledger = self._ledger
        for effect in ledger.handle(event, self._swarm.now()):
            match effect:
                case Decide():
                    self._decided(ledger.epoch, effect)
                case Cut():
                    self._tasks.spawn(self._cut(effect.step, ledger))
                case Finished():
                    self._dirty = False
                    self.state = "ready"
                    done = orchestrator_pb2.TrainDone(step=effect.step, states=self.cuts.states)
                    self._tell(TrainEvent(done=done))
                case Stalled():
                    missing = ", ".join(effect.missing)
                    self.trouble(f"step {effect.step} stands still: nothing from {missing}")

    def _decided(self, epoch: int, effect: Decide) -> None:
        self._steps_decided += 1
        decided = orchestrator_pb2.StepDecided(
            epoch=epoch,
            step=effect.step,
            loss=effect.loss,
            correct=effect.correct,
            samples=effect.samples,
        )
        self._last_decided = decided
        self._tell(TrainEvent(decided=decided))
        self._swarm.emit("decided", network=self.graph.name, step=effect.step, epoch=epoch)

    async def _cut(self, step: int, ledger: StepLedger) -> None:
        try:
            if await self.cuts.make(self.placement, ledger.epoch, step):
                self._swarm.emit("committed", network=self.graph.name, step=step)
        except RemoteError as error:
            if ledger is self._ledger:
                self.trouble(f"the cut at step {step} failed: {error}")
            return
        self._futile = 0
        self._tell(TrainEvent(committed=orchestrator_pb2.Committed(step=step)))
        if ledger is self._ledger:
            self._feed_ledger(Saved(step))

    # Watching

    async def _watch(self) -> None:
        """Heartbeats to every host, and an eye on steps that stand still."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            deadline = self._ledger.deadline()
            if deadline is not None and self._swarm.now() >= deadline:
                self._feed_ledger(Tick())
            if self._ready.is_set():
                hosts = by_host(self.placement)
                drop = pnode_pb2.DropRequest(network_id=self.network_id, epoch=self.epoch - 1)
                await self.hosts.release(drop)
                await asyncio.gather(*(self._heartbeat(host, hosts[host]) for host in hosts))

    async def _heartbeat(self, host: str, vnodes: list[str]) -> None:
        epoch = self.epoch
        request = pnode_pb2.HeartbeatRequest(
            network_id=self.network_id, epoch=epoch, lease_s=LEASE_S
        )
        healthy, wrong, lost = await self.hosts.heartbeat(host, request, vnodes)
        if epoch != self.epoch or not self._ready.is_set():
            return
        for hosted in healthy:
            self._health[hosted.vnode] = hosted
        if lost:
            self.hosts.shun(host)
        if wrong:
            self.trouble(wrong, host)

    # Small things

    def _refuse_feeder(self, code: common_pb2.RefusalCode, detail: str) -> None:
        self._tell(TrainEvent(refused=common_pb2.Refusal(code=code, detail=detail)))

    def _tell(self, event: TrainEvent) -> None:
        if self._feeder is not None:
            self._feeder.put_nowait(event)  # the feeder sends a step at a time, so this is short
