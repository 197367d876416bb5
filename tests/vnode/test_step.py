"""The order of steps: whatever arrives in whatever order, each host does the same once."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shuffled import EPOCH, Run, Shuffled

from p2pnet.sim.compute import Golden, Hosted, batch_of, initial
from p2pnet.v1 import common_pb2 as pb
from p2pnet.vnode.compiling import compile_graph
from p2pnet.vnode.draft import Draft, Settings, TensorSpec
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import (
    ActivationArrived,
    ApplyDone,
    Arrival,
    BackwardDone,
    ComputeFailed,
    Decided,
    Effect,
    Event,
    ForwardDone,
    GradientArrived,
    Metrics,
    Pace,
    Refuse,
    Report,
    RunApply,
    RunBackward,
    RunForward,
    RunSave,
    SaveRequested,
    SendActivations,
    SendGradients,
    Sent,
    Trouble,
)
from p2pnet.vnode.stages import InputEdge, OutputEdge, Stage
from p2pnet.vnode.step import (
    AHEAD_STEPS_MAX,
    IN_FLIGHT_MAX,
    QUEUE_MAX,
    RUNNING_MAX,
    UNSENT_MAX,
    StepCore,
)

NETWORKS: dict[str, dict[str, list[str]]] = {
    "chain": {"a": ["x"], "b": ["a"], "c": ["b"]},
    "skip": {"a": ["x"], "b": ["a"], "sum": ["b", "x"], "d": ["sum"]},
    "diamond": {"a": ["x"], "l": ["a"], "r": ["a"], "sum": ["l", "r"]},
    "many consumers": {
        "a": ["x"], "b": ["a"], "c": ["a", "b"], "d": ["a", "c", "a"], "e": ["d", "b"],
    },
    "two inputs": {"a": ["x"], "b": ["z"], "sum": ["a", "b", "x"]},
}  # fmt: skip
STEPS = 5


def graph_of(network: str, **settings: object) -> CompiledGraph:
    nodes = NETWORKS[network]
    inputs = {ref for refs in nodes.values() for ref in refs} - set(nodes)
    linear = {"in_features": 4, "out_features": 4}
    drafts = [
        Draft(node, "Add", {}, tuple(refs))
        if len(refs) > 1
        else Draft(node, "Linear", linear, (*refs,))
        for node, refs in nodes.items()
    ]
    return compile_graph(
        name="net",
        inputs={name: TensorSpec((4,)) for name in sorted(inputs)},
        nodes=drafts,
        loss=Draft("loss", "MSELoss", {}, (list(nodes)[-1],)),
        optimizer="SGD",
        optimizer_config={},
        settings=Settings(**settings),  # type: ignore[arg-type]
    )


class Hashes:
    """Every host computes hashes of what goes in and of the state: any other order shows."""

    def __init__(self, graph: CompiledGraph, hosts: dict[str, list[str]]) -> None:
        self.saved: dict[str, dict[str, bytes]] = {}
        self.hosted = {
            host: Hosted(graph, {vnode: initial(graph.seed, vnode) for vnode in vnodes})
            for host, vnodes in hosts.items()
        }

    def __call__(self, host: str, run: Run) -> Event | None:
        hosted = self.hosted[host]
        match run:
            case RunForward(stage, step, part, inputs, _):
                outputs, metrics = hosted.forward(stage, step, part, inputs)  # type: ignore[arg-type]
                return ForwardDone(stage, step, part, outputs, metrics)
            case RunBackward(stage, step, part, gradients):
                found = hosted.backward(stage, step, part, gradients)  # type: ignore[arg-type]
                return BackwardDone(stage, step, part, found)
            case RunApply(step, norm):
                hosted.apply(step, norm)
                return ApplyDone(step)
            case RunSave(step):
                self.saved[f"{host} {step}"] = dict(hosted.states)
                return None

    def states(self) -> dict[str, bytes]:
        return {v: s for hosted in self.hosted.values() for v, s in hosted.states.items()}


def split(graph: CompiledGraph, seed: int) -> dict[str, list[str]]:
    """The VNodes over 1 to 4 hosts."""
    rng = random.Random(seed)
    count = rng.randint(1, 4)
    hosts: dict[str, list[str]] = {}
    for vnode in graph.vnodes():
        hosts.setdefault(f"h{rng.randrange(count)}", []).append(vnode)
    return hosts


def trained(
    graph: CompiledGraph,
    seed: int | None,
    *,
    steps: int = STEPS,
    core_type: type[StepCore] = StepCore,
    events_max: int = 400_000,
) -> tuple[dict[str, bytes], Shuffled, Hashes]:
    hosts = split(graph, seed or 0)
    hashes = Hashes(graph, hosts)
    net = Shuffled(
        graph,
        hosts,
        hashes,
        lambda step, part, ref: batch_of(ref, step, part),
        lambda step: 8,
        None if seed is None else random.Random(seed),
        core_type=core_type,
        squares=(lambda host, step: hashes.hosted[host].squares(step)) if graph.clip_norm else None,
        events_max=events_max,
    )
    net.train(steps)
    return hashes.states(), net, hashes


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(NETWORKS)), st.integers(0, 2**32), st.integers(1, 10))
def test_neither_the_order_of_arrival_nor_who_hosts_what_changes_anything(
    network: str, seed: int, micro_batches: int
) -> None:
    graph = graph_of(network, micro_batches=micro_batches)
    golden = Golden(graph)
    golden.states(STEPS)
    states, net, _ = trained(graph, seed)
    assert states == golden._hosted.states
    assert sorted(net.metrics) == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        assert net.metrics[step].loss == pytest.approx(golden.loss(step))
    for host, runs in net.log.items():
        stages = range(len(net.stages[host]))
        every = [
            (s, n, p) for s in stages for n in range(1, STEPS + 1) for p in range(micro_batches)
        ]
        for kind in (RunForward, RunBackward):
            done = [(r.stage, r.step, r.micro_batch) for r in runs if isinstance(r, kind)]
            assert sorted(done) == every, host
            for stage in stages:  # one after the other
                mine = [key for key in done if key[0] == stage]
                assert mine == sorted(mine)


@pytest.mark.parametrize("seed", range(6))
def test_the_norm_that_is_clipped_by_is_the_same_everywhere(seed: int) -> None:
    graph = graph_of("many consumers", micro_batches=2, clip_norm=1.0)
    states = [trained(graph, other)[1].norms for other in (seed, seed + 100)]
    assert [list(norms) for norms in states] == [list(range(1, STEPS + 1))] * 2
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert one == other > 0  # to the bit, whoever adds it up


@pytest.mark.parametrize("staleness", [1, 3])
def test_a_stale_forward_is_never_staler_than_it_may_be(staleness: int) -> None:
    graph = graph_of("diamond", staleness=staleness, micro_batches=2)
    behind = 0
    for seed in range(4):
        _, net, _ = trained(graph, seed, steps=12)  # the cores' check() looks at each forward
        for runs in net.log.values():
            applied = 0
            for run in runs:
                if isinstance(run, RunApply):
                    applied = run.step
                elif isinstance(run, RunForward):
                    behind = max(behind, run.step - 1 - applied)
    assert behind == staleness  # it was made use of, too


@pytest.mark.parametrize("seed", range(4))
def test_local_learning_runs_ahead_of_decisions_and_changes_nothing(seed: int) -> None:
    graph = graph_of("chain", cut_every=4)
    pace = Pace(ahead=4, snapshot_every=4)

    class Local(StepCore):
        def __init__(self, name: str, stages: Sequence[Stage], _: Pace, **kwargs: int) -> None:
            cut = [  # no gradient leaves a host
                Stage(
                    stage.nodes,
                    tuple(replace(edge, wants_gradient=False) for edge in stage.inputs),
                    tuple(replace(edge, brings_gradient=False) for edge in stage.outputs),
                    learns=False,
                    weighs=stage.weighs,
                )
                for stage in stages
            ]
            super().__init__(name, cut, pace, **kwargs)

    hosts = {"h0": ["a"], "h1": ["b", "c"], "h2": ["loss"]}
    states = []
    for rng in (None, random.Random(seed)):
        hashes = Hashes(graph, hosts)
        net = Shuffled(
            graph, hosts, hashes, lambda step, part, ref: batch_of(ref, step, part),
            lambda step: 8, rng, core_type=Local,
        )  # fmt: skip
        object.__setattr__(graph, "learning", "local")  # the feeder's window
        net.train(12)
        states.append(hashes.states())
        assert sorted(hashes.saved) == [f"h{i} {step}" for i in range(3) for step in (12, 4, 8)]
    assert net.most_ahead > 0
    assert states[0] == states[1]


# Mutants: each a core with one rule broken, so that the tests above are known to see it.


class RunsDoublesAgain(StepCore):
    def _keep(self, event: Arrival) -> list[Effect]:
        inbox = self._inboxes[self._place(event)]
        inbox.digests.pop(self._number(event.step, event.micro_batch), None)
        return super()._keep(event)


class KeepsLateOnes(StepCore):
    def _untimely(self, event: Arrival) -> list[Effect]:
        if event.step <= self.applied_step:
            self._samples[event.step] = event.batch_samples
        return super()._untimely(event)


class WantsOnlyThePresentStep(StepCore):
    def wants(self, event: Arrival) -> bool:
        return event.step == self.applied_step + 1 and super().wants(event)


class DoesNotWaitForTheDecision(StepCore):
    def _backward_done(self, event: BackwardDone) -> Sequence[Effect]:
        effects = super()._backward_done(event)
        self.decided_step = self.reported_step
        return [*effects, *self._advance()]


class BeginsBeforeItIsApplied(StepCore):
    def _may_begin(self, step: int) -> bool:
        return True


class TakesWhatIsThere(StepCore):
    def _forward(self) -> Effect | None:
        for index, line in enumerate(self._lines):
            for number in sorted(
                {n for box in self._into[index][0] for n in box.payloads}, reverse=True
            ):
                step, part = self._where(number)
                boxes = self._into[index][0]
                if self._may_begin(step) and all(number in box.payloads for box in boxes):
                    line.begun += 1
                    inputs = tuple(box.payloads.pop(number) for box in boxes)
                    return RunForward(index, step, part, inputs, self._samples[step])
        return None


class NeverSaysBusy(StepCore):
    def _untimely(self, event: Arrival) -> list[Effect]:
        return [
            e for e in super()._untimely(event) if getattr(e, "code", 0) != pb.REFUSAL_CODE_BUSY
        ]


class ForgetsBackPressure(StepCore):
    def _sent(self, event: Sent) -> Sequence[Effect]:
        return []


@pytest.mark.parametrize(
    "mutant",
    [
        RunsDoublesAgain,
        KeepsLateOnes,
        WantsOnlyThePresentStep,
        DoesNotWaitForTheDecision,
        BeginsBeforeItIsApplied,
        TakesWhatIsThere,
        NeverSaysBusy,
        ForgetsBackPressure,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_mutants_are_caught(mutant: type[StepCore]) -> None:
    graph = graph_of("many consumers", micro_batches=10)
    golden = Golden(graph)
    golden.states(STEPS)

    def differs(seed: int, core_type: type[StepCore]) -> bool:
        try:
            # The real core needs half as many events: who needs more is stuck.
            found, _, _ = trained(graph, seed, core_type=core_type, events_max=12_000)
        except (AssertionError, KeyError, ValueError):
            return True
        return found != golden._hosted.states

    assert not differs(0, StepCore)
    assert any(differs(seed, mutant) for seed in range(6))


# One core by hand.

STAGE = Stage(
    ("v",),
    (InputEdge("v", 0, "a", True), InputEdge("v", 1, "x", False)),
    (OutputEdge("v", "w", 1, True),),
    learns=True,
    weighs=False,
)
LOSS = Stage(
    ("v",),
    (InputEdge("v", 0, "p", True), InputEdge("v", 1, "y", False)),
    (),
    learns=True,
    weighs=True,
)


def activation(step: int = 1, slot: int = 0, **changes: object) -> ActivationArrived:
    fields: dict[str, object] = {
        "epoch": EPOCH, "step": step, "micro_batch": 0, "node": "v", "source": "ax"[slot],
        "slot": slot, "payload": f"p{step}{slot}", "digest": b"d%d%d" % (step, slot),
        "decided_step": 0, "batch_samples": 8,
    }  # fmt: skip
    return ActivationArrived(**(fields | changes))  # type: ignore[arg-type]


def gradient(step: int = 1, **changes: object) -> GradientArrived:
    fields: dict[str, object] = {
        "epoch": EPOCH, "step": step, "micro_batch": 0, "node": "v", "consumer": "w", "slot": 1,
        "payload": f"g{step}", "digest": b"g%d" % step, "decided_step": 0, "batch_samples": 8,
    }  # fmt: skip
    return GradientArrived(**(fields | changes))  # type: ignore[arg-type]


def new_core(pace: Pace = Pace(), stage: Stage = STAGE, base_step: int = 0) -> StepCore:  # noqa: B008
    return StepCore("net", [stage], pace, epoch=EPOCH, base_step=base_step)


def a_core(*args: object, **kwargs: object) -> Callable[[Event], list[object]]:
    core = new_core(*args, **kwargs)  # type: ignore[arg-type]

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
    handle(ForwardDone(0, step, 0, ("out",)))
    handle(gradient(step))
    assert Report(step, None) in handle(BackwardDone(0, step, 0, ("ga",)))


def refusal(effects: list[object]) -> int:
    (effect,) = effects
    assert isinstance(effect, Refuse)
    assert effect.detail.startswith(("net ", "v "))
    return effect.code


def test_one_step() -> None:
    handle = a_core()
    assert handle(activation(1, 1)) == []
    assert handle(activation(1, 0)) == [RunForward(0, 1, 0, ("p10", "p11"), 8)]
    assert handle(ForwardDone(0, 1, 0, ("out",))) == [SendActivations(0, 1, 0, ("out",), 8, 0, ())]
    assert handle(Sent(0, 1, 0)) == []
    assert handle(gradient()) == [RunBackward(0, 1, 0, ("g1",))]
    assert handle(BackwardDone(0, 1, 0, ("ga",))) == [
        SendGradients(0, 1, 0, ("ga",), 8, 0, ()),
        Report(1, None),
    ]
    assert handle(activation(2, 0)) == []  # early, and nothing is decided
    assert handle(activation(2, 1, decided_step=1)) == [
        RunApply(1, 0.0),
        RunForward(0, 2, 0, ("p20", "p21"), 8),  # in this order
    ]
    assert handle(ApplyDone(1)) == []
    assert handle(ForwardDone(0, 2, 0, ("out",))) == [SendActivations(0, 2, 0, ("out",), 8, 1, ())]


def test_a_loss_waits_for_nobody() -> None:
    handle = a_core(Pace(micro_batches=2), LOSS)
    for part in (1, 0):
        handle(activation(1, 0, micro_batch=part, source="p"))
        handle(activation(1, 1, micro_batch=part, source="y"))
    assert handle(ForwardDone(0, 1, 0, (), Metrics(2.0, 1, 3))) == [RunBackward(0, 1, 0, ())]
    assert handle(BackwardDone(0, 1, 0, ("g",))) == [SendGradients(0, 1, 0, ("g",), 8, 0, ())]
    assert handle(ForwardDone(0, 1, 1, (), Metrics(4.0, 1, 1))) == [RunBackward(0, 1, 1, ())]
    assert handle(BackwardDone(0, 1, 1, ("h",))) == [
        SendGradients(0, 1, 1, ("h",), 8, 0, ()),
        Report(1, Metrics(2.5, 2, 4)),
    ]


def test_a_backward_goes_before_a_forward_and_few_run_at_a_time() -> None:
    handle = a_core(Pace(micro_batches=6))
    runs = []
    for part in range(6):
        runs += handle(activation(1, 0, micro_batch=part))
        runs += handle(activation(1, 1, micro_batch=part))
    assert len(runs) == RUNNING_MAX
    handle(gradient(micro_batch=0))
    effects = handle(ForwardDone(0, 1, 0, ("out",)))
    assert effects[-1] == RunBackward(0, 1, 0, ("g1",))  # though four forwards wait


@pytest.mark.parametrize(("sent", "most"), [(True, IN_FLIGHT_MAX), (False, UNSENT_MAX)])
def test_who_is_not_listened_to_stops(sent: bool, most: int) -> None:
    """No gradient comes back and, in one case, nobody takes the activations either."""
    core = new_core(Pace(micro_batches=32))
    runs: deque[RunForward] = deque()
    begun = 0

    def handle(event: Event) -> bool:
        """Whether it was taken."""
        effects = core.handle(event, 0.0)
        core.check()
        runs.extend(effect for effect in effects if isinstance(effect, RunForward))
        return not any(isinstance(effect, Refuse) for effect in effects)

    for part in range(32):
        took = [handle(activation(1, slot, micro_batch=part)) for slot in (0, 1)]
        if not all(took):
            break
        while runs:
            begun, done = begun + 1, runs.popleft()
            handle(ForwardDone(0, 1, done.micro_batch, ("out",)))
            if sent:
                handle(Sent(0, 1, done.micro_batch))
    assert begun == most
    assert part == most + QUEUE_MAX  # so many more waited for their forward


def test_doubles_are_harmless_and_contradictions_are_refused() -> None:
    handle = a_core()
    handle(activation(1, 0))
    assert handle(activation(1, 0)) == []
    other = activation(1, 0, digest=b"other")
    assert refusal(handle(other)) == pb.REFUSAL_CODE_BAD_REQUEST
    handle(activation(1, 1))
    assert handle(activation(1, 0)) == []  # also when the first one was used
    assert refusal(handle(other)) == pb.REFUSAL_CODE_BAD_REQUEST
    assert handle(activation(1, 0, digest=b"")) == []  # it does not say what it is


def test_late_is_dropped_early_is_kept_and_too_early_is_busy() -> None:
    handle = a_core(base_step=5)
    assert handle(activation(5)) == []
    assert handle(gradient(4)) == []
    assert handle(activation(6 + AHEAD_STEPS_MAX)) == []
    assert refusal(handle(activation(7 + AHEAD_STEPS_MAX))) == pb.REFUSAL_CODE_BUSY
    assert refusal(handle(activation(2**63))) == pb.REFUSAL_CODE_BUSY


def test_so_many_micro_batches_wait_and_the_next_due_always_find_room() -> None:
    handle = a_core(Pace(micro_batches=32))
    for part in range(1, QUEUE_MAX):
        assert handle(activation(1, 0, micro_batch=part)) == []
    late = handle(activation(1, 0, micro_batch=QUEUE_MAX))
    assert refusal(late) == pb.REFUSAL_CODE_BUSY
    assert handle(activation(1, 0, micro_batch=0)) == []


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (activation(epoch=EPOCH - 1), pb.REFUSAL_CODE_STALE_EPOCH),
        (activation(epoch=EPOCH + 1), pb.REFUSAL_CODE_UNKNOWN_EPOCH),
        (Decided(EPOCH - 1, 0), pb.REFUSAL_CODE_STALE_EPOCH),
        (SaveRequested(EPOCH + 1, 0), pb.REFUSAL_CODE_UNKNOWN_EPOCH),
        (activation(micro_batch=1), pb.REFUSAL_CODE_BAD_REQUEST),
        (activation(step=0), pb.REFUSAL_CODE_BAD_REQUEST),
        (activation(slot=0, source="x"), pb.REFUSAL_CODE_BAD_REQUEST),
        (activation(slot=0, source="b"), pb.REFUSAL_CODE_BAD_REQUEST),
        (activation(node="w"), pb.REFUSAL_CODE_BAD_REQUEST),
        (activation(slot=1, source="x", batch_samples=0), pb.REFUSAL_CODE_BAD_REQUEST),
        (gradient(consumer="a"), pb.REFUSAL_CODE_BAD_REQUEST),
        (gradient(slot=0), pb.REFUSAL_CODE_BAD_REQUEST),
        (gradient(node="w"), pb.REFUSAL_CODE_BAD_REQUEST),
        (activation(decided_step=1), pb.REFUSAL_CODE_BAD_REQUEST),
        (Decided(EPOCH, 1), pb.REFUSAL_CODE_BAD_REQUEST),
        (SaveRequested(EPOCH, 1), pb.REFUSAL_CODE_BAD_REQUEST),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_and_changes_nothing(event: Event, code: int) -> None:
    handle = a_core()
    if isinstance(event, Arrival):
        assert not new_core().wants(event)
    assert refusal(handle(event)) == code
    held(handle)


def test_parts_of_two_batches_are_not_one_batch() -> None:
    handle = a_core()
    handle(activation(1, 0, batch_samples=8))
    other = handle(activation(1, 1, batch_samples=9))
    assert refusal(other) == pb.REFUSAL_CODE_BAD_REQUEST


def test_what_has_come_already_is_wanted_only_to_be_compared() -> None:
    core = new_core()
    event = activation(1, 0)
    assert core.wants(event)
    core.handle(event, 0.0)
    assert not core.wants(event)  # the digest that it states is enough
    assert not core.wants(replace(event, digest=b"another"))


def test_nobody_can_decide_what_we_have_not_reported() -> None:
    handle = a_core()
    handle(activation(1, 0))
    assert refusal(handle(activation(1, 1, decided_step=1))) == pb.REFUSAL_CODE_BAD_REQUEST
    held(handle)
    assert handle(Decided(EPOCH, 1)) == [RunApply(1, 0.0)]
    assert handle(Decided(EPOCH, 1)) == []


def test_who_clips_has_to_be_told_the_norm_and_passes_it_on() -> None:
    handle = a_core(Pace(clips=True))
    held(handle)
    for norms in ((), (math.nan,), (math.inf,), (-1.0,)):
        assert refusal(handle(Decided(EPOCH, 1, norms))) == pb.REFUSAL_CODE_BAD_REQUEST
    assert handle(Decided(EPOCH, 1, (2.5,))) == [RunApply(1, 2.5)]
    assert refusal(handle(Decided(EPOCH, 1, (2.6,)))) == pb.REFUSAL_CODE_BAD_REQUEST
    handle(ApplyDone(1))
    handle(activation(2, 0))
    handle(activation(2, 1))
    effects = handle(ForwardDone(0, 2, 0, ("out",)))
    assert effects == [SendActivations(0, 2, 0, ("out",), 8, 1, (2.5,))]


def test_a_save_waits_for_its_step_and_comes_before_the_next() -> None:
    handle = a_core()
    assert handle(SaveRequested(EPOCH, 0)) == [RunSave(0)]
    held(handle)
    assert handle(SaveRequested(EPOCH, 0)) == [RunSave(0)]  # nothing is applied yet
    assert handle(SaveRequested(EPOCH, 1)) == [RunApply(1, 0.0)]
    assert refusal(handle(SaveRequested(EPOCH, 0))) == pb.REFUSAL_CODE_BAD_REQUEST
    handle(activation(2, 0))
    handle(activation(2, 1))
    assert handle(ApplyDone(1)) == [RunSave(1)]  # the forward of step 2 changes no state


def test_a_failure_is_told_and_stops_the_vnodes() -> None:
    handle = a_core()
    handle(activation(1, 0))
    handle(activation(1, 1))
    assert handle(ComputeFailed(1, 0, "a misfit", True)) == [Trouble(1, 0, "a misfit", True)]
    assert refusal(handle(activation(2, 0))) == pb.REFUSAL_CODE_FAILED
    assert handle(SaveRequested(EPOCH, 0)) == [RunSave(0)]  # the state is as it was


@pytest.mark.parametrize(
    "event",
    [
        ForwardDone(0, 1, 0, ("o",)),
        BackwardDone(0, 1, 0, ("a",)),
        ApplyDone(1),
        Sent(0, 1, 0),
        ForwardDone(0, 2, 0, ("o",)),
    ],
    ids=str,
)
def test_a_result_that_was_not_asked_for_is_our_own_bug(event: Event) -> None:
    handle = a_core()
    handle(activation(1, 0))
    with pytest.raises(ValueError, match=r"result|to be applied|to be sent"):
        handle(event)
