"""Reads a log on peers and appends to it: what `log/peers_shell.py` does. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from p2pnet.core import Core, Tick
from p2pnet.dht.manifest import open_manifest
from p2pnet.errors import RemoteError
from p2pnet.log import proposer as pr
from p2pnet.log import reader as rd
from p2pnet.log.history import History
from p2pnet.sim.calls import Calls
from p2pnet.sim.driver import Driver
from p2pnet.v1 import common_pb2, log_pb2

CALL_TIMEOUT_S = 1.5
_METHODS: dict[type[Any], str] = {
    log_pb2.PrepareRequest: "Keeper/Prepare",
    log_pb2.AcceptRequest: "Keeper/Accept",
    log_pb2.LearnRequest: "Keeper/Learn",
}
_PROPOSE, _READ = 41, 42  # in the trace

# (who is told, the decided entry)
Watcher = Callable[[str, common_pb2.Signed], None]
# the decided entry and whether it is ours; or None and why not
Appended = Callable[[common_pb2.Signed | None, bool, str], None]
# the decided entries from the slot that was asked for on; or None and why not
WasRead = Callable[[tuple[common_pb2.Signed, ...] | None, str], None]


class LogClient:
    """One process's copy of one network's log, with the proofs that its entries are decided."""

    def __init__(
        self, calls: Calls, manifest: common_pb2.Signed, network_id: str, watcher: Watcher
    ) -> None:
        self.calls = calls
        self.history = History(network_id)
        self.first = tuple(open_manifest(manifest).keepers)
        self.proofs: dict[int, log_pb2.Proof] = {}
        self.rng: random.Random = calls.machine.world.rng_of(
            "log", calls.machine.number, calls.machine.boots, network_id
        )
        self.watcher = watcher
        self._waiting: list[tuple[int, int, WasRead]] = []
        self._reading = False

    def read(
        self, from_slot: int, done: WasRead, *, hints: Sequence[str] = (), at_least: int = 0
    ) -> None:
        """Reads from a slot on, later; one read after the other."""
        self._waiting.append((from_slot, at_least, done))
        if not self._reading:
            self._read_next(hints)

    def _read_next(self, hints: Sequence[str]) -> None:
        self._reading = True
        at_least = self._waiting[0][1]
        core = rd.LogReader(self.history, first=self.first, hints=hints, at_least=at_least)

        def done(why: str) -> None:
            from_slot, _, then = self._waiting.pop(0)
            if self._waiting:
                self._read_next(hints)
            else:
                self._reading = False
            then(None if why else tuple(self.history.entries[from_slot - 1 :]), why)

        _Reading(self, core, done)

    def append(self, history: History, entry: common_pb2.Signed, done: Appended) -> None:
        """Gets an entry into the slot after `history`."""
        try:
            core = pr.Proposer(
                self.calls.machine.peer_id, history, entry, rng=self.rng, proofs=self.proofs
            )
        except RemoteError as error:
            reason = str(error)
            self.calls.machine.after(0.0, lambda: done(None, False, reason))
            return

        def ended(decided: pr.Decided | None, why: str) -> None:
            if decided is None:
                done(None, False, why)
                return
            slot = history.next_slot
            self.proofs[slot] = decided.proof
            if self.history.next_slot == slot:
                self.history.add(decided.entry)
            self.watcher(self.calls.machine.peer_id, decided.entry)
            done(decided.entry, decided.ours, "")

        _Proposal(self, core, ended)


class _Proposal(Driver[pr.Event, pr.Effect]):
    """One entry on its way into one slot; `done` is called once."""

    def __init__(
        self, log: LogClient, core: pr.Proposer, done: Callable[[pr.Decided | None, str], None]
    ) -> None:
        super().__init__(log.calls.machine)
        self._calls = log.calls
        self._core = core
        self._done = done
        self._feed(pr.Begin())

    def _feed(self, event: pr.Event) -> None:
        self.hand_in(event, _PROPOSE, type(event).__name__.encode())

    def _driven(self) -> Core[pr.Event | Tick, pr.Effect]:
        return self._core

    def _carry_out(self, effect: pr.Effect) -> None:
        if isinstance(effect, pr.Send):
            self._send(effect.keeper, effect.requests)
        elif isinstance(effect, pr.Decided):
            self._done(effect, "")
        else:
            self._done(None, effect.reason)

    def _send(self, keeper: str, requests: Sequence[pr.Request]) -> None:
        request, rest = requests[0], requests[1:]

        def answered(reply: Any) -> None:
            if reply is not None and rest:
                self._send(keeper, rest)
                return
            last = requests[-1]
            if isinstance(last, log_pb2.LearnRequest):
                return
            if reply is None:
                self._feed(pr.Missed(keeper, last, "no answer"))
            else:
                self._feed(pr.Answered(keeper, last, reply))

        self._calls.call(
            keeper, _METHODS[type(request)], request, timeout_s=CALL_TIMEOUT_S, done=answered
        )


class _Reading(Driver[rd.Event, rd.Effect]):
    """One read; `done` is called once."""

    def __init__(self, log: LogClient, core: rd.LogReader, done: Callable[[str], None]) -> None:
        super().__init__(log.calls.machine)
        self._log = log
        self._core = core
        self._done = done
        self._feed(rd.Begin())

    def _feed(self, event: rd.Event) -> None:
        self.hand_in(event, _READ, type(event).__name__.encode())

    def _driven(self) -> Core[rd.Event | Tick, rd.Effect]:
        return self._core

    def _carry_out(self, effect: rd.Effect) -> None:
        match effect:
            case rd.Ask(keeper, request):
                self._log.calls.call(
                    keeper,
                    "Keeper/ReadLog",
                    request,
                    timeout_s=CALL_TIMEOUT_S,
                    done=lambda reply: self._answered(keeper, reply),
                )
            case rd.Found(slot, entry, proof):
                self._log.proofs[slot] = proof
                self._log.watcher(self.peer_id, entry)
            case rd.Done():
                self._done("")
            case rd.Failed(reason):
                self._done(reason)

    def _answered(self, keeper: str, reply: log_pb2.ReadLogReply | None) -> None:
        if reply is None:
            self._feed(rd.Missed(keeper, "no answer"))
        else:
            self._feed(rd.Answered(keeper, reply))
