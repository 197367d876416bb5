"""A shell: drives the conductor of one network; carries its effects out over gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from google.protobuf.message import Message

from p2pnet.core import Tick
from p2pnet.errors import P2PNetError, RefusedError
from p2pnet.keys import short
from p2pnet.log.entry import HOLDERS_MAX
from p2pnet.log.shell import Log
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.conductor import Conductor, Phase
from p2pnet.orchestrator.planner import Planner
from p2pnet.orchestrator.publish import Publisher
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, orchestrator_pb2, pnode_pb2, vnode_pb2

logger = logging.getLogger(__name__)

ALLOCATE_TIMEOUT_S = 5.0
READY_TIMEOUT_S = 30.0
HEARTBEAT_TIMEOUT_S = 2.0
RELEASE_TIMEOUT_S = 1.5
STORE_TIMEOUT_S = 30.0
RETAIN_TIMEOUT_S = 2.0
BLOB_COPIES = 2  # beside the host's own
SMALL_BYTES = 1 << 20  # what a host stores of a cut, if that is less, goes to twice as many
BYTES_A_SECOND = 1_000_000  # what a slow volunteer sends
OUR_ERROR = "an error of this orchestrator: see its log"

ReplyT = TypeVar("ReplyT", bound=Message)

OnOver = Callable[["ConductedNetwork", m.Over], None]


class ConductedNetwork:
    """One network under this node's claim. Lives on the gRPC thread.

    `on_over` is called once, when this node has nothing more to do with it.
    """

    def __init__(
        self,
        swarm: Swarm,
        core: Conductor,
        log: Log,
        publisher: Publisher,
        planner: Planner,
        on_over: OnOver,
    ) -> None:
        self.core = core
        self.settled = asyncio.Event()  # ready for the first time, or over
        self.over: m.Over | None = None
        self._swarm = swarm
        self._log = log
        self._publisher = publisher
        self._planner = planner
        self._on_over = on_over
        self._feeders: dict[int, asyncio.Queue[orchestrator_pb2.TrainEvent]] = {}
        self._asks: dict[int, asyncio.Future[common_pb2.Refusal | None]] = {}
        self._numbers = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self._tasks = TaskSet(f"network {core.graph.name}")

    # What the service calls

    def feed(self, event: m.Event) -> None:
        """Hands the core an event and carries out what comes of it."""
        if self._stopped:
            return
        try:
            for effect in self.core.handle(event, self._swarm.now()):
                self._carry_out(effect)
            if self.core.phase is Phase.READY:
                self.settled.set()
        finally:
            self._set_timer()

    async def ask(self, make: Callable[[int], m.Event], timeout_s: float) -> None:
        """Asks the core for something and waits for its answer.

        Raises:
            RefusedError: the core's refusal.
            TimeoutError: not in time.
        """
        number = self._number()
        answer: asyncio.Future[common_pb2.Refusal | None]
        answer = self._asks[number] = asyncio.get_running_loop().create_future()
        try:
            self.feed(make(number))
            refusal = await asyncio.wait_for(answer, timeout_s)
        finally:
            del self._asks[number]
        if refusal is not None:
            raise RefusedError(refusal.detail, code=refusal.code)

    def feeder_comes(self, peer_id: str) -> tuple[int, asyncio.Queue[orchestrator_pb2.TrainEvent]]:
        """A feeder's stream, by number, and what it is to be told."""
        number = self._number()
        queue: asyncio.Queue[orchestrator_pb2.TrainEvent] = asyncio.Queue()
        self._feeders[number] = queue
        self.feed(m.FeederCame(number, peer_id))
        return number, queue

    def feeder_left(self, number: int) -> None:
        """The stream is closed."""
        del self._feeders[number]
        self.feed(m.FeederLeft(number))

    async def stop(self) -> None:
        """Stops everything in the background; the records run out."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        for answer in self._asks.values():
            answer.cancel()
        await self._tasks.close()
        await self._publisher.close()
        await self._log.close()

    # Effects

    def _carry_out(self, effect: m.Effect) -> None:
        match effect:
            case m.ReadLog():
                self._spawn(self._read(effect), m.LogSilent(OUR_ERROR))
            case m.Append():
                self._spawn(self._append(effect), m.NotAppended(OUR_ERROR))
            case m.MakePlan():
                self._spawn(self._planner.plan(effect), m.Planned(effect.purpose, None, OUR_ERROR))
            case m.MakeReady():
                self._spawn(self._make_ready(effect), m.HostReady(effect.host, OUR_ERROR))
            case m.Allocate():
                epoch = int(effect.request.epoch)
                failed = m.NotAllocated(effect.host, epoch, OUR_ERROR)
                self._spawn(self._allocate(effect), failed)
            case m.Publish():
                publish = self._publisher.publish(
                    effect.epoch, effect.acceptances, self.core.graph.vnodes(), effect.keepers
                )
                self._tasks.spawn(publish)
            case m.Withdraw():
                self._tasks.spawn(self._publisher.close())
            case m.Beat():
                epoch = int(effect.request.epoch)
                self._spawn(self._beat(effect), m.NotBeaten(effect.host, epoch, OUR_ERROR))
            case m.Release():
                self._spawn(self._release(effect), m.Released(effect.host, heard=False))
            case m.Store():
                unstored = m.NotStored(effect.host, effect.epoch, effect.step, OUR_ERROR)
                self._spawn(self._store(effect), unstored)
            case m.Retain():
                self._tasks.spawn(self._retain(effect))
            case m.Tell():
                if (queue := self._feeders.get(effect.feeder)) is not None:
                    queue.put_nowait(effect.event)  # it feeds a step at a time, so this is short
            case m.Answer():
                answer = self._asks.get(effect.ask)
                if answer is not None and not answer.done():
                    answer.set_result(effect.refusal)
            case m.Note():
                self._swarm.emit(effect.event, **effect.fields)
            case m.Over():
                self.over = effect
                self.settled.set()
                logger.warning("network %s: %s", self.core.graph.name, effect.reason)
                self._on_over(self, effect)

    def _spawn(self, job: Coroutine[Any, Any, m.Event], instead: m.Event) -> None:
        """Feeds back what comes of an effect; after an error of ours `instead`."""

        async def run() -> None:
            try:
                event = await job
            except Exception:
                logger.exception("network %s: %s", self.core.graph.name, OUR_ERROR)
                event = instead
            self.feed(event)

        self._tasks.spawn(run())

    async def _read(self, effect: m.ReadLog) -> m.Event:
        try:
            return m.LogRead(tuple(await self._log.read(effect.from_slot)))
        except P2PNetError as error:
            return m.LogSilent(str(error))

    async def _append(self, effect: m.Append) -> m.Event:
        try:
            return m.Appended(await self._log.append(self.core.history, effect.entry))
        except P2PNetError as error:
            return m.NotAppended(str(error))

    async def _make_ready(self, effect: m.MakeReady) -> m.Event:
        try:
            reply = await self._call(
                effect.host, "PNode/Ready", effect.request, pnode_pb2.ReadyReply, READY_TIMEOUT_S
            )
        except P2PNetError as error:
            return m.HostReady(effect.host, str(error))
        busy = reply.refusal.code == common_pb2.REFUSAL_CODE_BUSY
        return m.HostReady(effect.host, reply.refusal.detail, busy)

    async def _allocate(self, effect: m.Allocate) -> m.Event:
        host, epoch = effect.host, int(effect.request.epoch)
        try:
            reply = await self._call(
                host, "PNode/Allocate", effect.request, pnode_pb2.AllocateReply, ALLOCATE_TIMEOUT_S
            )
        except P2PNetError as error:
            return m.NotAllocated(host, epoch, str(error))
        if reply.HasField("refusal"):
            return m.NotAllocated(host, epoch, reply.refusal.detail, reply.refusal.code)
        return m.Allocated(host, epoch, tuple(reply.acceptances))

    async def _beat(self, effect: m.Beat) -> m.Event:
        host, epoch = effect.host, int(effect.request.epoch)
        try:
            reply = await self._call(
                host,
                "PNode/Heartbeat",
                effect.request,
                pnode_pb2.HeartbeatReply,
                HEARTBEAT_TIMEOUT_S,
            )
        except P2PNetError as error:
            return m.NotBeaten(host, epoch, str(error))
        refusal = reply.refusal if reply.HasField("refusal") else None
        return m.Beaten(host, epoch, tuple(reply.vnodes), refusal)

    async def _release(self, effect: m.Release) -> m.Event:
        request = pnode_pb2.DropRequest(network_id=self.core.network_id, epoch=effect.epoch)
        try:
            await self._call(
                effect.host, "PNode/Drop", request, pnode_pb2.DropReply, RELEASE_TIMEOUT_S
            )
        except P2PNetError as error:  # its lease ends without us, too
            logger.info("peer %s was not told to let go: %s", short(effect.host), error)
            return m.Released(effect.host, heard=False)
        return m.Released(effect.host, heard=True)

    async def _store(self, effect: m.Store) -> m.Event:
        sizes = [self.core.graph.node(vnode).state_bytes for vnode in effect.vnodes]
        copies = BLOB_COPIES if sum(sizes) > SMALL_BYTES else 2 * BLOB_COPIES
        request = vnode_pb2.SaveRequest(
            network_id=self.core.network_id,
            epoch=effect.epoch,
            step=effect.step,
            vnodes=effect.vnodes,
            copy_to=self._copy_to(effect, copies),
            norms=effect.norms,
        )
        timeout_s = STORE_TIMEOUT_S + sum(sizes) * (1 + copies) / BYTES_A_SECOND
        host, epoch, step = effect.host, effect.epoch, effect.step
        try:
            reply = await self._call(host, "VNode/Save", request, vnode_pb2.SaveReply, timeout_s)
        except P2PNetError as error:
            return m.NotStored(host, epoch, step, str(error))
        if reply.HasField("refusal"):
            return m.NotStored(host, epoch, step, reply.refusal.detail, reply.refusal.code)
        return m.Stored(host, epoch, step, dict(reply.states))

    def _copy_to(self, effect: m.Store, copies: int) -> Sequence[str]:
        """Who gets copies of a host's states: not the same for all hosts."""
        others = [
            member.peer_id
            for member in self._swarm.members()
            if member.alive
            and member.hosting
            and member.peer_id not in (effect.host, *effect.avoid)
        ]
        at = sum(effect.host.encode()) % max(1, len(others))
        turned = others[at:] + others[:at]
        first = dict.fromkeys(effect.first)
        wanted = min(max(copies, len(first)), HOLDERS_MAX - 1)
        return sorted(turned, key=lambda peer: peer not in first)[:wanted]

    async def _retain(self, effect: m.Retain) -> None:
        request = vnode_pb2.RetainRequest(
            network_id=self.core.network_id, digests=list(effect.digests), claim=effect.claim
        )
        calls = [
            self._call(holder, "Blob/Retain", request, vnode_pb2.RetainReply, RETAIN_TIMEOUT_S)
            for holder in effect.holders
        ]
        await asyncio.gather(*calls, return_exceptions=True)  # a hint; quotas hold without it

    async def _call(
        self, peer: str, method: str, request: Message, reply: type[ReplyT], timeout_s: float
    ) -> ReplyT:
        return await self._swarm.call(peer, method, request, reply, timeout_s=timeout_s)

    # Small things

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.core.deadline()
        if due is not None and not self._stopped:
            wait_s = max(0.001, due - self._swarm.now())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.feed, Tick())
