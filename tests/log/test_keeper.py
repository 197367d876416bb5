"""Keepers and proposers: the rules of one keeper, and Paxos's safety under bad networks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import log_helpers as given
import pytest

from p2pnet.core import Tick
from p2pnet.errors import ForgedError, LocalError, MalformedError, RefusedError, RemoteError
from p2pnet.keys import KeyPair
from p2pnet.log import keeper as keeper_module
from p2pnet.log.history import History, new_claim, new_commit, parse_entry
from p2pnet.log.keeper import (
    Accept,
    Effect,
    Event,
    Keeper,
    Learn,
    Persist,
    Prepare,
    Read,
    Reply,
    to_key,
)
from p2pnet.log.proposer import (
    Answered,
    Begin,
    Decided,
    Failed,
    Missed,
    Proposer,
    Send,
    learn_requests,
)
from p2pnet.v1 import common_pb2, log_pb2

A, B = given.key(1), given.key(2)
K1, K2, K3 = (given.key(number).peer_id for number in (11, 12, 13))


def prepare(pair: KeyPair, round_: int, slot: int = 1, network: str = given.NETWORK) -> Prepare:
    ballot = log_pb2.Ballot(round=round_, proposer=pair.peer_id)
    request = log_pb2.PrepareRequest(network_id=network, slot=slot, ballot=ballot)
    return Prepare(pair.peer_id, request)


def accept(pair: KeyPair, round_: int, entry: common_pb2.Signed) -> Accept:
    ballot = log_pb2.Ballot(round=round_, proposer=pair.peer_id)
    slot = log_pb2.LogEntry.FromString(entry.payload).slot
    request = log_pb2.AcceptRequest(network_id=given.NETWORK, slot=slot, ballot=ballot, entry=entry)
    return Accept(pair.peer_id, request)


def learn(pair: KeyPair, entries: Sequence[common_pb2.Signed]) -> Learn:
    request = log_pb2.LearnRequest(network_id=given.NETWORK, entries=entries)
    return Learn(pair.peer_id, request)


def ask(keeper: Keeper, event: Event) -> tuple[object, list[Persist]]:
    """The reply, and what had to be kept before it."""
    *persists, reply = keeper.handle(event, 0.0)
    keeper.check()
    assert isinstance(reply, Reply)
    assert all(isinstance(effect, Persist) for effect in persists)
    return reply.message, persists  # type: ignore[return-value]


def first_claim(pair: KeyPair, keepers: Sequence[str] = (K1, K2, K3)) -> common_pb2.Signed:
    return new_claim(History(given.NETWORK), pair, given.OPEN, keepers=keepers)


# --- one keeper ---------------------------------------------------------------


def test_a_promise_and_an_acceptance_are_kept_before_they_are_told() -> None:
    keeper = Keeper(K1)
    reply, kept = ask(keeper, prepare(A, 1))
    assert reply.promised
    assert len(kept) == 1
    reply, kept = ask(keeper, accept(A, 1, first_claim(A)))
    assert reply.accepted
    assert len(kept) == 1
    reply, kept = ask(keeper, accept(A, 1, first_claim(A)))  # the same message twice
    assert reply.accepted
    assert kept == []


def test_a_promise_holds_and_names_what_was_accepted() -> None:
    keeper = Keeper(K1)
    ask(keeper, prepare(A, 1))
    ask(keeper, accept(A, 1, first_claim(A)))
    reply, _ = ask(keeper, prepare(B, 2))
    assert (reply.promised, to_key(reply.accepted)) == (True, (1, A.peer_id))
    assert reply.entry == first_claim(A)
    reply, kept = ask(keeper, accept(A, 1, first_claim(A)))
    assert (reply.accepted, to_key(reply.ballot), kept) == (False, (2, B.peer_id), [])
    assert not ask(keeper, prepare(A, 1))[0].promised
    assert not ask(keeper, prepare(B, 2))[0].promised  # never the same ballot twice


def test_what_is_decided_is_told_and_the_next_slot_opens() -> None:
    keeper, history = Keeper(K1), given.claimed(A, keepers=(K1, K2, K3), commits=3)
    assert ask(keeper, learn(A, history.entries))[1] == [
        Persist(given.NETWORK, slot, keeper.dump()[given.NETWORK, slot]) for slot in range(1, 5)
    ]
    reply, _ = ask(keeper, prepare(B, 9, slot=2))
    assert (reply.decided, reply.entry) == (True, history.entries[1])
    assert ask(keeper, prepare(B, 1, slot=5))[0].promised
    behind, kept = ask(keeper, prepare(B, 1, slot=7))
    assert (behind, kept) == (log_pb2.PrepareReply(), [])
    read, _ = ask(keeper, Read(log_pb2.ReadLogRequest(network_id=given.NETWORK, from_slot=3)))
    assert list(read.entries) == history.entries[2:]


def test_learning_out_of_order_waits_for_what_is_missing() -> None:
    keeper, history = Keeper(K1), given.claimed(A, keepers=(K1,), commits=2)
    ask(keeper, learn(A, history.entries[:1]))
    assert ask(keeper, learn(A, history.entries[2:]))[1] == []
    assert len(ask(keeper, learn(A, history.entries))[1]) == 2


def test_a_keeper_is_the_same_after_a_restart() -> None:
    history = given.claimed(A, keepers=(K1, K2, K3), commits=2)
    keeper, disk = Keeper(K1), {}
    for event in (
        learn(A, history.entries),
        prepare(A, 3, slot=4),
        accept(A, 3, new_commit(history, A, 60, given.states())),
        prepare(B, 4, slot=4),
    ):
        for kept in ask(keeper, event)[1]:
            disk[kept.network_id, kept.slot] = kept.data
    assert disk == keeper.dump()
    again = Keeper.load(K1, disk)
    assert again.dump() == disk
    reply, _ = ask(again, prepare(A, 3, slot=4))
    assert (reply.promised, to_key(reply.ballot)) == (False, (4, B.peer_id))
    assert to_key(reply.accepted) == (3, A.peer_id)


@pytest.mark.parametrize("damage", ["bytes", "gap", "entry"])
def test_a_damaged_record_is_named(damage: str) -> None:
    keeper = Keeper(K1)
    ask(keeper, learn(A, given.claimed(A, keepers=(K1,), commits=2).entries))
    disk = keeper.dump()
    if damage == "bytes":
        disk[given.NETWORK, 2] = b"\xff" + disk[given.NETWORK, 2]
    elif damage == "gap":
        del disk[given.NETWORK, 2]
    else:
        disk[given.NETWORK, 2] = disk[given.NETWORK, 3]
    with pytest.raises(LocalError, match=f"slot [23] of network {given.NETWORK} is damaged"):
        Keeper.load(K1, disk)


def test_a_keeper_refuses_what_cannot_count() -> None:
    history = given.claimed(A, keepers=(K1, K2, K3), commits=1)
    keeper = Keeper(K1)
    ask(keeper, learn(A, history.entries))
    later = given.claimed(A, keepers=(K1, K2, K3), commits=1)
    later.epoch = 5
    before = keeper.dump()
    for event, kind, words in [
        (accept(A, 1, new_commit(later, A, 40, given.states())), ForgedError, "last claim has 1"),
        (accept(B, 1, new_commit(history, B, 40, given.states())), ForgedError, "holds the claim"),
        (accept(A, 1, new_claim(later, A, given.OPEN, keepers=[K1])), ForgedError, "the next is 2"),
        (prepare(A, 0, slot=3), MalformedError, "no possible round"),
        (prepare(A, 2**32 + 1, slot=3), MalformedError, "no possible round"),
        (Prepare(B.peer_id, prepare(A, 1, slot=3).request), MalformedError, "its proposer's own"),
        (prepare(A, 1, network="x"), MalformedError, "not a network id"),
        (learn(A, [given.claimed(B, keepers=(K1,)).entries[0]]), ForgedError, "two entries"),
    ]:
        with pytest.raises(kind, match=words):
            keeper.handle(event, 0.0)
        keeper.check()
        assert keeper.dump() == before


def test_only_whom_the_owner_grants_may_write() -> None:
    closed = given.manifest(A)
    network = given.network_of(closed)
    claim = new_claim(History(network), A, closed, keepers=[K1])
    keeper = Keeper(K1)
    lesson = log_pb2.LearnRequest(network_id=network, entries=[claim])
    with pytest.raises(RefusedError, match="does not let"):
        keeper.handle(Learn(B.peer_id, lesson), 0.0)
    ask(keeper, Learn(A.peer_id, lesson))
    with pytest.raises(RefusedError, match="does not let") as refused:
        keeper.handle(prepare(B, 1, slot=2, network=network), 0.0)
    assert refused.value.code == common_pb2.REFUSAL_CODE_NOT_GRANTED


def test_whom_the_log_does_not_name_does_not_keep_it() -> None:
    with pytest.raises(RefusedError, match="names other keepers"):
        Keeper(K1).handle(accept(A, 1, first_claim(A, [K2])), 0.0)
    stranger = Keeper(K1)
    ask(stranger, learn(A, given.claimed(A, keepers=(K2, K3)).entries))
    with pytest.raises(RefusedError, match="not a keeper of that slot"):
        stranger.handle(prepare(A, 1, slot=2), 0.0)


def test_a_stranger_cannot_fill_a_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper(K1)
    for number in range(keeper_module.UNCLAIMED_MAX):
        ask(keeper, prepare(A, 1, network=f"{number:032x}"))
    with pytest.raises(RefusedError, match="as many logs as it can"):
        keeper.handle(prepare(A, 1, network="f" * 32), 0.0)
    ask(keeper, prepare(B, 1, network="f" * 32))
    monkeypatch.setattr(keeper_module, "BYTES_MAX", 100)
    with pytest.raises(RefusedError, match="room for logs is full"):
        keeper.handle(learn(B, [first_claim(B)]), 0.0)


# --- one proposer -------------------------------------------------------------


def run_quietly(proposer: Proposer, keepers: dict[str, Keeper], dead: Sequence[str] = ()) -> object:
    """Every message arrives at once; returns the result."""
    queue: list[object] = list(proposer.handle(Begin(), 0.0))
    now, result = 0.0, None
    while True:
        while queue:
            effect = queue.pop(0)
            if isinstance(effect, Send):
                queue += exchange(proposer, keepers, effect, now, dead)
            else:
                result = effect
        deadline = proposer.deadline()
        if deadline is None:
            return result
        now = deadline
        queue += proposer.handle(Tick(), now)


def exchange(
    proposer: Proposer, keepers: dict[str, Keeper], send: Send, now: float, dead: Sequence[str]
) -> Sequence[object]:
    for request in send.requests:
        if send.keeper in dead:
            return missed(proposer, send, now)
        event = {
            log_pb2.PrepareRequest: Prepare,
            log_pb2.AcceptRequest: Accept,
            log_pb2.LearnRequest: Learn,
        }[type(request)](A.peer_id, request)
        try:
            reply = keepers[send.keeper].handle(event, now)[-1]
        except RemoteError:
            return missed(proposer, send, now)
    if isinstance(request, log_pb2.LearnRequest):
        return []
    return proposer.handle(Answered(send.keeper, request, reply.message), now)


def missed(proposer: Proposer, send: Send, now: float) -> Sequence[object]:
    last = send.requests[-1]
    if isinstance(last, log_pb2.LearnRequest):
        return []
    return proposer.handle(Missed(send.keeper, last, "unreachable"), now)


def test_an_entry_is_decided_by_a_majority_and_the_new_keepers_hear_it_all() -> None:
    history = given.claimed(A, keepers=(K1, K2), commits=2)
    keepers = {name: Keeper(name) for name in (K1, K2, K3)}
    entry = new_commit(history, A, 60, given.states(), keepers=[K1, K3])
    # K1 and K2 know nothing of the log yet: they are taught on the way.
    result = run_quietly(Proposer(A.peer_id, history, entry, rng=random.Random(1)), keepers)
    assert result == Decided(entry, ours=True)
    for keeper in keepers.values():
        known = keeper.history(given.NETWORK)
        assert known is not None
        assert known.entries == [*history.entries, entry]


def test_a_minority_of_dead_keepers_does_not_matter_and_a_majority_does() -> None:
    for dead, kind in (([K2], Decided), ([K1, K2], Failed)):
        keepers = {name: Keeper(name) for name in (K1, K2, K3)}
        proposer = Proposer(
            A.peer_id,
            History(given.NETWORK),
            first_claim(A),
            rng=random.Random(1),
            keepers=[K1, K2, K3],
            rounds_max=4,
        )
        result = run_quietly(proposer, keepers, dead)
        assert isinstance(result, kind)
    assert isinstance(result, Failed)
    assert "not decided in 4 rounds: it takes 2 of 3 keepers" in result.reason


def test_who_comes_late_is_told_who_won() -> None:
    keepers = {name: Keeper(name) for name in (K1, K2, K3)}
    ours, theirs = first_claim(A), first_claim(B)
    # B's entry reached a majority, but B died before telling anybody.
    for name in (K1, K2):
        ask(keepers[name], prepare(B, 1))
        ask(keepers[name], accept(B, 1, theirs))
    proposer = Proposer(
        A.peer_id,
        History(given.NETWORK),
        ours,
        rng=random.Random(1),
        keepers=[K1, K2, K3],
    )
    assert run_quietly(proposer, keepers) == Decided(theirs, ours=False)


@pytest.mark.parametrize("order", [(K1, K2), (K2, K1)])
def test_of_two_accepted_entries_the_one_under_the_higher_ballot_is_proposed(
    order: Sequence[str],
) -> None:
    older, newer = first_claim(B), first_claim(given.key(3))
    keepers = {name: Keeper(name) for name in (K1, K2)}
    ask(keepers[K1], accept(B, 1, older))
    ask(keepers[K2], accept(given.key(3), 2, newer))
    proposer = Proposer(
        A.peer_id,
        History(given.NETWORK),
        first_claim(A),
        rng=random.Random(1),
        keepers=[K1, K2, K3],
    )
    proposer.handle(Begin(), 0.0)
    proposer.handle(Tick(), 2.0)  # the first round meets silence
    sends: Sequence[object] = ()
    for round_ in (2, 3):
        now = proposer.deadline()
        assert now is not None
        request = prepare(A, round_).request
        proposer.handle(Tick(), now)
        for name in order:
            reply, _ = ask(keepers[name], Prepare(A.peer_id, request))
            sends = proposer.handle(Answered(name, request, reply), now)  # type: ignore[arg-type]
        if sends:
            break
        proposer.handle(Tick(), now + 2.0)
    assert len(sends) == 3
    proposals = {send.requests[0].entry.payload for send in sends if isinstance(send, Send)}  # type: ignore[union-attr]
    assert proposals == {newer.payload}


def test_an_entry_that_could_not_count_is_not_even_tried() -> None:
    history = given.claimed(A, keepers=(K1,))
    entry = new_commit(history, B, 20, given.states())
    with pytest.raises(ForgedError, match="holds the claim"):
        Proposer(B.peer_id, history, entry, rng=random.Random(1))


def test_a_long_history_travels_in_bounded_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    history = given.claimed(A, keepers=(K1,), commits=30)
    one = len(history.entries[1].payload)
    monkeypatch.setattr("p2pnet.log.proposer.LEARN_BYTES_MAX", 5 * one)
    lessons = learn_requests(given.NETWORK, history.entries)
    assert len(lessons) >= 6
    assert [entry for lesson in lessons for entry in lesson.entries] == history.entries
    assert all(sum(len(e.payload) for e in lesson.entries) <= 5 * one for lesson in lessons)


# --- a bad network ------------------------------------------------------------


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
            if isinstance(effect, Reply) and isinstance(effect.message, log_pb2.PrepareReply):
                effect.message.ClearField("accepted")
                effect.message.ClearField("entry" if not effect.message.decided else "accepted")
        return effects


@dataclass
class Actor:
    """A proposer that, once it fails or is restarted, comes back with another entry."""

    pair: KeyPair
    proposer: Proposer


class World:
    """Keepers and racing proposers on a network that loses, repeats, delays and reorders.

    Records everything that was ever decided: by a proposer's word, and by the
    acceptances that keepers gave, whether anybody noticed or not.
    """

    def __init__(self, seed: int, n_keepers: int, n_proposers: int, kind: type[Keeper]) -> None:
        self.rng = random.Random(seed)
        self.kind = kind
        self.names = sorted(given.key(11 + number).peer_id for number in range(n_keepers))
        self.keepers = {name: kind(name) for name in self.names}
        self.disks: dict[str, dict[tuple[str, int], bytes]] = {name: {} for name in self.names}
        self.now = 0.0
        self.wire: list[tuple[str, Actor, Proposer, object]] = []
        self.accepted: dict[tuple[int, str, bytes], dict[str, None]] = {}
        self.decided: dict[bytes, None] = {}
        self.entries = 0
        self.actors = [self.actor(given.key(1 + number)) for number in range(n_proposers)]

    def actor(self, pair: KeyPair) -> Actor:
        actor = Actor(pair, None)  # type: ignore[arg-type]
        self.restart(actor)
        return actor

    def restart(self, actor: Actor) -> None:
        self.entries += 1
        history = History(given.NETWORK)
        entry = new_claim(
            history, actor.pair, given.OPEN, keepers=self.names, reason=f"try {self.entries}"
        )
        actor.proposer = Proposer(
            actor.pair.peer_id, history, entry, rng=self.rng, keepers=self.names, rounds_max=6
        )
        self.carry(actor, actor.proposer, actor.proposer.handle(Begin(), self.now))

    def carry(self, actor: Actor, proposer: Proposer, effects: Sequence[object]) -> None:
        proposer.check()
        for effect in effects:
            if isinstance(effect, Send):
                self.wire.append(("to", actor, proposer, effect))
            elif isinstance(effect, Decided):
                self.decided[effect.entry.payload] = None

    def step(self, loss: float) -> None:
        choice = self.rng.random()
        if choice < 0.02:
            name = self.rng.choice(self.names)
            self.keepers[name] = self.kind.load(name, self.disks[name])
        elif choice < 0.04:
            self.restart(self.rng.choice(self.actors))
        elif choice < 0.12 or not self.wire:
            actor = self.rng.choice(self.actors)
            deadline = actor.proposer.deadline()
            if deadline is not None:
                self.now = max(self.now, deadline)
                self.carry(actor, actor.proposer, actor.proposer.handle(Tick(), self.now))
        else:
            self.deliver(loss)

    def deliver(self, loss: float) -> None:
        index = self.rng.randrange(len(self.wire))
        way, actor, proposer, message = self.wire[index]
        if self.rng.random() > loss / 2:  # else it comes again
            self.wire[index] = self.wire[-1]
            self.wire.pop()
        if self.rng.random() < loss:
            return
        if way == "back":
            if proposer is actor.proposer:  # else it has died
                self.carry(actor, proposer, proposer.handle(message, self.now))  # type: ignore[arg-type]
            return
        assert isinstance(message, Send)
        reply = self.serve(actor, message)
        last = message.requests[-1]
        if reply is not None and not isinstance(last, log_pb2.LearnRequest):
            answer = Answered(message.keeper, last, reply)  # type: ignore[arg-type]
            self.wire.append(("back", actor, proposer, answer))

    def serve(self, actor: Actor, send: Send) -> object:
        message = None
        for request in send.requests:
            kind = {
                log_pb2.PrepareRequest: Prepare,
                log_pb2.AcceptRequest: Accept,
                log_pb2.LearnRequest: Learn,
            }[type(request)]
            try:
                effects = self.keepers[send.keeper].handle(
                    kind(actor.pair.peer_id, request), self.now
                )
            except RemoteError:
                return None
            self.keepers[send.keeper].check()
            for effect in effects:
                if isinstance(effect, Persist):
                    self.disks[send.keeper][effect.network_id, effect.slot] = effect.data
                else:
                    message = effect.message
            if isinstance(request, log_pb2.AcceptRequest) and message.accepted:
                voters = self.accepted.setdefault(
                    (*to_key(request.ballot), request.entry.payload), {}
                )
                voters[send.keeper] = None
                if len(voters) > len(self.names) // 2:
                    self.decided[request.entry.payload] = None
        return message


def race(seed: int, n_keepers: int, n_proposers: int, kind: type[Keeper] = Keeper) -> World:
    world = World(seed, n_keepers, n_proposers, kind)
    for _ in range(150):
        world.step(loss=0.2)
    for _ in range(600):  # the network heals
        if world.decided and not world.wire:
            break
        world.step(loss=0.0)
    return world


SEEDS = 60


@pytest.mark.parametrize("n_proposers", [2, 3])
@pytest.mark.parametrize("n_keepers", [3, 5])
def test_a_slot_is_never_decided_twice(n_keepers: int, n_proposers: int) -> None:
    decided = 0
    for seed in range(SEEDS):
        world = race(seed, n_keepers, n_proposers)
        assert len(world.decided) <= 1, f"seed {seed}"
        decided += len(world.decided)
        known = {
            entry.payload: parse_entry(entry)
            for keeper in world.keepers.values()
            if (history := keeper.history(given.NETWORK)) is not None
            for entry in history.entries
        }
        assert list(known) in ([], list(world.decided)), f"seed {seed}"
    assert decided == SEEDS  # once the network is well, somebody gets through


@pytest.mark.parametrize("mutant", [Forgetful, Amnesiac, Secretive])
def test_the_same_races_catch_a_wrong_keeper(mutant: type[Keeper]) -> None:
    assert any(len(race(seed, 3, 3, mutant).decided) > 1 for seed in range(SEEDS))
