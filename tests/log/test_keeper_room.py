"""A keeper's room: strangers do not fill it, and what goes for want of it leaves Paxos whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import log_helpers as given
import pytest

from p2pnet.errors import ForgedError, MalformedError, RefusedError, RemoteError
from p2pnet.keys import KeyPair
from p2pnet.log import reader as reading
from p2pnet.log import room
from p2pnet.log.history import History, new_cancellation, new_closing, new_commit
from p2pnet.log.keeper import (
    ROUND_AHEAD,
    ROUND_STEP,
    Accept,
    Event,
    Forget,
    Keeper,
    Learn,
    Persist,
    Prepare,
    Read,
    Reply,
)
from p2pnet.log.room import KEPT_S
from p2pnet.v1 import common_pb2, log_pb2

ONE, TWO, THREE, FOUR = (given.key(number) for number in range(11, 15))
KEEPERS = [ONE, TWO, THREE]
PAIRS = {pair.peer_id: pair for pair in (*KEEPERS, FOUR)}
A = given.key(1)
OTHERS = [given.key(number) for number in range(20, 40)]


class Kept:
    """A keeper and its disk; at any time it may be loaded anew."""

    def __init__(self, pair: KeyPair = ONE) -> None:
        self.pair = pair
        self.core = Keeper(pair)
        self.disk: dict[tuple[str, int], bytes] = {}
        self.now = 0.0

    def __call__(self, event: Event) -> Any:
        effects = self.core.handle(event, self.now)
        self.core.check()
        for effect in effects:
            if isinstance(effect, Persist):
                self.disk[effect.network_id, effect.slot] = effect.data
            elif isinstance(effect, Forget):
                for name in [name for name in self.disk if name[0] == effect.network_id]:
                    if name[1]:
                        del self.disk[name]
        assert self.disk == self.core.dump()
        reply = effects[-1]
        assert isinstance(reply, Reply)
        return reply.message

    def again(self) -> None:
        """After a restart."""
        self.core = Keeper.load(self.pair, self.disk)

    def kept(self) -> list[str]:
        return [history.network_id for history in self.core.histories()]


def network(number: int, *keepers: KeyPair, **more: Any) -> common_pb2.Signed:
    """The manifest of one of many networks."""
    names = given.keys_of(keepers or KEEPERS)
    if not more:
        more["anybody"] = True
    return given.manifest(keepers=names, nonce=b"%d" % number, **more)


def prepare(
    manifest: common_pb2.Signed, by: KeyPair = A, round_: int = 1, slot: int = 1, wall_ms: int = 0
) -> Prepare:
    request = log_pb2.PrepareRequest(
        network_id=given.network_of(manifest),
        slot=slot,
        ballot=log_pb2.Ballot(round=round_, proposer=by.peer_id),
        manifest=manifest,
    )
    return Prepare(by.peer_id, request, wall_ms)


def accept(entry: common_pb2.Signed, by: KeyPair = A, round_: int = 1) -> Accept:
    body = log_pb2.LogEntry.FromString(entry.payload)
    ballot = log_pb2.Ballot(round=round_, proposer=by.peer_id)
    request = log_pb2.AcceptRequest(
        network_id=body.network_id, slot=body.slot, ballot=ballot, entry=entry
    )
    return Accept(by.peer_id, request)


def first_claim(manifest: common_pb2.Signed, by: KeyPair = A, **more: Any) -> common_pb2.Signed:
    entry: common_pb2.Signed = given.claim(
        History(given.network_of(manifest)), by, manifest, **more
    )
    return entry


def learn(history: History) -> Learn:
    proofs = given.proofs_of(history, PAIRS)
    request = log_pb2.LearnRequest(
        network_id=history.network_id, entries=history.entries, proofs=list(proofs.values())
    )
    return Learn(A.peer_id, request)


def closed(manifest: common_pb2.Signed) -> History:
    history = given.claimed(A, manifest)
    end = new_cancellation(given.OWNER, history.network_id, "done", 1)
    history.add(new_closing(history, A, end))
    return history


def moved(manifest: common_pb2.Signed, *, shown: bool) -> History:
    """A log that goes from the first three keepers to the fourth."""
    history = History(given.network_of(manifest))
    history.add(given.claim(history, A, manifest, keepers=[FOUR.peer_id]))
    if shown:  # the fourth has decided something, so it has all that came before
        history.add(new_commit(history, A, 20, given.states()))
    return history


def read(kept: Kept, network_id: str, from_slot: int = 1) -> log_pb2.ReadLogReply:
    reply: log_pb2.ReadLogReply = kept(
        Read(log_pb2.ReadLogRequest(network_id=network_id, from_slot=from_slot))
    )
    return reply


# --- who may take a place -------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "kind", "words"),
    [
        (prepare(network(1, TWO, THREE)), RefusedError, "names other keepers"),
        (prepare(network(1, anybody=False)), RefusedError, "does not let"),
        (Prepare(A.peer_id, prepare(network(1)).request), ForgedError, "not that of network"),
    ],
    ids=["other keepers", "not granted", "another manifest"],
)
def test_a_first_promise_takes_the_owners_word(
    event: Prepare, kind: type[RemoteError], words: str
) -> None:
    if kind is ForgedError:
        event.request.manifest.CopyFrom(network(2))
    kept = Kept()
    with pytest.raises(kind, match=words):
        kept(event)
    assert kept.disk == {}


def test_the_caller_of_a_first_acceptance_is_granted_too() -> None:
    manifest = given.manifest(A, keepers=[ONE.peer_id])
    with pytest.raises(RefusedError, match="does not let"):
        Kept()(accept(first_claim(manifest), by=OTHERS[0]))


def test_strangers_who_promise_themselves_everything_keep_nobody_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "NETWORKS_MAX", 8)
    monkeypatch.setattr(room, "UNCLAIMED_MAX", 3)
    kept = Kept()
    honest = network(0)
    kept(prepare(honest))
    kept(accept(first_claim(honest)))
    for number in range(3):
        kept(prepare(network(1 + number), by=OTHERS[0], round_=7))
    with pytest.raises(RefusedError, match="logs of yours"):
        kept(prepare(network(99), by=OTHERS[0]))
    for number in range(40):  # more than there is room for
        kept.now += 1.0
        kept(prepare(network(100 + number), by=OTHERS[number // 3 + 1], round_=8 + number))
    assert len(kept.kept()) == 8
    assert given.network_of(honest) in kept.kept()  # what was accepted stays
    kept.again()
    late = network(200)
    assert not kept(prepare(late)).promised
    reply = kept(prepare(late, round_=100))
    assert reply.promised
    assert kept(accept(first_claim(late), round_=100)).accepted


@pytest.mark.parametrize("restart", [False, True])
def test_a_promise_that_went_holds(monkeypatch: pytest.MonkeyPatch, restart: bool) -> None:
    """Its ballot is part of the floor, under which nobody is promised anything."""
    monkeypatch.setattr(room, "NETWORKS_MAX", 1)
    first, second = network(1), network(2)
    low, high = OTHERS[0], OTHERS[1]
    kept = Kept()
    assert kept(prepare(first, by=high, round_=9)).promised
    assert kept(prepare(second, by=high, round_=10)).promised
    assert kept.kept() == [given.network_of(second)]
    if restart:
        kept.again()
    # A call of a proposer that has slept since, with the promises of all but this keeper.
    assert not kept(prepare(first, by=low, round_=8)).promised
    assert not kept(accept(first_claim(first, low), by=low, round_=8)).accepted
    assert kept(accept(first_claim(first, high), by=high, round_=9)).accepted


# --- ballots ------------------------------------------------------------------


def test_ballots_go_no_further_than_the_clock_and_so_are_never_used_up() -> None:
    kept, wall_ms = Kept(), 1_800_000_000_000
    manifest = network(1)
    ends, mine = max(OTHERS, key=lambda pair: pair.peer_id), min(OTHERS, key=lambda p: p.peer_id)
    highest = wall_ms + ROUND_AHEAD
    with pytest.raises(MalformedError, match="still to come"):
        kept(prepare(manifest, by=ends, round_=highest + 1, wall_ms=wall_ms))
    assert kept(prepare(manifest, by=ends, round_=highest, wall_ms=wall_ms)).promised
    assert not kept(prepare(manifest, by=mine, round_=highest, wall_ms=wall_ms)).promised
    assert kept(prepare(manifest, by=mine, round_=highest + 1, wall_ms=wall_ms + 1)).promised
    # A clock that goes back, or is not set, keeps nobody out.
    assert kept(prepare(manifest, by=mine, round_=highest + 2, wall_ms=0)).promised
    with pytest.raises(MalformedError, match="still to come"):
        kept(prepare(manifest, by=mine, round_=highest + 3 + ROUND_STEP, wall_ms=0))


# --- what goes ----------------------------------------------------------------


def full(monkeypatch: pytest.MonkeyPatch, *histories: History) -> Kept:
    """A keeper that has room for nothing beyond these."""
    kept = Kept()
    for history in histories:
        kept(learn(history))
    monkeypatch.setattr(room, "NETWORKS_MAX", len(histories))
    return kept


def test_a_closed_log_answers_for_a_while_and_then_goes_when_room_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, living = closed(network(1)), given.claimed(A, network(2))
    kept = full(monkeypatch, living, ended)
    kept.now = KEPT_S - 1.0
    with pytest.raises(RefusedError, match="as many logs as it can"):
        kept(prepare(network(3)))
    assert len(read(kept, ended.network_id).entries) == 2
    kept.now = KEPT_S
    assert len(read(kept, ended.network_id).entries) == 2
    assert kept(prepare(network(3))).promised
    assert kept.kept() == sorted([living.network_id, given.network_of(network(3))])
    for restart in (False, True):
        if restart:
            kept.again()
        for event in (
            Read(log_pb2.ReadLogRequest(network_id=ended.network_id)),
            prepare(network(1), round_=50),
            accept(first_claim(network(1), A, reason="again"), round_=50),
            learn(ended),
        ):
            with pytest.raises(RefusedError, match="owner has ended it") as refused:
                kept(event)
            assert refused.value.code == common_pb2.REFUSAL_CODE_CLOSED
    kept.now += 2 * KEPT_S
    kept(learn(given.claimed(A, network(4))))  # for the promise; the living log stays
    with pytest.raises(RefusedError, match="as many logs as it can"):
        kept(prepare(network(5), round_=9))


def test_a_log_of_other_keepers_goes_only_when_they_have_shown_that_they_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = moved(network(1), shown=False)
    kept = full(monkeypatch, alone)
    kept.now = 5 * KEPT_S
    with pytest.raises(RefusedError, match="as many logs as it can"):
        kept(prepare(network(3)))
    shown = moved(network(1), shown=True)
    kept(learn(shown))
    kept.now += KEPT_S
    assert kept(prepare(network(3))).promised
    assert kept.kept() == [given.network_of(network(3))]
    kept.again()
    reply = read(kept, shown.network_id)
    assert (list(reply.entries), list(reply.keepers)) == ([], [FOUR.peer_id])
    # It has voted in slot 1: there it is dead. It may still be taught, and named again.
    for event in (
        prepare(network(1), round_=50),
        accept(first_claim(network(1), A, reason="another"), round_=50),
    ):
        with pytest.raises(RefusedError, match="does not keep that slot"):
            kept(event)
    assert kept(prepare(network(1), slot=3, round_=50)).next_slot == 1  # "teach me"
    back = History(shown.network_id)
    back.extend(shown.entries)
    back.add(new_commit(back, A, 40, given.states(), keepers=[ONE.peer_id]))
    kept.now += 1.0
    kept(learn(back))
    assert kept(prepare(network(1), slot=4, round_=1)).promised
    kept.again()
    assert list(read(kept, shown.network_id).entries) == back.entries


def test_an_entry_that_nobody_decides_goes_and_its_slot_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have been decided with this keeper's vote, of which nobody has told it."""
    monkeypatch.setattr(room, "NETWORKS_MAX", 1)
    kept, manifest = Kept(), network(1)
    kept(prepare(manifest))
    kept(accept(first_claim(manifest)))
    with pytest.raises(RefusedError, match="as many logs as it can"):
        kept(prepare(network(2)))
    kept.now = KEPT_S
    assert kept(prepare(network(2))).promised
    kept.again()
    for event in (
        prepare(manifest, round_=9),
        accept(first_claim(manifest, A, reason="x"), round_=9),
        Read(log_pb2.ReadLogRequest(network_id=given.network_of(manifest))),
    ):
        with pytest.raises(RefusedError, match="does not keep that slot"):
            kept(event)
    kept(learn(given.claimed(A, manifest)))
    assert kept(prepare(manifest, slot=2)).promised


