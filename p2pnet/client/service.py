"""A shell: services as their governors handle them, through a node's control socket."""

from __future__ import annotations

import json
from typing import Any

from p2pnet.client.session import Session
from p2pnet.dht.keyspace import service_key
from p2pnet.dht.service import Newest
from p2pnet.errors import NotFoundError, UsageError
from p2pnet.service_file import to_json
from p2pnet.v1 import control_pb2, records_pb2


async def publish(session: Session, signed: records_pb2.SignedService) -> dict[str, Any]:
    """Has the node put a signed manifest into the DHT.

    Raises:
        UsageError: too few governors signed, or its version is not above what is there.
    """
    request = control_pb2.ServiceRequest(publish=signed)
    reply = await session.control("Service", request, control_pb2.ServiceReply)
    published: dict[str, Any] = json.loads(reply.json)
    return published


async def pinned(session: Session) -> dict[str, Any] | None:
    """The service that the node serves, None where it is open to any network."""
    reply = await session.control("Service", control_pb2.ServiceRequest(), control_pb2.ServiceReply)
    shown: dict[str, Any] | None = json.loads(reply.json)
    return shown


async def find(session: Session, service_id: str) -> dict[str, Any]:
    """The newest manifest of a service that the DHT has; raises NotFoundError."""
    request = control_pb2.GetRecordsRequest(keys=[service_key(service_id)])
    reply = await session.control("GetRecords", request, control_pb2.GetRecordsReply)
    newest = Newest(service_id)
    for held in reply.records:
        record = records_pb2.Record.FromString(held.record.payload)
        newest.take(records_pb2.SignedService.FromString(record.body))
    if newest.service is None:
        raise NotFoundError(
            f"the DHT has no manifest of the service {service_id}: check the id, or have it "
            "published with `p2pnet service publish`"
        )
    return to_json(newest.service)


def check_open(shown: dict[str, Any] | None) -> dict[str, Any]:
    """What `pinned` says; raises UsageError for an open node."""
    if shown is None:
        raise UsageError(
            "this node is open: it hosts networks of anybody; `p2pnet join --service` limits it"
        )
    return shown
