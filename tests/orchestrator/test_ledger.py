"""The step ledger: decisions, cuts, and what is late, doubled or lost."""

from __future__ import annotations

import random

import pytest

from p2pnet.core import Tick
from p2pnet.orchestrator.ledger import (
    STALL_S,
    Cut,
    CutWanted,
    Decide,
    Effect,
    EndOfData,
    Event,
    Finished,
    NotFinite,
    Reported,
    Saved,
    Stalled,
    StepLedger,
    Unsaved,
)

VNODES = ("fc1", "out", "loss")


def ledger(cut_every: int = 2, epoch: int = 3, step: int = 4) -> StepLedger:
    return StepLedger(vnodes=VNODES, loss="loss", epoch=epoch, step=step, cut_every=cut_every)


def feed(core: StepLedger, *events: Event, now: float = 0.0) -> list[Effect]:
    effects: list[Effect] = []
    for event in events:
        effects += core.handle(event, now)
        core.check()
    return effects


def held(step: int, epoch: int = 3, loss: float = 0.5) -> list[Event]:
    return [
        Reported((v,), epoch, step, loss=loss if v == "loss" else 0.0, samples=8) for v in VNODES
    ]


def test_a_step_is_decided_when_the_last_vnode_reports() -> None:
    core = ledger()
    reports = held(5)
    assert feed(core, *reports[:2]) == []
    assert feed(core, reports[2]) == [Decide(5, 0.5, 0, 8)]


def test_a_cut_is_due_after_cut_every_steps_and_holds_back_the_next_decision() -> None:
    core = ledger(cut_every=2)
    feed(core, *held(5))
    assert feed(core, *held(6)) == [Decide(6, 0.5, 0, 8), Cut(Decide(6, 0.5, 0, 8))]
    assert feed(core, *held(7)) == []  # computed, but state 6 is not stored yet
    assert feed(core, Saved(6)) == [Decide(7, 0.5, 0, 8)]
    assert core.saved == 6


def test_late_doubled_and_foreign_reports_change_nothing() -> None:
    core = ledger()
    first = held(5)[0]
    stale = [Reported(("fc1",), 2, 5), Reported(("fc1",), 3, 4), Reported(("fc1",), 3, 7)]
    foreign = [Reported(("who",), 3, 5), Reported(("out", "who"), 3, 5), Reported((), 3, 5)]
    assert feed(core, first, first, *stale, *foreign, Saved(9)) == []
    assert feed(core, *held(5)[1:]) == [Decide(5, 0.5, 0, 8)]


def test_the_end_of_data_saves_what_is_decided_once() -> None:
    core = ledger(cut_every=100)
    feed(core, *held(5))
    assert feed(core, EndOfData(5)) == [Cut(Decide(5, 0.5, 0, 8))]
    assert feed(core, Saved(5)) == [Finished(5)]
    assert feed(core, EndOfData(5), Saved(5)) == []


def test_the_end_of_data_waits_for_steps_that_are_still_to_be_done_again() -> None:
    core = ledger(cut_every=100)
    assert feed(core, EndOfData(6)) == []
    assert feed(core, *held(5)) == [Decide(5, 0.5, 0, 8)]
    assert feed(core, *held(6)) == [Decide(6, 0.5, 0, 8), Cut(Decide(6, 0.5, 0, 8))]
    assert feed(core, Saved(6)) == [Finished(6)]


def test_the_end_of_data_at_a_cut_is_finished_at_once() -> None:
    assert feed(ledger(), EndOfData(4)) == [Finished(4)]


def test_a_stall_names_who_is_missing_and_is_not_cried_twice() -> None:
    core = ledger()
    feed(core, held(5)[0], now=1.0)
    assert core.deadline() == 1.0 + STALL_S
    assert feed(core, Tick(), now=5.0) == []
    assert feed(core, Tick(), now=1.0 + STALL_S) == [Stalled(5, ("out", "loss"))]
    assert feed(core, Tick(), now=2.0 + STALL_S) == []


