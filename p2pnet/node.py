"""A PNode, put together. The map of the system.

    trio thread      libp2p ── gossip ── DHT                     who is here, what is where
    bridge           ──────────────────────────────────────
    asyncio thread   gRPC: PNode, VNode, Blob    hosts VNodes    the hot path
                           Orchestrator, Keeper  places networks, keeps their logs
                           Control (Unix socket) answers this machine's user
    compute thread   torch                                       only where a VNode is hosted

A short-lived client is the same thing without a part in anything: it listens
nowhere, hosts nothing, is no member and answers nobody.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from p2pnet import clock
from p2pnet.around import Around
from p2pnet.bootstrap import parse_list
from p2pnet.control import Control
from p2pnet.data.blobs import BlobStore
from p2pnet.datadir import DataDir
from p2pnet.dht.shell import Dht
from p2pnet.dht.wire import KAD_PROTOCOL
from p2pnet.draining import Draining
from p2pnet.errors import P2PNetError, UsageError
from p2pnet.events import EventBus
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.capabilities_shell import local_capabilities, measure_matmul_gflops
from p2pnet.gossip.events import MemberChanged, State
from p2pnet.gossip.known import Known
from p2pnet.gossip.shell import Gossip
from p2pnet.joining import Joining
from p2pnet.log.keeper_shell import KeeperService
from p2pnet.net import identity
from p2pnet.net.bridge import Bridge, open_bridge
from p2pnet.net.dialer import TcpDialer
from p2pnet.net.libp2p import Libp2pNetwork, open_network
from p2pnet.net.multiaddr import parse
from p2pnet.net.rpc_server import RpcServer
from p2pnet.net.tls import load_or_create_certificate
from p2pnet.orchestrator.shell import Orchestrator
from p2pnet.orchestrator.sightings import sightings_of
from p2pnet.remembered import Remembered
from p2pnet.rendezvous import Rendezvous
from p2pnet.service import Scope
from p2pnet.service_file import Pin
from p2pnet.tracing import Tracing
from p2pnet.units import format_size
from p2pnet.vnode.blobs import BLOBS_BYTES_MAX, BlobKeeper
from p2pnet.vnode.devices import AUTO, CPU, Device
from p2pnet.vnode.devices_shell import choose_device
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.shell import Host

logger = logging.getLogger(__name__)

ADVERTISE_EVERY_S = 1.0
AROUND_EVERY_S = 0.1
DRAIN_TIMEOUT_S = 30.0
GOODBYE_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 5.0
GRACE_S = 0.5
START_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """What a node is told at its start."""

    data_dir: Path
    """Its identity, and what it has to remember."""
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    """libp2p multiaddrs; none for a client. gRPC listens on the same IP address."""
    grpc_port: int = 0
    """0: any free one."""
    bootstrap: tuple[str, ...] = ()
    """Multiaddrs with /p2p/ to start from; the peers remembered come on top."""
    cpus: float | None = None
    """Lent; None: all."""
    threads: int = 1
    """Of torch, within one operation; at most as many as CPUs are lent."""
    device: str = AUTO
    """What to compute on, as `vnode.devices.parse_device` takes it."""
    memory_bytes: int | None = None
    """Lent; None: half of what is free. On a GPU, at most what is free on that."""
    kad_protocol: str = KAD_PROTOCOL
    """Another one lets stock libp2p peers share the DHT."""
    state_url: str = ""
    """Where the networks that this node orchestrates keep log and states; "": on peers."""
    service: Pin | None = None
    """The one service whose networks it takes part in; None: any network."""
    faults: bool = False
    """Whether faults may be injected through the control socket."""

    @property
    def client(self) -> bool:
        """Short-lived: asks, and takes no part."""
        return not self.listen


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node that is up."""

    peer_id: str
    addrs: tuple[str, ...]
    grpc: str
    data_dir: str
    socket: Path
    starts_new_network: bool
    device: str
    """What it computes on, for people."""
    service: Mapping[str, Any] | None
    """The one service that it serves, as far as it knows it; None: open to any network."""


