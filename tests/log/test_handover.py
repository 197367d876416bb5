"""Keepers are replaced while entries race and everything breaks: one entry a slot, for ever.

The shipped cores (keeper, proposer, reader) on a network that loses, repeats, delays
and reorders; keepers sleep for long and come back with what their disks hold, all of
them are replaced one by one, writers forget everything. Mutants show that the same
schedules catch a keeper or a writer that breaks a rule.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import log_helpers as given
import pytest

from p2pnet.core import Tick
from p2pnet.errors import RemoteError
from p2pnet.keys import KeyPair, sha256
from p2pnet.log import proposer as writing
from p2pnet.log import reader as reading
from p2pnet.log import room
from p2pnet.log.history import History, parse_entry
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
    to_key,
)
from p2pnet.log.proof import majority
from p2pnet.v1 import common_pb2, log_pb2

POOL = [given.key(number) for number in range(11, 18)]  # who may keep
NAMES = given.keys_of(POOL)
PAIRS = {pair.peer_id: pair for pair in POOL}
MANIFEST = given.manifest(anybody=True, keepers=NAMES[:3])
NETWORK = given.network_of(MANIFEST)
KINDS: dict[type, Any] = {
    log_pb2.PrepareRequest: Prepare,
    log_pb2.AcceptRequest: Accept,
    log_pb2.LearnRequest: Learn,
}


class Forgetful(Keeper):
    """A mutant: forgets its promises."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        for log in self._logs.values():
            log.promised = log.accepted
        return super().handle(event, now)


class Amnesiac(Keeper):
    """A mutant: answers without having kept anything."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        return [effect for effect in super().handle(event, now) if isinstance(effect, Reply)]


class Secretive(Keeper):
    """A mutant: does not tell what it has accepted."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        effects = super().handle(event, now)
        for effect in effects:
            message = effect.message if isinstance(effect, Reply) else None
            if isinstance(message, log_pb2.PrepareReply) and not message.decided:
                message.ClearField("accepted")
                message.ClearField("entry")
        return effects


class WithoutFloor(Keeper):
    """A mutant: forgets the promises in logs that it gives up."""

    def _give_up(self, networks: Sequence[str]) -> list[Effect]:
        effects = super()._give_up(networks)
        self._floor = None
        return [e for e in effects if not isinstance(e, Persist) or e.network_id == NETWORK]


class WithoutGone(Keeper):
    """A mutant: forgets in which logs it has voted."""

    def _give_up(self, networks: Sequence[str]) -> list[Effect]:
        effects = super()._give_up(networks)
        self._gone = {}
        return [e for e in effects if not isinstance(e, Persist) or e.network_id != NETWORK]


class Successor(writing.Proposer):
    """A mutant: asks the keepers that its own entry names, instead of those before."""

    def __init__(self, me: str, history: History, entry: common_pb2.Signed, **more: Any) -> None:
        super().__init__(me, history, entry, **more)
        self._keepers = tuple(parse_entry(entry).keepers)
        self._majority = majority(self._keepers)
        self._seen = dict.fromkeys(self._keepers, 0)


@dataclass
class Writer:
    """Reads, then puts in entry after entry; a restart takes all that it knows."""

    pair: KeyPair
    history: History = field(default_factory=lambda: History(NETWORK))
    proofs: dict[int, log_pb2.Proof] = field(default_factory=dict)
    core: Any = None
    read: bool = False  # since it began


