"""The core of a training run: every event in every state, and long random schedules."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import pytest

from p2pnet.client import feed as module
from p2pnet.client.events import (
    Batch,
    BatchGiven,
    CloseStream,
    Deliver,
    Effect,
    Event,
    FeedFailed,
    FeedStep,
    FindOrchestrator,
    Finished,
    GiveUp,
    NoMore,
    NotFound,
    OpenStream,
    OrchestratorFound,
    Pace,
    Recovery,
    Say,
    Send,
    Started,
    StreamEnded,
    StreamOpened,
    TellDecided,
    Told,
)
from p2pnet.client.feed import STALL_S, Feed
from p2pnet.client.link import (
    BEGIN_S,
    OPEN_S,
    ORCHESTRATOR_GONE_S,
    RETRY_MAX_S,
    RETRY_S,
    SAY_S,
    SILENT_S,
)
from p2pnet.client.results import RESULT_S
from p2pnet.core import Tick
from p2pnet.errors import RefusedError, RolledBackError, UnreachableError, UsageError
from p2pnet.v1 import common_pb2, pnode_pb2
from p2pnet.v1 import orchestrator_pb2 as pb

E = TypeVar("E")
A, B = "peer-a", "peer-b"
NETWORK = "0" * 32
ALONE = Pace(window=1, norms=0)  # a step at a time
AHEAD = Pace(window=3, norms=2)


def ready(
    epoch: int = 1, step: int = 0, live: int = 0, norms: Sequence[float] = ()
) -> pb.TrainEvent:
    place = pnode_pb2.Location(vnode="v", host=f"host-{epoch}", epoch=epoch)
    standby = pnode_pb2.Location(vnode="v", host="another", epoch=epoch, standby=True)
    return pb.TrainEvent(
        ready=pb.TrainReady(
            epoch=epoch,
            step=step,
            locations=[place, standby],
            graph=b"g",
            live_step=live,
            norms=norms,
        )
    )


def decided(step: int, epoch: int = 1) -> pb.TrainEvent:
    return pb.TrainEvent(
        decided=pb.StepDecided(
            epoch=epoch, step=step, loss=step / 8, correct=step, samples=4, norm=step / 2
        )
    )


def committed(step: int) -> pb.TrainEvent:
    return pb.TrainEvent(committed=pb.Committed(step=step))


def recovering(reason: str = "a host is gone") -> pb.TrainEvent:
    return pb.TrainEvent(recovering=pb.Recovering(reason=reason))


def uncommitted(step: int) -> pb.TrainEvent:
    return pb.TrainEvent(uncommitted=pb.Uncommitted(step=step, reason="no majority"))


def done(step: int) -> pb.TrainEvent:
    return pb.TrainEvent(done=pb.TrainDone(step=step))


def refused(code: int, host: str = "") -> pb.TrainEvent:
    name = common_pb2.RefusalCode.Name(code)
    return pb.TrainEvent(refused=common_pb2.Refusal(code=name, detail="no, because", host=host))


STALE = common_pb2.REFUSAL_CODE_STALE_EPOCH
UNKNOWN = common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK


class Run:
    """A feed in a test's hands: what goes in is checked, what comes out is kept."""

    def __init__(self, *events: Event | pb.TrainEvent) -> None:
        self.feed = Feed(NETWORK, "small")
        self.now = 100.0
        self.stream = 0
        self.seen: list[Effect] = []
        self.delivered: list[int] = []
        for event in events or (OrchestratorFound(A, 1),):
            self.take(event)

    def take(self, event: Event | pb.TrainEvent) -> list[Effect]:
        """Hands in an event; a `TrainEvent` comes on the newest stream."""
        if isinstance(event, pb.TrainEvent):
            event = Told(self.stream, event)
        effects = list(self.feed.handle(event, self.now))
        self.feed.check()
        deadline = self.feed.deadline()
        assert deadline is None or deadline > self.now, "it would tick for ever"
        for effect in effects:
            if isinstance(effect, OpenStream):
                assert effect.stream > self.stream
                self.stream = effect.stream
            elif isinstance(effect, Deliver):
                self.delivered.append(effect.result.step)
        self.seen += effects
        return effects

    def give(self, count: int = 1, size_bytes: int = 10) -> list[Effect]:
        effects = []
        for _ in range(count):
            effects += self.take(BatchGiven(Batch(None, size_bytes)))
        return effects

    def wait(self, seconds: float) -> list[Effect]:
        """Time goes on, tick by tick."""
        effects: list[Effect] = []
        until = self.now + seconds
        while (deadline := self.feed.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            effects += self.take(Tick())
        self.now = until
        return effects + self.take(Tick())


def of(kind: type[E], effects: Sequence[object]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def only(kind: type[E], effects: Sequence[object]) -> E:
    found = of(kind, effects)
    assert len(found) == 1, effects
    return found[0]


def commands(effects: Sequence[object]) -> list[str | None]:
    return [effect.command.WhichOneof("what") for effect in of(Send, effects)]


def training(steps: int = 3, batches: int = 5, pace: Pace = ALONE) -> Run:
    """A run of which so many steps are decided and none is committed."""
    run = Run(OrchestratorFound(A, 1), StreamOpened(1), ready(), pace)
    run.give(batches)
    for step in range(1, steps + 1):
        run.take(decided(step))
    return run


def test_it_begins_at_the_orchestrator_that_is_known() -> None:
    run = Run()
    assert only(OpenStream, run.seen).peer == A
    assert only(Send, run.seen).command.begin == pb.TrainBegin(network_id=NETWORK)
    run.take(StreamOpened(1))
    started = only(Started, run.take(ready(3, step=7)))
    assert started == Started(7, b"g")
    fed = only(FeedStep, run.give())
    assert (fed.epoch, fed.step, fed.locations) == (3, 8, {"v": "host-3"})


def test_one_step_is_out_at_a_time_and_results_come_in_order() -> None:
    run = Run(OrchestratorFound(A, 1), ready())
    assert [fed.step for fed in of(FeedStep, run.give(3))] == [1]
    effects = run.take(decided(1))
    assert only(Deliver, effects).result.loss == 1 / 8
    assert only(FeedStep, effects).step == 2
    assert not run.take(decided(1))  # said twice
    assert not run.take(decided(3))  # nobody has fed it
    assert not run.take(decided(2, epoch=2))  # of a claim that we have not heard of
    run.take(decided(2))
    run.take(decided(3))
    assert run.delivered == [1, 2, 3]


def fed(effects: Sequence[object]) -> list[int]:
    return [effect.step for effect in of(FeedStep, effects)]


def test_as_many_steps_are_out_as_the_network_wants() -> None:
    run = Run(OrchestratorFound(A, 1), ready(), AHEAD)
    assert fed(run.give(2)) == [1, 2]
    assert fed(run.give(3)) == [3]
    first = only(FeedStep, run.take(decided(1)))
    assert (first.step, first.decided_step, first.norms) == (4, 1, (0.5,))
    assert not run.take(decided(3))  # out of order
    second = only(FeedStep, run.take(decided(2)))
    assert (second.step, second.decided_step, second.norms) == (5, 2, (0.5, 1.0))
    assert fed(run.take(recovering())) == []
    assert fed(run.take(ready(2, step=1))) == [2, 3, 4]


def test_a_decision_rides_on_the_next_batch_or_goes_alone() -> None:
    run = training(0, batches=4, pace=AHEAD)
    effects = run.take(decided(1))
    assert fed(effects) == [4]
    assert not of(TellDecided, effects)
    told = only(TellDecided, run.take(decided(2)))
    assert (told.epoch, told.step, told.norms) == (1, 2, (0.5, 1.0))
    assert told.locations == {"v": "host-1"}
    assert only(TellDecided, run.take(decided(3))).norms == (1.0, 1.5)
    after = only(FeedStep, run.give())  # it says so again: it may overtake the other
    assert (after.step, after.decided_step, after.norms) == (5, 3, (1.0, 1.5))
    run = training(0, batches=1)
    assert only(TellDecided, run.take(decided(1))).norms == ()  # nothing is clipped


def test_nothing_is_told_that_hosts_begin_with() -> None:
    run = training(3, batches=3, pace=AHEAD)
    run.take(committed(3))
    run.take(recovering())
    assert not of(TellDecided, run.take(ready(2, step=3, norms=[1.0, 1.5])))
    fed_next = only(FeedStep, run.give())
    assert (fed_next.step, fed_next.decided_step, fed_next.norms) == (4, 3, (1.0, 1.5))


def test_a_wider_window_is_used_at_once() -> None:
    run = training(0, batches=4)
    assert fed(run.take(AHEAD)) == [2, 3]


def test_it_goes_on_from_a_step_that_is_decided_and_still_there() -> None:
    run = training(4, batches=6, pace=AHEAD)
    run.take(committed(2))
    run.take(recovering())
    effects = run.take(ready(2, step=2, live=4, norms=[1.5, 2.0]))
    assert fed(effects) == [5, 6]
    assert of(FeedStep, effects)[0].norms == (1.5, 2.0)
    run.take(decided(5, epoch=2))
    run.take(recovering())
    assert fed(run.take(ready(3, step=2))) == [3, 4, 5]  # no commit has covered these
    for step in range(3, 7):
        run.take(decided(step, epoch=3))
    assert run.delivered == [1, 2, 3, 4, 5, 6]


def test_a_run_that_begins_on_a_step_that_is_not_committed_cannot_go_back_behind_it() -> None:
    run = Run(OrchestratorFound(A, 1), ready(1, step=2, live=4))
    assert only(Started, run.seen).step == 4
    assert fed(run.give()) == [5]
    run.take(recovering())
    error = only(GiveUp, run.take(ready(2, step=2))).error
    assert isinstance(error, RolledBackError)
    assert error.step == 3


@pytest.mark.parametrize("told", [True, False])
def test_several_steps_that_were_decided_unheard(told: bool) -> None:
    run = training(1, batches=5, pace=AHEAD)
    run.take(recovering())
    assert fed(run.take(ready(2, step=0, live=4))) == [5]
    if told:
        results = of(Deliver, run.take(decided(3, epoch=2)))
        assert [(it.result.step, it.result.known) for it in results] == [(2, False), (3, True)]
        assert only(Deliver, run.take(decided(4, epoch=2))).result.known
        assert not of(Deliver, run.wait(RESULT_S))
    else:
        results = of(Deliver, run.wait(RESULT_S))
        assert [it.result.step for it in results] == [2, 3, 4]
        assert not any(it.result.known for it in results)
    run.take(decided(5, epoch=2))
    assert run.delivered == [1, 2, 3, 4, 5]


def test_after_a_recovery_what_no_commit_covers_is_fed_again_and_counts_once() -> None:
    run = training(4)
    run.take(committed(2))
    assert only(Recovery, run.take(recovering())).reason == "a host is gone"
    assert not run.take(decided(5))  # late
    assert only(FeedStep, run.take(ready(2, step=2))).step == 3
    for step in (3, 4, 5):
        run.take(decided(step, epoch=2))
    assert run.delivered == [1, 2, 3, 4, 5]


def test_a_commit_covers_no_step_that_we_have_not_heard_of() -> None:
    run = training(3)
    run.take(committed(5))
    run.take(recovering())
    assert only(FeedStep, run.take(ready(2, step=3))).step == 4


@pytest.mark.parametrize("told", [True, False])
def test_a_step_that_was_committed_unheard(told: bool) -> None:
    run = training(3)
    run.take(StreamEnded(1, "the connection was lost"))
    run.wait(RETRY_S)
    run.take(OrchestratorFound(B, 2))
    assert only(FeedStep, run.take(ready(2, step=4))).step == 5
    assert run.delivered == [1, 2, 3]
    if told:
        assert only(Deliver, run.take(decided(4, epoch=2))).result.known
    else:
        lost = only(Deliver, run.wait(RESULT_S)).result
        assert not lost.known
        assert math.isnan(lost.loss)
        assert lost.samples == 0
        assert not run.take(decided(4, epoch=2))
    run.take(decided(5, epoch=2))
    assert run.delivered == [1, 2, 3, 4, 5]


def test_an_unheard_result_is_given_before_the_next_and_before_the_end() -> None:
    run = training(3, batches=5)
    run.take(recovering())
    run.take(ready(2, step=4))
    first, second = of(Deliver, run.take(decided(5, epoch=2)))
    assert (first.result.step, first.result.known) == (4, False)
    assert (second.result.step, second.result.known) == (5, True)
    run = training(3, batches=4)
    run.take(recovering())
    run.take(NoMore())
    run.take(ready(2, step=4))
    effects = run.take(done(4))
    assert not only(Deliver, effects).result.known
    assert only(Finished, effects).done.step == 4


def test_the_end_is_said_on_every_stream_until_it_is_done() -> None:
    run = training(3, batches=3)
    assert commands(run.take(NoMore())) == ["end"]
    assert not run.take(NoMore())
    assert not run.take(done(2))  # of another run
    run.take(StreamEnded(1, "lost"))
    run.wait(RETRY_S)
    assert commands(run.take(OrchestratorFound(B, 2))) == ["begin", "end"]
    assert only(FeedStep, run.take(ready(2, step=2))).step == 3
    run.take(decided(3, epoch=2))
    assert only(Finished, run.take(done(3)))
    assert run.feed.over
    assert run.feed.deadline() is None
    assert not run.take(ready(3, step=0))
    assert run.delivered == [1, 2, 3]


def test_nothing_heard_is_complained_of_every_so_often() -> None:
    run = training(1)
    effects = run.wait(STALL_S)
    failed = only(Send, effects).command.failed
    assert (failed.step, failed.host, failed.reason) == (
        2,
        "",
        f"nothing was decided for {STALL_S:g} s",
    )
    assert not run.wait(STALL_S)
    assert commands(run.wait(STALL_S)) == ["failed"]
    run.take(decided(2))
    run.take(committed(2))
    assert commands(run.wait(STALL_S)) == ["failed"]


def test_a_host_that_cannot_be_fed_is_told_on_once_and_for_this_step_only() -> None:
    run = training(1)
    assert not run.take(FeedFailed(1, 1, "h", "late"))
    assert not run.take(FeedFailed(1, 3, "h", "not out yet"))
    assert not run.take(FeedFailed(2, 2, "h", "of no epoch of ours"))
    failed = only(Send, run.take(FeedFailed(1, 2, "h", "gone"))).command.failed
    assert (failed.epoch, failed.step, failed.host, failed.reason) == (1, 2, "h", "gone")


def test_a_host_that_knows_a_newer_epoch_makes_us_look_but_is_not_believed() -> None:
    run = training(1)
    effects = run.take(FeedFailed(1, 2, "h", "stale", newer_epoch=10**9))
    assert only(FindOrchestrator, effects)
    assert not of(FindOrchestrator, run.take(FeedFailed(1, 2, "h", "stale", newer_epoch=10**9)))
    assert not run.take(OrchestratorFound(A, 1))  # as before: it recovers by itself
    run.now += RETRY_MAX_S
    run.take(FeedFailed(1, 2, "h", "stale", newer_epoch=10**9))
    effects = run.take(OrchestratorFound(B, 2))
    assert only(CloseStream, effects).stream == 1
    assert only(OpenStream, effects).peer == B
    assert not run.take(Told(1, decided(2)))  # of the stream that is closed
    assert only(FeedStep, run.take(ready(2, step=0))).step == 1


@pytest.mark.parametrize("how", ["ended", "refused", "not let in"])
def test_a_lost_orchestrator_is_looked_for_until_there_is_one(how: str) -> None:
    run = training(2)
    if how == "ended":
        run.take(StreamEnded(1, "reset"))
    elif how == "refused":
        run.take(refused(UNKNOWN))
    else:
        run.take(StreamEnded(1, "reset"))
        run.wait(RETRY_S)
        run.take(OrchestratorFound(A, 1))
        assert only(CloseStream, run.wait(OPEN_S)).stream == 2
    assert only(FindOrchestrator, run.wait(RETRY_MAX_S))
    assert not of(FindOrchestrator, run.wait(60))  # one at a time
    run.take(NotFound("nobody knows it"))
    only(FindOrchestrator, run.wait(RETRY_MAX_S))
    assert only(OpenStream, run.take(OrchestratorFound(B, 2))).peer == B
    run.take(StreamOpened(run.stream))
    effects = run.take(ready(2, step=1))
    assert only(FeedStep, effects).step == 2
    assert only(Recovery, effects).reason
    assert only(Say, effects).text.endswith("going on")


def test_it_does_not_go_back_to_an_older_epoch() -> None:
    run = Run(OrchestratorFound(B, 5), ready(5), StreamEnded(1, "reset"))
    run.wait(RETRY_S)
    assert not of(OpenStream, run.take(OrchestratorFound(A, 4)))
    only(FindOrchestrator, run.wait(RETRY_MAX_S))
    # The record of the peer that we have been with may lag behind.
    assert only(OpenStream, run.take(OrchestratorFound(B, 4))).peer == B
    assert only(CloseStream, run.take(ready(4))).stream == 2
    run.wait(RETRY_MAX_S)
    run.take(OrchestratorFound(A, 6))
    assert not of(CloseStream, run.take(ready(6)))


def test_an_orchestrator_that_has_lost_the_network_is_left_for_good() -> None:
    run = training(2)
    assert not of(OpenStream, run.take(refused(STALE)))
    only(FindOrchestrator, run.wait(RETRY_S))
    assert not of(OpenStream, run.take(OrchestratorFound(A, 1)))
    run.wait(RETRY_MAX_S)
    assert only(OpenStream, run.take(OrchestratorFound(A, 2))).peer == A  # it has claimed anew


@pytest.mark.parametrize("code", [STALE, UNKNOWN])
def test_it_goes_where_the_former_orchestrator_says_but_not_in_circles(code: int) -> None:
    run = training(2)
    assert only(OpenStream, run.take(refused(code, host=B))).peer == B
    assert not of(OpenStream, run.take(refused(UNKNOWN, host=A)))
    only(FindOrchestrator, run.wait(RETRY_MAX_S))
    run.take(OrchestratorFound(B, 2))  # found is another thing than hinted at
    assert only(OpenStream, run.take(refused(UNKNOWN, host=A))).peer == A


def test_on_a_silent_stream_it_looks_whether_there_is_another() -> None:
    run = training(2)
    run.take(recovering())
    only(FindOrchestrator, run.wait(SILENT_S))
    assert not run.take(NotFound("the DHT does not answer"))
    only(FindOrchestrator, run.wait(SILENT_S))
    assert not run.take(OrchestratorFound(A, 1))
    assert not run.feed.over
    only(FindOrchestrator, run.wait(SILENT_S))
    assert only(OpenStream, run.take(OrchestratorFound(B, 2))).peer == B
    # One that nothing is asked of may be silent.
    run.take(ready(2, step=2))
    for step in (3, 4, 5):
        run.take(decided(step, epoch=2))
    assert not run.wait(10 * SILENT_S)


def test_without_an_orchestrator_it_says_so_and_gives_up_in_the_end() -> None:
    run = training(2)
    run.take(StreamEnded(1, "reset"))
    said = []
    gone: list[GiveUp] = []
    while not gone:
        effects = run.wait(1)
        said += [effect.text for effect in of(Say, effects)]
        gone = of(GiveUp, effects)
        if of(FindOrchestrator, effects):
            run.take(NotFound("nobody knows it"))
    assert run.now == pytest.approx(100 + ORCHESTRATOR_GONE_S, abs=1.5)
    assert isinstance(gone[0].error, UnreachableError)
    assert "the orchestrator of small is gone" in str(gone[0].error)
    assert len(said) == 1
    assert f"for up to {ORCHESTRATOR_GONE_S:g} s" in said[0]


def test_one_that_lets_us_in_and_says_nothing_is_no_orchestrator() -> None:
    run = Run(OrchestratorFound(A, 1), StreamOpened(1))
    while not run.feed.over:
        if of(FindOrchestrator, run.wait(1)):
            run.take(OrchestratorFound(A, 1))
    assert run.now == pytest.approx(100 + BEGIN_S, abs=1.5)
    # One that says what it waits for is waited for.
    run = Run(OrchestratorFound(A, 1), StreamOpened(1), recovering("too few hosts"))
    for _ in range(30):
        if of(FindOrchestrator, run.wait(ORCHESTRATOR_GONE_S / 10)):
            run.take(OrchestratorFound(A, 1))
    assert not run.feed.over


ENDS: dict[int, type[Exception]] = {
    common_pb2.REFUSAL_CODE_BAD_REQUEST: UsageError,
    common_pb2.REFUSAL_CODE_CLOSED: UsageError,
    common_pb2.REFUSAL_CODE_BUSY: RefusedError,
    common_pb2.REFUSAL_CODE_FAILED: RefusedError,
}


@pytest.mark.parametrize("code", ENDS)
def test_what_every_orchestrator_would_say_ends_the_run(code: int) -> None:
    effects = training(1).take(refused(code))
    error = only(GiveUp, effects).error
    assert isinstance(error, ENDS[code])
    assert "no, because" in str(error)
    assert only(CloseStream, effects)


def test_a_network_that_went_back_behind_a_commit() -> None:
    run = training(4)
    run.take(committed(3))
    run.take(recovering())
    error = only(GiveUp, run.take(ready(2, step=2))).error
    assert isinstance(error, RolledBackError)
    assert error.step == 3
    assert "went back to step 2: feed it again from batch 3" in str(error)


def test_a_network_that_somebody_else_has_trained_meanwhile() -> None:
    run = training(2)
    run.take(StreamEnded(1, "reset"))
    run.wait(RETRY_S)
    run.take(OrchestratorFound(B, 2))
    error = only(GiveUp, run.take(ready(2, step=9))).error
    assert "somebody else has trained small" in str(error)


def test_uncommitted_steps_are_said_once_and_their_end() -> None:
    run = training(3)
    said = only(Say, run.take(uncommitted(0))).text
    assert said.startswith("the network's log cannot be written: steps since 0 would be lost")
    assert not run.take(uncommitted(0))
    assert "can be written again" in only(Say, run.take(committed(3))).text
    assert only(Say, run.take(uncommitted(3)))


def test_recoveries_that_lead_nowhere_are_worth_a_word() -> None:
    run = training(1)
    said = []
    for epoch in range(2, 7):
        said.append(len(of(Say, run.take(recovering()))))
        run.take(ready(epoch))
    assert said == [0, 0, 0, 1, 1]
    assert all("no further" in effect.text for effect in of(Say, run.seen))
    run.take(decided(1, epoch=6))
    run.take(committed(1))
    assert not of(Say, run.take(recovering()))


@pytest.mark.parametrize("what", ["steps", "bytes"])
def test_what_is_held_is_bounded(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(module, "HELD_STEPS_MAX", 4 if what == "steps" else 100)
    monkeypatch.setattr(module, "HELD_BYTES_MAX", 1000 if what == "steps" else 40)
    run = training(0, batches=3)
    was_full = run.feed.full
    run.give()
    assert (was_full, run.feed.full) == (False, True)
    for step in (1, 2, 3):
        assert "end" not in commands(run.take(decided(step)))
    only_end = run.take(decided(4))
    assert commands(only_end) == ["end"]  # else no cut may ever be due
    assert "no more batches are fed" in only(Say, run.wait(SAY_S)).text
    effects = run.take(done(4))
    assert not of(Finished, effects)
    assert only(OpenStream, effects).peer == A
    assert not run.feed.full
    run.take(ready(1, step=4))
    assert only(FeedStep, run.give()).step == 5
    run.take(decided(5))
    run.take(NoMore())
    assert only(Finished, run.take(done(5)))


def test_a_commit_in_time_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_STEPS_MAX", 4)
    run = training(2, batches=4)
    run.take(committed(2))
    assert not run.feed.full
    run.give()
    for step in (3, 4, 5):
        assert not of(Send, run.take(decided(step)))


def states() -> dict[str, Run]:
    """A run in each state that there is."""
    lost = training(2)
    lost.take(StreamEnded(1, "reset"))
    looking = training(2)
    looking.take(StreamEnded(1, "reset"))
    looking.wait(RETRY_S)
    ending = training(2, batches=2)
    ending.take(NoMore())
    recovers = training(2)
    recovers.take(recovering())
    unheard = training(2)
    unheard.take(recovering())
    unheard.take(ready(2, step=3))
    ahead = training(2, pace=AHEAD)
    behind = training(1, pace=AHEAD)
    behind.take(recovering())
    behind.take(ready(2, live=3))
    finished = training(2, batches=2)
    finished.take(NoMore())
    finished.take(done(2))
    return {
        "opening": Run(),
        "opened": Run(OrchestratorFound(A, 1), StreamOpened(1)),
        "idle": Run(OrchestratorFound(A, 1), ready()),
        "training": training(2),
        "lost": lost,
        "looking": looking,
        "ending": ending,
        "recovers": recovers,
        "unheard": unheard,
        "ahead": ahead,
        "behind": behind,
        "finished": finished,
    }


EVENTS: dict[str, Event | pb.TrainEvent] = {
    "found": OrchestratorFound(B, 7),
    "found old": OrchestratorFound(B, 0),
    "not found": NotFound("no"),
    "opened": StreamOpened(1),
    "opened another": StreamOpened(9),
    "ready": ready(1, step=1),
    "ready later": ready(4, step=2),
    "ready beyond": ready(4, step=99),
    "ready alive": ready(4, step=1, live=2),
    "ready alive beyond": ready(4, step=1, live=99),
    "pace": Pace(2, 1),
    "decided": decided(3),
    "decided old": decided(1),
    "decided beyond": decided(99),
    "committed": committed(2),
    "committed beyond": committed(99),
    "recovering": recovering(),
    "uncommitted": uncommitted(1),
    "done": done(2),
    "nothing": pb.TrainEvent(),
    "stale": refused(STALE, host=B),
    "closed": refused(common_pb2.REFUSAL_CODE_CLOSED),
    "unspecified": refused(common_pb2.REFUSAL_CODE_UNSPECIFIED),
    "ended": StreamEnded(1, "reset"),
    "failed": FeedFailed(1, 3, "h", "gone", newer_epoch=9),
    "tick": Tick(),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", list(states()))
def test_no_event_breaks_any_state(state: str, event: str) -> None:
    run = states()[state]
    run.take(EVENTS[event])
    run.take(EVENTS[event])  # `take` checks the invariants
    assert run.delivered == list(range(1, len(run.delivered) + 1))


class World:
    """A network, its orchestrators and all that may go wrong between them and the feed.

    Only one orchestrator's claim is the newest; those before go on for a while, as in life,
    but what they commit does not count.
    """

    def __init__(self, seed: int, steps: int) -> None:
        self.rng = random.Random(seed)
        self.run = Run(OrchestratorFound(A, 1))
        self.steps = steps
        self.given = 0
        self.epoch = 1
        self.peer = A
        self.at = 0  # decided under the present claim
        self.committed = 0
        self.window = 1 + seed % 4
        self.fed: tuple[int, int] | None = None
        self.told = 0  # what hosts have heard of decisions in this epoch
        self.end: int | None = None
        self.known = (A, 1)
        self.streams: dict[int, str] = {}
        self.begun = 0  # the stream that the present orchestrator serves
        self.commands: list[tuple[int, pb.TrainCommand]] = []
        self.finding = False
        self.started = False
        self.unknown = 0
        self.do(self.run.seen)

    def do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case OpenStream():
                    self.streams[effect.stream] = effect.peer
                case CloseStream():
                    self.streams.pop(effect.stream, None)
                case Send():
                    assert effect.stream == max(self.streams, default=0)
                    self.commands.append((effect.stream, effect.command))
                case FeedStep():
                    if effect.epoch == self.epoch:
                        assert self.at < effect.step <= effect.decided_step + self.window
                        assert self.fed is None or self.fed < (effect.epoch, effect.step)
                        assert self.told <= effect.decided_step <= self.at
                        self.told = effect.decided_step
                    self.fed = (effect.epoch, effect.step)
                case TellDecided():
                    if effect.epoch == self.epoch:
                        assert self.told < effect.step <= self.at
                        self.told = effect.step
                case FindOrchestrator():
                    assert not self.finding
                    self.finding = True
                case Started():
                    self.started = True
                    self.do(self.run.take(Pace(self.window, 0)))
                case Deliver():
                    if not effect.result.known:
                        self.unknown += 1

    def tell(self, event: pb.TrainEvent) -> None:
        if self.begun in self.streams:
            self.do(self.run.take(Told(self.begun, event)))

    def is_over(self) -> bool:
        return self.run.feed.over

    def claim(self, peer: str) -> None:
        """Another orchestrator, or the same one, places the network anew."""
        self.epoch += 1
        if peer != self.peer:
            if self.begun in self.streams and self.rng.random() < 0.7:
                stream, self.begun = self.begun, 0
                self.do(self.run.take(StreamEnded(stream, "reset")))
            self.peer, self.begun, self.end = peer, 0, None
            self.at = self.committed
        elif self.begun:
            self.tell(recovering())
            live = self.rng.random() < 0.5
            self.at = self.at if live else self.committed
            self.resume(live)
        else:
            self.at = self.committed

    def resume(self, live: bool = False) -> None:
        """All VNodes still have the step that it is `at`, or it goes on from the commit."""
        if not live:
            self.at = self.committed
        self.told = self.at
        self.tell(ready(self.epoch, self.committed, self.at if live else 0))
        if self.committed and self.rng.random() < 0.5:
            self.tell(decided(self.committed, self.epoch))

    def serve(self) -> None:
        """The newest command reaches whom it is for."""
        if not self.commands:
            return
        stream, command = self.commands.pop(0)
        peer = self.streams.get(stream)
        if peer is None:
            return
        if peer != self.peer:
            if command.HasField("begin"):
                self.do(self.run.take(Told(stream, refused(UNKNOWN))))
        elif command.HasField("begin"):
            self.begun, self.end = stream, None
            self.do(self.run.take(StreamOpened(stream)))
            if self.fed is not None and self.fed[0] == self.epoch:
                self.epoch += 1  # half a step may be under way
            self.resume()
        elif command.HasField("end") and stream == self.begun:
            self.end = command.end.last_step
        elif command.HasField("failed") and command.failed.epoch == self.epoch:
            self.claim(self.peer)

    def step(self) -> None:
        is_out = self.fed is not None and (self.epoch, self.at + 1) <= self.fed
        if is_out and self.told >= self.at + 1 - max(1, self.window - 1):
            self.at += 1
            self.tell(decided(self.at, self.epoch))

    def commit(self) -> None:
        if self.at > self.committed:
            self.committed = self.at
            self.tell(committed(self.at))
        if self.end is not None and self.end == self.at and self.begun:
            self.tell(done(self.at))
            stream, self.begun = self.begun, 0
            if stream in self.streams:
                self.do(self.run.take(StreamEnded(stream, "over")))

    def turn(self, calm: bool) -> None:
        """One thing happens; in calm weather nothing that is bad."""
        rng = self.rng
        welcome = self.started and not self.run.feed.full
        if welcome and self.given < self.steps and rng.random() < 0.3:
            self.given += 1
            self.do(self.run.give())
            if self.given == self.steps:
                self.do(self.run.take(NoMore()))
        if self.finding and rng.random() < 0.5:
            self.finding = False
            if not calm and rng.random() < 0.4:
                old = OrchestratorFound(*self.known)
                answer: Event = old if rng.random() < 0.5 else NotFound("no")
            else:
                self.known = (self.peer, self.epoch)
                answer = OrchestratorFound(*self.known)
            self.do(self.run.take(answer))
        self.serve()
        if rng.random() < 0.7:
            self.step()
        if rng.random() < 0.2 or calm:
            self.commit()
        self.do(self.run.wait(rng.choice([0.0, 0.1, 1.0, 30.0])))
        if calm:
            return
        if rng.random() < 0.05:
            self.claim(rng.choice([A, B, "peer-c"]))
        if rng.random() < 0.05 and self.begun in self.streams:
            stream, self.begun = self.begun, 0
            self.do(self.run.take(StreamEnded(stream, "reset")))
        if rng.random() < 0.1 and self.fed is not None:
            self.do(self.run.take(FeedFailed(*self.fed, "h", "gone", rng.choice([0, 9]))))


def play(seed: int) -> World:
    """A whole run in weather that gets calm after a while."""
    world = World(seed, steps=40)
    turns = 0
    while not world.is_over():
        turns += 1
        assert turns < 5000, "the run does not come to an end"
        world.turn(calm=turns > 600)
    return world


@pytest.mark.parametrize("seed", range(120))
def test_whatever_happens_every_step_counts_once_and_in_order(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(module, "HELD_STEPS_MAX", 3 + seed % 7)
    world = play(seed)
    assert of(Finished, world.run.seen), of(GiveUp, world.run.seen)
    assert world.run.delivered == list(range(1, 41))
    assert world.committed == 40


def test_the_schedules_meet_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_STEPS_MAX", 3)
    worlds = [play(seed) for seed in range(20)]
    seen = [effect for world in worlds for effect in world.run.seen]
    fed = [effect.step for effect in of(FeedStep, seen)]
    assert len(fed) > 1.2 * 20 * 40  # much is done again
    assert sum(world.unknown for world in worlds) >= 3
    assert len(of(CloseStream, seen)) > 50
    assert len(of(OpenStream, seen)) > 200
    assert len([it for it in commands(seen) if it == "end"]) > 3 * 20  # runs that pause
    assert len(of(Recovery, seen)) > 100
