"""Membership cores in virtual time: a queue of events, and a network that delays them.

Times are in virtual seconds. A killed node refuses at once; a paused one (SIGSTOP)
answers nobody, and finds everything that was sent to it when it goes on.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from p2pnet.core import Tick
from p2pnet.errors import RemoteError
from p2pnet.gossip.events import (
    Answered,
    Description,
    Effect,
    Event,
    GossipConfig,
    MemberChanged,
    PeerConnected,
    PeerDisconnected,
    Reply,
    Request,
    Send,
    State,
    SyncWith,
    Unanswered,
)
from p2pnet.gossip.membership import Membership
from p2pnet.gossip.statements import Versions
from p2pnet.keys import KeyPair


def keypair(number: int) -> KeyPair:
    return KeyPair.from_seed(number.to_bytes(32, "big"))


@dataclass
class Node:
    core: Membership
    peer_id: str
    killed: bool = False
    paused: bool = False
    held: list[Callable[[], None]] = field(default_factory=list)
    connected: dict[str, None] = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    tick_at: float | None = None


class World:
    def __init__(self, count: int, *, seed: int = 0, config: GossipConfig | None = None) -> None:
        self.now = 1000.0
        self.seed = seed
        self.rng = random.Random(seed)
        self.config = config or GossipConfig()
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.made = 0
        self.messages = 0
        self.events = 0
        self.nodes: dict[str, Node] = {}
        self.cut: Callable[[str, str], bool] = lambda a, b: False
        for number in range(1, count + 1):
            self.add(number)

    def add(
        self,
        number: int,
        *,
        client: bool = False,
        incarnation: int | None = None,
        versions: Versions | None = None,
    ) -> Node:
        key = keypair(number)
        core = Membership(
            key,
            incarnation=incarnation or int(self.now * 1000),
            now=self.now,
            rng=random.Random(f"{self.seed} {number}"),
            description=Description(addrs=(f"/ip4/127.0.0.1/tcp/{number}",)),
            client=client,
            config=self.config,
            versions=versions,
        )
        node = self.nodes[key.peer_id] = Node(core, key.peer_id)
        self._schedule_tick(node)
        return node

    def list(self) -> list[Node]:
        return list(self.nodes.values())

    def join_all(self) -> None:
        """Everyone syncs with the first one, spread over a second."""
        first = self.list()[0]
        for node in self.list()[1:]:
            self.later(self.rng.uniform(0, 1), self._feeder(node, SyncWith(first.peer_id)))

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.made += 1
        heapq.heappush(self.queue, (self.now + delay_s, self.made, action))

    def run(self, for_s: float, until: Callable[[], bool] | None = None) -> float | None:
        """Runs on; returns after how long `until` held, None if it never did.

        It is asked every 20 ms.
        """
        start, end = self.now, self.now + for_s
        while True:
            if until is not None and until():
                return self.now - start
            if self.now >= end:
                return None
            self._run_to(end if until is None else min(end, self.now + 0.02))

    def feed(self, node: Node, event: Event) -> list[Effect]:
        """Hands an event to a node's core and carries out what comes of it."""
        effects = list(node.core.handle(event, self.now))
        self.events += 1
        if self.events % 8 == 0:
            node.core.check()
        node.effects += effects
        for effect in effects:
            if isinstance(effect, Send):
                self._carry(node, effect)
        self._schedule_tick(node)
        return effects

    def kill(self, node: Node) -> None:
        node.killed = True
        for peer_id in tuple(node.connected):
            self._disconnect(node, self.nodes[peer_id], 0.001)

    def pause(self, node: Node) -> None:
        node.paused = True

    def starve(self, node: Node, *, off_s: float, on_s: float, times: int) -> None:
        """Again and again the node gets no time for a while."""
        for turn in range(times):
            start = turn * (off_s + on_s)
            self.later(start, lambda: self.pause(node))
            self.later(start + off_s, lambda: self.resume(node))

    def resume(self, node: Node) -> None:
        node.paused = False
        held, node.held = node.held, []
        for action in held:
            action()
        self._schedule_tick(node)

    def states(self, peer_id: str) -> list[State | None]:
        """What the nodes that run hold one member to be."""
        found = []
        for node in self.running():
            member = node.core.member(peer_id)
            found.append(member.state if member else None)
        return found

    def running(self) -> list[Node]:
        return [n for n in self.list() if not n.killed and not n.paused]

    def all_alive(self) -> bool:
        count = len(self.running())
        return all(
            sum(m.state is State.ALIVE for m in node.core.members()) == count
            for node in self.running()
        )

    def ever(self, state: State) -> list[tuple[str, str]]:
        """(observer, subject) of every change to this state that a node saw."""
        return [
            (node.peer_id, effect.peer_id)
            for node in self.list()
            for effect in node.effects
            if isinstance(effect, MemberChanged) and effect.new is state and effect.old is not state
        ]

    def _run_to(self, end: float) -> None:
        while self.queue and self.queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self.queue)
            action()
        self.now = end

    def _feeder(self, node: Node, event: Event) -> Callable[[], None]:
        return lambda: self._arrive(node, event)

    def _arrive(self, node: Node, event: Event) -> None:
        if node.killed:
            return
        if node.paused:
            node.held.append(lambda: self._arrive(node, event))
        else:
            self.feed(node, event)

    def _schedule_tick(self, node: Node) -> None:
        due = node.core.deadline()
        if due is None or node.killed or node.tick_at == due:
            return
        node.tick_at = due

        def tick() -> None:
            if node.killed or node.tick_at != due:
                return
            if node.paused:
                node.held.append(tick)
            else:
                node.tick_at = None
                self.feed(node, Tick())
                after = node.core.deadline()
                assert after is None or after > self.now, "a tick leaves nothing due"

        self.later(max(0.0, due - self.now), tick)

    def _delay(self) -> float:
        return self.rng.uniform(0.0005, 0.005)

    def _disconnect(self, one: Node, other: Node, after_s: float) -> None:
        one.connected.pop(other.peer_id, None)
        other.connected.pop(one.peer_id, None)
        self.later(after_s, self._feeder(one, PeerDisconnected(other.peer_id)))
        self.later(after_s, self._feeder(other, PeerDisconnected(one.peer_id)))

    def _connect(self, one: Node, other: Node) -> None:
        if other.peer_id not in one.connected:
            one.connected[other.peer_id] = None
            other.connected[one.peer_id] = None
            self._arrive(one, PeerConnected(other.peer_id, "/ip4/127.0.0.1/tcp/1"))
            self._arrive(other, PeerConnected(one.peer_id, "/ip4/127.0.0.1/tcp/1"))

    def _carry(self, sender: Node, send: Send) -> None:
        self.messages += 1
        done = False

        def finish(event: Event) -> None:
            nonlocal done
            if not done:
                done = True
                self._arrive(sender, event)

        def timeout() -> None:
            if not done:
                if send.peer_id in sender.connected:
                    self._disconnect(sender, self.nodes[send.peer_id], 0.0)
                finish(Unanswered(send.rpc_id))

        target = self.nodes.get(send.peer_id)
        self.later(send.timeout_s, timeout)
        if target is None or self.cut(sender.peer_id, send.peer_id):
            return
        receiver = target

        def deliver() -> None:
            if receiver.killed:
                finish(Unanswered(send.rpc_id))
            elif receiver.paused:
                receiver.held.append(deliver)
            else:
                self._connect(sender, receiver)
                try:
                    effects = self.feed(receiver, Request(sender.peer_id, send.message))
                except RemoteError:
                    finish(Unanswered(send.rpc_id))
                    return
                replies = [e for e in effects if isinstance(e, Reply)]
                assert len(replies) == 1
                answer = Answered(send.rpc_id, replies[0].message)
                self.later(self._delay(), lambda: finish(answer))

        self.later(self._delay(), deliver)
