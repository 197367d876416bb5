"""A shell: the service that a node is told to serve, found in the DHT and kept on disk.

A node without one is open: it hosts any network. One that pins a service hosts what the
service's newest manifest lists, and until it has found one, nothing.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from p2pnet import clock
from p2pnet.datadir import read_whole, write_whole
from p2pnet.dht import service as core
from p2pnet.dht.keyspace import service_key
from p2pnet.dht.records import SERVICE, make_record, next_sequence
from p2pnet.dht.service import Newest, Service, Verdict
from p2pnet.dht.shell import Dht
from p2pnet.errors import LocalError, P2PNetError, RemoteError, ResourceError, UsageError
from p2pnet.events import EventBus
from p2pnet.keys import KeyPair
from p2pnet.sealed import HEAD_BYTES, seal, unseal
from p2pnet.service_file import Pin, to_json
from p2pnet.v1 import common_pb2, records_pb2

logger = logging.getLogger(__name__)

REFRESH_S = 60.0  # and up to half as much again, so that a thousand nodes do not ask at once
RETRY_S = 2.0  # while nothing is known
GET_TIMEOUT_S = 10.0
PUT_TIMEOUT_S = 10.0
# Anybody who pins a service keeps its manifest in the DHT, but not all of them at once.
COPIES_MIN = 4
COPIES_MAX = 12
KEPT_TTL_S = 3600
PUBLISHED_TTL_S = 24 * 3600

_KIND = b"serv"
_VERSION = 1
_FILE_BYTES_MAX = core.SIGNED_BYTES_MAX + HEAD_BYTES


class Scope:
    """Which networks this node takes part in.

    Everything but `serves` and `describe`, which any thread may call, lives on trio.
    """

    def __init__(
        self,
        directory: Path,
        pin: Pin | None,
        dht: Dht,
        keypair: KeyPair,
        events: EventBus,
        *,
        rng: random.Random,
        wall_ms: Callable[[], int] = clock.wall_ms,
    ) -> None:
        """Reads what was known before.

        Raises:
            LocalError: the file of it is damaged; nothing is thrown away.
        """
        self._dht = dht
        self._keypair = keypair
        self._events = events
        self._rng = rng
        self._wall_ms = wall_ms
        self._newest: Newest | None = None
        self._kept_version = 0  # that our own record in the DHT is of; 0: we have none
        self._sequence = 0
        self._unsaved = False
        self._twins: set[int] = set()  # versions of which two lists were met, and said so
        if pin is not None:
            self._newest = Newest(pin.service_id)
            self._file = directory / pin.service_id
            self._recall(self._newest)
            if pin.signed is not None:
                self._take(pin.signed)

    def serves(self, network_id: str, owner: bytes) -> str:
        """As `dht.service.Serves`: "", or why this node takes no part in a network."""
        return "" if self._newest is None else self._newest.serves(network_id, owner)

    def describe(self) -> dict[str, Any] | None:
        """The service, as `p2pnet service show --json` prints it; None: open to any network."""
        if self._newest is None:
            return None
        if self._newest.service is None:
            return {"id": self._newest.service_id, "version": 0}
        return to_json(self._newest.service)

    async def run(self) -> None:
        """Looks for newer manifests and keeps the newest in the DHT, until cancelled."""
        if self._newest is None:
            return
        if self._newest.service is None:
            logger.warning(
                "the manifest of the service %s is not found yet: until then this node hosts "
                "nothing", self._newest.service_id,
            )  # fmt: skip
        while True:
            await self._refresh(self._newest)
            known = self._newest.service is not None
            await trio.sleep(REFRESH_S * self._rng.uniform(1, 1.5) if known else RETRY_S)

    async def publish(self, signed: records_pb2.SignedService) -> Service:
        """Puts a manifest that its governors signed into the DHT, whether pinned here or not.

        Raises:
            UsageError: too few signed, or its version is not above what is there.
            UnreachableError: nobody took it.
        """
        try:
            service = core.open_service(signed)
        except RemoteError as error:
            raise UsageError(f"this cannot be published: {error}") from None
        key = service_key(service.service_id)
        ours = self._newest is not None and self._newest.service_id == service.service_id
        known = Newest(service.service_id)
        if ours and self._newest is not None and self._newest.signed is not None:
            known.take(self._newest.signed)
        for record in await self._dht.get(key, GET_TIMEOUT_S):
            if isinstance(record.content, records_pb2.SignedService):
                known.take(record.content)
        if known.take(signed) in (Verdict.OLDER, Verdict.TWIN) and known.service is not None:
            raise UsageError(
                f"version {service.version} of {service.name} cannot be published: version "
                f"{known.service.version} is there already; write a higher one"
            )
        await self._dht.put(self._make(key, signed, PUBLISHED_TTL_S), PUT_TIMEOUT_S)
        if ours:
            self._take(signed)
            await self._save()
        return service

    async def _refresh(self, newest: Newest) -> None:
        try:
            found = await self._dht.get(service_key(newest.service_id), GET_TIMEOUT_S)
        except P2PNetError as error:
            logger.info("the service %s could not be looked up: %s", newest.service_id, error)
            return
        for record in found:
            if isinstance(record.content, records_pb2.SignedService):
                self._take(record.content)
        await self._save()
        if newest.service is None:
            return
        copies = sum(record.epoch == newest.service.version for record in found)
        if copies < COPIES_MIN or 0 < self._kept_version < newest.service.version:
            self._keep(newest)
        elif copies > COPIES_MAX and self._kept_version:
            self._dht.unkeep(service_key(newest.service_id))
            self._kept_version = 0

    def _take(self, signed: records_pb2.SignedService) -> None:
        newest = self._newest
        assert newest is not None
        before = newest.service
        try:
            verdict = newest.take(signed)
        except RemoteError as error:  # only from a file of our user's: the DHT has checked
            logger.warning("a manifest of the service does not hold: %s", error)
            return
        service = newest.service
        if verdict is Verdict.TWIN and service is not None:
            self._warn_of_twin(service)
        if verdict is not Verdict.NEW or service is None:
            return
        self._unsaved = True
        gone = [] if before is None else [n for n in before.networks if n not in service.networks]
        logger.info("the service %s is at version %d", service.name, service.version)
        self._events.emit(
            "service",
            service=service.service_id,
            version=service.version,
            networks=list(service.networks),
            no_longer=gone,
        )

    def _warn_of_twin(self, service: Service) -> None:
        if service.version in self._twins:
            return
        self._twins.add(service.version)
        logger.warning(
            "the governors of %s signed two different lists as version %d: this node goes on "
            "with the one that it met first, and a version %d would settle it",
            service.name, service.version, service.version + 1,
        )  # fmt: skip

    def _keep(self, newest: Newest) -> None:
        """Puts our own copy, and keeps it alive."""
        assert newest.service is not None
        if self._kept_version == newest.service.version:
            return
        key = service_key(newest.service_id)

        def make() -> common_pb2.Signed:
            assert newest.signed is not None
            return self._make(key, newest.signed, KEPT_TTL_S)

        self._dht.keep(key, make)
        self._kept_version = newest.service.version

    def _make(self, key: bytes, signed: records_pb2.SignedService, ttl_s: int) -> common_pb2.Signed:
        now_ms = self._wall_ms()
        self._sequence = next_sequence(self._sequence, now_ms)
        return make_record(
            self._keypair,
            key,
            SERVICE,
            epoch=core.open_service(signed).version,
            sequence=self._sequence,
            ttl_s=ttl_s,
            issued_at_ms=now_ms,
            body=signed.SerializeToString(deterministic=True),
        )

    # On disk, so that an old list is refused after a restart too

    def _recall(self, newest: Newest) -> None:
        data = read_whole(self._file, _FILE_BYTES_MAX)
        if data is None:
            return
        try:
            newest.take(core.parse_signed(unseal(_KIND, _VERSION, data)))
        except (LocalError, RemoteError) as error:
            raise LocalError(
                f"{self._file} cannot be used: {error}; take it away to start from what the "
                "network says"
            ) from None

    async def _save(self) -> None:
        """Tried again at each refresh until it is done."""
        if not self._unsaved or self._newest is None or self._newest.signed is None:
            return
        data = seal(_KIND, _VERSION, self._newest.signed.SerializeToString(deterministic=True))
        try:
            await trio.to_thread.run_sync(self._write, data)
            self._unsaved = False
        except (OSError, ResourceError) as error:
            logger.warning("the service's manifest is not kept beyond a restart: %s", error)

    def _write(self, data: bytes) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(self._file, data)
