"""Calls from node to node by method and message, as over gRPC. Pure.

A message is handed over as it is: who keeps one that it may change copies it first.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from p2pnet.errors import RemoteError
from p2pnet.sim.connections import Later
from p2pnet.sim.machine import Machine
from p2pnet.sim.streams import End

PROTOCOL = "calls"
CALL = 40  # in the trace

# (caller's peer id, request) -> reply, or a `Later`; raises RemoteError to fail the call
Method = Callable[[str, Any], Any]
# the reply, or None: it failed
Answered = Callable[[Any], None]


class Calls:
    """The methods of one machine, and its calls to others.

    `replays`: the share of requests that somebody in between serves once more, up to
    `replay_s` later.
    """

    protocol = PROTOCOL

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.methods: dict[str, Method] = {}
        self.replays = 0.0
        self.replay_s = 5.0
        self._rng: random.Random = machine.world.rng_of("replays", machine.number)
        machine.world.wire.repeated[PROTOCOL] = None
        machine.install(self)

    def call(
        self, peer_id: str, method: str, request: Any, *, timeout_s: float, done: Answered
    ) -> None:
        """Asks a peer; `done` is called once, later, unless this process ends."""
        world = self.machine.world
        if not self.machine.alive:
            return  # it has died within the call that it is in
        if peer_id == self.machine.peer_id:
            self._call_here(method, request, done)
            return
        other = world.by_id.get(peer_id)
        world.wire.request(
            self.machine,
            peer_id,
            PROTOCOL,
            (method, request),
            timeout_s=timeout_s,
            addrs=(other.addr,) if other is not None else (),
            done=lambda reply, who: done(reply if who is not None else None),
        )

    def _call_here(self, method: str, request: Any, done: Answered) -> None:
        # A node calls itself without a socket, but not within its own call either.
        machine = self.machine

        def serve() -> None:
            try:
                reply = self.serve(machine.peer_id, (method, request))
            except RemoteError:
                done(None)
                return
            if isinstance(reply, Later):
                boots = machine.boots
                reply.then(lambda what, good: machine.does(boots, done, what if good else None))
            else:
                done(reply)

        machine.after(0.0, serve)

    # As a `Program`

    def boot(self) -> None:
        """See `Program`."""

    def connected(self, peer_id: str, addr: str) -> None:
        """See `Program`."""

    def disconnected(self, peer_id: str) -> None:
        """See `Program`."""

    def serve(self, peer_id: str, payload: Any) -> Any:
        """See `Program`."""
        method, request = payload
        if self.replays and self._rng.random() < self.replays:
            late_s = self._rng.uniform(0.0, self.replay_s)
            self.machine.after(late_s, self._again, peer_id, method, request)
        return self._serve(peer_id, method, request)

    def _serve(self, peer_id: str, method: str, request: Any) -> Any:
        machine = self.machine
        machine.world.note(machine.number, CALL, f"{method} {peer_id}".encode() + _bytes(request))
        return self.methods[method](peer_id, request)

    def _again(self, peer_id: str, method: str, request: Any) -> None:
        try:
            self._serve(peer_id, method, request)
        except RemoteError:
            pass

    def size_bytes(self, payload: Any) -> int:
        """See `Program`."""
        return len(_bytes(payload[1] if isinstance(payload, tuple) else payload))


def _bytes(message: Any) -> bytes:
    if isinstance(message, bytes):
        return message
    if hasattr(message, "SerializeToString"):
        data: bytes = message.SerializeToString(deterministic=True)
        return data
    return b"" if isinstance(message, End) else repr(message).encode()
