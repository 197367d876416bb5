"""Several writers race for one log on keepers that die, come back and are replaced. Pure.

Claims and commits are nearly all that happens here, a hundred times as often as in a
network that trains. Afterwards `log/checker.py` judges what everybody was told.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from p2pnet.dht.manifest import network_id_of
from p2pnet.errors import RemoteError
from p2pnet.keys import MANIFEST, KeyPair, sha256
from p2pnet.log.checker import Acknowledged, Decided, Recording, check
from p2pnet.log.history import History, new_claim, new_commit
from p2pnet.sim.calls import Calls
from p2pnet.sim.faults import Faults, any_clock, any_links
from p2pnet.sim.keeper_node import KeeperNode
from p2pnet.sim.log_client import LogClient
from p2pnet.sim.machine import Machine
from p2pnet.sim.report import Report
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.world import World
from p2pnet.v1 import common_pb2, log_pb2, records_pb2

_KEEPERS = 3
_PAUSE_S = 0.3  # between two things that a writer does, on average
_GRAPH = b"{}"
_STORM_PAUSE_S = 0.06
_DIES_THEN = 0.2  # a writer, as soon as it hears that its entry is decided
_FAULTS = 0.2  # of what strikes; the rest are restarts
_CALM_S = 60.0

OWNER = KeyPair.from_seed(sha256(b"owner"))


def manifest_of(name: str, spec_digest: bytes, **fields: Any) -> common_pb2.Signed:
    """A manifest by the simulator's owner; anybody may orchestrate."""
    manifest = records_pb2.Manifest(
        owner=OWNER.public_key,
        name=name,
        spec_digest=spec_digest,
        any_orchestrator=True,
        **fields,
    )
    return OWNER.sign(MANIFEST, manifest.SerializeToString(deterministic=True))


class _Writer:
    """Reads, claims and commits, again and again; knows nothing after a restart."""

    def __init__(self, storm: _Storm, machine: Machine, calls: Calls) -> None:
        self._storm = storm
        self.machine = machine
        self._calls = calls
        self._rng: random.Random = machine.world.rng_of("writer", machine.number)
        machine.on_boot.append(self.boot)
        self.boot()

    def boot(self) -> None:
        storm = self._storm
        self.log = LogClient(self._calls, storm.manifest, storm.network_id, storm.told)
        self._later()

    def _later(self) -> None:
        self.machine.after(self._rng.expovariate(1.0 / _PAUSE_S), self._read)

    def _read(self) -> None:
        self.log.read(self.log.history.next_slot, self._write)

    def _write(self, entries: tuple[common_pb2.Signed, ...] | None, why: str) -> None:
        storm, history, key = self._storm, self.log.history, self.machine.key
        if entries is None:
            self._later()
            return
        keepers = storm.next_keepers(history, self._rng)
        mine = history.orchestrator == self.machine.peer_id
        if not history.epoch or not mine or self._rng.random() < 0.2:
            genesis = None if history.epoch else log_pb2.Genesis(graph=_GRAPH)
            entry = new_claim(
                history, key, storm.manifest, placement={}, keepers=keepers, genesis=genesis
            )
        else:
            step = 1 + (int(history.commit.step) if history.commit is not None else 0)
            digest = sha256(b"%d" % step)
            ref = common_pb2.BlobRef(digest=digest, size_bytes=1)
            entry = new_commit(history, key, step, {"only": ref}, keepers=keepers)
        storm.tried += 1
        self.log.append(history, entry, self._ended)

    def _ended(self, entry: common_pb2.Signed | None, ours: bool, why: str) -> None:
        storm = self._storm
        if entry is not None and ours:
            storm.recording.note(Acknowledged(self.machine.peer_id, entry))
            storm.acknowledged += 1
        self._later()


