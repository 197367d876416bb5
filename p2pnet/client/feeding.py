"""A shell: brings batches, in micro-batches, and decisions to the hosts of the VNodes.

Every edge gets its micro-batches in order, and those of a step before those of the next; so
many are on their way at a time and no more. A host that is busy is asked again for a while:
that is how a slow one slows the feeder down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from p2pnet.client.batches import Content, split
from p2pnet.client.events import FeedFailed, FeedStep, TellDecided
from p2pnet.client.session import NetworkInfo, Session
from p2pnet.errors import LocalError, RemoteError, UsageError
from p2pnet.net.hop_frames import Buffer
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.codecs import codec_of
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import AUTO, RAW, Array, encode

HOPS_MAX = 32  # on their way at a time
HOP_TIMEOUT_S = 5.0
SLOWEST_BYTES_PER_S = 128 << 10  # a way that is slower than this is no way to train
BUSY_S = 15.0  # a host that has no room is asked again for so long
BUSY_PAUSE_S = 0.01  # it doubles with each try, up to ...
BUSY_PAUSE_MAX_S = 0.5
HOLD_S = 0.002  # a decision waits so long for a batch that carries it: a hop a host less

_LATER = (common_pb2.REFUSAL_CODE_BUSY, common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH)
_NEVER = (common_pb2.REFUSAL_CODE_BAD_REQUEST, common_pb2.REFUSAL_CODE_TOO_LARGE)

Request = vnode_pb2.TrainRequest | vnode_pb2.DecidedRequest


class Feeding:
    """Feeds one network's VNodes. Lives on the session's loop.

    Args:
        on_failed: told of a host that could not be fed, or says no.
        on_error: told what is wrong with a batch itself, or with the local node; the run
            is over then.
    """

    def __init__(
        self,
        session: Session,
        network: NetworkInfo,
        graph: CompiledGraph,
        on_failed: Callable[[FeedFailed], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._session = session
        self._network = network
        self._graph = graph
        self._on_failed = on_failed
        self._on_error = on_error
        self._epoch = 0
        self._steps: asyncio.Queue[FeedStep] = asyncio.Queue()  # at most a window of them
        self._worker: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(HOPS_MAX)
        self._bytes = 0  # on their way
        self._hops: dict[asyncio.Task[None], int] = {}  # and of which step
        self._held: tuple[TellDecided, asyncio.TimerHandle] | None = None
        self._to_tell: dict[str, TellDecided] = {}  # by host: the newest
        self._telling: dict[asyncio.Task[None], None] = {}  # one a host

    def feed(self, out: FeedStep) -> None:
        """Begins to send a batch; what that makes out of date ends."""
        if out.epoch != self._epoch:
            self._stop()
            self._epoch, self._steps = out.epoch, asyncio.Queue()
        for hop, step in self._hops.items():
            if step <= out.decided_step:
                hop.cancel()
        if self._held is not None:
            told, _ = self._held
            if told.epoch != out.epoch or told.step <= out.decided_step:
                self._let_go()
        self._steps.put_nowait(out)
        if self._worker is None:
            self._worker = self._start(self._work(self._steps))

    def tell(self, decided: TellDecided) -> None:
        """Tells the hosts that batches go to, unless a batch does so at once.

        Of several decisions the newest is enough.
        """
        self._let_go()
        timer = asyncio.get_running_loop().call_later(HOLD_S, self._tell_all, decided)
        self._held = decided, timer

    def _let_go(self) -> None:
        if self._held is not None:
            self._held[1].cancel()
            self._held = None

    def _tell_all(self, decided: TellDecided) -> None:
        self._held = None
        names = (*self._graph.inputs, TARGET)
        nodes = [node for name in names for node, _ in self._graph.consumers(name)]
        for host in dict.fromkeys(self._host(decided, node) for node in nodes):
            if host not in self._to_tell:
                task = self._start(self._tell(host))
                self._telling[task] = None
                task.add_done_callback(self._telling.pop)
            self._to_tell[host] = decided

    async def close(self) -> None:
        """Ends all that is under way."""
        self._let_go()
        tasks = [*self._hops, *self._telling, *([self._worker] if self._worker else [])]
        self._stop()
        for task in self._telling:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            self._worker = None
        for hop in self._hops:
            hop.cancel()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose failure, which is ours, ends the run."""

        def done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._on_error(error if isinstance(error, Exception) else LocalError(str(error)))

        task = asyncio.ensure_future(work)
        task.add_done_callback(done)
        return task

    def _host(self, out: FeedStep | TellDecided, node: str) -> str:
        return out.locations.get(self._graph.home(node), "")

    # Batches

    async def _work(self, steps: asyncio.Queue[FeedStep]) -> None:
        while True:
            out = await steps.get()
            content = out.batch.content
            assert isinstance(content, Content)
            for index, part in enumerate(split(content, self._graph.micro_batches)):
                for name, array in (*part.inputs.items(), (TARGET, part.target)):
                    tensor, payload = await self._encode(name, array)
                    for node, slot in self._graph.consumers(name):
                        request = vnode_pb2.TrainRequest(
                            id=vnode_pb2.StepId(
                                network_id=self._network.network_id,
                                epoch=out.epoch,
                                step=out.step,
                                micro_batch=index,
                            ),
                            vnode=node,
                            direction=vnode_pb2.DIRECTION_FORWARD,
                            source=name,
                            slot=slot,
                            tensor=tensor,
                            decided_step=out.decided_step,
                            batch_samples=len(content.target),
                            norms=out.norms,
                        )
                        await self._room.acquire()
                        self._send(out, self._hop(out, node, request, payload))

    async def _encode(self, name: str, array: Array) -> tuple[common_pb2.Tensor, Buffer]:
        """Raw without a copy; what has to be computed for it is computed elsewhere."""
        codec = codec_of(self._graph.codec_of(name))
        if codec in (AUTO, RAW) or array.dtype.kind != "f":
            return encode(array, RAW)
        return await asyncio.to_thread(encode, array, codec)

    def _send(self, out: FeedStep, hop: Coroutine[Any, Any, None]) -> None:
        def done(task: asyncio.Task[None]) -> None:
            del self._hops[task]
            self._room.release()

        task = self._start(hop)
        self._hops[task] = out.step
        task.add_done_callback(done)

    async def _hop(
        self, out: FeedStep, node: str, request: vnode_pb2.TrainRequest, payload: Buffer
    ) -> None:
        size_bytes = memoryview(payload).nbytes
        self._bytes += size_bytes
        try:
            await self._ask(out, out.step, self._host(out, node), node, request, payload)
        finally:
            self._bytes -= size_bytes

    # Decisions

    async def _tell(self, host: str) -> None:
        told: TellDecided | None = None
        try:
            while self._to_tell[host] is not told:
                told = self._to_tell[host]
                request = vnode_pb2.DecidedRequest(
                    network_id=self._network.network_id,
                    epoch=told.epoch,
                    step=told.step,
                    norms=told.norms,
                )
                what = f"the host of {self._graph.name}"
                await self._ask(told, told.step + 1, host, what, request, None)
        finally:
            del self._to_tell[host]

    # Either

    async def _ask(
        self,
        out: FeedStep | TellDecided,
        step: int,
        host: str,
        what: str,
        request: Request,
        payload: Buffer | None,
    ) -> None:
        """Until it is taken; else whoever is concerned is told, and `step` waits for it.

        Raises:
            UsageError: the batch is wrong, whoever hosts the VNode.
            LocalError: the local node is gone.
        """

        def failed(reason: str, newer_epoch: int = 0) -> None:
            self._on_failed(FeedFailed(out.epoch, step, host, reason, newer_epoch))

        loop = asyncio.get_running_loop()
        until, pause_s = loop.time() + BUSY_S, BUSY_PAUSE_S
        while True:
            timeout_s = HOP_TIMEOUT_S + self._bytes / SLOWEST_BYTES_PER_S
            try:
                reply, _ = await self._session.hop(host, request, payload, timeout_s=timeout_s)
            except RemoteError as error:
                failed(f"{what} cannot be fed: {error}")
                return
            if not reply.HasField("refusal"):
                return
            refusal = reply.refusal
            if refusal.code not in _LATER or loop.time() >= until:
                break
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, BUSY_PAUSE_MAX_S)
        if refusal.code in _NEVER:  # whoever hosts it next would say the same
            raise UsageError(f"network {self._network.name}: {refusal.detail}")
        stale = refusal.code == common_pb2.REFUSAL_CODE_STALE_EPOCH
        failed(f"{what} refuses a batch: {refusal.detail}", refusal.epoch if stale else 0)
