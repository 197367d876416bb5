"""The service that a node serves: found in the DHT, kept there and on disk; and its file."""

from __future__ import annotations

import json
import logging
import random
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from p2pnet import service as shell
from p2pnet import service_file
from p2pnet.dht import service as core
from p2pnet.dht.keyspace import service_key
from p2pnet.dht.records import SERVICE, make_record
from p2pnet.dht.shell import Dht
from p2pnet.errors import ForgedError, LocalError, UsageError
from p2pnet.events import EventBus
from p2pnet.keys import KeyPair
from p2pnet.net.memory import MemoryFabric
from p2pnet.service import Scope
from p2pnet.service_file import Pin
from p2pnet.v1 import records_pb2

WALL_MS = 1_800_000_000_000
GOVERNORS = sorted(
    (KeyPair.from_seed(bytes([n]) * 32) for n in (101, 102, 103)), key=lambda k: k.public_key
)
NODES = [KeyPair.from_seed(bytes([n]) * 32) for n in range(1, 4)]
STRANGER = KeyPair.from_seed(bytes([9]) * 32)
OWNER = STRANGER.public_key  # of networks that no list names by their owner
KEYS = [governor.public_key for governor in GOVERNORS]
ID = core.service_id_of("club", 2, KEYS)
ONE, TWO = "1" * 32, "2" * 32
PIN = Pin(ID)


def signed(
    version: int, networks: Sequence[str], by: Sequence[KeyPair] = GOVERNORS[:2]
) -> records_pb2.SignedService:
    """A list, by two of three governors."""
    payload = core.make_payload("club", 2, KEYS, version=version, networks=networks)
    return records_pb2.SignedService(
        payload=payload, signatures=[core.sign(payload, governor) for governor in by]
    )


class World:
    """Three nodes of one DHT, in a virtual time that jumps over waits."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.nursery = nursery
        self.dhts: list[Dht] = []

    async def start(self) -> None:
        """They meet through the first."""
        fabric = MemoryFabric()
        for n, node in enumerate(NODES):
            network = fabric.network(node, f"/ip4/127.0.0.1/tcp/{4000 + n}")
            dht = Dht(network, rng=random.Random(n), now=trio.current_time, wall_ms=self.wall_ms)
            if n:
                first = (NODES[0].peer_id, ["/ip4/127.0.0.1/tcp/4000"])
                await network.connect(*first, timeout_s=1)
                dht.seen(*first)
            await self.nursery.start(dht.run)
            await trio.testing.wait_all_tasks_blocked()
            self.dhts.append(dht)

    def wall_ms(self) -> int:
        """The same second for all."""
        return WALL_MS

    def scope(self, n: int, pin: Pin | None = PIN) -> Scope:
        """Node n's, as its data dir and the pin say."""
        return Scope(
            self.directory / f"n{n}", pin, self.dhts[n], NODES[n], EventBus(),
            rng=random.Random(n), wall_ms=self.wall_ms,
        )  # fmt: skip

    async def run(self, n: int, pin: Pin | None = PIN) -> Scope:
        """The same, looking for newer manifests from now on."""
        scope = self.scope(n, pin)
        self.nursery.start_soon(scope.run)
        return scope


def in_world(directory: Path, test: Callable[[World], Awaitable[None]]) -> None:
    """Runs a test among three nodes."""

    async def main() -> None:
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                world = World(directory, nursery)
                await world.start()
                await test(world)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def has_come_to_serve(scope: Scope, network_id: str) -> bool:
    """After the next refresh at the latest."""
    await trio.sleep(2 * shell.REFRESH_S)
    return not scope.serves(network_id, OWNER)