@dataclass(slots=True)
class _Parts:
    """What runs, for the tasks that keep it going."""

    config: NodeConfig
    data: DataDir
    network: Libp2pNetwork
    gossip: Gossip
    around: Around
    bridge: Bridge
    capabilities: Capabilities
    events: EventBus
    members_changed: trio.Event = field(default_factory=trio.Event)


async def run_node(
    config: NodeConfig, *, on_ready: Callable[[NodeInfo], None], stop: trio.Event
) -> None:
    """Runs a node until `stop` is set, or until somebody has it leave; then drains and leaves.

    Raises:
        ResourceError: the data dir or a port is taken, the disk is full, or the GPU that is
            asked for cannot be used.
        UsageError: an address to listen on that is none, or more threads than CPUs.
    """
    async with AsyncExitStack() as stack:
        data = DataDir(config.data_dir)
        data.open()
        stack.callback(data.close)
        keypair = identity.load_or_create(data.path / "identity")
        certificate = load_or_create_certificate(data.path / "tls")
        capabilities, device = await _capabilities(config)
        network = await stack.enter_async_context(open_network(keypair, listen=config.listen))
        bridge = await stack.enter_async_context(open_bridge())
        # A short-lived client tells nobody what happens in it.
        events = EventBus(None if config.client else data.path / "events.jsonl")
        stack.callback(events.close)
        rng = random.Random(secrets.token_bytes(32))  # nobody shall foretell whom we ask
        dht = Dht(network, rng=rng, server=not config.client, protocol=config.kad_protocol)
        scope = Scope(data.path / "services", config.service, dht, keypair, events, rng=rng)
        dialer = TcpDialer(keypair, causality=events.causality)
        around = Around(keypair, dialer, dht, lambda: gossip, bridge, events)
        compute = ComputeThread(config.threads, device=device.name, cpus=config.cpus)
        stack.callback(compute.close)
        faults = Faults(config.faults, events.emit)
        blobs = BlobKeeper(BlobStore(data.path / "blobs", BLOBS_BYTES_MAX), around)
        host = Host(
            around,
            compute,
            blobs,
            faults,
            memory_bytes=capabilities.memory_bytes,
            hosting=not config.client,
            state_url=config.state_url,
            directory=data.path / "hosting",
            serves=scope.serves,
            service=lambda: str((scope.describe() or {"id": ""})["id"]),
        )
        keeper = KeeperService(keypair, data.path / "keeper", events.emit)
        orchestrator = Orchestrator(
            around,
            config.state_url,
            sightings=lambda: sightings_of(keeper, host),
            serves=scope.serves,
        )

        tracing = Tracing(around, events)

        servers: list[RpcServer] = []

        async def stop_asyncio() -> None:
            await orchestrator.close()
            await host.close()
            for server in servers:
                await server.stop(GRACE_S)
            await around.close()
            await dialer.close()

        stack.push_async_callback(_shielded, bridge, stop_asyncio)

        async def start_server() -> str:
            server = RpcServer(certificate, causality=events.causality)
            servers.append(server)
            for part in (host, blobs, orchestrator, keeper, tracing):
                for service, methods in part.services().items():
                    server.add(service, methods)
                    around.serves(service, methods)
            orchestrator.start()
            ip = parse(config.listen[0]).host
            address = f"[{ip}]" if ":" in ip else ip
            return await server.start(f"{address}:{config.grpc_port}")

        grpc = ""
        if not config.client:
            grpc = await bridge.to_asyncio(start_server, timeout_s=START_TIMEOUT_S)

        gossip = Gossip(
            network,
            keypair,
            grpc_targets=_targets(network.addrs(), grpc),
            certificate_der=certificate.cert_der,
            capabilities=capabilities,
            incarnation=clock.wall_ms(),
            rng=random.Random(secrets.token_bytes(32)),
            client=config.client,
        )
        rendezvous = Rendezvous(
            network,
            gossip,
            dht,
            rng=rng,
            provides=not config.client,
            shared=config.kad_protocol != KAD_PROTOCOL,
        )
        joining = Joining(network, gossip, dht, rendezvous, rng=rng, client=config.client)
        remembered = Remembered(data.path, keypair.peer_id, gossip, dht, rng=rng)
        parts = _Parts(config, data, network, gossip, around, bridge, capabilities, events)

        token = trio.lowlevel.current_trio_token()

        def leave() -> None:
            token.run_sync_soon(stop.set)

        def stop_hosting() -> None:
            hosts_nothing = replace(parts.capabilities, hosting=False)
            token.run_sync_soon(_describe, parts, hosts_nothing)

        draining = Draining(
            around,
            host,
            orchestrator,
            lambda: (log.orchestrator for log in keeper.histories() if log.closing is None),
            stop_hosting,
        )
        socket = data.new_socket()
        control = Control(
            peer_id=keypair.peer_id,
            addrs=lambda: _named(network.addrs(), keypair.peer_id),
            grpc=grpc,
            data_dir=str(data.path),
            bridge=bridge,
            gossip=gossip,
            dht=dht,
            events=events,
            faults=faults,
            host=host,
            scope=scope,
            tracing=tracing,
            swarm=around,
            progress=joining.progress,
            settled=lambda: joining.tried,
            refresh=joining.refresh,
            lost=lambda: config.client and not any(m.state.live for m in gossip.members()),
            leave=leave,
            draining=draining,
        )

        async def start_control() -> None:
            events.bind(asyncio.get_running_loop())
            control_server = RpcServer()
            servers.append(control_server)
            for service, methods in control.services().items():
                control_server.add(service, methods)
            await control_server.start_unix(socket)

        await bridge.to_asyncio(start_control, timeout_s=START_TIMEOUT_S)

        async with trio.open_nursery() as nursery:
            gossip.watch(_member_watcher(parts, orchestrator, dialer))
            await nursery.start(gossip.run)
            known: list[Known] = []
            if not config.client:
                known = await remembered.members()
                joining.recall(known)
                await nursery.start(remembered.restore)
            await nursery.start(dht.run)
            around.update(gossip.members())
            nursery.start_soon(_keep_around, parts)
            start_from = list(config.bootstrap)
            if not known:
                # A hint of a file's: what is broken in it is left out.
                start_from += parse_list("\n".join(data.remembered_peers()), "peers.json").addrs
            nursery.start_soon(joining.run, start_from)
            nursery.start_soon(rendezvous.run)
            if not config.client:
                nursery.start_soon(_advertise, parts, host)
                if device.name == CPU:  # the speed of another is known
                    nursery.start_soon(_measure, parts)
                nursery.start_soon(remembered.keep)
                nursery.start_soon(scope.run)
            on_ready(
                NodeInfo(
                    keypair.peer_id,
                    _named(network.addrs(), keypair.peer_id),
                    grpc,
                    str(data.path),
                    socket,
                    starts_new_network=not (start_from or known),
                    device=device.title,
                    service=scope.describe(),
                )
            )
            await stop.wait()
            if not config.client:
                await _drain(parts, draining)
                await gossip.leave(GOODBYE_TIMEOUT_S)
                await remembered.save()
            nursery.cancel_scope.cancel()


