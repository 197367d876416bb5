"""A shell: the DHT as a user looks into it, through a node's control socket.

What comes back are dicts as `p2pnet dht ... --json` prints them: keys that people
script. A KEY is a network's name or id, NAME/VNODE, or a CID.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from p2pnet.client.session import Session
from p2pnet.dht.keyspace import cid_of, key_of_cid, name_key, network_key, vnode_key
from p2pnet.dht.records import ALLOCATION, NETWORK, SERVICE
from p2pnet.dht.service import open_service, parse_signed
from p2pnet.errors import MalformedError, NotFoundError, UsageError
from p2pnet.keys import peer_id_bytes, peer_id_of
from p2pnet.service_file import to_json
from p2pnet.v1 import common_pb2, control_pb2, records_pb2

_MULTIHASHES = (b"\x00\x24", b"\x12\x20")  # identity of an Ed25519 key, sha2-256 of another


async def find_peer(session: Session, peer_id: str) -> dict[str, Any]:
    """Where a peer may be reached: {"peer_id", "addrs"}.

    Raises:
        UsageError: not a peer id.
        NotFoundError: nobody knows it.
    """
    _check_peer_id(peer_id)
    request = control_pb2.FindPeerRequest(peer_id=peer_id)
    reply = await session.control("FindPeer", request, control_pb2.FindPeerReply)
    if not reply.HasField("peer"):
        raise NotFoundError(
            f"no peer of the network knows {peer_id}: check the id, or whether it is in "
            "`p2pnet members`"
        )
    return _peer_json(reply.peer)


async def get(session: Session, text: str) -> list[dict[str, Any]]:
    """The records under a KEY, the newest of each author first.

    Raises:
        NotFoundError: there is none.
    """
    keys = await _keys_of(session, text)
    request = control_pb2.GetRecordsRequest(keys=keys)
    reply = await session.control("GetRecords", request, control_pb2.GetRecordsReply)
    if not reply.records:
        raise NotFoundError(
            f"the DHT has no record under {text!r}: check the name or the CID; records of a "
            "network that has stopped run out within a minute or so"
        )
    return [_record_json(held) for held in reply.records]


async def providers(session: Session, text: str) -> list[dict[str, Any]]:
    """Who says that it provides a CID or hosts NAME/VNODE: {"peer_id", "addrs"} each.

    Raises:
        UsageError: neither of them.
        NotFoundError: no such network or VNode.
    """
    request = control_pb2.FindProvidersRequest(key=await _provider_key(session, text))
    reply = await session.control("FindProviders", request, control_pb2.FindProvidersReply)
    return [_peer_json(peer) for peer in reply.peers]


async def stats(session: Session) -> dict[str, int | float | None]:
    """Counts of the node's own part in the DHT."""
    reply = await session.control("DhtStats", control_pb2.DhtStatsRequest(),
                                  control_pb2.DhtStatsReply)  # fmt: skip
    counts: dict[str, int | float | None] = json.loads(reply.json)
    return counts


def _check_peer_id(text: str) -> None:
    try:
        raw = peer_id_bytes(text)
    except MalformedError:
        raw = b""
    if raw[:2] not in _MULTIHASHES or len(raw) != 2 + raw[1]:
        raise UsageError(
            f"{text[:80]!r} is not a peer id: one looks like 12D3KooW… and stands in "
            "`p2pnet members --json`"
        )


async def _keys_of(session: Session, text: str) -> list[bytes]:
    if "/" in text:
        return [await _vnode_key(session, text)]
    try:
        return [key_of_cid(text)]
    except UsageError:
        return [name_key(text), network_key(text)]


async def _provider_key(session: Session, text: str) -> bytes:
    if "/" in text:
        return await _vnode_key(session, text)
    try:
        return key_of_cid(text)
    except UsageError:
        raise UsageError(
            f"{text[:120]!r} is neither NAME/VNODE nor the CID of a SHA-256 (bafkrei… or Qm…): "
            "`p2pnet whereis NAME --json` has the CID of each VNode"
        ) from None


async def _vnode_key(session: Session, text: str) -> bytes:
    name, _, vnode = text.partition("/")
    network = await session.find(name)
    if vnode not in network.vnodes:
        raise NotFoundError(
            f"network {network.name} has no VNode {vnode!r}: it has {', '.join(network.vnodes)}"
        )
    return vnode_key(network.network_id, vnode)


def _peer_json(peer: control_pb2.PeerAddrs) -> dict[str, Any]:
    return {"peer_id": peer.peer_id, "addrs": list(peer.addrs)}


def _record_json(held: records_pb2.HeldRecord) -> dict[str, Any]:
    record = records_pb2.Record.FromString(held.record.payload)
    kind, content = _CONTENT[record.kind]
    age_s = held.age_ms / 1000
    return {
        "cid": cid_of(record.key),
        "author": peer_id_of(held.record.public_key),
        "kind": kind,
        "epoch": record.epoch,
        "sequence": record.sequence,
        "age_s": age_s,
        "expires_in_s": max(0.0, record.ttl_s - age_s),
        "content": content(record.body),
    }


def _allocation_json(body: bytes) -> dict[str, Any]:
    signed = common_pb2.Signed.FromString(body)
    allocation = records_pb2.Allocation.FromString(signed.payload)
    return {
        "network_id": allocation.network_id,
        "vnode": allocation.vnode,
        "host": allocation.host,
        "addrs": list(allocation.addrs),
        "claimant": allocation.claimant,
        "role": allocation.role,
        "lease_s": allocation.lease_s,
        "owner": peer_id_of(allocation.manifest.public_key),
    }


def _network_json(body: bytes) -> dict[str, Any]:
    network = records_pb2.NetworkRecord.FromString(body)
    return {
        "network_id": network.network_id,
        "name": network.name,
        "orchestrator": network.orchestrator,
        "vnodes": list(network.vnodes),
        "state_url": network.state_url,
        "keepers": list(network.keepers),
        "owner": peer_id_of(network.manifest.public_key),
    }


def _service_json(body: bytes) -> dict[str, Any]:
    return to_json(open_service(parse_signed(body)))


_CONTENT: dict[int, tuple[str, Callable[[bytes], dict[str, Any]]]] = {
    ALLOCATION: ("allocation", _allocation_json),
    NETWORK: ("network", _network_json),
    SERVICE: ("service", _service_json),
}