def test_bytes_are_found_where_they_do_no_harm_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended, living = closed(network(1)), given.claimed(A, network(2))
    kept = Kept()
    kept(learn(ended))
    kept(learn(living))
    monkeypatch.setattr(room, "BYTES_MAX", ended.size_bytes + living.size_bytes)
    more = given.claimed(A, network(2), commits=1)
    before = dict(kept.disk)
    with pytest.raises(RefusedError, match="room for logs is full"):
        kept(learn(more))
    assert kept.disk == before
    kept.now = KEPT_S
    kept(learn(more))
    assert kept.kept() == [living.network_id]


def test_one_network_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = given.claimed(A, network(1), commits=30)
    monkeypatch.setattr(room, "BYTES_MAX", greedy.size_bytes)
    kept = Kept()
    kept(learn(greedy))  # of a lesson what there is room for
    took = kept.core.history(greedy.network_id)
    assert took is not None
    assert 0.45 < took.size_bytes / greedy.size_bytes < 0.6
    with pytest.raises(RefusedError, match="room for logs is full"):
        kept(prepare_and_accept(kept, greedy, took.next_slot))
    for number in range(2, 6):
        modest = given.claimed(A, network(number))
        kept(learn(modest))
        assert modest.network_id in kept.kept()


def prepare_and_accept(kept: Kept, history: History, slot: int) -> Accept:
    kept(prepare(network(1), slot=slot))
    return accept(history.entries[slot - 1])


