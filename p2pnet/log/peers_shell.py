"""A shell: a network's log on peers; carries out what proposer and reader decide."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import TypeVar

from p2pnet.core import Core, Tick
from p2pnet.errors import ForgedError, P2PNetError, RemoteError, UnreachableError
from p2pnet.log import proposer as writing
from p2pnet.log import reader as reading
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import History
from p2pnet.log.shell import Log
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, log_pb2

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 1.5

EventT = TypeVar("EventT")
EffectT = TypeVar("EffectT")


class LogOnPeers(Log):
    """The log on keepers, who are replaced as they go, through the log itself.

    Args:
        first: the keepers of slot 1, as the manifest names them.
        hints: newer ones, as far as known.
    """

    def __init__(
        self, swarm: Swarm, network_id: str, first: Sequence[str], hints: Sequence[str] = ()
    ) -> None:
        self._swarm = swarm
        self._first = tuple(first)
        self._hints = tuple(hints)
        self._known = History(network_id)  # what has been proved to us
        self._proofs: dict[int, log_pb2.Proof] = {}
        self._rng = random.Random(swarm.keypair.peer_id + network_id)
        self._one_at_a_time = asyncio.Lock()
        self._tasks = TaskSet(f"the log of network {network_id}")

    async def append(self, history: History, entry: common_pb2.Signed) -> common_pb2.Signed:
        """See `Log`."""
        async with self._one_at_a_time:
            if len(self._known.entries) < len(history.entries):  # to teach keepers that lag
                await self._sync(at_least=len(history.entries))
            core = writing.Proposer(
                self._swarm.keypair.peer_id, history, entry, rng=self._rng, proofs=self._proofs
            )
            events: asyncio.Queue[writing.Event] = asyncio.Queue()
            decided: writing.Decided | None = None
            effects: Sequence[writing.Effect] = core.handle(writing.Begin(), self._swarm.now())
            while True:
                for effect in effects:
                    if isinstance(effect, writing.Send):
                        self._tasks.spawn(self._send(effect, events))
                    elif isinstance(effect, writing.Decided):
                        decided = effect
                    else:
                        raise UnreachableError(effect.reason)
                if decided is not None:
                    break
                event = await self._next(core, events)
                effects = core.handle(event, self._swarm.now())
            if history.next_slot == self._known.next_slot:
                self._known.add(decided.entry)
                self._proofs[history.next_slot] = decided.proof
            return decided.entry

    async def history(self) -> History:
        """See `Log`."""
        async with self._one_at_a_time:
            await self._sync()
            return self._known

    async def confirm(self, entry: common_pb2.Signed) -> History:
        """See `Log`."""
        slot = parse_entry(entry).slot
        async with self._one_at_a_time:
            if self._known.entry(slot) is None:
                await self._sync(at_least=slot)
            known = self._known.entry(slot)
            if known is None or known.payload != entry.payload:
                raise ForgedError(f"slot {slot} of the log holds another entry")
            return self._known

    @property
    def size_bytes(self) -> int:
        """See `Log`."""
        return self._known.size_bytes

    async def close(self) -> None:
        """See `Log`."""
        await self._tasks.close()

    async def _sync(self, *, at_least: int = 0) -> None:
        hints = dict.fromkeys((*self._hints, *self._first)) if not self._known.entries else ()
        core = reading.LogReader(
            self._known, first=self._first, hints=tuple(hints), at_least=at_least
        )
        events: asyncio.Queue[reading.Event] = asyncio.Queue()
        effects: Sequence[reading.Effect] = core.handle(reading.Begin(), self._swarm.now())
        asking = TaskSet("a read of a log")
        try:
            while True:
                for effect in effects:
                    if isinstance(effect, reading.Ask):
                        asking.spawn(self._ask(effect, events))
                    elif isinstance(effect, reading.Found):
                        self._proofs[effect.slot] = effect.proof
                    elif isinstance(effect, reading.Failed):
                        raise UnreachableError(effect.reason)
                    else:
                        return
                event = await self._next(core, events)
                effects = core.handle(event, self._swarm.now())
        finally:
            await asking.close()

    async def _next(
        self, core: Core[EventT, EffectT], events: asyncio.Queue[EventT]
    ) -> EventT | Tick:
        deadline = core.deadline()
        left_s = None if deadline is None else max(0.0, deadline - self._swarm.now())
        try:
            async with asyncio.timeout(left_s):
                return await events.get()
        except TimeoutError:
            return Tick()

    async def _ask(self, ask: reading.Ask, events: asyncio.Queue[reading.Event]) -> None:
        try:
            reply = await self._swarm.call(
                ask.keeper,
                "Keeper/ReadLog",
                ask.request,
                log_pb2.ReadLogReply,
                timeout_s=CALL_TIMEOUT_S,
            )
        except P2PNetError as error:
            events.put_nowait(reading.Missed(ask.keeper, str(error)))
            return
        events.put_nowait(reading.Answered(ask.keeper, reply))

    async def _send(self, send: writing.Send, events: asyncio.Queue[writing.Event]) -> None:
        request: writing.Request = send.requests[-1]
        reply: log_pb2.PrepareReply | log_pb2.AcceptReply | None = None
        try:
            for request in send.requests:
                reply = await self._call(send.keeper, request)
        except RemoteError as error:
            if not isinstance(send.requests[-1], log_pb2.LearnRequest):
                events.put_nowait(writing.Missed(send.keeper, send.requests[-1], str(error)))
            return
        except P2PNetError as error:
            logger.info("a keeper was not asked: %s", error)
            return
        if not isinstance(request, log_pb2.LearnRequest) and reply is not None:
            events.put_nowait(writing.Answered(send.keeper, request, reply))

    async def _call(
        self, keeper: str, request: writing.Request
    ) -> log_pb2.PrepareReply | log_pb2.AcceptReply | None:
        call = self._swarm.call
        if isinstance(request, log_pb2.PrepareRequest):
            return await call(
                keeper, "Keeper/Prepare", request, log_pb2.PrepareReply, timeout_s=CALL_TIMEOUT_S
            )
        if isinstance(request, log_pb2.AcceptRequest):
            return await call(
                keeper, "Keeper/Accept", request, log_pb2.AcceptReply, timeout_s=CALL_TIMEOUT_S
            )
        await call(keeper, "Keeper/Learn", request, log_pb2.LearnReply, timeout_s=CALL_TIMEOUT_S)
        return None
