"""The order of a step: whatever arrives in whatever order, each VNode does the same once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shuffled import EPOCH, Run, Shuffled, wire

from p2pnet.v1 import common_pb2 as pb
from p2pnet.vnode import step as step_module
from p2pnet.vnode.messages import (
    ActivationArrived,
    ApplyDone,
    Arrival,
    BackwardDone,
    ComputeFailed,
    Consumer,
    Decided,
    Effect,
    Event,
    ForwardDone,
    GradientArrived,
    InputSlot,
    Metrics,
    Refuse,
    Report,
    RunApply,
    RunBackward,
    RunForward,
    RunSave,
    SaveRequested,
    SendActivation,
    SendGradient,
    Trouble,
    Wiring,
)
from p2pnet.vnode.step import AHEAD_STEPS_MAX, StepCore, _Box

NETWORKS: dict[str, dict[str, list[str]]] = {
    "chain": {"a": ["x"], "b": ["a"], "c": ["b"], "loss": ["c", "y"]},
    "skip": {"a": ["x"], "b": ["a"], "sum": ["b", "x"], "d": ["sum"], "loss": ["d", "y"]},
    "diamond": {"a": ["x"], "l": ["a"], "r": ["a"], "sum": ["l", "r"], "loss": ["sum", "y"]},
    "many consumers": {
        "a": ["x"], "b": ["a"], "c": ["a", "b"], "d": ["a", "c", "a"], "e": ["d", "b"],
        "loss": ["e", "y"],
    },
    "two inputs": {"a": ["x"], "b": ["z"], "sum": ["a", "b", "x"], "loss": ["sum", "y"]},
}  # fmt: skip


class Symbols:
    """Computes digests: of what goes in and of the state, so that any other order shows."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self.slots = slots
        self.state: dict[str, str] = {}
        self.held: dict[str, list[object]] = {}

    def __call__(self, vnode: str, run: Run) -> Event | None:
        state = self.state.get(vnode, "")
        match run:
            case RunForward():
                output = name("f", vnode, state, run.step, run.micro_batch, run.inputs)
                samples = 3 + run.micro_batch
                metrics = Metrics(1.0 + run.micro_batch, 1, samples) if vnode == "loss" else None
                return ForwardDone(run.step, run.micro_batch, output, metrics)
            case RunBackward():
                grads = (run.gradients, run.weight)
                self.held.setdefault(vnode, []).append(grads)
                return BackwardDone(
                    run.step,
                    run.micro_batch,
                    tuple(
                        name("b", vnode, state, slot, grads) for slot in range(self.slots[vnode])
                    ),
                )
            case RunApply():
                self.state[vnode] = name("s", state, self.held.pop(vnode))
                return ApplyDone(run.step)
            case RunSave():
                return None


def name(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def trained(
    nodes: Mapping[str, Sequence[str]],
    rng: random.Random | None,
    *,
    steps: int = 4,
    micro_batches: int = 1,
    feed_ahead: int = 0,
    core_type: type[StepCore] = StepCore,
) -> tuple[dict[str, list[Run]], dict[str, str], Shuffled]:
    symbols = Symbols({vnode: len(inputs) for vnode, inputs in nodes.items()})
    net = Shuffled(
        wire(nodes, "loss", micro_batches),
        symbols,
        lambda step, micro_batch, ref: f"{ref}{step}.{micro_batch}",
        lambda payload: repr(payload).encode(),
        rng,
        feed_ahead=feed_ahead,
        core_type=core_type,
    )
    net.train(steps)
    return net.log, symbols.state, net


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(NETWORKS)),
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.integers(0, AHEAD_STEPS_MAX + 2),
)
def test_the_order_of_arrival_changes_nothing(
    network: str, seed: int, micro_batches: int, feed_ahead: int
) -> None:
    nodes = NETWORKS[network]
    quiet, quiet_state, _ = trained(nodes, None, micro_batches=micro_batches)
    log, state, net = trained(
        nodes, random.Random(seed), micro_batches=micro_batches, feed_ahead=feed_ahead
    )
    assert log == quiet
    assert state == quiet_state
    assert sorted(net.metrics) == [1, 2, 3, 4]
    for vnode, runs in log.items():
        expected = [
            *((RunForward, step, part) for step in range(1, 5) for part in range(micro_batches)),
            *((RunBackward, step, part) for step in range(1, 5) for part in range(micro_batches)),
            *((RunApply, step, 0) for step in range(1, 5)),
        ]
        seen = [(type(run), run.step, getattr(run, "micro_batch", 0)) for run in runs]
        assert sorted(seen, key=str) == sorted(expected, key=str), vnode


