"""Nodes that forge: honest but for some of their answers, which they tamper with. Pure.

They stay members and holders in good standing, so that what they forge is looked at.
"""

from __future__ import annotations

import random
from typing import Any

from p2pnet.dht.wire import Kind, Message
from p2pnet.sim.dht_node import DhtNode
from p2pnet.sim.gossip_node import GossipNode
from p2pnet.sim.machine import Machine
from p2pnet.v1 import gossip_pb2, records_pb2

_SHARE = 0.3  # of its answers


class ForgingHolder(DhtNode):
    """Hands out records of a higher epoch than their authors signed."""

    def __init__(self, machine: Machine, **kwargs: Any) -> None:
        self._lies: random.Random = machine.world.rng_of("forged records", machine.number)
        super().__init__(machine, **kwargs)

    def serve(self, peer_id: str, payload: Message | bytes) -> Message | bytes | None:
        """See `Program`."""
        reply = super().serve(peer_id, payload)
        if (
            isinstance(reply, Message)
            and reply.kind is Kind.GET_VALUE
            and reply.value is not None
            and self._lies.random() < _SHARE
        ):
            return Message(reply.kind, reply.key, _forged_set(reply.value), reply.closer)
        return reply


class ForgingMember(GossipNode):
    """Tells of others in incarnations that they never had."""

    def __init__(self, machine: Machine, **kwargs: Any) -> None:
        self._lies: random.Random = machine.world.rng_of("forged adverts", machine.number)
        super().__init__(machine, **kwargs)

    def serve(self, peer_id: str, payload: bytes) -> bytes | None:
        """See `Program`."""
        reply = super().serve(peer_id, payload)
        if reply is None or self._lies.random() >= _SHARE:
            return reply
        message = gossip_pb2.GossipMessage.FromString(reply)
        for signed in message.adverts:
            advert = gossip_pb2.Advert.FromString(signed.payload)
            advert.incarnation += 1
            signed.payload = advert.SerializeToString(deterministic=True)
        return message.SerializeToString()


def _forged_set(value: bytes) -> bytes:
    """The same records, an epoch higher, under the signatures that they had."""
    held = records_pb2.RecordSet.FromString(value)
    for entry in held.records:
        record = records_pb2.Record.FromString(entry.record.payload)
        body = records_pb2.NetworkRecord.FromString(record.body)
        record.epoch = body.epoch = body.epoch + 1
        record.body = body.SerializeToString(deterministic=True)
        entry.record.payload = record.SerializeToString(deterministic=True)
    return held.SerializeToString()
