"""The shell over networks in memory, on trio's mock clock: hours pass in no time."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from gossip_world import keypair

from p2pnet.errors import MalformedError, UnreachableError, VersionError
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.events import MemberChanged, State
from p2pnet.gossip.messages import Kinds, write_message
from p2pnet.gossip.shell import PROTOCOL, Gossip
from p2pnet.gossip.statements import Versions
from p2pnet.net.memory import MemoryFabric, MemoryNetwork

CAPABILITIES = Capabilities(cpus=2.0, memory_bytes=1 << 30, arch="x86_64", devices=("cpu",))


def addr(number: int) -> str:
    return f"/ip4/127.0.0.1/tcp/{4000 + number}"


class Town:
    """Nodes on one fabric. `scopes` end them as a SIGKILL would."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.fabric = MemoryFabric()
        self.nursery = nursery
        self.nodes: dict[int, Gossip] = {}
        self.networks: dict[int, MemoryNetwork] = {}
        self.scopes: dict[int, trio.CancelScope] = {}

    async def start(self, number: int, *, client: bool = False) -> Gossip:
        key = keypair(number)
        listen = () if client else (addr(number),)
        network = self.networks[number] = self.fabric.network(key, *listen)
        gossip = self.nodes[number] = Gossip(
            network,
            key,
            grpc_targets=[f"127.0.0.1:{5000 + number}"],
            certificate_der=b"certificate",
            capabilities=CAPABILITIES,
            incarnation=1000 + int(trio.current_time()),
            rng=random.Random(number),
            now=trio.current_time,
            client=client,
        )
        scope = self.scopes[number] = trio.CancelScope()

        async def run(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            with scope:
                await gossip.run(task_status=task_status)

        await self.nursery.start(run)
        return gossip

    async def join(self, number: int, anchor: int, *, client: bool = False) -> Gossip:
        gossip = await self.start(number, client=client)
        peer_id = keypair(anchor).peer_id
        await self.networks[number].connect(peer_id, [addr(anchor)], timeout_s=5)
        await gossip.sync_with(peer_id)
        return gossip

    async def settle(self, *numbers: int) -> None:
        """Waits until these nodes list exactly one another as alive."""
        wanted = sorted(keypair(number).peer_id for number in numbers)
        with trio.fail_after(60):
            for number in numbers:
                await self.until(self.nodes[number], lambda g: alive(g) == wanted)

    async def until(self, gossip: Gossip, holds: Callable[[Gossip], bool]) -> None:
        """Waits for the change after which `holds`."""
        changed = trio.Event()
        gossip.watch(lambda change: changed.set() if holds(gossip) else None)
        if not holds(gossip):
            await changed.wait()

    def kill(self, number: int) -> None:
        self.scopes[number].cancel()
        self.fabric.kill(keypair(number).peer_id)


def alive(gossip: Gossip) -> list[str]:
    return [m.peer_id for m in gossip.members() if m.state is State.ALIVE]


def state(gossip: Gossip, number: int) -> State | None:
    member = gossip.member(keypair(number).peer_id)
    return member.state if member else None


def run(main: Callable[[Town], Awaitable[None]]) -> None:
    async def outer() -> None:
        async with trio.open_nursery() as nursery:
            await main(Town(nursery))
            nursery.cancel_scope.cancel()

    trio.run(outer, clock=trio.testing.MockClock(autojump_threshold=0))


def test_five_nodes_show_the_same_list_and_notice_a_kill_within_a_second() -> None:
    async def main(town: Town) -> None:
        await town.start(1)
        for number in (2, 3, 4, 5):
            await town.join(number, 1)
        await town.settle(1, 2, 3, 4, 5)
        assert len({tuple(m.advert for m in g.members()) for g in town.nodes.values()}) == 1
        await trio.testing.wait_all_tasks_blocked()
        town.kill(3)
        start = trio.current_time()
        for number in (1, 2, 4, 5):
            with trio.fail_after(20):
                await town.until(town.nodes[number], lambda g: state(g, 3) is State.FAILED)
        assert trio.current_time() - start < 1.5
        await town.settle(1, 2, 4, 5)

    run(main)


def test_a_frozen_node_is_failed_and_comes_back_when_it_thaws() -> None:
    async def main(town: Town) -> None:
        await town.start(1)
        for number in (2, 3, 4):
            await town.join(number, 1)
        await town.settle(1, 2, 3, 4)
        start = trio.current_time()
        town.fabric.freeze(keypair(4).peer_id)
        with trio.fail_after(60):
            await town.until(town.nodes[1], lambda g: state(g, 4) is State.FAILED)
        assert 4 < trio.current_time() - start < 12
        town.fabric.thaw(keypair(4).peer_id)
        await town.settle(1, 2, 3, 4)

    run(main)


def test_leaving_is_told_before_it_returns() -> None:
    async def main(town: Town) -> None:
        await town.start(1)
        for number in (2, 3):
            await town.join(number, 1)
        await town.settle(1, 2, 3)
        with trio.fail_after(1):
            await town.nodes[2].leave(timeout_s=5)
        assert state(town.nodes[1], 2) is State.LEFT
        assert state(town.nodes[3], 2) is State.LEFT
        assert state(town.nodes[2], 2) is State.LEFT

    run(main)


def test_leaving_returns_in_time_though_nobody_answers() -> None:
    async def main(town: Town) -> None:
        await town.start(1)
        await town.join(2, 1)
        await town.settle(1, 2)
        town.fabric.freeze(keypair(1).peer_id)
        start = trio.current_time()
        await town.nodes[2].leave(timeout_s=2)
        assert trio.current_time() - start == pytest.approx(2)

    run(main)


def test_adverts_carry_what_a_caller_needs_and_what_changed() -> None:
    async def main(town: Town) -> None:
        await town.start(1)
        second = await town.join(2, 1)
        await town.settle(1, 2)
        held = town.nodes[1].advert_of(keypair(2).peer_id)
        assert held is not None
        assert held.addrs == (addr(2),)
        assert held.grpc_targets == ("127.0.0.1:5002",)
        assert held.grpc_certificate == b"certificate"
        assert held.capabilities == CAPABILITIES
        assert town.nodes[1].advert_of("nobody") is None
        changes: list[MemberChanged] = []
        town.nodes[1].watch(changes.append)
        second.update_capabilities(Capabilities(cpus=1.0, vnodes=3))
        with trio.fail_after(5):
            await town.until(town.nodes[1], lambda g: bool(changes))
        last = changes[-1]
        assert (last.old, last.new) == (State.ALIVE, State.ALIVE)
        assert last.advert.capabilities.vnodes == 3
        assert last.advert.incarnation == held.incarnation

    run(main)


def test_a_client_sees_all_and_is_seen_by_none() -> None:
    async def main(town: Town) -> None:
        await town.start(1)
        await town.join(2, 1)
        await town.settle(1, 2)
        client = await town.join(3, 1, client=True)
        assert client.synced.is_set()
        assert alive(client) == sorted(keypair(n).peer_id for n in (1, 2))
        await trio.sleep(30)  # the mock clock's
        assert state(town.nodes[1], 3) is None
        assert state(town.nodes[2], 3) is None

    run(main)


def test_a_sync_with_nobody_there_is_unreachable() -> None:
    async def main(town: Town) -> None:
        gossip = await town.start(1)
        with pytest.raises(UnreachableError):
            await gossip.sync_with(keypair(9).peer_id)
        assert not gossip.synced.is_set()

    run(main)


def test_a_sync_with_another_version_says_so_once_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main(town: Town) -> None:
        gossip = await town.start(1)
        stranger = town.fabric.network(keypair(9), addr(9))

        async def refuse(peer_id: str, message: bytes) -> bytes:
            text = "this peer speaks gossip version 7, you speak 1"
            return write_message(Kinds.KIND_REFUSED, Versions(7, 7), detail=text)

        stranger.serve(PROTOCOL, refuse)
        await town.networks[1].connect(stranger.peer_id, [addr(9)], timeout_s=1)
        for _ in range(3):
            with pytest.raises(VersionError, match="version 7, you speak 1"):
                await gossip.sync_with(stranger.peer_id)

    with caplog.at_level(logging.WARNING, "p2pnet.gossip.shell"):
        run(main)
    assert sum("cannot talk to peer" in message for message in caplog.messages) == 1


def test_garbage_from_either_side_is_the_peers_fault() -> None:
    async def main(town: Town) -> None:
        gossip = await town.start(1)
        stranger = town.fabric.network(keypair(9), addr(9))

        async def babble(peer_id: str, message: bytes) -> bytes:
            return b"\xff\xff\xff"

        stranger.serve(PROTOCOL, babble)
        await stranger.connect(keypair(1).peer_id, [addr(1)], timeout_s=1)
        with pytest.raises(MalformedError):
            await gossip.sync_with(stranger.peer_id)
        with pytest.raises(UnreachableError):
            await stranger.request(keypair(1).peer_id, PROTOCOL, b"\xff\xff", timeout_s=1)
        assert town.networks[1].offences(stranger.peer_id) == 1
        await town.join(2, 1)  # it goes on
        await town.settle(1, 2)

    run(main)


def test_a_callback_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main(town: Town) -> None:
        first = await town.start(1)

        def broken(change: MemberChanged) -> None:
            raise RuntimeError("a bug elsewhere")

        first.watch(broken)
        await town.join(2, 1)
        await town.settle(1, 2)

    run(main)
    assert any("callback" in message for message in caplog.messages)
