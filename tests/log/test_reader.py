"""Reading a log on peers: what one keeper proves is believed, what one hides is found."""

from __future__ import annotations

from collections.abc import Sequence

import log_helpers as given
import pytest

from p2pnet.core import Tick
from p2pnet.errors import RemoteError
from p2pnet.log import keeper as keeper_module
from p2pnet.log.history import History, new_commit
from p2pnet.log.keeper import Keeper, Learn, Read, Reply
from p2pnet.log.proposer import learn_requests
from p2pnet.log.reader import (
    GRACE_S,
    ROUND_TIMEOUT_S,
    ROUNDS_MAX,
    Answered,
    Ask,
    Begin,
    Done,
    Failed,
    Found,
    LogReader,
    Missed,
)
from p2pnet.v1 import log_pb2

A, B = given.key(1), given.key(2)
PAIRS = {given.key(number).peer_id: given.key(number) for number in range(11, 17)}
K = sorted(PAIRS)
OPEN = given.manifest(anybody=True, keepers=K[:3])
NETWORK = given.network_of(OPEN)


def long(commits: int = 3) -> History:
    return given.claimed(A, OPEN, commits=commits)


def taught(name: str, history: History, slots: int) -> Keeper:
    """A keeper that knows the first slots."""
    keeper = Keeper(PAIRS[name])
    proofs = given.proofs_of(history, PAIRS)
    for request in learn_requests(NETWORK, history.entries[:slots], proofs):
        keeper.handle(Learn(A.peer_id, request), 0.0)
    return keeper


def answer(keeper: Keeper, ask: Ask) -> Answered:
    reply = keeper.handle(Read(ask.request), 0.0)[-1]
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, log_pb2.ReadLogReply)
    return Answered(ask.keeper, reply.message)


def run(reader: LogReader, keepers: dict[str, Keeper | None]) -> tuple[list[Found], object, float]:
    """Everything arrives at once; who is None does not answer. (found, the end, when)."""
    now, found = 0.0, []
    queue: list[object] = list(reader.handle(Begin(), now))
    while True:
        while queue:
            effect = queue.pop(0)
            if isinstance(effect, Found):
                found.append(effect)
            elif isinstance(effect, Ask):
                if (keeper := keepers.get(effect.keeper)) is not None:
                    queue += reader.handle(answer(keeper, effect), now)
            else:
                assert reader.deadline() is None
                return found, effect, now
            reader.check()
        deadline = reader.deadline()
        assert deadline is not None
        now = deadline
        queue += reader.handle(Tick(), now)


def test_what_a_majority_knows_is_found_with_its_proofs() -> None:
    told, history = long(), History(NETWORK)
    keepers: dict[str, Keeper | None] = {name: taught(name, told, 4) for name in K[:3]}
    found, end, now = run(LogReader(history, first=K[:3]), keepers)
    assert (end, now) == (Done(), 0.0)
    assert history.entries == told.entries == [each.entry for each in found]
    assert [each.slot for each in found] == [1, 2, 3, 4]
    assert {each.slot: each.proof for each in found} == given.proofs_of(told, PAIRS)


@pytest.mark.parametrize("knows", K[:3])
def test_the_one_that_knows_more_is_believed_and_waited_for(knows: str) -> None:
    told, history = long(), History(NETWORK)
    keepers: dict[str, Keeper | None] = {
        name: taught(name, told, 4 if name == knows else 2) for name in K[:3]
    }
    _, end, _ = run(LogReader(history, first=K[:3]), keepers)
    assert end == Done()
    assert history.entries == told.entries


def test_a_silent_minority_is_waited_for_shortly() -> None:
    told, history = long(), History(NETWORK)
    keepers: dict[str, Keeper | None] = {name: taught(name, told, 4) for name in K[:2]}
    _, end, now = run(LogReader(history, first=K[:3]), keepers)
    assert end == Done()
    assert now == pytest.approx(GRACE_S)


def test_without_a_majority_it_fails_in_bounded_time_and_what_was_found_is_true() -> None:
    told, history = long(), History(NETWORK)
    keepers: dict[str, Keeper | None] = {K[0]: taught(K[0], told, 4)}
    _, end, now = run(LogReader(history, first=K[:3]), keepers)
    assert isinstance(end, Failed)
    assert "1 of 3 keepers answer, and it takes 2" in end.reason
    assert now < ROUNDS_MAX * (ROUND_TIMEOUT_S + 1)
    assert history.entries == told.entries