class _Storm:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        world = self.world = World(seed)
        self.rng = world.rng_of("storm")
        world.links = any_links(self.rng)
        world.links.rng = world.rng_of("links")
        world.links.loss = self.rng.uniform(0.0, 0.3)
        self.tried = self.acknowledged = 0
        self.storming = True
        self.machines = [
            world.machine(clock=any_clock(self.rng, wrong=self.rng.random() < 0.5))
            for _ in range(nodes)
        ]
        self.keepers = tuple(sorted(m.peer_id for m in self.machines[:_KEEPERS]))
        self.manifest = manifest_of("race", sha256(_GRAPH), keepers=self.keepers)
        self.network_id = network_id_of(self.manifest)
        self.recording = Recording(self.network_id)
        self.writers: list[_Writer] = []
        self.nodes: list[KeeperNode] = []
        for machine in self.machines:
            calls = Calls(machine)
            calls.replays = options["replays"]
            node = KeeperNode(machine, calls)
            node.watchers.append(self._decided)
            self.nodes.append(node)
            if len(self.writers) < options["writers"]:
                self.writers.append(_Writer(self, machine, calls))
        # A keeper that has lost its disk is another one: Paxos stands and falls with it.
        self.faults = Faults(world, self.machines, world.rng_of("faults"), keep_disks=True)

    def _decided(self, machine: Machine, network_id: str, entry: common_pb2.Signed) -> None:
        self.told(machine.peer_id, entry)

    def told(self, peer_id: str, entry: common_pb2.Signed) -> None:
        """Somebody holds an entry to be decided."""
        self.recording.note(Decided(peer_id, entry))
        writer = self.world.by_id[peer_id]
        if not self.storming or writer.key.public_key != entry.public_key:
            return
        if self.rng.random() < _DIES_THEN:
            # The worst moment: nobody but itself knows yet, and keepers have to remember.
            writer.kill()
            self.world.after(self.rng.uniform(0.1, 2.0), writer.restart)
            for keeper in self.rng.sample(self._keeping(), 2):
                self.world.after(0.0, keeper.restart)

    def next_keepers(self, history: History, rng: random.Random) -> tuple[str, ...]:
        """Now and then another one instead of one of them."""
        keepers = list(history.keepers or self.keepers)
        others = [m.peer_id for m in self.machines if m.alive and m.peer_id not in keepers]
        if others and rng.random() < 0.2:
            keepers[rng.randrange(len(keepers))] = rng.choice(others)
        return tuple(sorted(keepers))

    def _keeping(self) -> list[Machine]:
        """The keepers of the newest slot that anybody knows."""
        newest = max((w.log.history for w in self.writers), key=lambda h: h.next_slot)
        return [self.world.by_id[keeper] for keeper in newest.keepers or self.keepers]

    def play(self) -> None:
        end = self.world.now + self.options["storm_s"]
        while self.world.now < end:
            self.world.run_for(self.rng.expovariate(1.0 / _STORM_PAUSE_S))
            what = self.rng.random()
            if what < _FAULTS:
                self.faults.strike()
            else:  # what a keeper promised and accepted has to outlive its process
                self.rng.choice(self._keeping()).restart()
        self.storming = False
        self.faults.cease()
        for machine in self.machines:
            if not machine.alive:
                machine.restart()
        before = self.acknowledged
        self.world.run(lambda: self.acknowledged >= before + 2, _CALM_S, every_s=0.5)
        if self.acknowledged < before + 2:
            raise RemoteError(f"nothing is written any more, {_CALM_S:g} s after the last fault")


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    report = Report("log", nodes, seed)
    storm = _Storm(nodes, seed, options)
    try:
        storm.play()
    except Exception as error:  # a core may raise anything: that is what is looked for
        report.failures.append(f"at {storm.world.now:.3f} s: {type(error).__name__}: {error}")
    report.failures += [str(violation) for violation in check(storm.recording)]
    report.trace = storm.world.trace
    report.figures = {
        "virtual seconds": storm.world.now,
        "events": storm.world.events,
        "faults": len(storm.faults.log),
        "entries tried": storm.tried,
        "entries acknowledged": storm.acknowledged,
        "slots": max(writer.log.history.next_slot - 1 for writer in storm.writers),
    }
    if options["log"]:
        report.figures |= {f"{at:9.3f} s": what for at, what in storm.faults.log}
    return report


SCENARIO = Scenario(
    "log",
    "writers race for one log while its keepers die and are replaced: one history?",
    _run,
    nodes=6,
    nodes_min=4,
    nodes_max=64,
    options={
        "writers": 3.0,
        "storm_s": 8.0,
        "replays": 0.05,  # the share of messages that come again later
        "log": 0.0,  # 1: list the faults
    },
)
