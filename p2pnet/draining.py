"""A shell: moves everything away from this node, before it goes or instead of going."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from p2pnet.errors import P2PNetError
from p2pnet.keys import short
from p2pnet.orchestrator.shell import Orchestrator
from p2pnet.swarm import Swarm
from p2pnet.v1 import orchestrator_pb2
from p2pnet.vnode.shell import Host

logger = logging.getLogger(__name__)

TELL_TIMEOUT_S = 15.0
EMPTIED_S = 2.0
EMPTIED_CHECKS = 20


@dataclass(frozen=True, slots=True)
class Drained:
    """What has come of it: VNodes moved and left, networks handed over and left, by name."""

    moved: int
    left: int
    handed_over: tuple[str, ...]
    left_behind: tuple[str, ...]


class Draining:
    """Lives on the gRPC thread.

    Args:
        keeps_for: the orchestrators of the networks whose logs this node keeps.
        stop_hosting: has the membership told; any thread.
    """

    def __init__(
        self,
        swarm: Swarm,
        host: Host,
        orchestrator: Orchestrator,
        keeps_for: Callable[[], Iterable[str]],
        stop_hosting: Callable[[], None],
    ) -> None:
        self._swarm = swarm
        self._host = host
        self._orchestrator = orchestrator
        self._keeps_for = keeps_for
        self._stop_hosting = stop_hosting
        self._one_at_a_time = asyncio.Lock()

    async def drain(self) -> Drained:
        """Has every orchestrator move our VNodes, then hands over what we orchestrate.

        In this order: a network of our own moves its VNodes in good order, while it is
        still ours. What cannot be moved stays as it is, and is named.
        """
        async with self._one_at_a_time:
            self._host.drain()
            self._stop_hosting()
            to_tell = sorted({*self._host.claimants(), *self._keeps_for()})
            moved = sum(await asyncio.gather(*map(self._tell, to_tell)))
            await self._emptied()
            names = self._orchestrator.names()
            left_behind = await self._orchestrator.resign()
            return Drained(
                moved=moved,
                left=self._host.usage.vnodes,
                handed_over=tuple(name for name in names if name not in left_behind),
                left_behind=tuple(left_behind),
            )

    async def _emptied(self) -> None:
        """Waits a moment for the orchestrators' word that we have lost our VNodes."""
        for _ in range(EMPTIED_CHECKS):
            if not self._host.usage.vnodes:
                return
            await asyncio.sleep(EMPTIED_S / EMPTIED_CHECKS)

    async def _tell(self, peer_id: str) -> int:
        if peer_id == self._swarm.keypair.peer_id:
            return await self._orchestrator.move_away(peer_id)
        try:
            reply = await self._swarm.call(
                peer_id,
                "Orchestrator/Leaving",
                orchestrator_pb2.LeavingRequest(),
                orchestrator_pb2.LeavingReply,
                timeout_s=TELL_TIMEOUT_S,
            )
        except P2PNetError as error:
            logger.warning("orchestrator %s was not told that we go: %s", short(peer_id), error)
            return 0
        return int(reply.moved)
