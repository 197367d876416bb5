"""A small swarm to which everything happens (RELIABILITY, R26). Pure.

First the seed draws faults of every kind while nodes put, get and look up: whatever
happens, nothing of `safety.py` may. Then all faults cease, and within a while everybody
must see one same membership, every record of a living author must be found at its
newest, and lookups must equal brute force.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from functools import partial

from p2pnet.dht import events as ev
from p2pnet.dht.keyspace import name_key
from p2pnet.dht.lookup import QUORUM
from p2pnet.dht.records import OpenRecord, open_record
from p2pnet.gossip.events import State
from p2pnet.keys import KeyPair, peer_id_bytes, sha256
from p2pnet.sim.faults import Faults, any_clock, any_links
from p2pnet.sim.forgers import ForgingHolder, ForgingMember
from p2pnet.sim.grow import Peer, settle
from p2pnet.sim.machine import Phase
from p2pnet.sim.records import Ledger, network_record
from p2pnet.sim.report import Report
from p2pnet.sim.safety import MembershipSafety, RecordSafety, SafetyViolation
from p2pnet.sim.scenario import Scenario
from p2pnet.sim.truth import nearest
from p2pnet.sim.world import World

_NODES_MIN = 6
_BOOTSTRAP = 2
_NAMES = ("ant", "bee", "cat")  # networks, under whose keys several authors put records
_SAVE_S = 2.0
_KEPT_TTL_S = 30
_TIMEOUT_S = 6.0
_GRACE_S = 3.0  # an operation that has not ended so long after its time hangs
_PAUSE_S = 0.2  # between two things that happen, on average
_ROUND_S = 0.5  # between two looks whether all is well again
_FRESH_S = 3.0  # a record signed so lately may still be under way


class _Swarm:
    def __init__(self, nodes: int, seed: int, options: Mapping[str, float]) -> None:
        self.options = options
        world = self.world = World(seed)
        rng = self.rng = world.rng_of("swarm")
        world.links = any_links(rng)
        world.links.rng = world.rng_of("links")
        wrong = rng.random() < 0.5
        # What goes wrong goes wrong among few (and costs the square of their number).
        self.peers = [
            settle(world, clock=any_clock(rng, wrong=wrong), save_s=_SAVE_S)
            for _ in range(min(rng.randint(_NODES_MIN, nodes) for _ in range(3)))
        ]
        if rng.random() < 0.5:
            self.peers.append(_forger(world))
        self.ledger = Ledger()
        self.membership = MembershipSafety(self.peers)
        self.records = RecordSafety(world, self.peers, self.ledger)
        machines = [peer.machine for peer in self.peers]
        self.faults = Faults(world, machines, world.rng_of("faults"))
        self.kept: dict[tuple[int, str], int] = {}  # (machine, name) -> epoch
        self.operations = 0
        self.open: dict[int, tuple[Peer, int, float, str]] = {}  # operations under way
        for peer in self.peers:
            peer.bootstrap = machines[:_BOOTSTRAP]
            peer.machine.on_boot.insert(0, partial(self.membership.booted, peer))
            peer.machine.on_boot.append(partial(self._keep_again, peer))
            peer.machine.after(rng.uniform(0.0, 1.0), peer.join)

    # The storm

    def storm(self) -> None:
        """Faults and work, one after another."""
        end = self.world.now + self.options["storm_s"]
        work = [self._put, self._keep, self._replay, self._get, self._get, self._find]
        while self.world.now < end:
            self.world.run_for(self.rng.expovariate(1.0 / _PAUSE_S))
            if self.rng.random() < self.options["faults"]:
                self.faults.strike()
            else:
                running = [peer for peer in self.peers if peer.machine.running]
                if running:
                    self.rng.choice(work)(self.rng.choice(running))
            self._judge()

    def calm(self) -> None:
        """Who is dead comes back, or stays away for good; no more faults."""
        self.faults.cease()
        for peer in self.peers:
            first = peer.machine.number < _BOOTSTRAP
            if not peer.machine.alive and (first or self.rng.random() < 0.5):
                peer.machine.restart(keep_disk=self.rng.random() < 0.5)

    def recovery(self) -> dict[str, float]:
        """After how long all is well again, in seconds. Raises SafetyViolation: never."""
        limit_s = self.options["recover_s"]
        took_s: dict[str, float] = {}
        start = self.world.now
        goals: list[tuple[str, Callable[[], str]]] = [
            ("membership", self._one_view),
            ("lookups", self._lookups_right),
            ("records", self._records_found),
        ]
        for name, trouble in goals:
            while why := trouble():
                if self.world.now - start > limit_s:
                    raise SafetyViolation(f"{limit_s:g} s after the last fault: {why}")
                self.world.run_for(_ROUND_S if name != "membership" else 0.25)
            took_s[name] = self.world.now - start
        self._judge()
        return took_s

    # Work

    def _put(self, peer: Peer) -> None:
        record = self._sign(peer, self.rng.choice(_NAMES), self.rng.randint(20, 3600))
        self._start(peer, lambda op: ev.Put(op, record, _TIMEOUT_S), "put")

    def _replay(self, peer: Peer) -> None:
        """An old record, put once more by anybody."""
        issued = self.ledger.issued(name_key(self.rng.choice(_NAMES)))
        if issued:
            record = self.rng.choice(issued)
            self._start(peer, lambda op: ev.Put(op, record, _TIMEOUT_S), "replay")

    def _keep(self, peer: Peer) -> None:
        self._keep_one(peer, self.rng.choice(_NAMES))

    def _keep_again(self, peer: Peer) -> None:
        for number, name in list(self.kept):
            if number == peer.machine.number:
                self._keep_one(peer, name)

    def _keep_one(self, peer: Peer, name: str) -> None:
        self.kept[peer.machine.number, name] = peer.machine.number

        def make() -> OpenRecord:
            return self._sign(peer, name, _KEPT_TTL_S)

        peer.dht.keep(name_key(name), make)

    def _sign(self, peer: Peer, name: str, ttl_s: int) -> OpenRecord:
        """The next record of that author, newer than all its others."""
        last = self.ledger.latest(name_key(name), peer.peer_id, self.world.now)
        epoch = last.epoch + 1 if last is not None else 1
        signed = network_record(peer.machine, name, epoch=epoch, ttl_s=ttl_s)
        record = open_record(signed, name_key(name), peer.machine.wall_ms)
        self.ledger.signed(record, self.world.now)
        return record

    def _get(self, peer: Peer) -> None:
        key = name_key(self.rng.choice(_NAMES))
        due = self.records.before(key)
        boots = [(other.machine.boots, other.machine.phase) for other in self.peers]

        def judge(result: ev.Result) -> None:
            if isinstance(result, ev.Records):
                after = [(other.machine.boots, other.machine.phase) for other in self.peers]
                self.records.after(key, due, result, whole=boots == after)

        self._start(peer, lambda op: ev.Get(op, key, _TIMEOUT_S), "get", judge)

    def _find(self, peer: Peer) -> None:
        other = self.rng.choice(self.peers)
        self._start(peer, lambda op: ev.FindNode(op, other.peer_id, _TIMEOUT_S), "lookup")

    def _start(
        self,
        peer: Peer,
        make: Callable[[int], ev.Event],
        what: str,
        judge: Callable[[ev.Result], None] | None = None,
    ) -> None:
        self.operations += 1
        number = self.operations

        def then(result: ev.Result) -> None:
            self.open.pop(number, None)
            if judge is not None:
                judge(result)

        self.open[number] = (peer, peer.machine.boots, peer.machine.now, what)
        peer.dht.start(make, then)

    def _judge(self) -> None:
        self.records.sweep()
        for number, (peer, boots, since, what) in list(self.open.items()):
            machine = peer.machine
            if machine.boots != boots or not machine.alive:
                del self.open[number]
            elif machine.phase is Phase.UP and machine.now - since > _TIMEOUT_S + _GRACE_S:
                late_s = machine.now - since
                raise SafetyViolation(f"a {what} of {machine} has not ended after {late_s:.1f} s")

    # Whether all is well

    def _running(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.machine.running]

    def _one_view(self) -> str:
        running = self._running()
        here = sorted(peer.peer_id for peer in running)
        for peer in running:
            live = [m.peer_id for m in peer.gossip.members() if m.state is State.ALIVE]
            if live != here:
                missing = len([p for p in here if p not in live])
                extra = len([p for p in live if p not in here])
                return f"{peer.machine} lacks {missing} members and has {extra} that are gone"
        return ""

    def _lookups_right(self) -> str:
        target = KeyPair.from_seed(sha256(b"nobody %d" % self.rng.randrange(64))).peer_id
        for peer in self._running():
            others = [p.machine for p in self._running() if p is not peer]
            result = self._ask(peer, lambda op: ev.FindNode(op, target, _TIMEOUT_S))
            named = [p.peer_id for p in result.closest] if isinstance(result, ev.Nodes) else []
            true = nearest(others, peer_id_bytes(target), len(others))
            if [p for p in named if p != peer.peer_id] != true:
                return f"a lookup of {peer.machine} named {len(named)} of {len(true)} peers"
        return ""

    def _records_found(self) -> str:
        asker = self.rng.choice(self._running())
        for name in _NAMES:
            key, since = name_key(name), self.world.now - _FRESH_S
            due = self.records.before(key)
            result = self._ask(asker, partial(_get, key))
            if not isinstance(result, ev.Records):
                return f"{asker.machine} can read nothing"
            self.records.after(key, due, result, whole=True)
            found, others = result.records, len(self._running()) - 1
            if found and result.answers < min(QUORUM, others):
                return f"a read of {asker.machine} heard {result.answers} of {others} holders"
            newest = {record.author: record.rank for record in found}
            for peer in self._running():
                if (peer.machine.number, name) not in self.kept:
                    continue
                wanted = self.ledger.latest(key, peer.peer_id, since)
                if wanted is not None and newest.get(peer.peer_id, (-1, -1, b"")) < wanted.rank:
                    return f"{asker.machine} does not find the newest of {peer.machine}"
        return ""

    def _ask(self, peer: Peer, make: Callable[[int], ev.Event]) -> ev.Result:
        results: list[ev.Result] = []
        peer.dht.start(make, results.append)
        if self.world.run(lambda: bool(results), _TIMEOUT_S + _GRACE_S) is None:
            raise SafetyViolation(f"an operation of {peer.machine} does not end")
        return results[0]


def _forger(world: World) -> Peer:
    machine = world.machine()
    return Peer(machine, ForgingHolder(machine, save_s=_SAVE_S), ForgingMember(machine))


def _get(key: bytes, op_id: int) -> ev.Get:
    return ev.Get(op_id, key, _TIMEOUT_S)


def _run(nodes: int, seed: int, options: Mapping[str, float]) -> Report:
    report = Report("swarm", nodes, seed)
    swarm = _Swarm(nodes, seed, options)
    took_s: dict[str, float] = {}
    try:
        swarm.storm()
        swarm.calm()
        took_s = swarm.recovery()
    except Exception as error:  # a core may raise anything: that is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        report.failures.append(
            f"at {swarm.world.now:.3f} s: {type(error).__name__}: {error} "
            f"({where.filename.rpartition('p2pnet/')[2]}:{where.lineno})"
        )
    report.trace = swarm.world.trace
    report.figures = {
        "machines": len(swarm.peers),
        "virtual seconds": swarm.world.now,
        "events": swarm.world.events,
        "faults": len(swarm.faults.log),
        "operations": swarm.operations,
        "reads judged": swarm.records.reads,
        "reads bound by a quorum": swarm.records.binding,
        **{f"{name} well after s": seconds for name, seconds in took_s.items()},
    }
    if options["log"]:
        report.figures |= {f"{at:9.3f} s": what for at, what in swarm.faults.log}
    return report


SCENARIO = Scenario(
    "swarm",
    "the seed draws all faults: is it safe all the time, and well again afterwards?",
    _run,
    nodes=12,
    nodes_min=_NODES_MIN,
    nodes_max=64,
    options={
        "storm_s": 4.0,
        "faults": 0.5,  # the share of what happens in the storm that is a fault
        "recover_s": 90.0,
        "log": 0.0,  # 1: list the faults
    },
)