def test_a_log_goes_on_at_its_newer_keepers() -> None:
    told = long(1)
    told.add(new_commit(told, A, 40, given.states(), keepers=K[2:5]))
    told.add(new_commit(told, A, 60, given.states()))
    for first_two in (2, 3):  # what the old ones heard
        history = History(NETWORK)
        keepers: dict[str, Keeper | None] = {
            name: taught(name, told, first_two) for name in K[:2]
        } | {name: taught(name, told, 4) for name in K[2:5]}
        _, end, _ = run(LogReader(history, first=K[:3]), keepers)
        assert end == Done()
        assert history.entries == told.entries
    # All of the first keepers are gone for good: somebody has to know a newer one.
    gone: dict[str, Keeper | None] = {name: taught(name, told, 4) for name in K[3:5]}
    history = History(NETWORK)
    assert isinstance(run(LogReader(history, first=K[:3]), gone)[1], Failed)
    assert run(LogReader(history, first=K[:3], hints=K[4:5]), gone)[1] == Done()
    assert history.entries == told.entries


def test_pages_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    told, history = long(9), History(NETWORK)
    monkeypatch.setattr(keeper_module, "READ_BYTES_MAX", 2 * len(told.entries[1].payload))
    keepers: dict[str, Keeper | None] = {name: taught(name, told, 10) for name in K[:3]}
    assert run(LogReader(history, first=K[:3]), keepers)[1] == Done()
    assert history.entries == told.entries


def test_what_is_known_is_not_read_again() -> None:
    told, history = long(), long(1)
    keepers: dict[str, Keeper | None] = {name: taught(name, told, 4) for name in K[:3]}
    found, end, _ = run(LogReader(history, first=K[:3]), keepers)
    assert end == Done()
    assert [each.slot for each in found] == [3, 4]


def forged(reply: log_pb2.ReadLogReply, how: str) -> None:
    if how == "without proofs":
        del reply.proofs[:]
    elif how == "without the first":
        del reply.entries[0]
        del reply.proofs[0]
    elif how == "a tail of its own":
        history = long()
        fake = given.claim(history, B, OPEN)
        reply.entries.append(fake)
        reply.proofs.append(reply.proofs[-1])
    elif how == "another network's":
        other = given.manifest(A, keepers=K[:3])
        reply.entries[0].CopyFrom(given.claimed(A, other).entries[0])
    else:
        reply.entries[2].payload += b"\0"


@pytest.mark.parametrize(
    "how",
    ["without proofs", "without the first", "a tail of its own", "another network's", "garbage"],
)
def test_a_keeper_that_lies_is_not_believed(how: str) -> None:
    told, history = long(), History(NETWORK)
    keepers = {name: taught(name, told, 4) for name in K[:3]}
    reader = LogReader(history, first=K[:3])
    queue: list[object] = list(reader.handle(Begin(), 0.0))
    asks = [ask for ask in queue if isinstance(ask, Ask)]
    lie = answer(keepers[asks[0].keeper], asks[0])
    forged(lie.reply, how)
    effects: list[object] = list(reader.handle(lie, 0.0))
    assert [e.entry for e in effects if isinstance(e, Found)] == history.entries
    assert history.entries == told.entries[: len(history.entries)]
    queue = [*effects, *asks[1:]]
    end = None
    while queue:
        effect = queue.pop(0)
        if isinstance(effect, Ask):
            queue += reader.handle(answer(keepers[effect.keeper], effect), 0.0)
        elif not isinstance(effect, Found):
            end = effect
    assert end == Done()
    assert history.entries == told.entries


def test_a_slot_that_is_asked_for_is_waited_for() -> None:
    """A host hears of a claim before the keepers have heard that it is decided."""
    told, history = long(), History(NETWORK)
    keepers: dict[str, Keeper | None] = {name: taught(name, told, 3) for name in K[:3]}
    reader = LogReader(history, first=K[:3], at_least=4)
    asks = drained(reader, keepers, reader.handle(Begin(), 0.0))
    assert asks == []
    deadline = reader.deadline()
    assert deadline is not None
    keepers[K[1]] = taught(K[1], told, 4)  # one is enough
    assert drained(reader, keepers, reader.handle(Tick(), deadline)) == [Done()]
    assert history.entries == told.entries


