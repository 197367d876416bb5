"""Which forward passes are run together: no waiting, no mixing, no growing without end."""

from __future__ import annotations

import random
from typing import Any

import pytest

from p2pnet.core import Tick
from p2pnet.vnode import gathering
from p2pnet.vnode.gathering import Freed, Gathering, GiveUp, InputArrived, Run


def arrived(request: str, stage: str = "s", place: int = 0, **changes: Any) -> InputArrived:
    fields: dict[str, Any] = {
        "stage": stage,
        "request": request.encode(),
        "place": place,
        "places": 1,
        "samples": 1,
        "size_bytes": 10,
        "tensor": f"{request}{place}",
        "where": None,
        "together_max": 8,
    }
    return InputArrived(**(fields | changes))


def names(effect: Any) -> list[str]:
    assert isinstance(effect, Run)
    return [part.request.decode() for part in effect.parts]


def test_what_comes_alone_runs_at_once_and_what_comes_meanwhile_together() -> None:
    core = Gathering()
    assert [names(it) for it in core.handle(arrived("a"), 0)] == [["a"]]
    for name in "bcd":
        assert core.handle(arrived(name), 0) == []
    assert [names(it) for it in core.handle(Freed(), 0)] == [["b", "c", "d"]]
    assert core.handle(Freed(), 0) == []


def test_stages_take_turns_and_the_longest_complete_goes_first() -> None:
    core = Gathering()
    core.handle(arrived("busy"), 0)
    for name, stage in (("a", "s"), ("b", "t"), ("c", "s"), ("d", "t")):
        core.handle(arrived(name, stage), 0)
    assert names(core.handle(Freed(), 0)[0]) == ["a", "c"]
    assert names(core.handle(Freed(), 0)[0]) == ["b", "d"]


def test_no_more_samples_go_together_than_the_largest_batch_has() -> None:
    core = Gathering()
    core.handle(arrived("busy"), 0)
    for name, samples in (("a", 5), ("b", 4), ("c", 3), ("d", 1)):
        core.handle(arrived(name, samples=samples), 0)
    assert names(core.handle(Freed(), 0)[0]) == ["a", "c"]  # "b" would make it nine
    assert names(core.handle(Freed(), 0)[0]) == ["b", "d"]


def test_a_pass_waits_for_all_inputs_and_gets_them_in_order() -> None:
    core = Gathering()
    assert core.handle(arrived("a", place=1, places=2), 0) == []
    assert core.handle(arrived("a", place=1, places=2, tensor="copy"), 0) == []
    (run,) = core.handle(arrived("a", place=0, places=2), 0)
    assert isinstance(run, Run)
    assert run.parts[0].tensors == ("a0", "a1")


def test_parts_of_sessions_go_alone() -> None:
    core = Gathering()
    core.handle(arrived("busy"), 0)
    for name, session in (("a", b""), ("b", b"one"), ("c", b""), ("d", b"two")):
        core.handle(arrived(name, session=session), 0)
    runs = [names(core.handle(Freed(), 0)[0]) for _ in range(3)]
    assert runs == [["a", "c"], ["b"], ["d"]]


def test_the_oldest_incomplete_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "REQUESTS_MAX", 3)
    core = Gathering()
    core.handle(arrived("busy"), 0)
    core.handle(arrived("complete"), 0)
    assert core.handle(arrived("half", places=2), 1) == []
    assert core.handle(arrived("x", places=2), 1) == []
    (gone,) = core.handle(arrived("y", places=2), 2)
    assert isinstance(gone, GiveUp)
    assert gone.request == b"half"
    core.check()


def test_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "BYTES_MAX", 100)
    core = Gathering()
    core.handle(arrived("busy"), 0)
    gone = [core.handle(arrived(str(i), size_bytes=40), i) for i in range(4)]
    assert [[it.request for it in them if isinstance(it, GiveUp)] for them in gone] == [
        [], [], [b"0"], [b"1"],
    ]  # fmt: skip
    core.check()


def test_what_waits_for_too_long_is_given_up_in_time() -> None:
    core = Gathering()
    core.handle(arrived("half", places=2), 5)
    assert core.deadline() == 5 + gathering.WAIT_MAX_S
    assert core.handle(Tick(), 64.9) == []
    (gone,) = core.handle(Tick(), 65)
    assert isinstance(gone, GiveUp)
    assert core.deadline() is None


@pytest.mark.parametrize("seed", range(20))
def test_every_complete_pass_runs_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    core, ran, busy = Gathering(), [], False
    edges = [(f"r{i}", rng.choice("st"), place) for i in range(40) for place in range(2)]
    stage_of = {name: stage for name, stage, _ in edges}
    edges = [(name, stage_of[name], place) for name, _, place in edges]
    rng.shuffle(edges)
    events: list[Any] = [
        arrived(name, stage, place, places=2, samples=1 + int(name[1:]) % 4)
        for name, stage, place in edges
    ]
    while events or busy:
        event = events.pop() if events and (not busy or rng.random() < 0.7) else Freed()
        busy = busy and not isinstance(event, Freed)
        for effect in core.handle(event, 0):
            assert isinstance(effect, Run)
            assert not busy, "two at a time"
            assert sum(part.samples for part in effect.parts) <= 8
            assert {stage_of[name] for name in names(effect)} == {effect.stage}
            ran += names(effect)
            busy = True
        core.check()
    assert sorted(ran) == sorted(stage_of)