def test_a_cut_that_is_wanted_is_made_as_soon_as_there_is_something_to_store() -> None:
    core = ledger(cut_every=100)
    assert feed(core, CutWanted()) == []
    assert feed(core, *held(5)) == [Decide(5, 0.5, 0, 8), Cut(Decide(5, 0.5, 0, 8))]
    feed(core, Saved(5))
    assert feed(core, *held(6)) == [Decide(6, 0.5, 0, 8)]  # wanted once, made once
    assert feed(core, CutWanted()) == [Cut(Decide(6, 0.5, 0, 8))]


def test_nothing_is_decided_after_the_last_cut() -> None:
    core = ledger(cut_every=100)
    feed(core, *held(5))
    assert feed(core, CutWanted(last=True)) == [Cut(Decide(5, 0.5, 0, 8))]
    assert feed(core, *held(6), Saved(5)) == []
    assert core.decided == 5
    assert feed(core, Tick(), now=10 * STALL_S) == []  # and nobody is to blame


@pytest.mark.parametrize("seed", range(20))
def test_any_order_with_duplicates_decides_each_step_once_in_order(seed: int) -> None:
    rng = random.Random(seed)
    core = ledger(cut_every=3, step=0)
    decided: list[int] = []
    step = 0
    waiting: list[Event] = []
    while len(decided) < 12:
        if not waiting:
            step += 1
            waiting = held(step) * 2
            rng.shuffle(waiting)
        for effect in feed(core, waiting.pop()):
            if isinstance(effect, Decide):
                decided.append(effect.step)
            elif isinstance(effect, Cut):
                feed(core, Saved(effect.step))
    assert decided == list(range(1, 13))


# Several steps at a time, and whole hosts


def whole(step: int, squares: tuple[float, ...] = ()) -> Reported:
    """One host has all."""
    return Reported(VNODES, 3, step, loss=0.5, samples=8, squares=squares)


def test_a_hosts_report_counts_for_all_of_its_vnodes_or_for_none() -> None:
    core = ledger()
    assert feed(core, Reported(("fc1", "out"), 3, 5)) == []
    assert feed(core, Reported(("out", "loss"), 3, 5)) == []  # one of them is reported already
    assert feed(core, Reported(("loss",), 3, 5, loss=0.5, samples=8)) == [Decide(5, 0.5, 0, 8)]


def test_steps_are_decided_in_order_however_they_are_reported() -> None:
    core = StepLedger(VNODES, "loss", 3, 4, cut_every=100, window=3)
    assert feed(core, whole(6), whole(7), whole(8)) == []  # 8 is outside of the window
    decided = feed(core, whole(5))
    assert [effect.step for effect in decided if isinstance(effect, Decide)] == [5, 6, 7]
    assert feed(core, whole(6), whole(8)) == [Decide(8, 0.5, 0, 8)]


def test_the_norm_is_of_all_gradients_and_does_not_depend_on_the_order_of_reports() -> None:
    squares = {"fc1": (1e16, 1.0), "out": (1.0,), "loss": (1.0, 1.0)}
    found = []
    for order in (VNODES, VNODES[::-1]):
        core = StepLedger(VNODES, "loss", 3, 4, 100, clips=True, norms_kept=2)
        reports = [Reported((v,), 3, 5, squares=squares[v]) for v in order]
        [decided] = feed(core, *reports)
        assert isinstance(decided, Decide)
        found.append(decided.norm)
    assert found == [(1e16 + 4) ** 0.5] * 2
    assert core.norms == (found[0],)
    feed(core, whole(6, (4.0,)), whole(7, (9.0,)))
    assert core.norms == (2.0, 3.0)  # the newest last, and no more than are of use


@pytest.mark.parametrize("square", ["inf", "nan", "-1", "1e308"])
def test_gradients_without_a_finite_norm_never_count(square: str) -> None:
    core = StepLedger(VNODES, "loss", 3, 4, 100, window=3, clips=True)
    assert feed(core, whole(6, (1.0,)), whole(5, (float(square),) * 3)) == [NotFinite(5)]
    assert core.decided == 4
    assert core.norms == ()
    assert feed(core, whole(5, (1.0,)), whole(6, (1.0,))) == []  # nor does what comes after


