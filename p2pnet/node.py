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
import random
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from p2pnet import clock
from p2pnet.around import Around
from p2pnet.bootstrap import parse_list
from p2pnet.control import Control, Progress
from p2pnet.data.blobs import BlobStore
from p2pnet.datadir import DataDir
from p2pnet.dht.shell import KAD_PROTOCOL, Dht
from p2pnet.errors import P2PNetError, RemoteError, ResourceError
from p2pnet.events import EventBus
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.capabilities_shell import local_capabilities, measure_matmul_gflops
from p2pnet.gossip.events import MemberChanged, State
from p2pnet.gossip.shell import Gossip
from p2pnet.keys import KeyPair, short
from p2pnet.net import identity
from p2pnet.net.bridge import Bridge, open_bridge
from p2pnet.net.dialer import TcpDialer
from p2pnet.net.libp2p import Libp2pNetwork, open_network
from p2pnet.net.multiaddr import parse
from p2pnet.net.network import ConnectionChange
from p2pnet.net.rpc_server import RpcServer
from p2pnet.net.tls import load_or_create_certificate
from p2pnet.orchestrator.keeper_shell import KeeperService
from p2pnet.orchestrator.shell import Orchestrator
from p2pnet.v1 import orchestrator_pb2
from p2pnet.vnode.blobs import BLOBS_BYTES_MAX, BlobKeeper
from p2pnet.vnode.executor import ComputeThread
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.shell import Host

logger = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 5.0
RETRY_MIN_S = 0.5
RETRY_MAX_S = 30.0
REMEMBER_EVERY_S = 30.0
ADVERTISE_EVERY_S = 1.0
REFRESH_EVERY_S = 5.0
REFRESH_PEERS = 20  # what a bucket of the DHT's table holds
DRAIN_TIMEOUT_S = 15.0
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
    memory_bytes: int | None = None
    """Lent; None: half of what is free."""
    kad_protocol: str = KAD_PROTOCOL
    """Another one lets stock libp2p peers share the DHT."""
    state_url: str = ""
    """Where the networks that this node orchestrates keep log and states; "": on peers."""
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


@dataclass(slots=True)
class _Parts:
    """What runs, for the tasks that keep it going."""

    config: NodeConfig
    data: DataDir
    network: Libp2pNetwork
    gossip: Gossip
    dht: Dht
    around: Around
    bridge: Bridge
    capabilities: Capabilities
    stop: trio.Event
    rng: random.Random
    progress: Progress = field(default_factory=Progress)
    tried: trio.Event = field(default_factory=trio.Event)  # every bootstrap peer once


