"""A shell: cuts; the states of all VNodes after one step, stored, copied, and committed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence

from p2pnet.errors import RefusedError
from p2pnet.keys import short
from p2pnet.log.shell import NetworkLog
from p2pnet.orchestrator.hosts import Hosts, by_host
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.graph import CompiledGraph

SAVE_TIMEOUT_S = 30.0
RETAIN_TIMEOUT_S = 2.0
BLOB_COPIES = 2  # beside the host's own
BYTES_A_SECOND = 1_000_000  # what a slow volunteer sends


class Cuts:
    """Makes the cuts of one network. What is committed is what the log says."""

    def __init__(
        self,
        swarm: Swarm,
        log: NetworkLog,
        hosts: Hosts,
        network_id: str,
        graph: CompiledGraph,
        initial: Mapping[str, common_pb2.BlobRef],
    ) -> None:
        self._swarm = swarm
        self._log = log
        self._hosts = hosts
        self._network_id = network_id
        self._initial = dict(initial)
        self._sizes = {vnode: graph.node(vnode).state_bytes for vnode in graph.vnodes()}
        self._holders: list[str] = []  # who was told last what to keep
        self._one_at_a_time = asyncio.Lock()

    @property
    def step(self) -> int:
        """The step of the last commit; 0 if there is none."""
        commit = self._log.history.commit
        return 0 if commit is None else int(commit.step)

    @property
    def states(self) -> Mapping[str, common_pb2.BlobRef]:
        """The states of the last commit, or those that the network was submitted with."""
        commit = self._log.history.commit
        return self._initial if commit is None else commit.states

    @property
    def committed(self) -> bool:
        """Whether there is a commit at all."""
        return self._log.history.commit is not None

    async def make(self, placement: Mapping[str, str], epoch: int, step: int) -> bool:
        """Saves every VNode's state after `step` and commits the cut.

        Returns False where the step is committed already. Raises RemoteError.
        """
        async with self._one_at_a_time:
            if self.committed and step <= self.step:
                return False
            before = list(self.states.values())
            hosts = by_host(placement)
            saved = await asyncio.gather(
                *(self._save(host, vnodes, epoch, step) for host, vnodes in hosts.items())
            )
            states = {vnode: ref for part in saved for vnode, ref in part.items()}
            await self._log.commit(epoch, step, states)
            await self._retain([*before, *states.values()])
            return True

    async def _save(
        self, host: str, vnodes: Sequence[str], epoch: int, step: int
    ) -> Mapping[str, common_pb2.BlobRef]:
        request = vnode_pb2.SaveRequest(
            network_id=self._network_id,
            epoch=epoch,
            step=step,
            vnodes=vnodes,
            copy_to=self._others(host),
        )
        size_bytes = sum(self._sizes[vnode] for vnode in vnodes)
        timeout_s = SAVE_TIMEOUT_S + size_bytes * (1 + BLOB_COPIES) / BYTES_A_SECOND
        reply = await self._swarm.call(
            host, "VNode/Save", request, vnode_pb2.SaveReply, timeout_s=timeout_s
        )
        if reply.HasField("refusal"):
            raise RefusedError(reply.refusal.detail, code=reply.refusal.code)
        if sorted(reply.states) != sorted(vnodes):
            raise RefusedError(f"{short(host)} saved other VNodes than it was asked to")
        return reply.states

    def _others(self, host: str) -> list[str]:
        """Who gets copies of a host's states: those that are well first, not the same for all."""
        others = [
            member.peer_id
            for member in self._swarm.members()
            if member.alive and member.hosting and member.peer_id != host
        ]
        at = sum(host.encode()) % max(1, len(others))
        turned = others[at:] + others[:at]
        return sorted(turned, key=lambda peer: not self._hosts.well(peer))[:BLOB_COPIES]

    async def _retain(self, keep: Sequence[common_pb2.BlobRef]) -> None:
        """Lets holders drop what the last two commits do not name."""
        request = vnode_pb2.RetainRequest(
            network_id=self._network_id, digests=sorted({ref.digest for ref in keep})
        )
        holders = sorted({holder for ref in keep for holder in ref.holders})
        # Those of the cut before these, too: nothing of theirs is named any more.
        told = sorted({*holders, *self._holders})
        self._holders = holders
        calls: list[Awaitable[object]] = [
            self._swarm.call(
                holder, "Blob/Retain", request, vnode_pb2.RetainReply, timeout_s=RETAIN_TIMEOUT_S
            )
            for holder in told
        ]
        await asyncio.gather(*calls, return_exceptions=True)  # a hint; quotas hold without it
