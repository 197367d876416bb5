"""A shell: what an orchestrator says of a network in the DHT, and keeps saying."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from p2pnet.clock import wall_ms
from p2pnet.dht.keyspace import name_key, network_key, vnode_key
from p2pnet.dht.records import make_record, next_sequence
from p2pnet.errors import P2PNetError
from p2pnet.swarm import Swarm
from p2pnet.v1 import common_pb2, records_pb2

logger = logging.getLogger(__name__)

# A network waits for its records this long and then goes on: they are hints,
# and are put again until they are there.
PUBLISH_TIMEOUT_S = 3.0


class Publisher:
    """The records of one network: where each VNode lives, and who looks after it."""

    def __init__(
        self,
        swarm: Swarm,
        network_id: str,
        name: str,
        manifest: common_pb2.Signed,
        state_url: str,
        ttl_s: int,
    ) -> None:
        self._swarm = swarm
        self._network_id = network_id
        self._name = name
        self._manifest = manifest
        self._state_url = state_url
        self._ttl_s = ttl_s
        self._sequence = 0
        self._keys: dict[bytes, None] = {}

    async def publish(
        self,
        epoch: int,
        acceptances: Sequence[common_pb2.Signed],
        vnodes: Sequence[str],
        keepers: Sequence[str],
    ) -> None:
        """Puts the records of an epoch and keeps them alive until the next one's."""
        network = records_pb2.NetworkRecord(
            network_id=self._network_id,
            name=self._name,
            manifest=self._manifest,
            epoch=epoch,
            orchestrator=self._swarm.keypair.peer_id,
            vnodes=vnodes,
            state_url=self._state_url,
            keepers=keepers,
        ).SerializeToString(deterministic=True)
        jobs = [
            (key, self._maker(key, records_pb2.RECORD_KIND_NETWORK, epoch, network))
            for key in (name_key(self._name), network_key(self._network_id))
        ]
        for accepted in acceptances:
            allocation = records_pb2.Allocation.FromString(accepted.payload)
            key = vnode_key(self._network_id, allocation.vnode)
            body = accepted.SerializeToString(deterministic=True)
            jobs.append((key, self._maker(key, records_pb2.RECORD_KIND_ALLOCATION, epoch, body)))
        self._keys.update(dict.fromkeys(key for key, _ in jobs))
        puts = [asyncio.ensure_future(self._swarm.keep_record(*job)) for job in jobs]
        _, late = await asyncio.wait(puts, timeout=PUBLISH_TIMEOUT_S)
        for put in puts:
            put.add_done_callback(_note)
        if late:
            logger.info("network %s: %d records are not in the DHT yet", self._name, len(late))

    async def close(self) -> None:
        """Lets the records run out."""
        keys, self._keys = self._keys, {}  # once: another may keep them afterwards
        for key in keys:
            try:
                await self._swarm.drop_record(key)
            except P2PNetError as error:
                logger.info("a record could not be let go: %s", error)

    def _maker(
        self, key: bytes, kind: records_pb2.RecordKind, epoch: int, body: bytes
    ) -> Callable[[], common_pb2.Signed]:
        """Signs the record afresh each time: only that restarts its TTL."""

        def make() -> common_pb2.Signed:
            now_ms = wall_ms()
            self._sequence = next_sequence(self._sequence, now_ms)
            return make_record(
                self._swarm.keypair,
                key,
                kind=kind,
                epoch=epoch,
                sequence=self._sequence,
                ttl_s=self._ttl_s,
                issued_at_ms=now_ms,
                body=body,
            )

        return make


def _note(put: asyncio.Future[int]) -> None:
    if not put.cancelled() and isinstance(error := put.exception(), P2PNetError):
        logger.info("a record did not reach the DHT: %s", error)
