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
    Reported,
    Saved,
    Stalled,
    StepLedger,
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
    return [Reported(v, epoch, step, loss=loss if v == "loss" else 0.0, samples=8) for v in VNODES]


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
    stale = [Reported("fc1", 2, 5), Reported("fc1", 3, 4), Reported("fc1", 3, 7)]
    assert feed(core, first, first, *stale, Reported("who", 3, 5), Saved(9)) == []
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
