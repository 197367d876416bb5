"""A shell: watches over the networks that this node keeps or hosts, and takes them over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from p2pnet.bounded import keep_latest
from p2pnet.core import Tick
from p2pnet.dht.keyspace import network_key, peer_position, position
from p2pnet.errors import P2PNetError, RemoteError
from p2pnet.log.history import History
from p2pnet.log.store_shell import LogInStore, open_store
from p2pnet.orchestrator.sightings import Sighting, of_history
from p2pnet.orchestrator.succession import (
    NETWORKS_MAX,
    Alive,
    AskLease,
    Event,
    Failed,
    Forget,
    Known,
    LeaseDenied,
    LeaseHeld,
    LeaseSilent,
    Succession,
    TakeOver,
)
from p2pnet.swarm import Swarm
from p2pnet.tasks import TaskSet
from p2pnet.v1 import orchestrator_pb2 as pb

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # at what this node keeps and hosts
LOOK_INTO_STORE_EVERY_S = 30.0
REMEMBERED_S = 120.0
LEASE_TIMEOUT_S = 1.5


class Heir:
    """Drives the core `Succession`. Lives on the gRPC thread.

    Args:
        sightings: all networks that this node keeps or hosts.
        holds: the epoch under which this node looks after a network itself, or 0.
        take_over: begins to claim a network; raises P2PNetError.
        state_url: where logs are that nobody keeps; this node knows those, too.
    """

    def __init__(
        self,
        swarm: Swarm,
        sightings: Callable[[], Iterable[Sighting]],
        *,
        holds: Callable[[str], int],
        take_over: Callable[[Sighting, str], Awaitable[object]],
        state_url: str = "",
    ) -> None:
        self._swarm = swarm
        self._look_around = sightings
        self._holds = holds
        self._take_over = take_over
        self._state_url = state_url
        self._stored: dict[str, LogInStore] = {}
        self._warned: dict[str, str] = {}
        self._core = Succession(swarm.keypair.peer_id)
        self._seen: dict[str, Sighting] = {}  # by network id, the newest of each
        self._seen_at: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = TaskSet("the heir of networks")

    def start(self) -> None:
        """Begins to watch."""
        self._tasks.spawn(self._look())
        if self._state_url:
            self._tasks.spawn(self._look_into_store())

    async def close(self) -> None:
        """Ends it."""
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.close()

    def sighting(self, network_id: str) -> Sighting | None:
        """What is known of a network."""
        return self._seen.get(network_id)

    def members_changed(self) -> None:
        """The membership has noticed something."""
        alive = tuple(member.peer_id for member in self._swarm.members() if member.alive)
        self._feed(Alive(alive))

    def over(self, history: History) -> None:
        """A network that this node looked after is another's now, or closed."""
        sighting = of_history(history)
        if sighting is not None:
            self._saw(sighting)

    def successors(self, history: History) -> list[str]:
        """Who may take a network over from this node, the next in rank first."""
        sighting = of_history(history)
        known = None if sighting is None else sighting.known()
        if not isinstance(known, Known):
            return []
        target = position(network_key(history.network_id))
        alive = [member.peer_id for member in self._swarm.members() if member.alive]
        me = self._swarm.keypair.peer_id
        able = [peer for peer in known.candidates if peer in alive and peer != me]
        return sorted(able, key=lambda peer: peer_position(peer) ^ target)

    async def _look(self) -> None:
        while True:
            for sighting in self._look_around():
                self._saw(sighting)
            self._forget_old()
            self.members_changed()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look_into_store(self) -> None:
        closed: dict[str, None] = {}
        while True:
            try:
                store = await asyncio.to_thread(open_store, self._state_url)
                found = await asyncio.to_thread(store.networks)
            except P2PNetError as error:
                logger.warning("the logs in %s cannot be listed: %s", self._state_url, error)
                found = []
            for network_id in [it for it in found if it not in closed][:NETWORKS_MAX]:
                log = self._stored.setdefault(network_id, LogInStore(store, network_id))
                try:
                    sighting = of_history(await log.history())
                except P2PNetError as error:
                    self._warn_once(network_id, error)
                    continue
                if sighting is not None:
                    self._saw(sighting)
                    if sighting.closed:
                        closed[network_id] = None
                        del self._stored[network_id]
            await asyncio.sleep(LOOK_INTO_STORE_EVERY_S)

    def _warn_once(self, network_id: str, error: P2PNetError) -> None:
        if self._warned.get(network_id) != str(error):
            keep_latest(self._warned, network_id, str(error), NETWORKS_MAX)
            logger.warning("the log of network %s cannot be read: %s", network_id, error)

    def _saw(self, sighting: Sighting) -> None:
        network_id = sighting.network_id
        known = self._seen.get(network_id)
        if known is None and len(self._seen) >= NETWORKS_MAX:
            return
        self._seen_at[network_id] = self._swarm.now()
        if known is not None and not sighting.closed:
            if sighting.epoch < known.epoch or known.closed:
                return
            if sighting.epoch == known.epoch and not sighting.keepers:
                return
        self._seen[network_id] = sighting
        self._feed(sighting.known())

    def _feed(self, event: Event) -> None:
        for effect in self._core.handle(event, self._swarm.now()):
            if isinstance(effect, AskLease):
                self._tasks.spawn(self._ask(effect))
            elif isinstance(effect, TakeOver):
                self._tasks.spawn(self._take(effect))
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._core.deadline()
        if due is not None:
            wait_s = max(0.01, due - self._swarm.now())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._feed, Tick())

    def _forget_old(self) -> None:
        """Of what this node has not kept or hosted for a while, others know more."""
        now = self._swarm.now()
        for network_id in [it for it, at in self._seen_at.items() if now > at + REMEMBERED_S]:
            if not self._holds(network_id):
                del self._seen[network_id], self._seen_at[network_id]
                self._feed(Forget(network_id))

    async def _ask(self, effect: AskLease) -> None:
        network_id, peer_id = effect.network_id, effect.peer_id
        if peer_id == self._swarm.keypair.peer_id:
            epoch = self._holds(network_id)
            held = LeaseHeld(network_id, peer_id, epoch)
            self._feed(held if epoch else LeaseDenied(network_id, peer_id))
            return
        try:
            reply = await self._swarm.call(
                peer_id,
                "Orchestrator/Lease",
                pb.LeaseRequest(network_id=network_id),
                pb.LeaseReply,
                timeout_s=LEASE_TIMEOUT_S,
            )
        except P2PNetError:
            self._feed(LeaseSilent(network_id, peer_id))
            return
        if reply.HasField("refusal"):
            self._feed(LeaseDenied(network_id, peer_id))
        else:
            self._feed(LeaseHeld(network_id, peer_id, reply.epoch))

    async def _take(self, effect: TakeOver) -> None:
        sighting = self._seen.get(effect.network_id)
        if sighting is None or sighting.epoch != effect.epoch or self._holds(effect.network_id):
            return  # somebody has claimed it in this very moment
        try:
            await self._take_over(sighting, effect.reason)
        except RemoteError as error:
            logger.info("network %s is not taken over: %s", sighting.charter.name, error)
            self._feed(Failed(effect.network_id))
        except P2PNetError as error:
            logger.warning("network %s cannot be taken over: %s", sighting.charter.name, error)
            self._feed(Failed(effect.network_id))