class World:
    """Everything that was ever accepted and said is written down, to be judged."""

    def __init__(
        self,
        seed: int,
        kind: type[Keeper] = Keeper,
        proposer: type[writing.Proposer] = writing.Proposer,
        crowded: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.kind, self.proposer, self.crowded = kind, proposer, crowded
        self.keepers = {name: kind(PAIRS[name]) for name in NAMES}
        self.disks: dict[str, dict[tuple[str, int], bytes]] = {name: {} for name in NAMES}
        self.asleep: dict[str, int] = {}  # until which step
        self.now, self.steps, self.entries, self.went = 0.0, 0, 0, 0
        self.wire: list[tuple[str, Writer, Any, Any]] = []
        self.accepted: dict[tuple[object, ...], dict[str, None]] = {}
        self.chosen: dict[int, dict[bytes, None]] = {}  # by votes or by somebody's word
        self.by_digest: dict[bytes, log_pb2.LogEntry] = {}
        self.writers = [Writer(given.key(1 + number)) for number in range(3)]

    def step(self, loss: float) -> None:
        self.steps += 1
        choice = self.rng.random()
        if self.crowded and self.rng.random() < 0.05:
            self.crowd(self.rng.choice(NAMES))
        if loss and choice < 0.02:
            name = self.rng.choice(NAMES)
            self.keepers[name] = self.kind.load(PAIRS[name], self.disks[name])
        elif loss and choice < 0.04:
            self.asleep[self.rng.choice(NAMES)] = self.steps + self.rng.randrange(200)
        elif loss and choice < 0.05:
            number = self.rng.randrange(len(self.writers))
            self.writers[number] = Writer(self.writers[number].pair)
        elif choice < 0.15 or not self.wire:
            self.tick(self.rng.choice(self.writers))
        else:
            self.deliver(loss)

    def tick(self, writer: Writer) -> None:
        if writer.core is None:
            self.begin(writer)
        elif (deadline := writer.core.deadline()) is not None:
            self.now = max(self.now, deadline)
            self.carry(writer, writer.core, writer.core.handle(Tick(), self.now))

    def begin(self, writer: Writer) -> None:
        history = writer.history
        if not writer.read or self.rng.random() < 0.2:
            writer.read = True
            writer.core = reading.LogReader(history, first=NAMES[:3], hints=NAMES, rounds_max=2)
            begin: Any = reading.Begin()
        else:
            self.entries += 1
            entry = given.claim(
                history,
                writer.pair,
                MANIFEST,
                keepers=self.next_keepers(history.keepers or NAMES[:3]),
                reason=f"try {self.entries}",
            )
            writer.core = self.proposer(
                writer.pair.peer_id,
                history,
                entry,
                rng=self.rng,
                proofs=writer.proofs,
                rounds_max=4,
            )
            begin = writing.Begin()
        self.carry(writer, writer.core, writer.core.handle(begin, self.now))

    def next_keepers(self, keepers: Sequence[str]) -> list[str]:
        """One of them goes, for another or (from one, and to five) two more."""
        wanted = self.rng.choice([len(keepers), len(keepers), 1, 3, 5])
        stay = self.rng.sample(list(keepers), min(wanted, max(1, len(keepers) - 1)))
        others = [name for name in NAMES if name not in stay]
        return sorted(stay + self.rng.sample(others, wanted - len(stay)))

    def carry(self, writer: Writer, core: Any, effects: Sequence[object]) -> None:
        core.check()
        for effect in effects:
            if isinstance(effect, writing.Send | reading.Ask):
                self.wire.append(("to", writer, core, effect))
                continue
            if isinstance(effect, reading.Found):
                writer.proofs[effect.slot] = effect.proof
                self.said(effect.entry)
            elif isinstance(effect, writing.Decided):
                writer.proofs[writer.history.next_slot] = effect.proof
                self.said(effect.entry)
                writer.history.add(effect.entry)
                writer.core = None
            else:
                writer.core = None

    def deliver(self, loss: float) -> None:
        index = self.rng.randrange(len(self.wire))
        way, writer, core, message = self.wire[index]
        if self.rng.random() > loss / 2:  # else it comes again
            self.wire[index] = self.wire[-1]
            self.wire.pop()
        if self.rng.random() < loss:
            return
        if way == "back":
            if core is writer.core:
                self.carry(writer, core, core.handle(message, self.now))
        elif self.asleep.get(message.keeper, 0) < self.steps or not loss:
            self.serve(writer, core, message)

    def serve(self, writer: Writer, core: Any, message: Any) -> None:
        if isinstance(message, reading.Ask):
            answered: reading.Event
            try:
                reply = self.ask(message.keeper, Read(message.request))
                answered = reading.Answered(message.keeper, reply)
            except RemoteError as error:
                answered = reading.Missed(message.keeper, str(error))
            self.wire.append(("back", writer, core, answered))
            return
        reply, request = None, message.requests[-1]
        for request in message.requests:
            try:
                reply = self.ask(message.keeper, KINDS[type(request)](writer.pair.peer_id, request))
            except RemoteError:
                return
            if isinstance(request, log_pb2.AcceptRequest) and reply.accepted:
                self.note(message.keeper, request)
        if not isinstance(request, log_pb2.LearnRequest):
            answer = writing.Answered(message.keeper, request, reply)
            self.wire.append(("back", writer, core, answer))

    def ask(self, name: str, event: Event) -> Any:
        effects = self.keepers[name].handle(event, self.now)
        self.keepers[name].check()
        for effect in effects:
            if isinstance(effect, Persist):
                self.disks[name][effect.network_id, effect.slot] = effect.data
            elif isinstance(effect, Forget):
                for slot in [s for n, s in self.disks[name] if n == effect.network_id and s]:
                    del self.disks[name][effect.network_id, slot]
        assert isinstance(effects[-1], Reply)
        return effects[-1].message

    def crowd(self, name: str) -> None:
        """Somebody wants a keeper's place for a network of his own."""
        stranger = given.key(50)
        self.entries += 1
        manifest = given.manifest(anybody=True, keepers=[name], nonce=b"%d" % self.entries)
        ballot = log_pb2.Ballot(round=self.rng.randrange(1, 4), proposer=stranger.peer_id)
        request = log_pb2.PrepareRequest(
            network_id=given.network_of(manifest), slot=1, ballot=ballot, manifest=manifest
        )
        with contextlib.suppress(RemoteError):
            self.ask(name, Prepare(stranger.peer_id, request))
        self.went += self.keepers[name].history(NETWORK) is None

    # --- the judge ---

    def note(self, name: str, request: log_pb2.AcceptRequest) -> None:
        """An acceptance, whether anybody hears of it or not."""
        entry = parse_entry(request.entry)
        self.by_digest[sha256(request.entry.payload)] = entry
        before = self.by_digest.get(entry.previous)
        keepers = list(before.keepers) if before is not None else NAMES[:3]
        voters = self.accepted.setdefault((*to_key(request.ballot), request.entry.payload), {})
        if name in keepers:
            voters[name] = None
        if len(voters) >= majority(keepers):
            self.said(request.entry)

    def said(self, signed: common_pb2.Signed) -> None:
        self.chosen.setdefault(given.slot_of(signed), {})[signed.payload] = None

    def is_torn(self) -> bool:
        return any(len(payloads) > 1 for payloads in self.chosen.values())


def run(seed: int, **mutant: Any) -> World:
    world = World(seed, **mutant)
    loss = world.rng.choice((0.02, 0.05, 0.15))
    for _ in range(600):
        world.step(loss)
        if world.is_torn():
            return world
    before = len(world.chosen)
    for _ in range(3000):  # all wakes up and the network heals: it goes on
        if len(world.chosen) >= before + 2 or world.is_torn():
            break
        world.step(loss=0.0)
    return world


@pytest.mark.parametrize("seeds", [range(start, start + 15) for start in range(0, 60, 15)], ids=str)
def test_one_entry_a_slot_whoever_keeps_it(seeds: range) -> None:
    slots = 0
    for seed in seeds:
        world = run(seed)
        assert not world.is_torn(), f"seed {seed}"
        chain = [next(iter(world.chosen[slot])) for slot in sorted(world.chosen)]
        assert sorted(world.chosen) == list(range(1, len(chain) + 1)), f"seed {seed}"
        known = [keeper.history(NETWORK) for keeper in world.keepers.values()]
        known += [writer.history for writer in world.writers]
        for history in known:
            if history is not None:
                payloads = [entry.payload for entry in history.entries]
                assert payloads == chain[: len(payloads)], f"seed {seed}"
        slots += len(chain)
    assert slots > 5 * len(seeds)  # a log that stands still is safe, too


@pytest.mark.parametrize("mutant", [Forgetful, Amnesiac, Secretive])
def test_the_same_schedules_catch_a_wrong_keeper(mutant: type[Keeper]) -> None:
    assert any(run(seed, kind=mutant).is_torn() for seed in range(100))


def test_keepers_change_only_through_the_log_itself() -> None:
    assert any(run(seed, proposer=Successor).is_torn() for seed in range(100))


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one log, and what is of no use goes at once."""
    monkeypatch.setattr(room, "NETWORKS_MAX", 1)
    monkeypatch.setattr(room, "KEPT_S", 0.0)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("seeds", [range(start, start + 15) for start in range(0, 45, 15)], ids=str)
def test_one_entry_a_slot_where_keepers_give_up_what_they_may(seeds: range) -> None:
    slots = went = 0
    for seed in seeds:
        world = run(seed, crowded=True)
        assert not world.is_torn(), f"seed {seed}"
        slots += len(world.chosen)
        went += world.went
    assert slots > 3 * len(seeds)
    assert went > 3 * len(seeds)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("mutant", [WithoutFloor, WithoutGone])
def test_the_same_schedules_catch_a_keeper_that_gives_up_too_much(mutant: type[Keeper]) -> None:
    assert any(run(seed, kind=mutant, crowded=True).is_torn() for seed in range(100))
