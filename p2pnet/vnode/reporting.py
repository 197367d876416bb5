"""A shell: what a host says of its steps: to its VNodes' standbys, then to the orchestrator.

In that order: once a step is reported by all it may be decided, and a standby that has not
got what was held for it could not go on from there. Whom that did not reach, the report says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from p2pnet.errors import P2PNetError
from p2pnet.keys import sha256
from p2pnet.swarm import Swarm
from p2pnet.v1 import orchestrator_pb2, vnode_pb2
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.hosted import Hosted
from p2pnet.vnode.messages import Report
from p2pnet.vnode.network import HostedNetwork, clip

logger = logging.getLogger(__name__)

REPORT_TIMEOUT_S = 5.0
FOLLOW_TIMEOUT_S = 5.0

Decision = Callable[[], tuple[int, tuple[float, ...]]]  # the last decided step, and the last norms


class Reporter:
    """Reports the steps of one network's VNodes on this host, under one epoch."""

    def __init__(
        self,
        net: HostedNetwork,
        vnodes: Sequence[str],
        hosted: Hosted,
        decision: Decision,
        swarm: Swarm,
        compute: ComputeThread,
    ) -> None:
        self._net = net
        self._vnodes = tuple(vnodes)
        self._hosted = hosted
        self._decision = decision
        self._swarm = swarm
        self._compute = compute

    async def held(self, effect: Report) -> None:
        """The gradients of a step are held by all VNodes here; first the standbys get them."""
        step = effect.step
        held = orchestrator_pb2.Held()
        if effect.metrics is not None:
            held.loss = effect.metrics.loss
            held.correct = effect.metrics.correct
            held.samples = effect.metrics.samples
        if self._net.graph.clip_norm:
            held.squares.extend(await self._compute.run(self._hosted.do_squares, step))
        held.unfollowed.extend(await self._be_followed(step))
        await self._tell(
            orchestrator_pb2.ReportRequest(
                id=self._id(step), vnode=self._vnodes[0], held=held, vnodes=self._vnodes
            )
        )

    async def trouble(
        self,
        step: int,
        vnode: str,
        reason: str,
        *,
        host: str = "",
        bad_input: bool = False,
        state_lost: bool = False,
    ) -> None:
        """Something is in the way of a step; `host` is who could not be reached, if anybody."""
        trouble = orchestrator_pb2.Trouble(
            host=host, reason=clip(reason), bad_input=bad_input, state_lost=state_lost
        )
        await self._tell(
            orchestrator_pb2.ReportRequest(id=self._id(step), vnode=vnode, trouble=trouble)
        )

    async def tell_standbys(self) -> None:
        """What is decided, which they hear otherwise when they are sent the next step."""
        step, norms = self._decision()
        request = vnode_pb2.DecidedRequest(
            network_id=self._net.network_id, epoch=self._net.epoch, step=step, norms=norms
        )
        standbys = {
            standby for vnode in self._vnodes for standby in self._net.standbys.get(vnode, ())
        }
        for standby in sorted(standbys):
            try:
                await self._swarm.hop(standby, request, None, timeout_s=FOLLOW_TIMEOUT_S)
            except P2PNetError as error:
                logger.info("a standby did not hear what is decided: %s", error)

    async def _be_followed(self, step: int) -> list[str]:
        """Sends what is held to the standbys; returns VNodes that have one who did not take it."""
        decided, norms = self._decision()

        async def follow(vnode: str, standby: str) -> str:
            data = await self._compute.run(self._hosted.do_pack, vnode, step)
            request = vnode_pb2.FollowRequest(
                id=self._id(step), vnode=vnode, decided_step=decided, norms=norms,
                digest=sha256(data),
            )  # fmt: skip
            try:
                reply, _ = await self._swarm.hop(
                    standby, request, memoryview(data), timeout_s=FOLLOW_TIMEOUT_S
                )
            except P2PNetError as error:
                logger.info("%s is not followed by its standby: %s", vnode, error)
                return vnode
            return vnode if reply.HasField("refusal") else ""

        pairs = [
            (vnode, standby)
            for vnode in self._vnodes
            for standby in self._net.standbys.get(vnode, ())
        ]
        missing = await asyncio.gather(*(follow(*pair) for pair in pairs))
        return sorted({vnode for vnode in missing if vnode})

    async def _tell(self, report: orchestrator_pb2.ReportRequest) -> None:
        try:
            await self._swarm.call(
                self._net.claimant,
                "Orchestrator/Report",
                report,
                orchestrator_pb2.ReportReply,
                timeout_s=REPORT_TIMEOUT_S,
            )
        except P2PNetError as error:  # it notices a step that stands still by itself
            logger.info("%s could not report to its orchestrator: %s", report.vnode, error)

    def _id(self, step: int) -> vnode_pb2.StepId:
        return vnode_pb2.StepId(network_id=self._net.network_id, epoch=self._net.epoch, step=step)
