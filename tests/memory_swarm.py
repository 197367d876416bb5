"""Several nodes in one process, on the event loop of `virtual_time`.

What a node has above its network is the real thing: `Host`, `Orchestrator`,
`KeeperService` and `BlobKeeper`, called through the very `Method`s that gRPC would
serve, with messages as bytes. In memory are the calls between them, the DHT (one
dict) and the membership (everybody sees the same).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from google.protobuf.message import Message
from memory_wire import LATENCY_S, Endpoint, Letter, MemoryDialer, Wire, contact_of, keypair_of
from virtual_time import InlineCompute

from p2pnet import keys
from p2pnet.client import session
from p2pnet.clock import wall_ms
from p2pnet.data.blobs import BlobStore
from p2pnet.dht.keyspace import vnode_key
from p2pnet.dht.records import OpenRecord, merge, open_record
from p2pnet.errors import RefusedError, UnreachableError
from p2pnet.gossip.statements import open_advert
from p2pnet.keys import KeyPair
from p2pnet.log.history import History, parse_entry
from p2pnet.log.keeper_shell import KeeperService
from p2pnet.net.hop_frames import Buffer, Request
from p2pnet.orchestrator.shell import Orchestrator
from p2pnet.orchestrator.sightings import Sighting, sightings_of
from p2pnet.swarm import MemberView
from p2pnet.v1 import common_pb2, gossip_pb2, log_pb2, records_pb2, vnode_pb2
from p2pnet.vnode import transfer
from p2pnet.vnode.blobs import BlobKeeper
from p2pnet.vnode.faults import Faults
from p2pnet.vnode.shell import Host

M = TypeVar("M", bound=Message)

NOTICE_S = 2.0  # until the membership no longer counts a dead peer among the living
MEMORY_BYTES = 1 << 30
SEED = 1


class Node(Endpoint):
    """One node; implements `p2pnet.swarm.Swarm`."""

    def __init__(
        self, world: MemorySwarm, name: str, *, lent_bytes: int, says_bytes: int, hosting: bool
    ) -> None:
        super().__init__()
        self.name = name
        self.says_bytes = says_bytes
        self.hosting = hosting
        self._world = world
        self._keypair = keypair_of(name)
        self._dialer: Any = MemoryDialer(world, self.peer_id)
        self.directory = world.directory / name
        self.store = BlobStore(self.directory / "blobs", 1 << 30)
        self.blobs = BlobKeeper(self.store, self)
        self._lent_bytes = lent_bytes
        self.host = self._new_host()
        self.orchestrator = Orchestrator(self, world.state_url, sightings=self._sightings)
        for part in (self.host, self.blobs, self.orchestrator):
            self._serve(part)
        self.start_keeper()
        self.orchestrator.start()

    def _new_host(self) -> Host:
        return Host(
            self,
            InlineCompute(),
            self.blobs,
            Faults(False, self.emit),
            memory_bytes=self._lent_bytes,
            hosting=self.hosting,
            state_url=self._world.state_url,
            directory=self.directory / "hosting",
        )

    def restart_host(self) -> None:
        """As after a crash: of what it hosted it has what is on disk."""
        self._world.spawn(self.host.close())
        self.host = self._new_host()
        self._serve(self.host)

    def start_keeper(self) -> None:
        """(Again) from what is on disk."""
        self.keeper = KeeperService(self._keypair, self.directory / "keeper")
        self._serve(self.keeper)

    def _sightings(self) -> Sequence[Sighting]:
        return sightings_of(self.keeper, self.host)

    def _serve(self, part: Any) -> None:
        if isinstance(part, Host):
            self.answer_hop = part.hop
        for service, methods in part.services().items():
            self.methods |= {f"{service}/{name}": method for name, method in methods.items()}

    @property
    def peer_id(self) -> str:
        return self._keypair.peer_id

    async def close(self) -> None:
        await self.orchestrator.close()
        await self.host.close()

    # What `Swarm` asks for

    @property
    def keypair(self) -> KeyPair:
        return self._keypair

    def now(self) -> float:
        return self._world.loop.time()

    def advert(self) -> common_pb2.Signed:
        advert = gossip_pb2.Advert(
            peer_id=self.peer_id,
            incarnation=1,
            presence=gossip_pb2.PRESENCE_HERE,
            addrs=["/ip4/127.0.0.1/tcp/1"],
            grpc_targets=["127.0.0.1:1"],
            versions=common_pb2.VersionRange(min=1, max=1),
            capabilities=gossip_pb2.Capabilities(hosting=self.hosting),
        )
        return self._keypair.sign(keys.ADVERT, advert.SerializeToString(deterministic=True))

    async def introduce(self, peer_id: str, advert: common_pb2.Signed) -> None:
        if open_advert(advert).peer_id != peer_id:
            raise RefusedError("an advert that is somebody else's")

    def members(self) -> Sequence[MemberView]:
        return self._world.members()

    async def call(
        self,
        peer_id: str,
        method: str,
        request: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
    ) -> M:
        return await self._dialer.call(
            contact_of(peer_id), method, request, reply_type, timeout_s=timeout_s
        )

    async def hop(
        self, peer_id: str, request: Request, payload: Buffer | None, *, timeout_s: float
    ) -> tuple[vnode_pb2.HopReply, memoryview | None]:
        return await self._world.hop(self.peer_id, peer_id, request, payload, timeout_s)

    async def put_blob(
        self, peer_id: str, data: bytes, *, network_id: str, timeout_s: float, digest: bytes = b""
    ) -> None:
        await transfer.put_blob(
            self._dialer,
            contact_of(peer_id),
            data,
            network_id=network_id,
            timeout_s=timeout_s,
            digest=digest,
        )

    async def get_blob(self, peer_id: str, digest: bytes, *, timeout_s: float) -> bytes:
        return await transfer.get_blob(
            self._dialer, contact_of(peer_id), digest, timeout_s=timeout_s
        )

    async def find_allocations(
        self, network_id: str, vnode: str, *, timeout_s: float
    ) -> Sequence[records_pb2.Allocation]:
        found = await self._world.look_up(vnode_key(network_id, vnode))
        return [r.content for r in found if isinstance(r.content, records_pb2.Allocation)]

    async def keep_record(self, key: bytes, make: Callable[[], common_pb2.Signed]) -> int:
        return await self._world.keep(self.peer_id, key, make())

    async def drop_record(self, key: bytes) -> None:
        self._world.records.get(key, {}).pop(self.peer_id, None)

    async def provide(self, key: bytes) -> None:
        self._world.providers.setdefault(key, []).append(self.peer_id)

    def emit(self, event: str, **fields: Any) -> None:
        self._world.events.append((self.name, event, fields))
        self._world.something_happened()


class MemorySwarm(Wire):
    """Nodes named "a", "b", ...; made inside a running loop, for `async with`."""

    def __init__(self, directory: Path, nodes: str = "abcd", *, state_url: str = "") -> None:
        self.directory = directory
        self.state_url = state_url
        super().__init__()
        self._nodes: dict[str, Node] = {}
        self.records: dict[bytes, dict[str, common_pb2.Signed]] = {}
        self.providers: dict[bytes, list[str]] = {}
        self.dht_answers = True
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self._patches: list[Any] = [
            mock.patch.object(os, "fsync"),  # no disk is waited for
            # A network's id, and so its keepers, are the same in every run.
            mock.patch.object(os, "urandom", random.Random(SEED).randbytes),
            mock.patch.object(session, "wall_ms", return_value=1),
        ]
        self._seen_alive: dict[str, bool] = {}
        for name in nodes:
            self.add(name)

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self._nodes

    def is_seen(self, peer_id: str) -> bool:
        return self._seen_alive[peer_id]

    async def __aenter__(self) -> MemorySwarm:
        for patch in self._patches:
            patch.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        for patch in self._patches:
            patch.stop()
        for node in list(self.nodes.values()):
            if not node.dead:
                self._stop(node)
        await asyncio.gather(*list(self._strays), return_exceptions=True)
        if self.crashes:
            raise self.crashes[0]

    def add(
        self,
        name: str,
        *,
        lent_bytes: int = MEMORY_BYTES,
        says_bytes: int | None = None,
        hosting: bool = True,
    ) -> Node:
        """A node joins; `says_bytes` is what its advert says that it lends, if not the truth."""
        says = lent_bytes if says_bytes is None else says_bytes
        node = Node(self, name, lent_bytes=lent_bytes, says_bytes=says, hosting=hosting)
        self._nodes[node.peer_id] = node
        self._see(node, True, "")
        return node

    def __getitem__(self, name: str) -> Node:
        return self.nodes[keypair_of(name).peer_id]

    # Faults

    def kill(self, peer_id: str) -> None:
        """As SIGKILL: nothing goes out or in any more, at once; the others notice later."""
        node = self.nodes[peer_id]
        if not node.dead:
            node.dead = True
            self._stop(node)
            self.loop.call_later(NOTICE_S, self._see, node, False, "has failed")

    def freeze(self, peer_id: str, *, noticed: bool = False) -> None:
        """As SIGSTOP: connections stay, and nobody answers."""
        self.nodes[peer_id].awake.clear()
        if noticed:
            self.loop.call_later(NOTICE_S, self._see, self.nodes[peer_id], False, "has failed")

    def thaw(self, peer_id: str) -> None:
        node = self.nodes[peer_id]
        node.awake.set()
        self._see(node, True, "")

    def hang_up(self, peer_id: str) -> None:
        """Every connection to the node breaks; it goes on, and can be called anew."""
        for task in list(self.nodes[peer_id].tasks):
            task.cancel()

    def _stop(self, node: Node) -> None:
        for task in list(node.tasks):
            task.cancel()
        self.spawn(node.close())

    def _see(self, node: Node, alive: bool, why: str) -> None:
        was = self._seen_alive.get(node.peer_id, False)
        self._seen_alive[node.peer_id] = alive
        if was != alive:
            for other in self.nodes.values():
                if not other.dead and other is not node:
                    other.orchestrator.member_changed(node.peer_id, alive, why)
            self.something_happened()

    # Members and the DHT

    def members(self) -> Sequence[MemberView]:
        return [
            MemberView(
                peer_id=node.peer_id,
                alive=self._seen_alive[node.peer_id],
                hosting=node.hosting,
                addrs=("/ip4/127.0.0.1/tcp/1",),
                cpus=1.0,
                memory_bytes=node.says_bytes,
                memory_used_bytes=node.host.usage.memory_bytes,
                gflops=1.0,
                vnodes=node.host.usage.vnodes,
                ip_group=node.peer_id,
            )
            for _, node in sorted(self.nodes.items())
        ]

    async def keep(self, author: str, key: bytes, signed: common_pb2.Signed) -> int:
        await asyncio.sleep(LATENCY_S)
        if not self.dht_answers:
            raise UnreachableError("no peer of the DHT answers")
        open_record(signed, key, wall_ms())
        self.records.setdefault(key, {})[author] = signed
        return len(self.nodes)

    async def look_up(self, key: bytes) -> list[OpenRecord]:
        await asyncio.sleep(LATENCY_S)
        if not self.dht_answers:
            raise UnreachableError("no peer of the DHT answers")
        found = [
            open_record(signed, key, wall_ms()) for signed in self.records.get(key, {}).values()
        ]
        return merge(found)

    # For tests

    def names(self, peer_ids: Sequence[str]) -> list[str]:
        return [self.nodes[peer_id].name for peer_id in peer_ids]

    def emitted(self, event: str) -> list[dict[str, Any]]:
        return [fields for _, what, fields in self.events if what == event]

    async def ask(
        self, name: str, method: str, request: Message, reply_type: type[M], *, by: str = ""
    ) -> M:
        """A call to a node by somebody, a stranger by default."""
        source = keypair_of(by or "stranger").peer_id
        letter = Letter(source, self[name].peer_id, method, request)
        return reply_type.FromString(await self.carry(letter, 30.0))

    async def ask_hop(
        self, name: str, request: Request, payload: Buffer | None = None, *, by: str = ""
    ) -> tuple[vnode_pb2.HopReply, memoryview | None]:
        """A hop to a node by somebody, a stranger by default."""
        source = keypair_of(by or "stranger").peer_id
        return await self.hop(source, self[name].peer_id, request, payload, 30.0)

    async def log_of(self, network_id: str) -> History:
        """A network's log as its keepers have it: every entry checked, all of one mind."""
        histories = []
        for name in [node.name for node in self.nodes.values() if not node.dead]:
            request = log_pb2.ReadLogRequest(network_id=network_id)
            reply = await self.ask(name, "Keeper/ReadLog", request, log_pb2.ReadLogReply)
            history = History(network_id)
            for entry in reply.entries:
                assert history.add(entry) == "", "an entry that does not count"
            histories.append(history)
        longest = max(histories, key=lambda history: len(history.entries))
        for history in histories:
            assert history.entries == longest.entries[: len(history.entries)]
        return longest


def commits_of(history: History) -> list[int]:
    """The steps that a log's commits name, in its order."""
    entries = [parse_entry(signed) for signed in history.entries]
    return [entry.commit.step for entry in entries if entry.HasField("commit")]


def claims_of(history: History) -> list[int]:
    """The epochs of a log's claims."""
    entries = [parse_entry(signed) for signed in history.entries]
    return [entry.claim.epoch for entry in entries if entry.HasField("claim")]
