"""Requests between machines, with the semantics of `net.Network` over TCP. Pure.

A request goes over the kept connection to that peer, or dials first. A port that
nobody listens on refuses at once; a silent address costs the whole timeout. Both ends
know of a connection; one of them learns that it broke when the other says so (its
process ended), when it sends into a process that knows of no such connection (a
restart), or after silence. As in `net/swarm.py`, a request whose connection turns out
to be dead is sent once more over a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from p2pnet.errors import RemoteError
from p2pnet.sim.connections import Done, Later, Line, Request, Silence
from p2pnet.sim.dialling import Dialler
from p2pnet.sim.machine import Machine, Phase

if TYPE_CHECKING:
    from p2pnet.sim.world import World

_REPEAT_S = 0.2  # TCP's first time-out (RFC 6298, as Linux has it); it doubles
SILENCE_S = 5.0  # as `net.libp2p.open_network` has it


class Wire:
    """All connections of a world."""

    def __init__(self, world: World, *, count_bytes: bool) -> None:
        self._world = world
        self._count_bytes = count_bytes
        self._dialler = Dialler(self, world)
        # Of these protocols a lost message is sent again, as TCP does it.
        self.repeated: dict[str, None] = {}
        self.messages: dict[str, int] = {}  # sent, by protocol
        self.bytes: dict[str, int] = {}

    # Asking

    def request(
        self,
        asker: Machine,
        peer_id: str,
        protocol: str,
        payload: Any,
        *,
        timeout_s: float,
        addrs: Sequence[str] = (),
        wants_reply: bool = True,
        done: Done,
    ) -> None:
        """Sends one message; `done` is called once, later, unless the asker's process ends.

        Connects first if need be, to `addrs` or to where the peer was last reached. The
        timeout is in seconds of the asker's own clock.
        """
        until = self._world.now + asker.clock.real(timeout_s)
        request = Request(asker, peer_id, protocol, payload, until, wants_reply, done)
        self._world.at(until, asker.times_out, asker.boots, self._timeout, request)
        line = asker.lines.get(peer_id)
        if line is not None:
            self.send(request, line)
        else:
            self._dialler.dial(request, addrs)

    def connect(
        self,
        asker: Machine,
        peer_id: str,
        addrs: Sequence[str],
        *,
        timeout_s: float,
        done: Done,
    ) -> None:
        """Makes sure of a connection."""
        self.request(asker, peer_id, "", None, timeout_s=timeout_s, addrs=addrs, done=done)

    def drop(self, machine: Machine, peer_id: str) -> None:
        """Closes the connection to a peer, if there is one, and forgets where it was."""
        machine.remembered.pop(peer_id, None)
        line = machine.lines.get(peer_id)
        if line is not None:
            self.close(line)

    def killed(self, machine: Machine) -> None:
        """A process ends: its kernel tells every peer."""
        for line in machine.lines.values():
            self._say_over(line)

    # Over a connection

    def send(self, request: Request, line: Line) -> None:
        """Sends a request over a connection."""
        world = self._world
        request.line = line
        line.used_at = world.now
        if not request.protocol:
            self.soon(request, line)
            return
        line.asked[request] = None
        self._count(request.asker, request.protocol, request.payload)
        for _ in range(2 if world.links.twice() else 1):
            self._carry_request(request, line, _REPEAT_S)
        if not request.wants_reply:
            self.soon(request, line)

    def _carry_request(self, request: Request, line: Line, repeat_s: float) -> None:
        world = self._world
        delay_s = world.links.carry_s(line.owner, line.peer)
        if delay_s is not None:
            world.at(world.now + delay_s, self._arrive, request, line)
        elif request.protocol in self.repeated and request.done is not None:
            when = world.now + repeat_s
            world.at(when, self._carry_request, request, line, 2 * repeat_s)

    def _arrive(self, request: Request, line: Line) -> None:
        server = line.peer
        phase = server.phase
        if phase is Phase.UP:
            self._serve(request, line)
        elif phase is Phase.PAUSED:
            server.does(server.boots, self._serve, request, line)
        elif phase is Phase.DOWN:
            self._reset(request, line)

    def _serve(self, request: Request, line: Line) -> None:
        world, server, asker = self._world, line.peer, line.owner
        if server.lines.get(asker.peer_id) is not line.twin:
            self._reset(request, line)
            return
        line.twin.heard_at = line.twin.used_at = world.now
        program = server.programs.get(request.protocol)
        good = program is not None
        reply: Any = None
        if program is not None:
            try:
                reply = program.serve(asker.peer_id, request.payload)
            except RemoteError:
                good = False
        if not request.wants_reply or isinstance(reply, Silence):
            return
        if isinstance(reply, Later):
            reply.then(partial(self._answer_later, request, line, server.boots))
        else:
            self._answer(request, line, reply, good)

    def _answer_later(
        self, request: Request, line: Line, boots: int, reply: Any, good: bool
    ) -> None:
        server = line.peer
        if server.boots == boots and server.lines.get(line.owner.peer_id) is line.twin:
            self._answer(request, line, reply, good)

    def _answer(self, request: Request, line: Line, reply: Any, good: bool) -> None:
        world, server = self._world, line.peer
        if good:
            self._count(server, request.protocol, reply)
        for _ in range(2 if world.links.twice() else 1):
            self._carry_reply(request, line, reply, good, _REPEAT_S)

    def _carry_reply(
        self, request: Request, line: Line, reply: Any, good: bool, repeat_s: float
    ) -> None:
        world, asker = self._world, line.owner
        delay_s = world.links.carry_s(line.peer, asker)
        if delay_s is not None:
            when = world.now + delay_s
            world.at(when, asker.does, request.boots, self._replied, request, line, reply, good)
        elif request.protocol in self.repeated and request.done is not None:
            when = world.now + repeat_s
            world.at(when, self._carry_reply, request, line, reply, good, 2 * repeat_s)

    def _replied(self, request: Request, line: Line, reply: Any, good: bool) -> None:
        line.heard_at = self._world.now
        if request.asker.lines.get(request.peer_id) is line:
            self.finish(request, reply, line if good else None)

    def finish(self, request: Request, reply: Any, line: Line | None) -> None:
        """Ends a request: answered over a connection, or failed."""
        if request.line is not None:
            request.line.asked.pop(request, None)
        done, request.done = request.done, None
        if done is not None:
            done(reply, line.peer if line is not None else None)

    def _timeout(self, request: Request) -> None:
        if request.done is None:
            return
        line = request.line
        self.finish(request, None, None)
        if (
            line is not None
            and self._world.now - line.heard_at >= SILENCE_S
            and request.asker.lines.get(request.peer_id) is line
        ):
            self.drop(request.asker, request.peer_id)

    # The end of a connection

    def _reset(self, request: Request, line: Line) -> None:
        """The other end knows of no such connection, and says so."""
        asker = request.asker
        delay_s = self._world.links.carry_s(line.peer, asker)
        if delay_s is not None:
            when = self._world.now + delay_s
            self._world.at(when, asker.does, request.boots, self._hung_up, line)

    def _say_over(self, line: Line) -> None:
        # TCP repeats it until it comes through; only a cut stops it.
        links = self._world.links
        if not links.parted(line.owner.number, line.peer.number):
            delay_s = links.base_s(line.owner, line.peer)
            peer = line.peer
            self._world.after(delay_s, peer.does, peer.boots, self._hung_up, line.twin)

    def _hung_up(self, line: Line) -> None:
        if line.owner.lines.get(line.peer.peer_id) is line:
            self.end(line)

    def close(self, line: Line) -> None:
        """Ends a connection; the other end is told."""
        self._say_over(line)
        self.end(line)

    def end(self, line: Line) -> None:
        """Ends this end of a connection. What waits on it is asked once more over another."""
        del line.owner.lines[line.peer.peer_id]
        asked, line.asked = line.asked, {}
        for program in list(line.owner.programs.values()):
            program.disconnected(line.peer.peer_id)
        for request in asked:
            request.line = None
            if request.done is None:
                continue
            if request.again:
                self.soon(request, None)
            else:
                request.again = True
                new = request.asker.lines.get(request.peer_id)
                if new is not None:
                    self.send(request, new)
                else:
                    self._dialler.dial(request, ())

    def soon(self, request: Request, line: Line | None) -> None:
        """Ends a request without an answer, but never within the call that made it."""
        world, asker = self._world, request.asker
        world.at(world.now, asker.does, request.boots, self.finish, request, None, line)

    # Counting

    def _count(self, sender: Machine, protocol: str, payload: Any) -> None:
        self.messages[protocol] = self.messages.get(protocol, 0) + 1
        if payload is None:
            return
        if self._count_bytes or isinstance(payload, bytes):
            size = sender.programs[protocol].size_bytes(payload)
            sender.sent_bytes += size
            self.bytes[protocol] = self.bytes.get(protocol, 0) + size
