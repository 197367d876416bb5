"""Whether an allocation is one that this host may agree to at all. Pure.

What can be said of it by itself: who signed what, and whether it fits together. That
its claim is the log's, and the newest, is `Tenancy`'s to find out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from p2pnet import keys
from p2pnet.dht.manifest import grants, network_id_of, open_manifest
from p2pnet.dht.service import Serves, anything
from p2pnet.errors import ForgedError, MalformedError, RemoteError
from p2pnet.keys import sha256, short
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import manifest_grants, placement_of, standbys_of
from p2pnet.v1 import common_pb2, log_pb2, pnode_pb2, records_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.network import refusal

LEASE_S_MAX = 3600
_MISFIT = "what is to be hosted does not fit the network's manifest"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a host lends, and to whom. `state_url` is of its --state, empty: the peers."""

    me: str  # peer id
    memory_bytes: int
    hosts: bool = True
    state_url: str = ""
    serves: Serves = anything


@dataclass(frozen=True, slots=True)
class Offer:
    """An allocation that fits together, and what this host would run for it."""

    network_id: str
    manifest: common_pb2.Signed
    opened: records_pb2.Manifest
    graph: CompiledGraph
    sizes: Mapping[str, int]  # VNode -> bytes of memory, with the largest batch
    following: Mapping[str, int]  # the same, of the VNodes that it would follow
    slot: int  # of its claim; 0: there is none yet
    epoch: int
    claimant: str  # peer id
    claim: bytes  # SHA-256 of the claim's payload
    placement: Mapping[str, str]  # VNode -> host's peer id, of the whole network, as it says
    standbys: Mapping[str, tuple[str, ...]]  # VNode -> peer ids of who follows it, likewise

    @property
    def size_bytes(self) -> int:
        """What all of it takes."""
        return sum(self.sizes.values()) + sum(self.following.values())


def examine(
    request: pnode_pb2.AllocateRequest, caller: str, limits: Limits, wall_ms: int
) -> Offer | common_pb2.Refusal:
    """The offer in an Allocate by `caller`, or why there is none."""
    offer = examine_manifest(request, caller, limits, wall_ms)
    if isinstance(offer, common_pb2.Refusal):
        return offer
    if not 0 < request.lease_s <= LEASE_S_MAX:
        return _bad(f"a lease has 1 to {LEASE_S_MAX} s, not {request.lease_s}")
    try:
        entry = parse_entry(request.claim)
        signer = keys.verify(keys.LOG_ENTRY, request.claim)
        if entry.WhichOneof("what") != "claim":
            return _bad("an allocation comes with the claim that it is made under")
        placed, followed = placement_of(entry.claim), standbys_of(entry.claim)
    except RemoteError as error:
        return _bad(f"the allocation's claim does not hold: {error}")
    if misfit := _misfit(request, entry, signer, caller):
        return _bad(misfit)
    if sorted(request.vnodes) != [vnode for vnode in placed if placed[vnode] == limits.me]:
        return _bad("the claim places other VNodes on this peer than it is asked to host")
    if sorted(request.standbys) != [vnode for vnode in followed if limits.me in followed[vnode]]:
        return _bad("the claim names this peer a standby of other VNodes than it is asked for")
    if why := _live_misfit(request, offer.graph):
        return _bad(why)
    hosts_max = offer.opened.limits.hosts_max
    if hosts_max and len(entry.claim.hosts) > hosts_max:
        return _no("NOT_GRANTED", f"the owner of {offer.opened.name} allows {hosts_max} hosts")
    return replace(
        offer,
        slot=entry.slot,
        epoch=request.epoch,
        claim=sha256(request.claim.payload),
        placement=placed,
        standbys=followed,
    )


