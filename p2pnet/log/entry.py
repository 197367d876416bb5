"""The limits of one log entry, and what is inside it. Pure (DESIGN D6).

Entries are written in one way only (canonical protobuf), so that an entry has one
digest. Everything that a claim, a commit or a closing names is bounded here,
before anything else looks at it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from p2pnet import keys
from p2pnet.dht.canonical import parse_canonical
from p2pnet.dht.manifest import check_keepers, check_network_id
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.v1 import common_pb2, log_pb2, records_pb2

ENTRY_BYTES_MAX = 4 << 20
STATES_MAX = 10_000  # VNodes of a network
HOSTS_MAX = 10_000
HOLDERS_MAX = 16
STANDBYS_MAX = 2  # of one VNode
VNODE_CHARS_MAX = 64
NUMBER_MAX = 2**53  # of epochs, steps and slots
REASON_CHARS_MAX = 200
_CANCELLATION_BYTES_MAX = 2 << 10


def parse_entry(signed: common_pb2.Signed) -> log_pb2.LogEntry:
    """The entry inside a signed one, with its limits checked but not its signature.

    Raises:
        MalformedError: too large, not an entry, or out of its limits.
    """
    if len(signed.payload) > ENTRY_BYTES_MAX:
        raise MalformedError(f"a log entry has at most {ENTRY_BYTES_MAX >> 20} MiB")
    entry = parse_canonical(log_pb2.LogEntry, signed.payload, ENTRY_BYTES_MAX)
    check_network_id(entry.network_id)
    if not 1 <= entry.slot <= NUMBER_MAX:
        raise MalformedError("a log entry has no slot")
    check_keepers(entry.keepers)
    what = entry.WhichOneof("what")
    if what == "claim":
        _check_claim(entry.claim)
    elif what == "commit":
        _check_commit(entry.commit)
    elif what != "closing":
        raise MalformedError("a log entry is neither a claim nor a commit nor a closing")
    return entry


def open_cancellation(
    signed: common_pb2.Signed, network_id: str, manifest: records_pb2.Manifest
) -> log_pb2.Cancellation:
    """The owner's word that a network ends.

    Raises:
        MalformedError: not a cancellation.
        ForgedError: not signed by the network's owner, or of another network.
    """
    cancellation = parse_canonical(log_pb2.Cancellation, signed.payload, _CANCELLATION_BYTES_MAX)
    keys.verify(keys.CANCELLATION, signed)
    if signed.public_key != manifest.owner:
        raise ForgedError("a cancellation that another than the network's owner signed")
    if cancellation.network_id != network_id:
        raise ForgedError(f"a cancellation is network {cancellation.network_id[:64]!r}'s")
    if len(cancellation.reason) > REASON_CHARS_MAX:
        raise MalformedError("a cancellation has too long a reason")
    return cancellation


def _check_claim(claim: log_pb2.Claim) -> None:
    if not 1 <= claim.epoch <= NUMBER_MAX or len(claim.reason) > REASON_CHARS_MAX:
        raise MalformedError("a claim has no epoch or too long a reason")
    keys.public_key_of(claim.orchestrator)
    hosts = list(claim.hosts)
    if len(hosts) > HOSTS_MAX or hosts != sorted(dict.fromkeys(hosts)):
        raise MalformedError(f"a claim names up to {HOSTS_MAX} hosts, sorted, each once")
    for host in hosts:
        keys.public_key_of(host)
    if len(claim.placement) > STATES_MAX:
        raise MalformedError(f"a claim places at most {STATES_MAX} VNodes")
    _check_vnodes(claim.placement)
    if any(index >= len(hosts) for index in claim.placement.values()):
        raise MalformedError("a claim places a VNode on a host that it does not name")
    for vnode, standbys in claim.standbys.items():
        following = list(standbys.hosts)
        if (
            vnode not in claim.placement
            or not 1 <= len(following) <= STANDBYS_MAX
            or len(dict.fromkeys((claim.placement[vnode], *following))) <= len(following)
            or max(following) >= len(hosts)
        ):
            raise MalformedError("a claim names standbys that cannot be")
    if claim.from_step > NUMBER_MAX:
        raise MalformedError("a claim goes back to no possible step")
    if len(claim.genesis.states) > STATES_MAX:
        raise MalformedError(f"a genesis names at most {STATES_MAX} states")
    _check_states(claim.genesis.states)


def _check_commit(commit: log_pb2.Commit) -> None:
    if not 1 <= commit.epoch <= NUMBER_MAX or commit.step > NUMBER_MAX:
        raise MalformedError("a commit has no epoch or no possible step")
    if not 1 <= len(commit.states) <= STATES_MAX:
        raise MalformedError(f"a commit names 1 to {STATES_MAX} states")
    _check_states(commit.states)


def _check_states(states: Mapping[str, common_pb2.BlobRef]) -> None:
    _check_vnodes(states)
    for blob in states.values():
        if len(blob.digest) != 32 or len(blob.holders) > HOLDERS_MAX:
            raise MalformedError("a log entry names a state that cannot be")


def _check_vnodes(names: Iterable[str]) -> None:
    if any(not 1 <= len(name) <= VNODE_CHARS_MAX for name in names):
        raise MalformedError(f"a VNode's name has 1 to {VNODE_CHARS_MAX} characters")
