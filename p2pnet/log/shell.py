"""A shell: a network's log, wherever it is kept; on peers, or in a directory (DESIGN D6)."""

from __future__ import annotations

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from p2pnet.core import Tick
from p2pnet.data.blobs import path_of
from p2pnet.dht.keyspace import network_key, peer_position, position
from p2pnet.errors import LocalError, P2PNetError, RefusedError, RemoteError, UnreachableError
from p2pnet.keys import short
from p2pnet.log.directory import DirectoryLog
from p2pnet.log.history import History, new_claim, new_commit, parse_entry
from p2pnet.log.proposer import (
    Answered,
    Begin,
    Decided,
    Event,
    Failed,
    Missed,
    Proposer,
    Request,
    Send,
)
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, log_pb2

logger = logging.getLogger(__name__)

KEEPERS = 5
CALL_TIMEOUT_S = 1.5
TRIES = 3


class NetworkLog(ABC):
    """The log of one network, as its orchestrator writes it. Lives on the gRPC thread."""

    def __init__(self, swarm: Swarm, network_id: str, manifest: common_pb2.Signed) -> None:
        self.history = History(network_id)
        self._swarm = swarm
        self._manifest = manifest
        self._writing = asyncio.Lock()
        self._lost = False

    async def claim(self, reason: str) -> int:
        """Takes the next epoch, and returns its number.

        Raises:
            RefusedError: another orchestrator has taken the network.
            UnreachableError: no majority of the keepers answers.
        """
        async with self._writing:
            if self._lost:  # as a commit has found: it is not taken right back
                raise self._taken()
            for _ in range(TRIES):
                before = self.history.epoch
                entry = new_claim(
                    self.history,
                    self._swarm.keypair,
                    self._manifest,
                    keepers=self._next_keepers(),
                    reason=reason,
                )
                if await self._append(entry):
                    return self.history.epoch
                if self.history.epoch != before:  # another claim took the slot
                    if self.history.orchestrator != self._swarm.keypair.peer_id:
                        break
                    return self.history.epoch  # one of ours, which we had given up
                # A commit of ours did, which we had given up: it counts after all.
            raise self._taken()

    async def commit(self, epoch: int, step: int, states: Mapping[str, common_pb2.BlobRef]) -> None:
        """Commits a cut under `epoch`; raises as `claim`."""
        async with self._writing:
            for _ in range(TRIES):
                if self.history.epoch != epoch:
                    raise RefusedError("a newer epoch has begun meanwhile")
                entry = new_commit(
                    self.history,
                    self._swarm.keypair,
                    step,
                    states,
                    keepers=self._next_keepers(),
                )
                if await self._append(entry):
                    return
                if self.history.epoch != epoch:
                    if self.history.orchestrator != self._swarm.keypair.peer_id:
                        break
                    raise RefusedError("a newer epoch has begun meanwhile")
                committed = self.history.commit
                if committed is not None and committed.step >= step:
                    return  # by a commit of ours, which we had given up
            raise self._taken()

    async def _append(self, entry: common_pb2.Signed) -> bool:
        """Whether the entry is the next slot's; else another is, which is noted."""
        winner = await self._decide(entry)
        void = self.history.add(winner)
        if winner.payload != entry.payload:
            return False
        if void:
            raise LocalError(f"an entry of the log does not count: {void}")
        return True

    def _taken(self) -> RefusedError:
        self._lost = True
        return RefusedError(
            f"another orchestrator, {short(self.history.orchestrator)}, has taken the network"
        )

    @abstractmethod
    async def _decide(self, entry: common_pb2.Signed) -> common_pb2.Signed:
        """Puts an entry into the next slot; returns what is there then."""

    @abstractmethod
    def _next_keepers(self) -> tuple[str, ...]:
        """Who keeps the slot after the next one."""

    def keepers(self) -> tuple[str, ...]:
        """Who keeps the next slot; nobody for a log in a directory."""
        return self.history.keepers

    @abstractmethod
    async def close(self) -> None:
        """Ends what is under way."""