async def run_node(
    config: NodeConfig, *, on_ready: Callable[[NodeInfo], None], stop: trio.Event
) -> None:
    """Runs a node until `stop` is set, or until somebody has it leave; then drains and leaves.

    Raises:
        ResourceError: the data dir or a port is taken, or the disk is full.
        UsageError: an address to listen on that is none.
    """
    async with AsyncExitStack() as stack:
        data = DataDir(config.data_dir)
        data.open()
        stack.callback(data.close)
        keypair = identity.load_or_create(data.path / "identity")
        certificate = load_or_create_certificate(data.path / "tls")
        capabilities = await _capabilities(config)
        network = await stack.enter_async_context(open_network(keypair, listen=config.listen))
        bridge = await stack.enter_async_context(open_bridge())
        events = EventBus()
        rng = random.Random(keypair.peer_id)
        dht = Dht(network, rng=rng, server=not config.client, protocol=config.kad_protocol)
        dialer = TcpDialer(keypair)
        around = Around(keypair, dialer, dht, lambda: gossip, bridge, events)
        compute = ComputeThread(threads=1)
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
        )
        orchestrator = Orchestrator(around, config.state_url)
        keeper = KeeperService(keypair.peer_id, data.path / "keeper")

        servers: list[RpcServer] = []

        async def stop_asyncio() -> None:
            await orchestrator.close()
            await host.close()
            for server in servers:
                await server.stop(GRACE_S)
            await dialer.close()

        stack.push_async_callback(_shielded, bridge, stop_asyncio)

        async def start_server() -> str:
            server = RpcServer(certificate)
            servers.append(server)
            for part in (host, blobs, orchestrator, keeper):
                for service, methods in part.services().items():
                    server.add(service, methods)
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
            rng=random.Random(keypair.peer_id),
            client=config.client,
        )
        parts = _Parts(config, data, network, gossip, dht, around, bridge, capabilities, stop, rng)

        def leave() -> None:
            token.run_sync_soon(stop.set)

        token = trio.lowlevel.current_trio_token()
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
            progress=parts.progress,
            settled=lambda: parts.tried,
            refresh=lambda: _refresh(parts),
            lost=lambda: config.client and not any(m.state.live for m in gossip.members()),
            leave=leave,
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
            network.watch(_connection_watcher(parts))
            await nursery.start(gossip.run)
            await nursery.start(dht.run)
            around.update(gossip.members())
            # A hint of a file's: what is broken in it is left out.
            remembered = parse_list("\n".join(data.remembered_peers()), "peers.json").addrs
            start_from = tuple(dict.fromkeys((*config.bootstrap, *remembered)))
            nursery.start_soon(_bootstrap, parts, start_from)
            nursery.start_soon(_keep_fresh, parts)
            if not config.client:
                nursery.start_soon(_advertise, parts, host)
                nursery.start_soon(_measure, parts)
                nursery.start_soon(_remember, parts)
            on_ready(
                NodeInfo(
                    keypair.peer_id,
                    _named(network.addrs(), keypair.peer_id),
                    grpc,
                    str(data.path),
                    socket,
                    starts_new_network=not start_from,
                )
            )
            await stop.wait()
            if not config.client:
                for name in orchestrator.names():
                    logger.warning(
                        "the network %s stops with this node, which looks after it", name
                    )
                await _drain(parts, host, keypair)
                await gossip.leave(GOODBYE_TIMEOUT_S)
                _remember_now(parts)
            nursery.cancel_scope.cancel()