def examine_manifest(
    request: pnode_pb2.AllocateRequest | pnode_pb2.ReadyRequest,
    caller: str,
    limits: Limits,
    wall_ms: int,
) -> Offer | common_pb2.Refusal:
    """The part of `examine` that needs no claim: manifest, grant, graph, service."""
    if not limits.hosts:
        return _no("NOT_GRANTED", "this peer hosts no VNodes")
    try:
        manifest = open_manifest(request.manifest)
    except RemoteError as error:
        return _bad(str(error))
    following = request.standbys if isinstance(request, pnode_pb2.AllocateRequest) else ()
    wanted = dict.fromkeys((*request.vnodes, *following))
    if (
        network_id_of(request.manifest) != request.network_id
        or sha256(request.graph) != manifest.spec_digest
        or not 0 < len(wanted) == len(request.vnodes) + len(following)
    ):
        return _bad(_MISFIT)
    name = manifest.name
    if not grants(manifest, caller):
        return _no(
            "NOT_GRANTED", f"the owner of {name} does not let {short(caller)} orchestrate it"
        )
    if manifest.state_url not in ("", limits.state_url):
        # Nobody but this machine's user says which of its directories are written.
        return _no("NOT_GRANTED", f"this peer was not started with --state {manifest.state_url}")
    expires_at_ms = manifest.limits.expires_at_ms
    if expires_at_ms and wall_ms > expires_at_ms:
        return _no("NOT_GRANTED", f"the time that the owner of {name} gave it is over")
    if why := limits.serves(request.network_id, manifest.owner):
        return _no("NOT_IN_SERVICE", why)
    try:  # last, since it costs most: 0.1 ms a VNode
        graph = CompiledGraph.from_json(request.graph)
    except RemoteError as error:
        return _bad(str(error))
    known = dict.fromkeys(graph.vnodes())
    if any(vnode not in known for vnode in wanted):
        return _bad(_MISFIT)
    return Offer(
        network_id=request.network_id,
        manifest=request.manifest,
        opened=manifest,
        graph=graph,
        sizes={vnode: graph.memory_bytes(vnode) for vnode in request.vnodes},
        following={vnode: graph.memory_bytes(vnode) for vnode in following},
        slot=0,
        epoch=0,
        claimant=caller,
        claim=b"",
        placement={},
        standbys={},
    )


def claim_in(signed: common_pb2.Signed, network_id: str, caller: str) -> log_pb2.Claim:
    """The claim of `caller` for that network in a signed log entry.

    Raises:
        MalformedError, ForgedError: it is none, or the owner does not grant it.
    """
    entry = parse_entry(signed)
    if entry.WhichOneof("what") != "claim" or entry.network_id != network_id:
        raise MalformedError("what is shown is not a claim of that network")
    if keys.verify(keys.LOG_ENTRY, signed) != caller or entry.claim.orchestrator != caller:
        raise ForgedError("a claim that another than the caller made")
    if not manifest_grants(network_id, entry.claim.manifest, caller):
        raise ForgedError(f"the network's owner does not let {short(caller)} orchestrate it")
    return entry.claim


def _misfit(
    request: pnode_pb2.AllocateRequest, entry: log_pb2.LogEntry, signer: str, caller: str
) -> str:
    """Why a claim is not the one that this caller makes this request under, or ""."""
    if signer != caller or entry.claim.orchestrator != caller:
        return f"the claim is {short(signer)}'s, not the caller's"
    if entry.network_id != request.network_id:
        return "the claim is of another network"
    if network_id_of(entry.claim.manifest) != request.network_id:
        return "the claim carries another network's manifest"
    if entry.claim.epoch != request.epoch:
        return f"the claim has epoch {entry.claim.epoch}, the allocation {request.epoch}"
    return ""


def _live_misfit(request: pnode_pb2.AllocateRequest, graph: CompiledGraph) -> str:
    """Why the decided step that the VNodes are to go on from in memory cannot be, or ""."""
    if not request.live_step:
        return "" if not request.norms else "norms are of a step to go on from, and there is none"
    if graph.replicas < 2:
        return "VNodes without standbys go on from the cut"
    if request.live_step <= request.step:
        return f"step {request.live_step} is not after the cut, which is of step {request.step}"
    known = min(request.live_step, graph.staleness + 1) if graph.clip_norm else 0
    if len(request.norms) > known or not all(
        math.isfinite(norm) and norm >= 0 for norm in request.norms
    ):
        return "the norms of the last decided steps cannot be"
    return ""


def _bad(detail: str) -> common_pb2.Refusal:
    return _no("BAD_REQUEST", detail)


def _no(code: str, detail: str) -> common_pb2.Refusal:
    return refusal(f"REFUSAL_CODE_{code}", detail)
