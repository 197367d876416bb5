"""A shell: VNodes that live elsewhere are followed here, step by step.

What such a VNode holds for a step comes here before the step can be decided, and is applied
when it is: so its state is here, to the bit, when the other host dies. In between, its
standby answers forward passes without training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from p2pnet.errors import LocalError, MalformedError, P2PNetError
from p2pnet.keys import sha256
from p2pnet.tasks import TaskSet
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.crew import Adopt, Surroundings, make
from p2pnet.vnode.follow import Follow
from p2pnet.vnode.hosted import Hosted
from p2pnet.vnode.network import HostedNetwork, clip, refusal
from p2pnet.vnode.stages import inference_stages_of
from p2pnet.vnode.tensors import Buffer

if TYPE_CHECKING:
    from p2pnet.vnode.components import Component


class Following:
    """The VNodes of one network that are followed here, under one epoch. On the gRPC thread."""

    def __init__(
        self,
        net: HostedNetwork,
        vnodes: Sequence[str],
        around: Surroundings,
        adopt: Adopt | None = None,
    ) -> None:
        self.vnodes = tuple(vnodes)
        self.errors: dict[str, str] = {}
        self.inference_stages = inference_stages_of(net.graph, vnodes)
        self._net = net
        self._around = around
        self._adopt = adopt
        self._hosted = Hosted(net.graph, vnodes, around.compute.device)
        self._made = False
        clips = net.graph.clip_norm > 0
        self._cores = {vnode: Follow(net.base_step, clips=clips) for vnode in vnodes}
        self._turns = {vnode: asyncio.Lock() for vnode in vnodes}
        self._loading = asyncio.Lock()
        self._tasks = TaskSet(f"standbys of network {net.graph.name}")
        # At once: the VNode does not wait long for its standby, and torch may have to load.
        self._tasks.spawn(self._warm())

    @property
    def hosted(self) -> Hosted | None:
        """The components; None as long as they are not in memory."""
        return self._hosted if self._made else None

    def step_of(self, vnode: str) -> int:
        """The last step of a VNode that was applied here."""
        return self._cores[vnode].applied_step

    async def close(self) -> None:
        """Stops."""
        await self._tasks.close()

    async def ready(self) -> Hosted:
        """The components with their states; raises P2PNetError."""
        async with self._loading:
            if not self._made:
                for vnode in self.vnodes:
                    try:
                        await make(self._hosted, vnode, self._net, self._around, self._adopt)
                    except P2PNetError as error:
                        self.errors[vnode] = clip(str(error))
                        raise
                self._made = True
        return self._hosted

    async def follow(
        self, request: vnode_pb2.FollowRequest, payload: Buffer | None
    ) -> common_pb2.Refusal | None:
        """Takes what a VNode holds for a step, and applies what is decided.

        Raises:
            MalformedError: bytes that are not what was announced.
        """
        data = bytes(payload or b"")
        if await asyncio.to_thread(sha256, data) != request.digest:
            raise MalformedError("what is to be followed is not what its digest names")
        await self.ready()
        async with self._turns[request.vnode]:
            await self._apply(request.vnode, request.decided_step, request.norms)
            if why := self._cores[request.vnode].take(request.id.step, data):
                return refusal(common_pb2.REFUSAL_CODE_FAILED, f"{request.vnode}: {why}")
        return None

    async def decided(self, step: int, norms: Sequence[float]) -> None:
        """Applies what is held up to a step, which is decided."""
        await self.ready()
        for vnode in self.vnodes:
            async with self._turns[vnode]:
                await self._apply(vnode, step, norms)

    async def give(self, vnode: str, step: int, norms: Sequence[float]) -> Component:
        """A component with the state after `step`, which is decided; it is not ours any more.

        Raises:
            LocalError: it is not to be had.
        """
        await self.ready()
        async with self._turns[vnode]:
            await self._apply(vnode, step, norms)
            if (here := self._cores[vnode].applied_step) != step:
                raise LocalError(f"{vnode} cannot go on from step {step}, its standby is at {here}")
            return await self._around.compute.run(self._hosted.do_take_out, vnode)

    async def _apply(self, vnode: str, decided: int, norms: Sequence[float]) -> None:
        core = self._cores[vnode]
        for step, norm, data in core.decided(decided, norms):
            await self._around.compute.run(self._hosted.do_follow, vnode, data, norm)
            core.applied(step)

    async def _warm(self) -> None:
        try:
            await self.ready()
        except P2PNetError:
            pass  # noted; it is tried again when the VNode sends something
