"""A shell around `Tenancy`: its disk, its reads of logs, its calls and answers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from p2pnet.core import Tick
from p2pnet.datadir import read_whole, write_whole
from p2pnet.errors import P2PNetError, ResourceError
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2
from p2pnet.vnode.admission import Limits
from p2pnet.vnode.logs_shell import Logs
from p2pnet.vnode.network import refusal
from p2pnet.vnode.standing import RECORD_BYTES_MAX
from p2pnet.vnode.tenancy import Tenancy
from p2pnet.vnode.tenancy_events import (
    Begin,
    Effect,
    End,
    Event,
    LogRead,
    LogSilent,
    NotPersisted,
    Persist,
    ReadLog,
    Reply,
)

logger = logging.getLogger(__name__)

ASKS_MAX = 1024  # calls that wait for an answer
PART_ENTRIES = 16  # of a log; each costs a signature to check, a millisecond on a busy machine


class TenancyShell:
    """Drives a `Tenancy`. Lives on the gRPC thread.

    What the core decides holds at once; effects are carried out one after another, in
    the order decided. One file a network under `directory`.

    Args:
        carry_out: runs VNodes, or lets them go; at once, without waiting for them.
    """

    def __init__(
        self,
        swarm: Swarm,
        limits: Limits,
        directory: Path,
        carry_out: Callable[[Begin | End], None],
    ) -> None:
        self._swarm = swarm
        self._directory = directory
        self._carry_out = carry_out
        self.core = Tenancy.load(limits, _read_all(directory))
        self._logs = Logs(swarm)
        self._asks = 0
        self._answers: dict[int, asyncio.Future[common_pb2.Refusal | None]] = {}
        self._batches: asyncio.Queue[Sequence[Effect]] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tick_at = math.inf
        self._tasks = TaskSet("the table of hosted networks")

    async def close(self) -> None:
        """Ends what is under way."""
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.close()
        await self._logs.close()

    async def ask(self, make: Callable[[int], Event]) -> common_pb2.Refusal | None:
        """Hands the core a call, and waits for its answer; None: yes."""
        if len(self._answers) >= ASKS_MAX:
            return refusal(common_pb2.REFUSAL_CODE_BUSY, "too many ask this peer at once")
        self._asks += 1
        ask = self._asks
        answer: asyncio.Future[common_pb2.Refusal | None]
        answer = self._answers[ask] = asyncio.get_running_loop().create_future()
        try:
            self.tell(make(ask))
            return await answer
        finally:
            del self._answers[ask]

    def tell(self, event: Event) -> None:
        """Hands the core an event."""
        effects = self.core.handle(event, self._swarm.now())
        if effects:
            self._batches.put_nowait(effects)
            if self._worker is None:
                self._worker = self._tasks.spawn(self._work())
        deadline = self.core.deadline()
        if deadline is not None and deadline < self._tick_at:
            if self._timer is not None:
                self._timer.cancel()
            self._tick_at = deadline
            delay_s = max(0.0, deadline - self._swarm.now())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._tick)

    def _tick(self) -> None:
        self._timer, self._tick_at = None, math.inf
        self.tell(Tick())

    async def _work(self) -> None:
        while True:
            effects = await self._batches.get()
            lost: dict[str, str] = {}  # networks whose VNodes are not to be, and why
            for effect in effects:
                try:
                    await self._do(effect, lost)
                except Exception as error:
                    logger.exception("a host could not do what it had decided")
                    if isinstance(effect, Begin):
                        lost[effect.tenant.network_id] = f"this peer failed: {error}"[:200]
            for network_id in lost:
                self.tell(NotPersisted(network_id))

    async def _do(self, effect: Effect, lost: dict[str, str]) -> None:
        if isinstance(effect, Persist):
            try:
                await asyncio.to_thread(self._write, effect)
            except ResourceError as error:
                logger.error("what this host agreed to cannot be kept: %s", error)
                why = f"this peer cannot write down what it agrees to: {error}"
                lost[effect.network_id] = why
        elif isinstance(effect, ReadLog):
            self._tasks.spawn(self._read_log(effect))
        elif isinstance(effect, Reply):
            no = effect.refusal
            if no is None and lost:
                no = refusal(common_pb2.REFUSAL_CODE_FAILED, next(iter(lost.values())))
            answer = self._answers.get(effect.ask)
            if answer is not None and not answer.done():
                answer.set_result(no)
        elif not (isinstance(effect, Begin) and effect.tenant.network_id in lost):
            self._carry_out(effect)

    async def _read_log(self, effect: ReadLog) -> None:
        network_id = effect.network_id
        try:
            entries = await self._logs.read(effect)
        except P2PNetError as error:
            self.tell(LogSilent(network_id, str(error)))
        except Exception:
            logger.exception("the log of network %s could not be read", network_id)
            self.tell(LogSilent(network_id, "reading it failed"))
        else:
            for at in range(PART_ENTRIES, len(entries), PART_ENTRIES):
                part = tuple(entries[at - PART_ENTRIES : at])
                self.tell(LogRead(network_id, part, more=True))
                await asyncio.sleep(0)  # others may go on meanwhile
            rest = max(0, len(entries) - 1) // PART_ENTRIES * PART_ENTRIES
            self.tell(LogRead(network_id, tuple(entries[rest:])))
        await self._logs.tidy(lambda network_id: self.core.standing(network_id) is not None)

    def _write(self, effect: Persist) -> None:
        path = self._directory / effect.network_id
        try:
            if effect.data is None:
                path.unlink(missing_ok=True)
                return
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{path} cannot be written: {error.strerror}") from error
        write_whole(path, effect.data)


def _read_all(directory: Path) -> dict[str, bytes]:
    records: dict[str, bytes] = {}
    if not directory.is_dir():
        return records
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            path.unlink()  # was being written when the node died; never answered for
            continue
        try:
            records[path.name] = read_whole(path, RECORD_BYTES_MAX) or b""
        except ResourceError as error:
            logger.warning("it is not used: %s", error)
    return records
