"""A shell: one node's events of a network for whoever asks, and everybody's put together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from itertools import islice, pairwise

from p2pnet import clock
from p2pnet.errors import MalformedError, P2PNetError, ResourceError
from p2pnet.events import EventBus
from p2pnet.net.handlers import Caller, Method, unary
from p2pnet.swarm import Swarm
from p2pnet.timeline import CLOCK_READ, Happening, mentioned, parse_happening, read_clock
from p2pnet.v1 import control_pb2, pnode_pb2

PAGE_EVENTS_MAX = 500
PAGE_BYTES_MAX = 1 << 20
PAGES_MAX = 20  # of one member
ASKED_AT_ONCE = 16
MEMBER_TIMEOUT_S = 4.0  # for a page
TRACE_TIMEOUT_S = 20.0  # for everybody
TRACE_BYTES_MAX = 32 << 20

_ABOUT_MEMBERS = ("member_came", "member_failed", "member_left")


class _Room:
    """What all members together may still say, in characters."""

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self, size: int) -> None:
        if size > self._left:
            raise ResourceError("there is more to tell than a trace holds")
        self._left -= size


class Tracing:
    """Serves `PNode/Events`, and gathers traces. Lives on the gRPC thread."""

    def __init__(self, swarm: Swarm, events: EventBus) -> None:
        self._swarm = swarm
        self._events = events

    def services(self) -> dict[str, Mapping[str, Method]]:
        """What gRPC serves."""
        return {
            "PNode": {
                "Events": unary(
                    self._serve, pnode_pb2.NetworkEventsRequest, pnode_pb2.NetworkEventsReply
                )
            }
        }

    async def gather(self, network_id: str) -> control_pb2.TraceReply:
        """What happened to a network, from every member that says something of it."""
        me = self._swarm.keypair.peer_id
        members = {member.peer_id: member.alive for member in self._swarm.members()}
        told = [parse_happening(kept.line, me) for kept in self._events.kept(network=network_id)]
        silent: dict[str, None] = {}
        gate = asyncio.Semaphore(ASKED_AT_ONCE)
        room = _Room(TRACE_BYTES_MAX)

        async def ask(peer_id: str) -> None:
            try:
                async with gate, asyncio.timeout_at(until):
                    await self._ask(peer_id, network_id, told, room)
            except (P2PNetError, TimeoutError):
                silent[peer_id] = None

        until = asyncio.get_running_loop().time() + TRACE_TIMEOUT_S
        async with asyncio.TaskGroup() as group:
            for peer_id, alive in members.items():
                if alive and peer_id != me:
                    group.create_task(ask(peer_id))
        # Of the members that are gone those that the others speak of.
        concerned = mentioned(told, list(members))
        silent |= dict.fromkeys(peer for peer in concerned if not members[peer])
        told += self._seen_of(concerned, told)
        return control_pb2.TraceReply(
            json=[json.dumps(event.to_json()) for event in told],
            silent=sorted(silent),
        )

    async def _ask(self, peer_id: str, network_id: str, told: list[Happening], room: _Room) -> None:
        """Adds what a member says, page by page; raises RemoteError where that ends early."""
        since = ""
        for _ in range(PAGES_MAX):
            request = pnode_pb2.NetworkEventsRequest(
                network_id=network_id, since=since, limit=PAGE_EVENTS_MAX
            )
            asked_ms = clock.wall_ms()
            reply = await self._swarm.call(
                peer_id,
                "PNode/Events",
                request,
                pnode_pb2.NetworkEventsReply,
                timeout_s=MEMBER_TIMEOUT_S,
            )
            room.take(sum(map(len, reply.json)))
            answered_ms = clock.wall_ms()
            page = [parse_happening(line, peer_id) for line in reply.json[: PAGE_EVENTS_MAX + 1]]
            if not page or page[-1].event != CLOCK_READ:
                raise MalformedError("a peer does not say what its clock says")
            now = page.pop()
            if any(later.at <= earlier.at for earlier, later in pairwise(page)):
                raise MalformedError("a peer's events are not in order")
            if page and since and str(page[0].at) <= since:
                raise MalformedError("a peer tells its events again")
            told += [event for event in page if event.event != CLOCK_READ]
            if not reply.more or not page:
                if since or page:  # who took no part is not in the picture
                    told.append(read_clock(peer_id, now.at, now.wall_ms, asked_ms, answered_ms))
                return
            since = str(page[-1].at)

    def _seen_of(self, peers: list[str], told: list[Happening]) -> list[Happening]:
        """What this node saw of members that the network had to do with, since it began."""
        if not told:
            return []
        start = min(happening.at for happening in told)
        me = self._swarm.keypair.peer_id
        seen = [parse_happening(kept.line, me) for kept in self._events.kept(since=str(start))]
        return [
            event
            for event in seen
            if event.event in _ABOUT_MEMBERS and event.fields.get("peer") in peers
        ]

    async def _serve(
        self, request: pnode_pb2.NetworkEventsRequest, caller: Caller
    ) -> pnode_pb2.NetworkEventsReply:
        """Anybody may ask: what happened to a network is in its log and records besides."""
        if not request.network_id:
            raise MalformedError("whose events?")
        found = self._events.kept(request.since, request.network_id)
        reply = pnode_pb2.NetworkEventsReply()
        size = 0
        for kept in islice(found, min(request.limit or PAGE_EVENTS_MAX, PAGE_EVENTS_MAX)):
            size += len(kept.line)
            if reply.json and size > PAGE_BYTES_MAX:
                break
            reply.json.append(kept.line)
        reply.more = len(reply.json) < len(found)
        reply.json.append(self._events.marker(CLOCK_READ))
        return reply
