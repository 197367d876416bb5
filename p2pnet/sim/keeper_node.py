"""The shipped keeper core on a simulated machine: what `log/keeper_shell.py` does. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pnet.log.history import History
from p2pnet.log.keeper import (
    Accept,
    Effect,
    Event,
    Forget,
    Keeper,
    Learn,
    Persist,
    Prepare,
    Read,
    Reply,
)
from p2pnet.sim.calls import Calls
from p2pnet.sim.machine import Machine
from p2pnet.v1 import common_pb2

_FILE = "logs"

# (who, network, entry): a keeper holds an entry to be decided
Watcher = Callable[[Machine, str, common_pb2.Signed], None]


class KeeperNode:
    """One keeper. What it has persisted survives its process, and nothing else does."""

    def __init__(self, machine: Machine, calls: Calls) -> None:
        self.machine = machine
        self.watchers: list[Watcher] = []
        self.core: Keeper
        calls.methods["Keeper/Prepare"] = lambda who, request: self._answer(Prepare(who, request))
        calls.methods["Keeper/Accept"] = lambda who, request: self._answer(Accept(who, request))
        calls.methods["Keeper/Learn"] = lambda who, request: self._answer(Learn(who, request))
        calls.methods["Keeper/ReadLog"] = lambda who, request: self._answer(Read(request))
        machine.on_boot.append(self.boot)
        self.boot()

    def boot(self) -> None:
        """A process begins with what the disk holds."""
        self.core = Keeper.load(self.machine.key, self.machine.disk.get(_FILE, {}))

    def histories(self) -> dict[str, History]:
        """The logs that it keeps, by network."""
        found = {network_id: self.core.history(network_id) for network_id in self._networks()}
        return {network_id: history for network_id, history in found.items() if history}

    def _networks(self) -> list[str]:
        disk = self.machine.disk.get(_FILE, {})
        return list(dict.fromkeys(network_id for network_id, _ in disk))

    def _answer(self, event: Event) -> Any:
        effects: list[Effect] = self.core.handle(event, self.machine.now)
        for effect in effects:
            if isinstance(effect, Persist):
                disk = self.machine.disk.setdefault(_FILE, {})
                disk[effect.network_id, effect.slot] = effect.data
                self._note(effect)
            elif isinstance(effect, Forget):
                disk = self.machine.disk.get(_FILE, {})
                for name in [name for name in disk if name[0] == effect.network_id and name[1]]:
                    del disk[name]
            elif isinstance(effect, Reply):
                self.core.check()
                return effect.message
        return None

    def _note(self, persisted: Persist) -> None:
        history = self.core.history(persisted.network_id)
        entry = history.entry(persisted.slot) if history is not None else None
        if entry is not None:
            for watcher in self.watchers:
                watcher(self.machine, persisted.network_id, entry)