async def _shielded(bridge: Bridge, stop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Stops what lives on the gRPC thread, also when we are cancelled."""
    with trio.CancelScope(shield=True):
        try:
            await bridge.to_asyncio(stop, timeout_s=STOP_TIMEOUT_S)
        except (P2PNetError, TimeoutError) as error:
            logger.warning("gRPC did not stop in good order: %s", error)


async def _capabilities(config: NodeConfig) -> Capabilities:
    if config.client:
        return Capabilities()
    found = await trio.to_thread.run_sync(
        lambda: local_capabilities(cpus=config.cpus, memory_bytes=config.memory_bytes)
    )
    return found


# Tasks


async def _bootstrap(parts: _Parts, addrs: Sequence[str]) -> None:
    """Finds the peers to start from, and keeps trying those that are not there."""
    ours = parts.network.peer_id
    wanted = [addr for addr in addrs if parse(addr).peer_id != ours]
    parts.progress.wanted = len(wanted)
    if not wanted:
        parts.tried.set()
        return
    waiting = dict.fromkeys(wanted)

    async def first_try(addr: str) -> None:
        if await _join_through(parts, addr):
            waiting.pop(addr, None)
            parts.tried.set()  # one is enough to know the others

    async with trio.open_nursery() as nursery:
        for addr in wanted:
            nursery.start_soon(first_try, addr)
    parts.tried.set()
    delay_s = RETRY_MIN_S
    told = False
    while waiting:
        if not told and parts.progress.reached == 0 and not parts.config.client:
            told = True
            logger.warning(
                "none of the %d bootstrap peers can be reached yet; this node keeps trying, and "
                "others can join through it meanwhile",
                len(waiting),
            )
        await trio.sleep(delay_s)
        delay_s = min(delay_s * 2, RETRY_MAX_S)
        for addr in list(waiting):
            if await _join_through(parts, addr):
                del waiting[addr]
    logger.info("every bootstrap peer was reached")


async def _join_through(parts: _Parts, addr: str) -> bool:
    try:
        peer_id = await parts.network.identify(addr, timeout_s=DIAL_TIMEOUT_S)
        await parts.gossip.sync_with(peer_id)
    except RemoteError as error:
        logger.info("bootstrap peer %s: %s", addr, error)
        return False
    await parts.dht.meet(peer_id, (parse(addr).where,))
    parts.progress.reached += 1
    return True


async def _advertise(parts: _Parts, host: Host) -> None:
    """Keeps the advert true: what is hosted, and how much memory that takes."""
    while True:
        await trio.sleep(ADVERTISE_EVERY_S)
        usage, said = host.usage, parts.capabilities
        if (usage.memory_bytes, usage.vnodes) != (said.memory_used_bytes, said.vnodes):
            now = replace(said, memory_used_bytes=usage.memory_bytes, vnodes=usage.vnodes)
            _describe(parts, now)


async def _keep_fresh(parts: _Parts) -> None:
    """The DHT gives up a peer that was slow for a while; the membership may know better."""
    while True:
        await trio.sleep(REFRESH_EVERY_S)
        _refresh(parts)


def _refresh(parts: _Parts) -> None:
    alive = [m for m in parts.gossip.members() if m.state.live]
    for member in parts.rng.sample(alive, min(len(alive), REFRESH_PEERS)):
        if member.peer_id != parts.network.peer_id:
            parts.dht.seen(member.peer_id, member.advert.addrs)


async def _measure(parts: _Parts) -> None:
    """Measures this machine's speed in a process of its own, which takes a second or so."""
    gflops = await measure_matmul_gflops(parts.data.path)
    _describe(parts, replace(parts.capabilities, matmul_gflops=gflops))


def _describe(parts: _Parts, capabilities: Capabilities) -> None:
    parts.capabilities = capabilities
    parts.gossip.update_capabilities(capabilities)


async def _remember(parts: _Parts) -> None:
    while True:
        await trio.sleep(REMEMBER_EVERY_S)
        _remember_now(parts)


def _remember_now(parts: _Parts) -> None:
    peers = [
        f"{addr}/p2p/{member.peer_id}"
        for member in parts.gossip.members()
        if member.state is State.ALIVE and member.peer_id != parts.network.peer_id
        for addr in member.advert.addrs[:1]
    ]
    if peers:
        try:
            parts.data.remember_peers(peers)
        except ResourceError as error:
            logger.warning("%s", error)


async def _drain(parts: _Parts, host: Host, keypair: KeyPair) -> None:
    """Has the orchestrators move this node's VNodes away before it goes."""

    async def tell(peer_id: str) -> None:
        try:
            await parts.around.call(
                peer_id,
                "Orchestrator/Leaving",
                orchestrator_pb2.LeavingRequest(),
                orchestrator_pb2.LeavingReply,
                timeout_s=DRAIN_TIMEOUT_S,
            )
        except P2PNetError as error:
            logger.warning("orchestrator %s was not told that we go: %s", short(peer_id), error)

    async def tell_all() -> None:
        claimants = [peer for peer in host.claimants() if peer != keypair.peer_id]
        await asyncio.gather(*(tell(peer_id) for peer_id in claimants))

    try:
        await parts.bridge.to_asyncio(tell_all, timeout_s=DRAIN_TIMEOUT_S + 1)
    except (P2PNetError, TimeoutError) as error:
        logger.warning("the VNodes here could not be moved away in time: %s", error)


# What the parts tell each other


def _member_watcher(
    parts: _Parts, orchestrator: Orchestrator, dialer: TcpDialer
) -> Callable[[MemberChanged], None]:
    async def tell(peer_id: str, alive: bool, why: str) -> None:
        orchestrator.member_changed(peer_id, alive, why)
        if not alive:
            await dialer.forget(peer_id)

    def changed(change: MemberChanged) -> None:
        parts.around.update(parts.gossip.members())
        if change.peer_id == parts.network.peer_id:
            return
        if change.new.live:
            parts.dht.seen(change.peer_id, change.advert.addrs)
        else:
            parts.dht.gone(change.peer_id)
        was = change.old is not None and change.old.live
        if was != change.new.live:
            why = "has left" if change.new is State.LEFT else "has failed"
            parts.bridge.thread.submit(tell, change.peer_id, change.new.live, why)

    return changed


def _connection_watcher(parts: _Parts) -> Callable[[ConnectionChange], None]:
    def changed(change: ConnectionChange) -> None:
        if change.connected:
            parts.dht.seen(change.peer_id)

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
