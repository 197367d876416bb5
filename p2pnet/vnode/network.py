"""What a host knows of one network that it has VNodes of, and what it says of it to others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pnet.v1 import common_pb2
from p2pnet.vnode.graph import CompiledGraph

REASON_CHARS_MAX = 200


@dataclass(slots=True)
class HostedNetwork:
    """One network under one epoch.

    `placement` maps every VNode to its host's peer id, as the claim says. `locations` does so,
    too, as far as it is known to be true: a cache, which may be emptied at any time, because
    the DHT knows. `standbys` maps a VNode to those of the peers that follow it.
    """

    network_id: str
    graph: CompiledGraph
    manifest: common_pb2.Signed
    epoch: int
    claimant: str  # the orchestrator's peer id
    base_step: int  # the cut that the epoch starts from
    state_url: str
    placement: Mapping[str, str] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    standbys: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def refuse_sender(self, source: str, caller: str) -> common_pb2.Refusal | None:
        """Why what a node gives cannot come from a peer: it lives elsewhere under this claim.

        Network inputs come from whoever trains.
        """
        try:
            host = self.placement.get(self.graph.home(source), caller)
        except KeyError:
            return None
        if host == caller:
            return None
        return refusal(
            common_pb2.REFUSAL_CODE_NOT_GRANTED, f"{source} does not live where this comes from"
        )


def clip(reason: str) -> str:
    """As much of a reason as is passed on: it may quote what a peer or a spec says."""
    return reason[:REASON_CHARS_MAX]


def refusal(
    code: common_pb2.RefusalCode | str, detail: str, *, epoch: int = 0, host: str = ""
) -> common_pb2.Refusal:
    """A refusal, for a reply; the code may also be the name of one."""
    return common_pb2.Refusal(code=code, detail=detail, epoch=epoch, host=host)
