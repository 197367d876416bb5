"""A shell: one training run, as the process that feeds the batches lives it (DESIGN D11).

`p2pnet.client.feed` decides; here are the stream to the orchestrator, the search for another
one, and those who wait for results. `p2pnet.client.feeding` sends the batches.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from p2pnet.client.batches import checked
from p2pnet.client.events import (
    Batch,
    BatchGiven,
    CloseStream,
    Deliver,
    Effect,
    Event,
    FeedStep,
    FindOrchestrator,
    Finished,
    GiveUp,
    NoMore,
    NotFound,
    OpenStream,
    OrchestratorFound,
    Pace,
    Recovery,
    Say,
    Send,
    Started,
    StepResult,
    StreamEnded,
    StreamOpened,
    TellDecided,
    Told,
)
from p2pnet.client.feed import Feed
from p2pnet.client.feeding import Feeding
from p2pnet.client.session import NetworkInfo, Session
from p2pnet.core import Tick
from p2pnet.errors import (
    LocalError,
    NotFoundError,
    P2PNetError,
    RefusedError,
    RemoteError,
    UsageError,
)
from p2pnet.v1 import orchestrator_pb2 as pb
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array

__all__ = ["StepResult", "TrainingRun"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

STREAM_TIMEOUT_S = 7 * 24 * 3600.0


class TrainingRun:
    """Feeds batches to a network, as many steps at a time as it can use.

    Made inside a running loop.

    Args:
        on_notice: told what the person who waits should know; by default it is logged.

    Raises from every method: UsageError for a batch that cannot be right and for a
    network that its owner has closed, RemoteError when no orchestrator is found for
    too long or the network gives up.
    """

    def __init__(
        self,
        session: Session,
        network: NetworkInfo,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.recoveries: list[str] = []  # why, each time
        self._session = session
        self._network = network
        self._on_notice = on_notice or logger.warning
        self._feed = Feed(network.network_id, network.name)
        self._graph: CompiledGraph | None = None
        self._results: dict[int, asyncio.Future[StepResult]] = {}
        self._asked = 0  # the newest step that somebody waits for
        self._turn = asyncio.Lock()  # batches are given in the order in which they are asked for
        self._room = asyncio.Event()
        self._started: asyncio.Future[None] = loop.create_future()
        self._over: asyncio.Future[pb.TrainDone] = loop.create_future()
        self._commands: asyncio.Queue[pb.TrainCommand] = asyncio.Queue()
        self._talking: asyncio.Task[None] | None = None
        self._feeding: Feeding | None = None
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._timer: asyncio.TimerHandle | None = None
        newest = session.newest(network)
        self._take(OrchestratorFound(newest.orchestrator, newest.epoch))

    async def start(self) -> CompiledGraph:
        """Waits until the network is ready to be trained; returns its graph."""
        if not self._started.done():
            await self._or_over(self._started)
        assert self._graph is not None
        return self._graph

    async def step(self, inputs: dict[str, Array], target: Array) -> StepResult:
        """One training step; returns when it is decided."""
        return await (await self.give(inputs, target))

    async def give(self, inputs: dict[str, Array], target: Array) -> asyncio.Future[StepResult]:
        """Hands in the next step's batch; the step's result comes when it is decided."""
        graph = await self.start()
        content = checked(graph, inputs, target)
        async with self._turn:
            while self._feed.full and not self._over.done():
                self._room.clear()
                await self._or_over(self._room.wait())
            self._raise_if_over()
            self._asked += 1
            step = self._asked
            result: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
            self._results[step] = result
            self._take(BatchGiven(Batch(content, content.size_bytes)))
        return result

    async def finish(self) -> pb.TrainDone:
        """Commits what was trained and ends the run."""
        await self.start()
        self._raise_if_over()
        self._take(NoMore())
        done = await asyncio.shield(self._over)
        await self.close()
        return done

    async def close(self) -> None:
        """Ends the run as it is; what was decided is still committed by the orchestrator."""
        if not self._over.done():
            self._end(LocalError("the training run was closed"))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._feeding is not None:
            await self._feeding.close()

    async def _or_over(self, waited_for: asyncio.Future[T] | Coroutine[Any, Any, T]) -> T:
        """What is waited for, or the error of a run that has ended meanwhile."""
        future = asyncio.ensure_future(waited_for)
        try:
            await asyncio.wait((future, self._over), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                self._raise_if_over()
            return future.result()
        finally:
            if future is not self._started:
                future.cancel()

    def _raise_if_over(self) -> None:
        if self._over.done():
            self._over.result()
            raise LocalError("the training run is finished")

    def _end(self, error: Exception) -> None:
        if not self._over.done():
            futures: list[asyncio.Future[Any]] = [self._over, *self._results.values()]
            for waiting in futures:
                if not waiting.done():
                    waiting.set_exception(error)
                    waiting.exception()  # it is heard, also where nobody waits
            self._results.clear()
        if self._timer is not None:
            self._timer.cancel()

    # The core

    def _take(self, event: Event) -> None:
        if self._over.done():
            return
        loop = asyncio.get_running_loop()
        for effect in self._feed.handle(event, loop.time()):
            self._do(effect)
        if not self._feed.full:
            self._room.set()
        if self._timer is not None:
            self._timer.cancel()
        deadline = self._feed.deadline()
        if deadline is not None and not self._over.done():
            self._timer = loop.call_at(deadline, self._take, Tick())

    def _do(self, effect: Effect) -> None:
        match effect:
            case OpenStream():
                self._hang_up()
                self._commands = asyncio.Queue()
                self._talking = self._spawn(self._talk(effect, self._commands))
            case CloseStream():
                self._hang_up()
            case Send():
                self._commands.put_nowait(effect.command)
            case FeedStep():
                assert self._feeding is not None
                self._feeding.feed(effect)
            case TellDecided():
                assert self._feeding is not None
                self._feeding.tell(effect)
            case FindOrchestrator():
                self._spawn(self._find())
            case Started():
                self._begin(effect)
            case Deliver():
                result = self._results.pop(effect.result.step, None)
                if result is not None and not result.done():
                    result.set_result(effect.result)
            case Recovery():
                self.recoveries.append(effect.reason)
            case Say():
                self._on_notice(effect.text)
            case Finished():
                self._over.set_result(effect.done)
            case GiveUp():
                self._end(effect.error)

    def _begin(self, started: Started) -> None:
        graph = CompiledGraph.from_json(started.graph)
        self._graph, self._asked = graph, started.step
        self._feeding = Feeding(self._session, self._network, graph, self._take, self._end)
        self._take(Pace(graph.window, graph.staleness + 1 if graph.clip_norm else 0))
        self._started.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task

    # The stream to the orchestrator

    async def _talk(self, to: OpenStream, commands: asyncio.Queue[pb.TrainCommand]) -> None:
        try:
            opened = await self._session.stream(
                to.peer, "Orchestrator/Train", pb.TrainEvent, STREAM_TIMEOUT_S
            )
            async with opened as stream:

                async def send() -> None:
                    while True:
                        await stream.write(await commands.get())

                self._take(StreamOpened(to.stream))
                sender = asyncio.ensure_future(send())
                try:
                    while (event := await stream.read()) is not None:
                        self._take(Told(to.stream, event))
                        if self._talking is not asyncio.current_task() or self._over.done():
                            return
                finally:
                    sender.cancel()
                    await asyncio.gather(sender, return_exceptions=True)
            self._take(StreamEnded(to.stream, "the orchestrator closed the stream"))
        except (RemoteError, NotFoundError) as error:
            self._take(StreamEnded(to.stream, str(error)))
        except P2PNetError as error:  # ours: the local node is gone
            self._end(error)

    def _hang_up(self) -> None:
        talking, self._talking = self._talking, None
        if talking is not None and talking is not asyncio.current_task():
            talking.cancel()

    async def _find(self) -> None:
        try:
            found = await self._session.locate(self._network)
        except RefusedError as error:  # it is closed
            self._end(UsageError(str(error)))
        except RemoteError as error:
            self._take(NotFound(str(error)))
        except P2PNetError as error:  # ours: the local node is gone
            self._end(error)
        else:
            self._take(OrchestratorFound(found.orchestrator, found.epoch))