def test_what_is_remembered_of_logs_that_went_has_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "GONE_MAX", 1)
    kept = full(monkeypatch, closed(network(1)), closed(network(2)))
    kept.now = KEPT_S
    assert kept(prepare(network(3))).promised
    kept(accept(first_claim(network(3))))
    with pytest.raises(RefusedError, match="as many logs as it can"):
        kept(prepare(network(4)))
    assert len(kept.kept()) == 2


# --- who reads ----------------------------------------------------------------


def answers(
    reader: reading.LogReader, effects: Sequence[object], peers: dict[str, Kept]
) -> Sequence[object]:
    """Every question is answered at once; returns the rest."""
    queue, rest = list(effects), []
    while queue:
        effect = queue.pop(0)
        if not isinstance(effect, reading.Ask):
            rest.append(effect)
            continue
        event: reading.Event
        try:
            event = reading.Answered(effect.keeper, peers[effect.keeper](Read(effect.request)))
        except (KeyError, RemoteError) as error:
            event = reading.Missed(effect.keeper, str(error))
        queue += reader.handle(event, 0.0)
    return rest


def test_who_knows_the_manifest_alone_finds_the_present_keepers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest = network(1)
    shown = moved(manifest, shown=True)
    peers = {pair.peer_id: Kept(pair) for pair in (*KEEPERS, FOUR)}
    for peer in peers.values():
        peer(learn(shown))
    monkeypatch.setattr(room, "NETWORKS_MAX", 1)
    for pair in KEEPERS:
        peers[pair.peer_id].now = KEPT_S
        peers[pair.peer_id](prepare(network(2)))
        assert read(peers[pair.peer_id], shown.network_id).keepers
    history = History(shown.network_id)
    reader = reading.LogReader(history, first=given.keys_of(KEEPERS))
    rest = answers(reader, reader.handle(reading.Begin(), 0.0), peers)
    assert history.entries == shown.entries
    assert isinstance(rest[-1], reading.Done)


