"""R11 for lookups: real nodes on real sockets, behind bad links.

Six nodes of the shipped network and DHT, each behind a proxy of its own, meet over
perfect links; then the links become what the profile says. A node that is connected, and
a newcomer that has to dial everybody over the bad links, find a peer, get, and put.

Short form: one round of each at 16 ms/0.1 %, at 300 ms/5 %, at 600 ms with bursts, and
with three of six links half-open, all at once, in about 10 s of real time. As written: the
row's whole range, five rounds each. Times are round trips; `loss` is per TCP segment.

Up to 300 ms/5 % each operation is to succeed. Beyond, each is to succeed, or to raise
UnreachableError or, of `find_peer`, to say that nobody knows where to reach the peer.
Never does one take longer than its time-out and the shell's grace.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
import trio
from dht.dht_samples import CLAIMANT, WALL_MS, allocation_record, keypair, manifest
from fault_proxy import PERFECT, Proxy, Quality

from p2pnet.dht import rtt
from p2pnet.dht.keyspace import vnode_key
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.shell import TIMEOUT_S, Dht
from p2pnet.errors import UnreachableError
from p2pnet.net.libp2p import open_network

COUNT = 6
HOLDERS = 3  # a quorum of them can be read
GRACE_S = 3.0  # what the shell adds to an operation's time-out, and a busy machine
RIG_S = 240.0


@dataclass(frozen=True)
class Profile:
    """Links of one kind. `must`: operations have to succeed, within that many seconds."""

    name: str
    quality: Quality
    must: float = math.inf
    cut: int = 0  # of the links, half-open
    short: bool = False
    timeout_s: float = TIMEOUT_S  # that operations are given


def link(
    round_trip_s: float, loss: float, *, burst_s: float = 0.0, every_s: float = math.inf
) -> Quality:
    """A link by its round trip; it jitters by a fifth, and carries a megabit a second."""
    one_way_s = round_trip_s / 2
    return Quality(one_way_s, one_way_s / 5, loss, burst_s, every_s, 125_000.0)


PROFILES = (
    Profile("16 ms/0.1 %", link(0.016, 0.001), must=TIMEOUT_S, short=True),
    Profile("50 ms/1 %", link(0.05, 0.01), must=TIMEOUT_S),
    Profile("150 ms/2 %", link(0.15, 0.02), must=TIMEOUT_S),
    Profile("300 ms/5 %", link(0.3, 0.05), must=TIMEOUT_S, short=True),
    Profile(
        "600 ms/5 %, bursts of 1 s every 4 s",
        link(0.6, 0.05, burst_s=1.0, every_s=4.0),
        short=True,
    ),
    Profile("600 ms/10 %, bursts of 3 s every 5 s", link(0.6, 0.1, burst_s=3.0, every_s=5.0)),
    Profile("16 ms/0.1 %, 3 of 6 half-open", link(0.016, 0.001), must=3.0, cut=3, short=True),
    Profile("all half-open", link(0.016, 0.001), cut=COUNT),
)


@dataclass
class Outcome:
    """What became of one operation."""

    who: str
    what: str
    result: str  # "ok", "unreachable", or what is wrong
    took_s: float


@dataclass
class Rig:
    """Six nodes and their proxies."""

    profile: Profile
    seed: int
    dhts: list[Dht] = field(default_factory=list)
    proxies: list[Proxy] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    async def run(self, rounds: int, setting_up: trio.Lock) -> list[Outcome]:
        """All operations, one after the other for each who asks."""
        async with trio.open_nursery() as nursery:
            async with setting_up:  # one rig after the other: handshakes cost time
                await self._set_up(nursery)
            for n, proxy in enumerate(self.proxies):
                proxy.quality = self.profile.quality
                proxy.cut = n >= COUNT - self.profile.cut
            async with trio.open_nursery() as askers:
                askers.start_soon(self._ask, "connected", self.dhts[0], rounds)
                askers.start_soon(self._newcomer, nursery, rounds)
            nursery.cancel_scope.cancel()
        return self.outcomes

    async def _node(self, n: int, *, task_status: Any) -> None:
        """A running node behind its proxy, or a client, which nobody dials."""
        server = n < COUNT
        port = free_port()
        listen = [f"/ip4/127.0.0.1/tcp/{port}"] if server else []
        announce = [self.proxies[n].addr] if server else []
        async with (
            open_network(keypair(n), listen=listen, announce=announce) as network,
            trio.open_nursery() as nursery,
        ):
            if server:
                self.proxies[n].to(port)
            dht = Dht(network, rng=Random(n), server=server, wall_ms=lambda: WALL_MS)
            await nursery.start(dht.run)
            task_status.started(dht)
            await trio.sleep_forever()

    async def _set_up(self, nursery: trio.Nursery) -> None:
        """Everybody has met everybody, and a record is there."""
        for n in range(COUNT):
            proxy = await Proxy(nursery, Random(f"{self.seed} {n}"), PERFECT).open()
            self.proxies.append(proxy)
            self.dhts.append(await nursery.start(self._node, n))
            for other, dht in enumerate(self.dhts[:n]):
                await self.dhts[n].meet(keypair(other).peer_id, [self.proxies[other].addr])
                await dht.meet(keypair(n).peer_id, [proxy.addr])
        assert await self.dhts[1].put(record("kept")) >= HOLDERS

    async def _newcomer(self, nursery: trio.Nursery, rounds: int) -> None:
        """One that has met nobody yet: it starts from the first, as a client does."""
        dht = await nursery.start(self._node, COUNT + 92)
        first = keypair(0).peer_id, [self.proxies[0].addr]

        async def joins() -> bool:
            await dht._network.connect(*first, timeout_s=self.profile.timeout_s)
            with trio.move_on_after(self.profile.timeout_s):
                await dht.meet(*first)
            if not dht.stats()["peers"]:
                raise UnreachableError("the first peer does not say what it speaks")
            return True

        if await self._timed("newcomer", "joins", joins):
            await self._ask("newcomer", dht, rounds)

    async def _ask(self, who: str, dht: Dht, rounds: int) -> None:
        timeout_s = self.profile.timeout_s
        wanted = HOLDERS if math.isfinite(self.profile.must) else 1

        async def finds() -> bool:
            if await dht.find_peer(keypair(2).peer_id, timeout_s) is None:
                # Others name it, but it did not answer in time.
                raise UnreachableError("nobody knows where it can be reached")
            return True

        async def gets() -> bool:
            found = await dht.get(key_of("kept"), timeout_s)
            return [each.author for each in found] == [CLAIMANT.peer_id]

        async def puts() -> bool:
            return await dht.put(record(who), timeout_s) >= wanted

        for _ in range(rounds):
            async with trio.open_nursery() as nursery:
                for what, operation in (("finds", finds), ("gets", gets), ("puts", puts)):
                    nursery.start_soon(self._timed, who, what, operation)

    async def _timed(self, who: str, what: str, operation: Callable[[], Awaitable[bool]]) -> bool:
        began = trio.current_time()
        result = "never ends"
        with trio.move_on_after(2 * self.profile.timeout_s + GRACE_S):
            try:
                result = "ok" if await operation() else "wrong"
            except UnreachableError:
                result = "unreachable"
            except Exception as error:
                result = repr(error)
        self.outcomes.append(Outcome(who, what, result, trio.current_time() - began))
        return result == "ok"


def free_port() -> int:
    """One of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def record(vnode: str) -> Any:
    """A VNode's allocation."""
    return allocation_record(vnode=vnode)