async def _shielded(bridge: Bridge, stop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Stops what lives on the gRPC thread, also when we are cancelled."""
    with trio.CancelScope(shield=True):
        try:
            await bridge.to_asyncio(stop, timeout_s=STOP_TIMEOUT_S)
        except (P2PNetError, TimeoutError) as error:
            logger.warning("gRPC did not stop in good order: %s", error)


async def _capabilities(config: NodeConfig) -> tuple[Capabilities, Device]:
    if config.client:
        return Capabilities(), Device()
    found = await trio.to_thread.run_sync(
        lambda: local_capabilities(cpus=config.cpus, memory_bytes=config.memory_bytes)
    )
    if config.threads > max(1, math.floor(found.cpus)):
        raise UsageError(f"{config.threads} threads are more than the {found.cpus:g} CPUs lent")
    device = await choose_device(config.device, found.devices)
    lent_bytes = device.lends(found.memory_bytes)
    if config.memory_bytes is not None and lent_bytes < config.memory_bytes:
        free = format_size(lent_bytes)
        logger.warning("only %s can be lent: no more is free on %s", free, device.title)
    return replace(
        found,
        memory_bytes=lent_bytes,
        matmul_gflops=device.gflops,
        device=device.title,
        threads=config.threads,
    ), device


# Tasks


async def _advertise(parts: _Parts, host: Host) -> None:
    """Keeps the advert true: what is hosted, and how much memory that takes."""
    while True:
        await trio.sleep(ADVERTISE_EVERY_S)
        usage, said = host.usage, parts.capabilities
        if (usage.memory_bytes, usage.vnodes) != (said.memory_used_bytes, said.vnodes):
            now = replace(said, memory_used_bytes=usage.memory_bytes, vnodes=usage.vnodes)
            _describe(parts, now)


async def _measure(parts: _Parts) -> None:
    """Measures this machine's speed in a process of its own, which takes a second or so."""
    lent = parts.capabilities
    gflops = await measure_matmul_gflops(parts.data.path, threads=lent.threads)
    share = min(1.0, lent.cpus / lent.threads)  # of the time, after which the thread rests
    _describe(parts, replace(parts.capabilities, matmul_gflops=gflops * share))


def _describe(parts: _Parts, capabilities: Capabilities) -> None:
    parts.capabilities = capabilities
    parts.gossip.update_capabilities(capabilities)


async def _drain(parts: _Parts, draining: Draining) -> None:
    """Moves everything away from this node before it goes."""
    try:
        drained = await parts.bridge.to_asyncio(draining.drain, timeout_s=DRAIN_TIMEOUT_S)
    except (P2PNetError, TimeoutError) as error:
        logger.warning("what is here could not be moved away in time: %s", error)
        return
    if drained.left:
        logger.warning("%d VNodes here were not moved away", drained.left)
    for name in drained.left_behind:
        logger.warning("nobody has taken over the network %s yet, which we looked after", name)


# What the parts tell each other


async def _keep_around(parts: _Parts) -> None:
    """Tells the gRPC side who is here: at once, but not for each of a thousand newcomers."""
    while True:
        await parts.members_changed.wait()
        parts.members_changed = trio.Event()
        parts.around.update(parts.gossip.members())
        await trio.sleep(AROUND_EVERY_S)


def _member_watcher(
    parts: _Parts, orchestrator: Orchestrator, dialer: TcpDialer
) -> Callable[[MemberChanged], None]:
    async def tell(peer_id: str, alive: bool, why: str) -> None:
        orchestrator.member_changed(peer_id, alive, why)
        if not alive:
            await dialer.forget(peer_id)

    def changed(change: MemberChanged) -> None:
        parts.members_changed.set()
        if change.peer_id == parts.network.peer_id:
            return
        was = change.old is not None and change.old.live
        if was != change.new.live:
            if was:  # who looks around now is not to see the dead
                parts.around.update(parts.gossip.members())
            event = "member_came" if change.new.live else f"member_{change.new}"
            parts.events.emit(event, peer=change.peer_id)
            why = "has left" if change.new is State.LEFT else "has failed"
            parts.bridge.thread.submit(tell, change.peer_id, change.new.live, why)

    return changed


# Small things


def _named(addrs: Sequence[str], peer_id: str) -> tuple[str, ...]:
    return tuple(f"{addr}/p2p/{peer_id}" for addr in addrs)


def _targets(addrs: Sequence[str], grpc: str) -> tuple[str, ...]:
    """Where gRPC is reached: the IP addresses that libp2p listens on, with gRPC's port."""
    if not grpc:
        return ()
    port = grpc.rpartition(":")[2]
    hosts = dict.fromkeys(parse(addr).host for addr in addrs)
    return tuple(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts)