def test_a_log_that_is_gone_is_not_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {}
    for pair in KEEPERS:
        with monkeypatch.context() as patch:
            kept = Kept(pair)
            kept(learn(closed(network(1))))
            patch.setattr(room, "NETWORKS_MAX", 1)
            kept.now = KEPT_S
            kept(prepare(network(2)))
            peers[pair.peer_id] = kept
    history = History(given.network_of(network(1)))
    reader = reading.LogReader(history, first=given.keys_of(KEEPERS), rounds_max=1)
    [failed] = answers(reader, reader.handle(reading.Begin(), 0.0), peers)
    assert isinstance(failed, reading.Failed)
    assert "owner has ended it" in failed.reason


@pytest.mark.parametrize("liar", ["endless", "nonsense"])
def test_who_names_keepers_without_end_is_heard_to_an_end(liar: str) -> None:
    rng = random.Random(1)
    reader = reading.LogReader(
        History(given.network_of(network(1))), first=given.keys_of(KEEPERS), rounds_max=1
    )
    queue = list(reader.handle(reading.Begin(), 0.0))
    asked = 0
    while queue:
        effect = queue.pop(0)
        if not isinstance(effect, reading.Ask):
            continue
        asked += 1
        reader.check()
        named = sorted(KeyPair.from_seed(rng.randbytes(32)).peer_id for _ in range(9))
        reply = log_pb2.ReadLogReply(keepers=named if liar == "endless" else ["x"])
        queue += reader.handle(reading.Answered(effect.keeper, reply), 0.0)
    assert asked == (3 + reading.NAMED_MAX if liar == "endless" else 3)