def test_feeding_too_far_ahead_is_held_back() -> None:
    assert trained(NETWORKS["skip"], random.Random(5), feed_ahead=6, steps=10)[2].busy > 0


# Mutants: each a core with one rule broken, so that the test above is known to see it.


class RunsDoublesAgain(StepCore):
    def _keep(self, event: Arrival) -> list[Effect]:
        step = self._steps.get(event.step)
        if step is not None and isinstance(event, ActivationArrived):
            step.activations.digests.pop((event.slot, event.micro_batch), None)
            if step.forwards_run > event.micro_batch and step.activations.edges == 1:
                return [RunForward(event.step, event.micro_batch, (event.payload,))]
        return super()._keep(event)


class KeepsLateOnes(StepCore):
    def _keep(self, event: Arrival) -> list[Effect]:
        self._steps.setdefault(event.step, step_module._Step(_Box(1), _Box(1)))
        return super()._keep(event)


class WantsOnlyThePresentStep(StepCore):
    def wants(self, event: Arrival) -> bool:
        return event.step == self.applied_step + 1 and super().wants(event)


class DoesNotWaitForTheDecision(StepCore):
    def _backward_done(self, event: BackwardDone) -> Sequence[Effect]:
        effects = super()._backward_done(event)
        self.decided_step = self.reported_step
        return [*effects, *self._advance()]


class TakesAsItCame(_Box):
    def take(self, micro_batch: int) -> tuple[object, ...]:
        keys = [key for key in self.payloads if key[1] == micro_batch]
        return tuple(self.payloads.pop(key) for key in keys)


class WaitsForOne(_Box):
    def has(self, micro_batch: int) -> bool:
        return any(key[1] == micro_batch for key in self.payloads)


