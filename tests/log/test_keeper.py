"""Keepers and proposers: the rules of one keeper, and what one proposer makes of answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import log_helpers as given
import pytest

from p2pnet.core import Tick
from p2pnet.errors import ForgedError, LocalError, MalformedError, RefusedError, RemoteError
from p2pnet.keys import KeyPair
from p2pnet.log import keeper as keeper_module
from p2pnet.log.history import History, new_commit
from p2pnet.log.keeper import (
    Accept,
    Event,
    Keeper,
    Learn,
    Persist,
    Prepare,
    Read,
    Reply,
    to_key,
)
from p2pnet.log.proof import check_proof
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
PAIRS = {given.key(number).peer_id: given.key(number) for number in range(11, 16)}
K1, K2, K3 = list(PAIRS)[:3]


def open_to_all(*keepers: str) -> common_pb2.Signed:
    return given.manifest(anybody=True, keepers=keepers or (K1, K2, K3))


OPEN = open_to_all()
NETWORK = given.network_of(OPEN)


def keeper_of(name: str) -> Keeper:
    return Keeper(PAIRS[name])


def log_of(pair: KeyPair, *keepers: str, commits: int = 0) -> History:
    """A history on `keepers`, by default all three."""
    return given.claimed(pair, open_to_all(*keepers), commits=commits)


def prepare(pair: KeyPair, round_: int, slot: int = 1, network: str = NETWORK) -> Prepare:
    ballot = log_pb2.Ballot(round=round_, proposer=pair.peer_id)
    request = log_pb2.PrepareRequest(network_id=network, slot=slot, ballot=ballot)
    if slot == 1:
        request.manifest.CopyFrom(OPEN)
    return Prepare(pair.peer_id, request)


def accept(pair: KeyPair, round_: int, entry: common_pb2.Signed) -> Accept:
    ballot = log_pb2.Ballot(round=round_, proposer=pair.peer_id)
    slot = log_pb2.LogEntry.FromString(entry.payload).slot
    request = log_pb2.AcceptRequest(network_id=NETWORK, slot=slot, ballot=ballot, entry=entry)
    return Accept(pair.peer_id, request)


def learn(pair: KeyPair, history: History, first: int = 1) -> Learn:
    """A lesson: what the history holds from a slot on."""
    proofs = given.proofs_of(history, PAIRS)
    request = log_pb2.LearnRequest(
        network_id=history.network_id,
        entries=history.entries[first - 1 :],
        proofs=[proofs[slot] for slot in range(first, history.next_slot)],
    )
    return Learn(pair.peer_id, request)


def ask(keeper: Keeper, event: Event) -> tuple[object, list[Persist]]:
    """The reply, and what had to be kept before it."""
    *persists, reply = keeper.handle(event, 0.0)
    keeper.check()
    assert isinstance(reply, Reply)
    assert all(isinstance(effect, Persist) for effect in persists)
    return reply.message, persists  # type: ignore[return-value]


def first_claim(pair: KeyPair, **more: Any) -> common_pb2.Signed:
    entry: common_pb2.Signed = given.claim(History(NETWORK), pair, OPEN, **more)
    return entry


# --- one keeper ---------------------------------------------------------------


def test_a_promise_and_an_acceptance_are_kept_before_they_are_told() -> None:
    keeper = keeper_of(K1)
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
    keeper = keeper_of(K1)
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
    keeper, history = keeper_of(K1), log_of(A, commits=3)
    assert ask(keeper, learn(A, history))[1] == [
        Persist(NETWORK, slot, keeper.dump()[NETWORK, slot]) for slot in range(1, 5)
    ]
    reply, _ = ask(keeper, prepare(B, 9, slot=2))
    assert (reply.decided, reply.entry) == (True, history.entries[1])
    assert ask(keeper, prepare(B, 1, slot=5))[0].promised
    behind, kept = ask(keeper, prepare(B, 1, slot=7))
    assert (behind, kept) == (log_pb2.PrepareReply(next_slot=5), [])
    read, _ = ask(keeper, Read(log_pb2.ReadLogRequest(network_id=NETWORK, from_slot=3)))
    assert list(read.entries) == history.entries[2:]


def test_learning_out_of_order_waits_for_what_is_missing() -> None:
    keeper, history = keeper_of(K1), log_of(A, commits=2)
    ask(keeper, learn(A, log_of(A)))
    assert ask(keeper, learn(A, history, first=3))[1] == []
    assert len(ask(keeper, learn(A, history))[1]) == 2


def test_a_keeper_is_the_same_after_a_restart() -> None:
    history = log_of(A, commits=2)
    keeper, disk = keeper_of(K1), {}
    for event in (
        learn(A, history),
        prepare(A, 3, slot=4),
        accept(A, 3, new_commit(history, A, 60, given.states())),
        prepare(B, 4, slot=4),
    ):
        for kept in ask(keeper, event)[1]:
            disk[kept.network_id, kept.slot] = kept.data
    assert disk == keeper.dump()
    again = Keeper.load(PAIRS[K1], disk)
    assert again.dump() == disk
    reply, _ = ask(again, prepare(A, 3, slot=4))
    assert (reply.promised, to_key(reply.ballot)) == (False, (4, B.peer_id))
    assert to_key(reply.accepted) == (3, A.peer_id)


@pytest.mark.parametrize("damage", ["bytes", "gap", "entry"])
def test_a_damaged_record_is_named(damage: str) -> None:
    keeper = keeper_of(K1)
    ask(keeper, learn(A, log_of(A, commits=2)))
    disk = keeper.dump()
    if damage == "bytes":
        disk[NETWORK, 2] = b"\xff" + disk[NETWORK, 2]
    elif damage == "gap":
        del disk[NETWORK, 2]
    else:
        disk[NETWORK, 2] = disk[NETWORK, 3]
    with pytest.raises(LocalError, match=f"slot [23] of network {NETWORK} is damaged"):
        Keeper.load(PAIRS[K1], disk)


def test_a_keeper_refuses_what_cannot_count() -> None:
    history = log_of(A, commits=1)
    keeper = keeper_of(K1)
    ask(keeper, learn(A, history))
    later = log_of(A, commits=1)
    later.epoch = 5
    before = keeper.dump()
    for event, kind, words in [
        (accept(A, 1, new_commit(later, A, 40, given.states())), ForgedError, "last claim has 1"),
        (accept(B, 1, new_commit(history, B, 40, given.states())), ForgedError, "holds the claim"),
        (accept(A, 1, given.claim(later, A, OPEN, keepers=[K1])), ForgedError, "the next is 2"),
        (prepare(A, 0, slot=3), MalformedError, "no possible round"),
        (prepare(A, 2**62 + 1, slot=3), MalformedError, "no possible round"),
        (prepare(A, 2**32, slot=3), MalformedError, "still to come"),
        (Prepare(B.peer_id, prepare(A, 1, slot=3).request), MalformedError, "its proposer's own"),
        (prepare(A, 1, network="x"), MalformedError, "not a network id"),
        (learn(A, log_of(B)), ForgedError, "two entries"),
    ]:
        with pytest.raises(kind, match=words):
            keeper.handle(event, 0.0)
        keeper.check()
        assert keeper.dump() == before


def test_only_whom_the_owner_grants_may_write() -> None:
    closed = given.manifest(A, keepers=[K1])
    network = given.network_of(closed)
    keeper = keeper_of(K1)
    lesson = learn(A, given.claimed(A, closed)).request
    with pytest.raises(RefusedError, match="does not let"):
        keeper.handle(Learn(B.peer_id, lesson), 0.0)
    ask(keeper, Learn(A.peer_id, lesson))
    with pytest.raises(RefusedError, match="does not let") as refused:
        keeper.handle(prepare(B, 1, slot=2, network=network), 0.0)
    assert refused.value.code == common_pb2.REFUSAL_CODE_NOT_GRANTED


def test_whom_the_log_does_not_name_does_not_keep_it() -> None:
    other = open_to_all(K2, K3)
    claim = given.claim(History(given.network_of(other)), A, other, keepers=[K1])
    request = accept(A, 1, claim).request
    request.network_id = given.network_of(other)
    with pytest.raises(RefusedError, match="manifest names other keepers"):
        keeper_of(K1).handle(Accept(A.peer_id, request), 0.0)
    stranger = keeper_of(K1)
    ask(stranger, learn(A, log_of(A, K2, K3)))
    with pytest.raises(RefusedError, match="not a keeper of that slot"):
        stranger.handle(prepare(A, 1, slot=2, network=given.network_of(other)), 0.0)


def lies() -> list[object]:
    history = log_of(A)
    fake = given.claim(history, A, OPEN, reason="fake")
    honest = given.proof_of(history, fake, PAIRS)
    cases: list[tuple[str, log_pb2.Proof | None]] = [("no proof", None)]
    alone = log_pb2.Proof()
    alone.CopyFrom(honest)
    del alone.votes[sorted(alone.votes)[0]]
    cases.append(("has 1 votes, but 3 keepers decide", alone))
    padded = log_pb2.Proof()
    padded.CopyFrom(alone)
    padded.votes[A.peer_id] = bytes(64)
    cases.append(("is no keeper", padded))
    forged = log_pb2.Proof()
    forged.CopyFrom(honest)
    forged.votes[sorted(forged.votes)[0]] = bytes(64)
    cases.append(("is not signed by it", forged))
    short = log_pb2.Proof()
    short.CopyFrom(honest)
    short.votes[sorted(short.votes)[0]] = b""
    cases.append(("is no signature", short))
    moved = log_pb2.Proof()
    moved.CopyFrom(honest)
    moved.ballot.round = 2
    cases.append(("is not signed by it", moved))
    other = given.proof_of(history, given.claim(history, B, OPEN), PAIRS)
    cases.append(("is not signed by it", other))
    return [
        pytest.param(fake, proof, words, id=f"{n}-{words}")
        for n, (words, proof) in enumerate(cases)
    ]


@pytest.mark.parametrize(("fake", "proof", "words"), lies())
def test_nobody_lengthens_a_log_without_a_majority(
    fake: common_pb2.Signed, proof: log_pb2.Proof | None, words: str
) -> None:
    """An orchestrator that the owner has granted signs claims for itself, as it likes."""
    history, keeper = log_of(A), keeper_of(K1)
    ask(keeper, learn(A, history))
    before = keeper.dump()
    request = log_pb2.LearnRequest(network_id=NETWORK, entries=[fake])
    if proof is None:
        words = "without proofs"
    else:
        request.proofs.append(proof)
    with pytest.raises(RemoteError, match=words):
        keeper.handle(Learn(A.peer_id, request), 0.0)
    assert keeper.dump() == before
    # Nor is a proposer misled by a keeper that says so.
    proposer = Proposer(
        B.peer_id,
        history,
        given.claim(history, B, OPEN),
        rng=random.Random(1),
        proofs={},
    )
    [send, *_] = proposer.handle(Begin(), 0.0)
    assert isinstance(send, Send)
    told = log_pb2.PrepareReply(decided=True, entry=fake, proof=proof)
    assert proposer.handle(Answered(K1, send.requests[0], told), 0.0) == []  # type: ignore[arg-type]


def test_a_refused_lesson_takes_no_room() -> None:
    keeper, lesson = keeper_of(K1), learn(A, log_of(A))
    lesson.request.proofs[0].ballot.round = 7
    with pytest.raises(ForgedError, match="is not signed by it"):
        keeper.handle(lesson, 0.0)
    assert keeper.history(NETWORK) is None
    lesson.request.entries.extend([lesson.request.entries[0]] * keeper_module.BATCH_ENTRIES)
    lesson.request.proofs.extend([lesson.request.proofs[0]] * keeper_module.BATCH_ENTRIES)
    with pytest.raises(MalformedError, match="at most 32 entries"):
        keeper.handle(lesson, 0.0)


def test_a_keeper_that_lags_is_taught_from_where_it_is() -> None:
    history = log_of(A, commits=99)
    proofs = given.proofs_of(history, PAIRS)
    entry = new_commit(history, A, 5000, given.states())
    proposer = Proposer(A.peer_id, history, entry, rng=random.Random(1), proofs=proofs)
    request = proposer.handle(Begin(), 0.0)[0].requests[0]  # type: ignore[union-attr]
    behind = log_pb2.PrepareReply(next_slot=90)
    [send] = proposer.handle(Answered(K1, request, behind), 0.0)  # type: ignore[arg-type]
    assert isinstance(send, Send)
    lesson, again = send.requests
    assert isinstance(lesson, log_pb2.LearnRequest)
    assert list(lesson.entries) == history.entries[89:]
    assert again == request


def test_a_vote_that_is_not_the_keepers_does_not_count() -> None:
    history = log_of(A)
    entry = given.claim(history, B, OPEN)
    proposer = Proposer(B.peer_id, history, entry, rng=random.Random(1), proofs={})
    sends = proposer.handle(Begin(), 0.0)
    request = sends[0].requests[0]  # type: ignore[union-attr]
    promise = log_pb2.PrepareReply(promised=True, ballot=request.ballot)  # type: ignore[union-attr]
    accepts: Sequence[object] = ()
    for name in (K1, K2):
        accepts = proposer.handle(Answered(name, request, promise), 0.0)  # type: ignore[arg-type]
    proposal = accepts[0].requests[0]  # type: ignore[attr-defined]
    false = log_pb2.AcceptReply(accepted=True, ballot=request.ballot, vote=bytes(64))  # type: ignore[union-attr]
    for name in (K1, K2, K3):
        assert proposer.handle(Answered(name, proposal, false), 0.0) == []


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
    history = given.claimed(A, OPEN)
    history.add(new_commit(history, A, 20, given.states(), keepers=[K1, K2]))
    history.add(new_commit(history, A, 40, given.states()))
    keepers = {name: keeper_of(name) for name in (K1, K2, K3)}
    entry = new_commit(history, A, 60, given.states(), keepers=[K1, K3])
    # K1 and K2 know nothing of the log yet: they are taught on the way.
    proofs = given.proofs_of(history, PAIRS)
    proposer = Proposer(A.peer_id, history, entry, rng=random.Random(1), proofs=proofs)
    result = run_quietly(proposer, keepers)
    assert isinstance(result, Decided)
    assert (result.entry, result.ours) == (entry, True)
    check_proof(result.proof, entry, (K1, K2))
    for keeper in keepers.values():
        known = keeper.history(NETWORK)
        assert known is not None
        assert known.entries == [*history.entries, entry]


def test_former_keepers_hear_that_others_have_the_log() -> None:
    history = History(NETWORK)
    history.add(first_claim(A, keepers=[K3]))
    keepers = {name: keeper_of(name) for name in (K1, K2, K3)}
    for keeper in keepers.values():
        ask(keeper, learn(A, history))
    entry = new_commit(history, A, 20, given.states())
    proofs = given.proofs_of(history, PAIRS)
    proposer = Proposer(A.peer_id, history, entry, rng=random.Random(1), proofs=proofs)
    assert isinstance(run_quietly(proposer, keepers), Decided)
    for keeper in keepers.values():
        known = keeper.history(NETWORK)
        assert known is not None
        assert known.entries == [*history.entries, entry]


def test_a_minority_of_dead_keepers_does_not_matter_and_a_majority_does() -> None:
    for dead, kind in (([K2], Decided), ([K1, K2], Failed)):
        keepers = {name: keeper_of(name) for name in (K1, K2, K3)}
        proposer = Proposer(
            A.peer_id,
            History(NETWORK),
            first_claim(A),
            rng=random.Random(1),
            proofs={},
            rounds_max=4,
        )
        result = run_quietly(proposer, keepers, dead)
        assert isinstance(result, kind)
    assert isinstance(result, Failed)
    assert "not decided in 4 rounds: it takes 2 of 3 keepers" in result.reason


def test_who_comes_late_is_told_who_won() -> None:
    keepers = {name: keeper_of(name) for name in (K1, K2, K3)}
    ours, theirs = first_claim(A), first_claim(B)
    # B's entry reached a majority, but B died before telling anybody.
    for name in (K1, K2):
        ask(keepers[name], prepare(B, 1))
        ask(keepers[name], accept(B, 1, theirs))
    proposer = Proposer(
        A.peer_id,
        History(NETWORK),
        ours,
        rng=random.Random(1),
        proofs={},
    )
    result = run_quietly(proposer, keepers)
    assert isinstance(result, Decided)
    assert (result.entry, result.ours) == (theirs, False)


@pytest.mark.parametrize("order", [(K1, K2), (K2, K1)])
def test_of_two_accepted_entries_the_one_under_the_higher_ballot_is_proposed(
    order: Sequence[str],
) -> None:
    older, newer = first_claim(B), first_claim(given.key(3))
    keepers = {name: keeper_of(name) for name in (K1, K2)}
    ask(keepers[K1], accept(B, 1, older))
    ask(keepers[K2], accept(given.key(3), 2, newer))
    proposer = Proposer(
        A.peer_id,
        History(NETWORK),
        first_claim(A),
        rng=random.Random(1),
        proofs={},
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
    history = log_of(A)
    entry = new_commit(history, B, 20, given.states())
    with pytest.raises(ForgedError, match="holds the claim"):
        Proposer(B.peer_id, history, entry, rng=random.Random(1), proofs={})
    empty = History(given.NETWORK)
    with pytest.raises(ValueError, match="in a store, not on peers"):
        Proposer(A.peer_id, empty, given.claim(empty, A), rng=random.Random(1), proofs={})


def test_a_long_history_travels_in_bounded_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    history = log_of(A, commits=30)
    proofs = given.proofs_of(history, PAIRS)
    one = len(history.entries[1].payload)
    monkeypatch.setattr("p2pnet.log.proposer.LEARN_BYTES_MAX", 5 * one)
    lessons = learn_requests(NETWORK, history.entries, proofs)
    assert len(lessons) >= 6
    assert [entry for lesson in lessons for entry in lesson.entries] == history.entries
    assert all(sum(len(e.payload) for e in lesson.entries) <= 5 * one for lesson in lessons)
    assert [proof for lesson in lessons for proof in lesson.proofs] == list(proofs.values())
    del proofs[4]  # what cannot be proved is not told
    short = learn_requests(NETWORK, history.entries, proofs)
    assert [entry for lesson in short for entry in lesson.entries] == history.entries[:3]


@pytest.mark.parametrize("liar", [K1, K2, K3])
def test_one_keeper_that_lies_about_rounds_does_not_end_them(liar: str) -> None:
    """It says that a ballot just below the highest possible one had been promised."""
    rounds: list[int] = []
    huge = log_pb2.Ballot(round=keeper_module.ROUND_MAX - 1, proposer=B.peer_id)

    class Liar(Keeper):
        def handle(self, event: Event, now: float) -> list[Any]:
            assert isinstance(event, Prepare | Accept | Learn)
            if isinstance(event, Prepare):
                rounds.append(event.request.ballot.round)
                return [Reply(log_pb2.PrepareReply(ballot=huge))]
            return [Reply(log_pb2.AcceptReply(ballot=huge))]

    keepers = {name: keeper_of(name) for name in (K1, K2, K3)} | {liar: Liar(PAIRS[liar])}
    proposer = Proposer(
        A.peer_id, History(NETWORK), first_claim(A), rng=random.Random(1), proofs={}
    )
    sends = proposer.handle(Begin(), 0.0)
    for send in sends:  # in the first round only the liar answers
        if isinstance(send, Send) and send.keeper == liar:
            exchange(proposer, keepers, send, 0.0, ())
    proposer.handle(Tick(), 2.0)
    assert isinstance(run_quietly(proposer, keepers), Decided)
    assert rounds == [1, 2]