def key_of(vnode: str) -> bytes:
    """Where it is kept."""
    return vnode_key(network_id_of(manifest()), vnode)


def judge(profile: Profile, outcomes: list[Outcome]) -> None:
    """Raises AssertionError for a failure, where there must be none, and for a hang."""
    for outcome in outcomes:
        seen = f"{profile.name}: {outcome}"
        allowed = ("ok",) if math.isfinite(profile.must) else ("ok", "unreachable")
        assert outcome.result in allowed, seen
        # To join is two steps: a connection, and what the peer speaks.
        steps = 2 if outcome.what == "joins" else 1
        assert outcome.took_s <= min(profile.must, steps * profile.timeout_s + GRACE_S), seen


def measure(profiles: list[Profile], rounds: int, seed: int) -> dict[str, list[Outcome]]:
    """Runs rigs side by side, in one process and real time."""
    found: dict[str, list[Outcome]] = {}

    async def one(profile: Profile, setting_up: trio.Lock) -> None:
        found[profile.name] = await Rig(profile, seed).run(rounds, setting_up)

    async def main() -> None:
        setting_up = trio.Lock()
        with trio.fail_after(RIG_S):
            async with trio.open_nursery() as nursery:
                for profile in profiles:
                    nursery.start_soon(one, profile, setting_up)

    trio.run(main)
    return found


def test_r11_lookups_over_bad_links(scale: Any, figure: Any) -> None:
    profiles = [profile for profile in PROFILES if profile.short or scale.as_written]
    found = measure(profiles, rounds=5 if scale.as_written else 1, seed=1)
    for profile in profiles:
        outcomes = found[profile.name]
        took = sorted(outcome.took_s for outcome in outcomes)
        ok = sum(outcome.result == "ok" for outcome in outcomes)
        figure(
            f"R11 {profile.name}: {ok} of {len(took)} done, median {took[len(took) // 2]:.2f} s, "
            f"worst {took[-1]:.2f} s"
        )
    for profile in profiles:
        judge(profile, found[profile.name])


def forever(*_: object) -> float:
    """A patience without an end."""
    return 3600.0


def at_once(*_: object) -> float:
    """One that fits a loopback alone."""
    return 0.1


MUTANTS = {
    "nobody is ever given up": (forever, "16 ms/0.1 %, 3 of 6 half-open"),
    "a fixed time-out": (at_once, "300 ms/5 %"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_r11_mutant_without_measured_time_outs(
    monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    patience, name = MUTANTS[mutant]
    (profile,) = (profile for profile in PROFILES if profile.name == name)
    for method in ("patience_s", "timeout_s", "hedge_s"):
        monkeypatch.setattr(rtt.RoundTrips, method, patience, raising=False)
    # Whoever waits for ever has been caught by then.
    found = measure([replace(profile, timeout_s=6.0)], rounds=1, seed=1)
    with pytest.raises(AssertionError, match=profile.name):
        judge(profile, found[name])
