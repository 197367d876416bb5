"""How simulated machines connect: one address at a time, as `net/swarm.py` does. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from p2pnet.sim.connections import Line, Request
from p2pnet.sim.machine import Machine, Phase

if TYPE_CHECKING:
    from p2pnet.sim.wire import Wire
    from p2pnet.sim.world import World

# As `net.libp2p.open_network` has them.
CONNECTIONS_MAX = 512
INBOUND_CONNECTIONS_MAX = 384
# Round trips: TCP 1, choosing and making Noise and yamux 4.5, the first stream 1.
_HANDSHAKE_TRIPS = 6.5
_ALMOST_S = 0.02
_CHANNEL_S = 10.0
_KNOCK_AGAIN_S = 1.0  # a SYN that was lost is sent again, then after twice as long each time


class _Dial:
    """An attempt to connect, one address at a time."""

    __slots__ = ("addrs", "asker", "boots", "over", "peer_id", "turn", "until", "waiting")

    def __init__(self, request: Request, addrs: Sequence[str]) -> None:
        self.asker = request.asker
        self.boots = request.boots
        self.peer_id = request.peer_id
        self.addrs = addrs
        self.until = request.until
        self.turn = -1
        self.waiting = [request]
        self.over = False


class Dialler:
    """All attempts to connect that are under way in a world."""

    def __init__(self, wire: Wire, world: World) -> None:
        self._wire = wire
        self._world = world
        self._dials: dict[tuple[int, str], _Dial] = {}  # by (machine, peer id)

    def dial(self, request: Request, addrs: Sequence[str]) -> None:
        """Sends a request over a new connection, or fails it."""
        asker, peer_id = request.asker, request.peer_id
        under_way = self._dials.get((asker.number, peer_id))
        if under_way is not None and under_way.boots == asker.boots:
            under_way.waiting.append(request)
            return
        known = asker.remembered.get(peer_id)
        candidates = tuple(addrs) or (() if known is None else (known,))
        if not candidates or peer_id == asker.peer_id or not self._make_room(asker):
            self._wire.soon(request, None)
            return
        dial = self._dials[asker.number, peer_id] = _Dial(request, candidates)
        if request.protocol in self._wire.repeated:  # a channel connects for whoever calls next
            dial.until = max(dial.until, self._world.now + _CHANNEL_S)
        self._next_addr(dial, 0)

    def _make_room(self, machine: Machine) -> bool:
        if len(machine.lines) < CONNECTIONS_MAX:
            return True
        idle = [line for line in machine.lines.values() if not line.asked]
        if idle:
            self._wire.close(min(idle, key=lambda line: line.used_at))
        return bool(idle)

    def _next_addr(self, dial: _Dial, turn: int) -> None:
        """Gives up the address whose turn it was; `turn` is the next one's."""
        if dial.over or dial.turn >= turn:
            return
        left = len(dial.addrs) - turn
        if not left:
            self._failed(dial)
            return
        dial.turn = turn
        now = self._world.now
        share_s = (dial.until - now) / left
        # A little sooner than the request's own timeout, so that the dial ends first.
        self._world.at(
            now + share_s * 0.999, dial.asker.does, dial.boots, self._next_addr, dial, turn + 1
        )
        self._knock(dial, turn, _KNOCK_AGAIN_S)

    def _knock(self, dial: _Dial, turn: int, again_s: float) -> None:
        asker, world = dial.asker, self._world
        if dial.over or dial.turn != turn or dial.boots != asker.boots or not asker.alive:
            return
        target = world.by_addr.get(dial.addrs[turn])
        if target is None:
            return  # nobody there: silence
        there_s = world.links.carry_s(asker, target)
        back_s = world.links.carry_s(target, asker)
        if there_s is None or back_s is None:
            world.after(again_s, self._knock, dial, turn, 2 * again_s)
        else:
            world.after(there_s, self._knocked, dial, turn, target, back_s)

    def _knocked(self, dial: _Dial, turn: int, target: Machine, back_s: float) -> None:
        world, asker = self._world, dial.asker
        if target.phase is Phase.DOWN:
            world.after(back_s, asker.does, dial.boots, self._next_addr, dial, turn + 1)
        elif target.phase is not Phase.VANISHED:
            # A paused process is connected to by its kernel, and shakes hands later.
            more_s = (_HANDSHAKE_TRIPS - 1) * 2 * world.links.base_s(asker, target)
            world.after(more_s, target.does, target.boots, self._shake, dial, turn, target, back_s)

    def _shake(self, dial: _Dial, turn: int, target: Machine, back_s: float) -> None:
        world, asker = self._world, dial.asker
        full = len(target.lines) >= INBOUND_CONNECTIONS_MAX
        if target.peer_id != dial.peer_id or (full and asker.peer_id not in target.lines):
            world.after(back_s, asker.does, dial.boots, self._next_addr, dial, turn + 1)
        elif not world.links.parted(target.number, asker.number):
            world.after(back_s, asker.does, dial.boots, self._up, dial, turn, target, target.boots)

    def _up(self, dial: _Dial, turn: int, target: Machine, boots: int) -> None:
        asker = dial.asker
        if dial.over or dial.turn != turn or not target.alive or target.boots != boots:
            return
        if not target.running:
            target.does(boots, asker.does, dial.boots, self._up, dial, turn, target, boots)
            return
        asker.remembered[target.peer_id] = dial.addrs[turn]
        line = asker.lines.get(target.peer_id)
        new = line is None or target.lines.get(asker.peer_id) is not line.twin
        if new:
            self._join(asker, target)
        line = asker.lines[target.peer_id]
        self._over(dial)
        for request in dial.waiting:
            if request.done is not None:
                self._wire.send(request, line)

    def _join(self, asker: Machine, target: Machine) -> None:
        now = self._world.now
        for machine, peer in ((asker, target), (target, asker)):
            stale = machine.lines.get(peer.peer_id)
            if stale is not None:  # its other end is gone, unheard
                self._wire.end(stale)
        near, far = Line(asker, target, now), Line(target, asker, now)
        near.twin, far.twin = far, near
        asker.lines[target.peer_id] = near
        target.lines[asker.peer_id] = far
        for program in asker.programs.values():
            program.connected(target.peer_id, target.addr)
        target.does(target.boots, self._accepted, far)

    def _accepted(self, line: Line) -> None:
        if line.owner.lines.get(line.peer.peer_id) is line:
            for program in line.owner.programs.values():
                program.connected(line.peer.peer_id, line.peer.addr)

    def _failed(self, dial: _Dial) -> None:
        self._over(dial)
        now = self._world.now
        timed_out = now >= dial.until - _ALMOST_S
        for request in dial.waiting:
            if timed_out and request.until > now + _ALMOST_S and request.done is not None:
                self.dial(request, dial.addrs)  # it has joined one that had less time
            else:
                self._wire.finish(request, None, None)

    def _over(self, dial: _Dial) -> None:
        dial.over = True
        if self._dials.get((dial.asker.number, dial.peer_id)) is dial:
            del self._dials[dial.asker.number, dial.peer_id]