@pytest.fixture(autouse=True)
def files_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps over waits does not wait for threads."""

    async def run_sync(sync_fn: Callable[..., Any], *args: Any) -> Any:
        return sync_fn(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)


def test_an_open_node_serves_anything(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        scope = world.scope(0, None)
        await scope.run()  # has nothing to do
        assert scope.serves(ONE, OWNER) == ""
        assert scope.describe() is None

    in_world(tmp_path, test)


def test_until_a_manifest_is_found_nothing_is_served(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        pinned = await world.run(0)
        await trio.sleep(5)
        assert "not found" in pinned.serves(ONE, OWNER)
        assert pinned.describe() == {"id": ID, "version": 0}
        await world.scope(1, None).publish(signed(1, [ONE]))  # through an open node
        assert await has_come_to_serve(pinned, ONE)
        assert "does not list" in pinned.serves(TWO, OWNER)

    in_world(tmp_path, test)


def test_a_file_with_enough_signatures_is_enough_to_begin(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        scope = world.scope(0, Pin(ID, signed(1, [ONE])))
        assert scope.serves(ONE, OWNER) == ""

    in_world(tmp_path, test)


def test_a_newer_version_replaces_the_list(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        first, second = await world.run(0), await world.run(1)
        await first.publish(signed(1, [ONE]))
        assert first.serves(ONE, OWNER) == ""  # who publishes does not wait for the DHT
        assert await has_come_to_serve(second, ONE)
        await first.publish(signed(2, [TWO]))
        assert await has_come_to_serve(second, TWO)
        assert second.serves(ONE, OWNER) != ""

    in_world(tmp_path, test)


def test_an_old_list_is_refused_after_a_restart_too(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        scope = world.scope(0)
        await scope.publish(signed(1, [ONE]))
        await scope.publish(signed(2, [TWO]))
        again = world.scope(0, Pin(ID, signed(1, [ONE])))  # and its user's file is the old one
        assert again.serves(TWO, OWNER) == ""
        assert again.serves(ONE, OWNER) != ""
        old = make_record(
            STRANGER, service_key(ID), SERVICE, epoch=1, sequence=1 << 60, ttl_s=3600,
            issued_at_ms=WALL_MS, body=signed(1, [ONE]).SerializeToString(deterministic=True),
        )  # fmt: skip
        await world.dhts[1].put(old)
        world.nursery.start_soon(again.run)
        await trio.sleep(3 * shell.REFRESH_S)
        assert again.serves(ONE, OWNER) != ""

    in_world(tmp_path, test)


def test_who_pins_a_service_keeps_its_manifest_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "PUBLISHED_TTL_S", 600)
    monkeypatch.setattr(shell, "KEPT_TTL_S", 300)

    async def test(world: World) -> None:
        await world.scope(2, None).publish(signed(1, [ONE]))
        pinned = await world.run(0)
        assert await has_come_to_serve(pinned, ONE)
        await trio.sleep(1500)  # what was published has long run out
        late = await world.run(1)
        assert await has_come_to_serve(late, ONE)

    in_world(tmp_path, test)


@pytest.mark.parametrize(
    ("offered", "said"),
    [
        (signed(1, [ONE], GOVERNORS[:1]), "2 of the 3 governors of club have to sign, and 1 did"),
        (signed(1, [TWO]), "version 2 is there already"),
        (signed(2, [ONE]), "version 2 is there already"),
    ],
    ids=["too-few", "older", "same-version-other-list"],
)
def test_what_cannot_be_published(
    tmp_path: Path, offered: records_pb2.SignedService, said: str
) -> None:
    async def test(world: World) -> None:
        publisher = world.scope(0, None)
        await publisher.publish(signed(2, [TWO]))
        with pytest.raises(UsageError, match=said):
            await world.scope(1, None).publish(offered)
        await publisher.publish(signed(2, [TWO], GOVERNORS[1:]))  # the same, said again

    in_world(tmp_path, test)


def test_two_lists_of_one_version_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(world: World) -> None:
        scope = world.scope(0, Pin(ID, signed(1, [ONE])))
        world.nursery.start_soon(scope.run)
        await trio.sleep(1)
        twin = make_record(
            STRANGER, service_key(ID), SERVICE, epoch=1, sequence=1, ttl_s=3600,
            issued_at_ms=WALL_MS, body=signed(1, [TWO]).SerializeToString(deterministic=True),
        )  # fmt: skip
        await world.dhts[1].put(twin)
        await trio.sleep(5 * shell.REFRESH_S)
        assert scope.serves(ONE, OWNER) == ""

    with caplog.at_level(logging.WARNING, "p2pnet.service"):
        in_world(tmp_path, test)
    (said,) = caplog.messages
    assert "two different lists as version 1" in said


def test_a_damaged_file_is_named_and_not_thrown_away(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.scope(0).publish(signed(1, [ONE]))
        file = tmp_path / "n0" / ID
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(LocalError, match=f"{file}.*take it away"):
            world.scope(0)
        assert file.exists()

    in_world(tmp_path, test)


# The file


def draft() -> dict[str, Any]:
    """What a volunteer is given to pin."""
    return {"name": "club", "threshold": 2, "governors": [g.peer_id for g in GOVERNORS]}


def test_a_file_of_governors_is_enough_to_pin(tmp_path: Path) -> None:
    file = tmp_path / "club.json"
    file.write_text(json.dumps(draft()))
    assert service_file.read_pin(str(file)) == PIN
    as_hex = draft() | {"governors": [key.hex() for key in KEYS[::-1]]}
    file.write_text(json.dumps(as_hex))
    assert service_file.read_pin(str(file)) == PIN
    assert service_file.read_pin(ID) == PIN


def test_a_file_is_signed_by_one_after_the_other(tmp_path: Path) -> None:
    file = tmp_path / "club.json"
    whole = signed(3, [ONE], by=())
    service_file.write(file, whole)
    assert service_file.read(file) == whole
    for governor in (GOVERNORS[2], GOVERNORS[0], GOVERNORS[0]):  # in any order, one of them twice
        service_file.write(file, service_file.with_signature(service_file.read(file), governor))
    pin = service_file.read_pin(str(file))
    assert pin.signed is not None
    assert core.open_service(pin.signed).signers == (KEYS[0], KEYS[2])
    with pytest.raises(UsageError, match="none of the 3 governors"):
        service_file.with_signature(pin.signed, STRANGER)


def test_a_list_that_was_changed_after_it_was_signed(tmp_path: Path) -> None:
    file = tmp_path / "club.json"
    service_file.write(file, signed(1, [ONE]))
    file.write_text(file.read_text().replace(ONE, TWO))
    with pytest.raises(UsageError, match="whoever changed it has to have it signed again"):
        service_file.read_pin(str(file))
    with pytest.raises(ForgedError):
        service_file.with_signature(service_file.read(file), GOVERNORS[2])


BAD: dict[str, tuple[Any, str]] = {
    "noise": ("noise", "is not JSON"),
    "a list": ([], "is an object with"),
    "unknown field": (draft() | {"network": [ONE]}, "has no 'network'"),
    "no name": ({k: v for k, v in draft().items() if k != "name"}, "a service name has"),
    "a text for a number": (draft() | {"threshold": "2"}, "'threshold' has to be a whole number"),
    "true for a number": (draft() | {"threshold": True}, "'threshold' has to be a whole number"),
    "too large a number": (draft() | {"version": 1 << 70}, "'version' is out of range"),
    "too high a threshold": (draft() | {"threshold": 4}, "4 governors have to sign"),
    "no key": (draft() | {"governors": ["me"]}, "'me' is not a public key"),
    "numbers for keys": (draft() | {"governors": [1]}, "'governors' is a list of texts"),
    "no network id": (draft() | {"networks": ["digits"]}, "'digits' is not a network id"),
    "a network twice": (draft() | {"networks": [ONE, ONE]}, "one of them twice"),
    "half a signature": (draft() | {"signatures": [{"governor": "me"}]}, "a signature is"),
    "no base64": (
        draft() | {"signatures": [{"governor": GOVERNORS[0].peer_id, "signature": "*"}]},
        "is not JSON|base64",
    ),
}


@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: Any, said: str) -> None:
    file = tmp_path / "club.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError, match=said) as error:
        service_file.read_pin(str(file))
    assert str(file) in str(error.value)


def test_neither_an_id_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a service's id"):
        service_file.read_pin(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="there is no file"):
        service_file.read(tmp_path / "nothing")
    big = tmp_path / "big"
    big.write_bytes(bytes(service_file.FILE_BYTES_MAX + 1))
    with pytest.raises(UsageError):
        service_file.read(big)


def test_only_its_user_reads_what_a_node_keeps(tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await world.scope(0).publish(signed(1, [ONE]))
        assert stat.S_IMODE((tmp_path / "n0").stat().st_mode) == 0o700

    in_world(tmp_path, test)