class LogInDirectory(NetworkLog):
    """The log in a directory that every orchestrator can reach."""

    def __init__(
        self, swarm: Swarm, network_id: str, manifest: common_pb2.Signed, root: Path
    ) -> None:
        super().__init__(swarm, network_id, manifest)
        self._directory = DirectoryLog(root)

    async def _decide(self, entry: common_pb2.Signed) -> common_pb2.Signed:
        slot = parse_entry(entry).slot
        return await asyncio.to_thread(self._directory.append, entry, slot)

    def _next_keepers(self) -> tuple[str, ...]:
        return ()

    async def close(self) -> None:
        """See `NetworkLog`."""


class LogOnPeers(NetworkLog):
    """The log on keepers, who are replaced as they go, through the log itself."""

    def __init__(self, swarm: Swarm, network_id: str, manifest: common_pb2.Signed) -> None:
        super().__init__(swarm, network_id, manifest)
        self._rng = random.Random(swarm.keypair.peer_id + network_id)
        self._tasks = TaskSet(f"the log of network {network_id}")

    async def close(self) -> None:
        """See `NetworkLog`."""
        await self._tasks.close()

    def _next_keepers(self) -> tuple[str, ...]:
        """The living keepers stay; the dead are replaced by the members closest to the network.

        An odd number, at most KEEPERS, so that a majority outlives as many as possible.
        """
        alive = [member.peer_id for member in self._swarm.members() if member.alive]
        target = position(network_key(self.history.network_id))
        closest = sorted(alive, key=lambda peer: peer_position(peer) ^ target)
        stay = [peer for peer in self.history.keepers if peer in alive]
        wanted = min(KEEPERS, len(alive) - 1 + len(alive) % 2)
        chosen = (stay + [peer for peer in closest if peer not in stay])[:wanted]
        return tuple(sorted(chosen))

    async def _decide(self, entry: common_pb2.Signed) -> common_pb2.Signed:
        proposer = Proposer(
            self._swarm.keypair.peer_id,
            self.history,
            entry,
            rng=self._rng,
            keepers=self._next_keepers(),
        )
        events: asyncio.Queue[Event] = asyncio.Queue()
        events.put_nowait(Begin())
        while True:
            deadline = proposer.deadline()
            left_s = None if deadline is None else max(0.0, deadline - self._swarm.now())
            try:
                async with asyncio.timeout(left_s):
                    event = await events.get()
            except TimeoutError:
                event = Tick()
            winner: common_pb2.Signed | None = None
            for effect in proposer.handle(event, self._swarm.now()):
                if isinstance(effect, Send):
                    self._tasks.spawn(self._send(effect, events))
                elif isinstance(effect, Decided):
                    winner = effect.entry
                elif isinstance(effect, Failed):
                    raise UnreachableError(effect.reason)
            if winner is not None:
                return winner

    async def _send(self, send: Send, events: asyncio.Queue[Event]) -> None:
        request: Request = send.requests[-1]
        try:
            for request in send.requests:
                reply = await self._ask(send.keeper, request)
        except RemoteError as error:
            if not isinstance(request, log_pb2.LearnRequest):
                events.put_nowait(Missed(send.keeper, request, str(error)))
            return
        except P2PNetError as error:
            logger.info("a keeper was not asked: %s", error)
            return
        if not isinstance(request, log_pb2.LearnRequest) and reply is not None:
            events.put_nowait(Answered(send.keeper, request, reply))

    async def _ask(
        self, keeper: str, request: Request
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


def open_log(
    swarm: Swarm, network_id: str, manifest: common_pb2.Signed, state_url: str
) -> NetworkLog:
    """The log of a new network: where its state lives, or on peers."""
    if state_url:
        return LogInDirectory(swarm, network_id, manifest, path_of(state_url) / "log")
    return LogOnPeers(swarm, network_id, manifest)