def test_the_end_of_data_is_not_reached_by_a_cut_that_fails() -> None:
    core = ledger(cut_every=2)
    feed(core, *held(5), *held(6))
    assert feed(core, Unsaved(6)) == []
    decided = [e.step for e in feed(core, *held(7), *held(8)) if isinstance(e, Decide)]
    assert decided == [7, 8]  # steps go on, without a cut till one is asked for
    assert feed(core, EndOfData(8)) == []
    assert feed(core, CutWanted()) == [Cut(Decide(8, 0.5, 0, 8))]
    assert feed(core, Saved(8)) == [Finished(8)]


def test_going_on_from_a_decided_step_cuts_it_first() -> None:
    last = Decide(7, 0.5, 0, 8, 2.0)
    core = StepLedger(VNODES, "loss", 3, 4, 100, clips=True, last=last, norms=(2.0,))
    assert core.decided == 7
    assert feed(core, CutWanted()) == [Cut(last)]
    feed(core, Saved(7))
    assert core.saved == 7
    assert feed(core, whole(7), whole(8, (9.0,))) == [Decide(8, 0.5, 0, 8, 3.0)]


# Networks that do not wait for decisions


class Vnode:
    """A `local` VNode that runs ahead as far as it may, and keeps its last two snapshots."""

    def __init__(self, cut_every: int, window: int) -> None:
        self.cut_every, self.window = cut_every, window
        self.step = 0
        self.snapshots: list[int] = []

    def run(self, decided: int) -> None:
        while self.step < decided + self.window:
            self.step += 1
            if self.step % self.cut_every == 0:
                self.snapshots = [*self.snapshots, self.step][-2:]


@pytest.mark.parametrize("cut_every", [1, 2, 5, 32, 100])
@pytest.mark.parametrize("lag", [0, 3, 40])
def test_no_local_vnode_drops_the_state_that_is_being_stored(cut_every: int, lag: int) -> None:
    window = min(32, cut_every)
    core = StepLedger(VNODES, "loss", 3, 0, cut_every, window=window, local=True)
    vnode = Vnode(cut_every, window)
    storing: list[tuple[int, int]] = []  # (until which round, step)
    reported = 0
    cuts = []
    for now in range(600):
        vnode.run(core.decided)  # the fastest, which knows of every decision at once
        effects: list[Effect] = []
        if reported < min(vnode.step, core.decided + window):
            reported += 1
            effects += feed(core, whole(reported))
        for due in [due for due in storing if due[0] <= now]:
            storing.remove(due)
            assert due[1] in vnode.snapshots
            effects += feed(core, Saved(due[1]))
        for effect in effects:
            if isinstance(effect, Cut):
                assert effect.step % cut_every == 0
                cuts.append(effect.step)
                storing.append((now + lag, effect.step))
    assert cuts[:2] == [cut_every, 2 * cut_every]
    assert core.decided > 8


def test_a_local_cut_that_is_wanted_waits_for_a_step_that_is_kept() -> None:
    core = StepLedger(VNODES, "loss", 3, 0, 3, window=3, local=True)
    feed(core, whole(1))
    assert feed(core, CutWanted(last=True)) == []
    decided = feed(core, whole(2), whole(3), whole(4))
    assert [effect.step for effect in decided] == [2, 3, 3]
    assert isinstance(decided[-1], Cut)
    assert feed(core, Saved(3)) == []  # step 4 is not decided any more


def test_a_local_networks_last_step_is_kept_wherever_it_is() -> None:
    core = StepLedger(VNODES, "loss", 3, 0, 3, window=3, local=True)
    feed(core, *(whole(step) for step in (1, 2, 3)), Saved(3), whole(4))
    assert feed(core, EndOfData(4)) == [Cut(Decide(4, 0.5, 0, 8))]
    assert feed(core, Saved(4)) == [Finished(4)]