@pytest.mark.parametrize(
    "mutant",
    [
        RunsDoublesAgain,
        KeepsLateOnes,
        WantsOnlyThePresentStep,
        DoesNotWaitForTheDecision,
        TakesAsItCame,
        WaitsForOne,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_mutants_are_caught(
    mutant: type[StepCore] | type[_Box], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = NETWORKS["many consumers"]
    quiet = trained(nodes, None)[:2]
    core_type = StepCore

    def differs(seed: int) -> bool:
        try:
            return trained(nodes, random.Random(seed), core_type=core_type)[:2] != quiet
        except (AssertionError, KeyError, ValueError):
            return True

    assert not any(differs(seed) for seed in range(5))
    if issubclass(mutant, StepCore):
        core_type = mutant
    else:
        monkeypatch.setattr(step_module, "_Box", mutant)
    assert any(differs(seed) for seed in range(5))


# One core by hand.

WIRING = Wiring("v", (InputSlot("a", False), InputSlot("x", True)), (Consumer("w", 1),))


def activation(step: int = 1, slot: int = 0, **changes: object) -> ActivationArrived:
    fields: dict[str, object] = {
        "epoch": EPOCH, "step": step, "micro_batch": 0, "source": "ax"[slot], "slot": slot,
        "payload": f"p{step}{slot}", "digest": b"d%d%d" % (step, slot), "decided_step": 0,
    }  # fmt: skip
    return ActivationArrived(**(fields | changes))  # type: ignore[arg-type]


def gradient(step: int = 1, **changes: object) -> GradientArrived:
    fields: dict[str, object] = {
        "epoch": EPOCH, "step": step, "micro_batch": 0, "consumer": "w", "slot": 1,
        "payload": f"g{step}", "digest": b"g%d" % step, "decided_step": 0,
    }  # fmt: skip
    return GradientArrived(**(fields | changes))  # type: ignore[arg-type]


def a_core(wiring: Wiring = WIRING, base_step: int = 0) -> Callable[[Event], list[object]]:
    core = StepCore(wiring, epoch=EPOCH, base_step=base_step)

    def handle(event: Event) -> list[object]:
        effects = core.handle(event, 0.0)
        core.check()
        return list(effects)

    assert core.deadline() is None
    return handle


def held(handle: Callable[[Event], list[object]], step: int = 1) -> None:
    """Brings a core to where it holds the gradients of a step."""
    handle(activation(step, 0))
    handle(activation(step, 1))
    handle(ForwardDone(step, 0, "out"))
    handle(gradient(step))
    assert Report(step, None) in handle(BackwardDone(step, 0, ("ga", "gx")))


def refusal(effects: list[object]) -> int:
    (effect,) = effects
    assert isinstance(effect, Refuse)
    assert effect.detail.startswith("v ")
    return effect.code


def test_one_step() -> None:
    handle = a_core()
    assert handle(activation(1, 1)) == []
    assert handle(activation(1, 0)) == [RunForward(1, 0, ("p10", "p11"))]
    assert handle(ForwardDone(1, 0, "out")) == [SendActivation(1, 0, "w", 1, "out", 0)]
    assert handle(gradient()) == [RunBackward(1, 0, ("g1",), 1.0)]
    assert handle(BackwardDone(1, 0, ("ga", "gx"))) == [
        SendGradient(1, 0, "a", 0, "ga", 0),  # and none to the network input x
        Report(1, None),
    ]
    assert handle(activation(2, 0)) == []  # early, and nothing is decided
    assert handle(activation(2, 1, decided_step=1)) == [RunApply(1)]
    assert handle(ApplyDone(1)) == [RunForward(2, 0, ("p20", "p21"))]
    assert handle(ForwardDone(2, 0, "out")) == [SendActivation(2, 0, "w", 1, "out", 1)]


def test_a_loss_waits_for_nobody_and_weighs_its_parts() -> None:
    inputs = (InputSlot("p", False), InputSlot("y", True))
    handle = a_core(Wiring("v", inputs, (), is_loss=True, micro_batches=2))
    for part in (1, 0):
        handle(activation(1, 0, micro_batch=part, source="p"))
        handle(activation(1, 1, micro_batch=part, source="y"))
    assert handle(ForwardDone(1, 0, "l0", Metrics(2.0, 1, 3))) == []
    assert handle(ForwardDone(1, 1, "l1", Metrics(4.0, 1, 1))) == [
        RunBackward(1, 0, (), 0.75),
        RunBackward(1, 1, (), 0.25),
    ]
    assert handle(BackwardDone(1, 0, ("g", None))) == [SendGradient(1, 0, "p", 0, "g", 0)]
    assert handle(BackwardDone(1, 1, ("h", None))) == [
        SendGradient(1, 1, "p", 0, "h", 0),
        Report(1, Metrics(2.5, 2, 4)),
    ]


def test_doubles_are_harmless_and_contradictions_are_refused() -> None:
    handle = a_core()
    handle(activation(1, 0))
    assert handle(activation(1, 0)) == []
    other = activation(1, 0, digest=b"other")
    assert refusal(handle(other)) == pb.REFUSAL_CODE_BAD_REQUEST
    handle(activation(1, 1))
    assert handle(activation(1, 0)) == []  # also when the first one was used
    assert refusal(handle(other)) == pb.REFUSAL_CODE_BAD_REQUEST


def test_late_is_dropped_early_is_kept_and_too_early_is_busy() -> None:
    handle = a_core(base_step=5)
    assert handle(activation(5)) == []
    assert handle(gradient(4)) == []
    assert handle(activation(6 + AHEAD_STEPS_MAX)) == []
    assert refusal(handle(activation(7 + AHEAD_STEPS_MAX))) == pb.REFUSAL_CODE_BUSY
    assert refusal(handle(activation(2**63))) == pb.REFUSAL_CODE_BUSY


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (activation(epoch=EPOCH - 1), pb.REFUSAL_CODE_STALE_EPOCH),
        (activation(epoch=EPOCH + 1), pb.REFUSAL_CODE_UNKNOWN_EPOCH),
        (Decided(EPOCH - 1, 0), pb.REFUSAL_CODE_STALE_EPOCH),
        (SaveRequested(EPOCH + 1, 0), pb.REFUSAL_CODE_UNKNOWN_EPOCH),
        (activation(micro_batch=1), pb.REFUSAL_CODE_BAD_REQUEST),
        (activation(slot=0, source="x"), pb.REFUSAL_CODE_BAD_REQUEST),
        (activation(slot=0, source="b"), pb.REFUSAL_CODE_BAD_REQUEST),
        (ActivationArrived(EPOCH, 1, 0, "x", 2, "p", b"d", 0), pb.REFUSAL_CODE_BAD_REQUEST),
        (gradient(consumer="a"), pb.REFUSAL_CODE_BAD_REQUEST),
        (gradient(slot=0), pb.REFUSAL_CODE_BAD_REQUEST),
        (activation(decided_step=1), pb.REFUSAL_CODE_BAD_REQUEST),
        (Decided(EPOCH, 1), pb.REFUSAL_CODE_BAD_REQUEST),
        (SaveRequested(EPOCH, 1), pb.REFUSAL_CODE_BAD_REQUEST),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_and_changes_nothing(event: Event, code: int) -> None:
    handle = a_core()
    if isinstance(event, Arrival):
        assert not StepCore(WIRING, epoch=EPOCH, base_step=0).wants(event)
    assert refusal(handle(event)) == code
    held(handle)


def test_what_has_come_already_is_wanted_only_to_be_compared() -> None:
    core = StepCore(WIRING, epoch=EPOCH, base_step=0)
    event = activation(1, 0)
    assert core.wants(event)
    core.handle(event, 0.0)
    assert not core.wants(event)  # the digest that it states is enough
    assert not core.wants(replace(event, digest=b"another"))
    assert core.wants(replace(event, digest=b""))


def test_nobody_can_decide_what_we_have_not_reported() -> None:
    handle = a_core()
    handle(activation(1, 0))
    assert refusal(handle(activation(1, 1, decided_step=1))) == pb.REFUSAL_CODE_BAD_REQUEST
    held(handle)
    assert handle(Decided(EPOCH, 1)) == [RunApply(1)]
    assert handle(Decided(EPOCH, 1)) == []


def test_a_save_waits_for_its_step_and_comes_before_the_next() -> None:
    handle = a_core()
    assert handle(SaveRequested(EPOCH, 0)) == [RunSave(0)]
    held(handle)
    assert handle(SaveRequested(EPOCH, 0)) == [RunSave(0)]  # nothing is applied yet
    assert handle(SaveRequested(EPOCH, 1)) == [RunApply(1)]
    assert refusal(handle(SaveRequested(EPOCH, 0))) == pb.REFUSAL_CODE_BAD_REQUEST
    handle(activation(2, 0))
    handle(activation(2, 1))
    assert handle(ApplyDone(1)) == [RunSave(1), RunForward(2, 0, ("p20", "p21"))]


def test_a_failure_is_told_and_stops_the_vnode() -> None:
    handle = a_core()
    handle(activation(1, 0))
    handle(activation(1, 1))
    assert handle(ComputeFailed(1, 0, "a misfit", True)) == [Trouble(1, 0, "a misfit", True)]
    assert refusal(handle(activation(2, 0))) == pb.REFUSAL_CODE_FAILED
    assert handle(SaveRequested(EPOCH, 0)) == [RunSave(0)]  # the state is as it was


@pytest.mark.parametrize(
    "event",
    [ForwardDone(1, 0, "o"), BackwardDone(1, 0, ("a", "b")), ApplyDone(1), ForwardDone(2, 0, "o")],
    ids=str,
)
def test_a_result_that_was_not_asked_for_is_our_own_bug(event: Event) -> None:
    handle = a_core()
    handle(activation(1, 0))
    with pytest.raises(ValueError, match=r"result|to be applied"):
        handle(event)


def test_a_dead_end_is_no_vnode() -> None:
    with pytest.raises(ValueError, match="consumers"):
        StepCore(Wiring("v", (InputSlot("x", True),), ()), epoch=1, base_step=0)
