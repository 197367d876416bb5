"""What a host is asked for, and whether that is what it has agreed to. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.message import DecodeError

from p2pnet.errors import MalformedError, RefusedError
from p2pnet.keys import ACCEPTANCE, verify
from p2pnet.log.history import History
from p2pnet.orchestrator.desk import locations
from p2pnet.orchestrator.hosts import all_hosts, by_host, following_by_host
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2
from p2pnet.vnode.graph import CompiledGraph


def allocate_requests(
    history: History,
    graph: CompiledGraph,
    claim: common_pb2.Signed,
    placement: Mapping[str, str],
    standbys: Mapping[str, Sequence[str]],
    *,
    lease_s: int,
    step: int,
    states: Mapping[str, common_pb2.BlobRef],
    state_url: str,
    live_step: int = 0,
    norms: Sequence[float] = (),
) -> dict[str, pnode_pb2.AllocateRequest]:
    """What each host of a claimed placement is asked, standbys included, by host in order.

    `history` ends with the claim; `step` and `states` are the cut to start from. Where
    `live_step` is given, that is gone on from instead, in memory; `norms` are of the last
    decided steps up to it.
    """
    rows = locations(history.epoch, placement, standbys)
    hosted, followed = by_host(placement), following_by_host(standbys)
    requests: dict[str, pnode_pb2.AllocateRequest] = {}
    for host in all_hosts(placement, standbys):
        vnodes, following = hosted.get(host, ()), followed.get(host, ())
        requests[host] = pnode_pb2.AllocateRequest(
            network_id=history.network_id,
            epoch=history.epoch,
            manifest=history.manifest,
            graph=graph.to_json(),
            vnodes=vnodes,
            lease_s=lease_s,
            step=step,
            states={vnode: states[vnode] for vnode in (*vnodes, *following) if vnode in states},
            locations=rows,
            state_url=state_url,
            claim=claim,
            live_step=live_step,
            norms=norms,
            standbys=following,
        )
    return requests


def check_accepted(
    network_id: str,
    epoch: int,
    host: str,
    vnodes: Sequence[str],
    acceptances: Sequence[common_pb2.Signed],
    standbys: Mapping[str, Sequence[str]],
) -> None:
    """Raises RemoteError unless the host has signed just what it was asked for.

    It signs for the VNodes that it hosts, with who follows them; not for what it follows.
    """
    said = []
    for accepted in acceptances:
        if verify(ACCEPTANCE, accepted) != host:
            raise RefusedError("the host signed as somebody else")
        try:
            it = records_pb2.Allocation.FromString(accepted.payload)
        except DecodeError:
            raise MalformedError("the host signed what is no allocation") from None
        said.append((it.network_id, it.vnode, it.host, it.epoch, tuple(it.standbys)))
    if sorted(said) != [
        (network_id, vnode, host, epoch, tuple(standbys.get(vnode, ()))) for vnode in sorted(vnodes)
    ]:
        raise RefusedError("the host agreed to something else than it was asked for")