def test_a_slot_that_nobody_decides_is_not_waited_for_for_long() -> None:
    told, history = long(), History(NETWORK)
    keepers: dict[str, Keeper | None] = {name: taught(name, told, 3) for name in K[:3]}
    _, end, now = run(LogReader(history, first=K[:3], at_least=4), keepers)
    assert end == Failed("slot 4 of the log is not decided")
    assert now < 1.5
    assert history.entries == told.entries[:3]


def drained(
    reader: LogReader, keepers: dict[str, Keeper | None], effects: Sequence[object]
) -> list[object]:
    """What is left when every keeper has answered."""
    queue, left = list(effects), []
    while queue:
        effect = queue.pop(0)
        if isinstance(effect, Ask) and (keeper := keepers[effect.keeper]) is not None:
            queue += reader.handle(answer(keeper, effect), 0.0)
        elif not isinstance(effect, Found):
            left.append(effect)
    return left


def test_answers_that_nobody_asked_for_change_nothing() -> None:
    told, history = long(), History(NETWORK)
    reader = LogReader(history, first=K[:3])
    asks = reader.handle(Begin(), 0.0)
    assert isinstance(asks[0], Ask)
    keeper = taught(K[0], told, 4)
    stranger = Answered(K[5], answer(keeper, asks[0]).reply)
    assert reader.handle(stranger, 0.0) == []
    assert reader.handle(Missed(K[5], "no"), 0.0) == []
    assert history.entries == []
    with pytest.raises(ValueError, match="in a store"):
        LogReader(history, first=[])
    with pytest.raises(RemoteError):
        History("x")


def test_a_long_log_is_read_in_small_pieces_and_once() -> None:
    """3,000 entries at 1 s a piece: a read lasts as long as it gets on."""
    told, history = long(2_999), History(NETWORK)
    keepers = dict.fromkeys(K[:3], taught(K[0], told, 3_000))  # all know the same
    reader, now, pieces, told_twice = LogReader(history, first=K[:3]), 0.0, 0, 0
    queue: list[object] = list(reader.handle(Begin(), now))
    while queue and queue[0] != Done():
        effect = queue.pop(0)
        assert not isinstance(effect, Failed)
        if isinstance(effect, Ask):
            message = answer(keepers[effect.keeper], effect)
            assert len(message.reply.entries) <= keeper_module.BATCH_ENTRIES
            before = history.next_slot
            now += 1.0 if message.reply.entries else 0.0
            assert reader.deadline() is not None
            new = reader.handle(message, now)
            pieces += history.next_slot > before
            told_twice += bool(message.reply.entries) and history.next_slot == before
            queue += new
    assert len(history.entries) == 3_000
    assert pieces == -(-3_000 // keeper_module.BATCH_ENTRIES)
    assert told_twice <= 2  # the first answers of the others
    assert now > 90


def test_who_was_behind_is_asked_when_the_teller_goes_silent() -> None:
    told, history = long(99), History(NETWORK)
    keepers = {name: taught(name, told, 100) for name in K[:3]}
    reader = LogReader(history, first=K[:3])
    asks = [ask for ask in reader.handle(Begin(), 0.0) if isinstance(ask, Ask)]
    again = reader.handle(answer(keepers[K[0]], asks[0]), 0.0)
    assert [ask.keeper for ask in again if isinstance(ask, Ask)] == [K[0]]
    for ask in asks[1:]:
        assert reader.handle(answer(keepers[ask.keeper], ask), 0.0) == []
    deadline = reader.deadline()
    assert deadline == ROUND_TIMEOUT_S
    asks = [ask for ask in reader.handle(Tick(), deadline) if isinstance(ask, Ask)]
    assert [(ask.keeper, ask.request.from_slot) for ask in asks] == [(K[1], 33), (K[2], 33)]
    left = drained(reader, dict(keepers), asks)
    assert left == [Done()]
    assert history.entries == told.entries
