"""A shell: one training run, as the process that feeds the batches sees it (DESIGN D11).

Batches go to the VNodes; step numbers and results come from the orchestrator. A
batch is kept until a commit covers its step, so that after a failure the steps
since can be done again; whoever asked for a step waits a little longer and
notices nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import numpy as np

from p2pnet.client.session import NetworkInfo, Session
from p2pnet.errors import (
    LocalError,
    NotFoundError,
    P2PNetError,
    RefusedError,
    RemoteError,
    UnreachableError,
    UsageError,
)
from p2pnet.net.channel import Stream
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.v1 import orchestrator_pb2 as pb
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.network import BATCH_SAMPLES
from p2pnet.vnode.tensors import Array, digest_of, encode

logger = logging.getLogger(__name__)

FEED_TIMEOUT_S = 5.0
STREAM_TIMEOUT_S = 7 * 24 * 3600.0
RECOVERIES_QUIET = 3  # between two commits; more are worth a word
STALL_S = 20.0  # without a word after a batch went out: ask the orchestrator to look
ORCHESTRATOR_GONE_S = 120.0
RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class StepResult:
    """A decided step. The loss is the mean over `samples`; `correct` counts classifications."""

    step: int
    loss: float
    correct: int
    samples: int


class TrainingRun:
    """Feeds batches to a network, one step at a time.

    Raises from every method: UsageError for a batch that cannot be right,
    RemoteError when the orchestrator is gone for too long or gives up.
    """

    def __init__(self, session: Session, network: NetworkInfo) -> None:
        self.recoveries: list[str] = []  # why, each time
        self._session = session
        self._network = network
        self._graph: CompiledGraph | None = None
        self._held: dict[int, tuple[dict[str, Array], Array]] = {}
        self._results: dict[int, asyncio.Future[StepResult]] = {}
        self._locations: dict[str, str] = {}
        self._epoch = 0
        self._decided = 0  # of this epoch
        self._last = 0  # the newest step that was asked for
        self._ready = asyncio.Event()
        self._heard_at = 0.0  # of the orchestrator
        self._ending = False
        self._done: asyncio.Future[pb.TrainDone] = asyncio.get_running_loop().create_future()
        self._commands: asyncio.Queue[pb.TrainCommand] = asyncio.Queue()
        self._feeding: asyncio.Task[None] | None = None
        self._fed_at = 0.0  # when the last batch went out
        self._again = 0  # recoveries since the last commit
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._main = asyncio.ensure_future(self._run())

    async def start(self) -> CompiledGraph:
        """Waits until the network is ready to be trained; returns its graph."""
        await self._or_failure(self._started)
        assert self._graph is not None
        return self._graph

    async def step(self, inputs: dict[str, Array], target: Array) -> StepResult:
        """One training step; returns when it is decided."""
        graph = await self.start()
        inputs = {name: fitted(graph, name, array) for name, array in inputs.items()}
        target = fitted(graph, TARGET, target)
        missing = [name for name in graph.inputs if name not in inputs]
        if missing:
            raise UsageError(f"network {graph.name} also needs the input {missing[0]!r}")
        sizes = sorted({len(target), *(len(array) for array in inputs.values())})
        if len(sizes) != 1 or not sizes[0]:
            raise UsageError(f"a batch needs as many inputs as targets, and at least one: {sizes}")
        if sizes[0] > BATCH_SAMPLES:
            raise UsageError(
                f"a batch has at most {BATCH_SAMPLES} samples, which is what hosts lend memory "
                f"for, and this one has {sizes[0]}"
            )
        self._last += 1
        step = self._last
        self._held[step] = (inputs, target)
        result: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        self._results[step] = result
        self._feed_next()
        try:
            await self._or_failure(result)
        finally:
            self._results.pop(step, None)
        return result.result()

    async def finish(self) -> pb.TrainDone:
        """Commits what was trained and ends the run."""
        await self.start()
        self._ending = True
        self._say_end()
        await self._or_failure(self._done)
        await self.close()
        return self._done.result()

    async def close(self) -> None:
        """Ends the run as it is; what was decided is still committed by the orchestrator."""
        tasks = [task for task in (self._main, self._feeding) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _or_failure(self, future: asyncio.Future[StepResult] | asyncio.Future[None]
                          | asyncio.Future[pb.TrainDone]) -> None:  # fmt: skip
        waits = (future, self._main, self._failed)
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            if self._failed.done():
                self._failed.result()
            if self._main.cancelled():
                raise LocalError("the training run was closed")
            self._main.result()
            raise UnreachableError("the orchestrator ended the run")

    # The stream to the orchestrator

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        told_at = -1.0
        while not self._done.done():
            try:
                await self._talk()
            except (UnreachableError, NotFoundError) as error:
                self._ready.clear()
                if loop.time() > self._heard_at + ORCHESTRATOR_GONE_S:
                    raise UnreachableError(
                        f"the orchestrator of {self._network.name} is gone, and no other has "
                        f"taken its place: {error}"
                    ) from error
                if told_at < self._heard_at:
                    told_at = loop.time()
                    logger.warning(
                        "the orchestrator is out of reach; trying for up to %d s: %s",
                        ORCHESTRATOR_GONE_S,
                        error,
                    )
                await asyncio.sleep(RETRY_S)
                await self._find_orchestrator()

    async def _find_orchestrator(self) -> None:
        try:
            self._network = await self._session.find(self._network.network_id)
        except P2PNetError as error:
            logger.info("no orchestrator found: %s", error)

    async def _talk(self) -> None:
        begin = pb.TrainBegin(
            network_id=self._network.network_id, first_step_held=min(self._held, default=0)
        )
        opened = await self._session.stream(
            self._network.orchestrator, "Orchestrator/Train", pb.TrainEvent, STREAM_TIMEOUT_S
        )
        async with opened as stream:
            await stream.write(pb.TrainCommand(begin=begin))

            async def send() -> None:
                while True:
                    await stream.write(await self._commands.get())

            if self._ending:
                self._say_end()  # to an orchestrator that has not heard it
            sender = asyncio.ensure_future(send())
            try:
                while (event := await self._next(stream)) is not None:
                    self._take(event)
                    if self._done.done():
                        return
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
        raise UnreachableError("the orchestrator closed the stream")

    async def _next(self, stream: Stream[pb.TrainEvent]) -> pb.TrainEvent | None:
        """The next event; while a step is out and nothing comes, the orchestrator is nudged."""
        loop = asyncio.get_running_loop()
        reading = asyncio.ensure_future(stream.read())
        try:
            while not reading.done():
                waiting = self._ready.is_set() and self._decided < self._last
                left_s = self._fed_at + STALL_S - loop.time() if waiting else STALL_S
                if left_s <= 0:
                    self._complain("", f"nothing was decided for {STALL_S:g} s")
                    self._fed_at = loop.time()
                    continue
                await asyncio.wait({reading}, timeout=left_s)
            return reading.result()
        finally:
            reading.cancel()

    def _take(self, event: pb.TrainEvent) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        what = event.WhichOneof("what")
        if what == "ready":
            self._resume(event.ready)
        elif what == "decided" and event.decided.epoch == self._epoch:
            decided = event.decided
            self._decided = decided.step
            result = self._results.get(decided.step)
            if result is not None and not result.done():
                result.set_result(
                    StepResult(decided.step, decided.loss, decided.correct, decided.samples)
                )
            self._feed_next()
        elif what == "committed":
            self._again = 0
            for step in [step for step in self._held if step <= event.committed.step]:
                del self._held[step]
        elif what == "recovering":
            self._ready.clear()
            self.recoveries.append(event.recovering.reason)
            self._again += 1
            if self._again > RECOVERIES_QUIET:
                logger.warning(
                    "network %s gets no further than its last commit: %s",
                    self._network.name,
                    event.recovering.reason,
                )
        elif what == "refused":
            refusal = event.refused
            if refusal.code == common_pb2.REFUSAL_CODE_BAD_REQUEST:
                raise UsageError(f"network {self._network.name}: {refusal.detail}")
            raise RefusedError(refusal.detail, code=refusal.code)
        elif what == "done":
            self._done.set_result(event.done)

    def _resume(self, ready: pb.TrainReady) -> None:
        """A new epoch, from the cut at `ready.step`: what came after is done again."""
        if self._graph is None:
            self._graph = CompiledGraph.from_json(ready.graph)
            self._last = ready.step
            self._started.set_result(None)
        lost = next((s for s in range(ready.step + 1, self._last + 1) if s not in self._held), 0)
        if lost:
            raise RefusedError(
                f"the network went back to step {ready.step}, and batch {lost} is not kept any more"
            )
        self._epoch, self._decided = ready.epoch, ready.step
        self._locations = {location.vnode: location.host for location in ready.locations}
        self._ready.set()
        self._feed_next()

    # Feeding

    def _feed_next(self) -> None:
        step = self._decided + 1
        if not self._ready.is_set() or step > self._last:
            return
        if self._feeding is not None:
            self._feeding.cancel()  # of an epoch that is over, or done
        self._fed_at = asyncio.get_running_loop().time()
        self._feeding = asyncio.ensure_future(self._feed(self._epoch, step))

    async def _feed(self, epoch: int, step: int) -> None:
        assert self._graph is not None
        inputs, target = self._held[step]
        hops = [
            self._hop(epoch, step, vnode, name, slot, array)
            for name, array in (*inputs.items(), (TARGET, target))
            for vnode, slot in self._graph.consumers(name)
        ]
        try:
            await asyncio.gather(*hops)
        except P2PNetError as error:  # not of a peer: a bad batch, or our own node is gone
            if not self._failed.done():
                self._failed.set_exception(error)

    async def _hop(
        self, epoch: int, step: int, vnode: str, name: str, slot: int, array: Array
    ) -> None:
        host = self._locations[vnode]
        request = vnode_pb2.TrainRequest(
            id=vnode_pb2.StepId(network_id=self._network.network_id, epoch=epoch, step=step),
            vnode=vnode,
            direction=vnode_pb2.DIRECTION_FORWARD,
            source=name,
            slot=slot,
            tensor=encode(array),
            decided_step=step - 1,
            tensor_digest=digest_of(array),
        )
        try:
            reply = await self._session.call(
                host, "VNode/Train", request, vnode_pb2.HopReply, timeout_s=FEED_TIMEOUT_S
            )
        except RemoteError as error:
            self._complain(host, f"{vnode} cannot be fed: {error}")
            return
        if reply.refusal.code == common_pb2.REFUSAL_CODE_BAD_REQUEST:
            # whoever hosts it next would say the same
            raise UsageError(f"network {self._network.name}: {reply.refusal.detail}")
        if reply.HasField("refusal"):
            self._complain(host, f"{vnode} refuses a batch: {reply.refusal.detail}")

    def _say_end(self) -> None:
        self._commands.put_nowait(pb.TrainCommand(end=pb.TrainEnd(last_step=self._last)))

    def _complain(self, host: str, reason: str) -> None:
        failed = pb.TrainFailed(epoch=self._epoch, step=self._decided + 1, host=host, reason=reason)
        self._commands.put_nowait(pb.TrainCommand(failed=failed))


def fitted(graph: CompiledGraph, name: str, array: Array) -> Array:
    """A batch as the graph wants it: dtype, and shape without the first dimension.

    Raises:
        UsageError: says what was expected.
    """
    if name != TARGET and name not in graph.inputs:
        raise UsageError(f"network {graph.name} has no input {name!r}: {', '.join(graph.inputs)}")
    spec = graph.tensor(name)
    array = np.asarray(array)
    if np.dtype(spec.dtype).kind != array.dtype.kind or array.ndim == 0:
        raise UsageError(
            f"{name} has to be {spec.dtype}, samples first, and is {array.dtype.name}"
            f"{list(array.shape)}"
        )
    if array.shape[1:] != spec.shape:
        raise UsageError(
            f"{name} has to be {list(spec.shape)} a sample, and is {list(array.shape[1:])}"
        )
    return np.ascontiguousarray(array, dtype=spec.dtype)
