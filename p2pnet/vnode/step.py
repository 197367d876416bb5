"""The order of a training step at one VNode: forward, backward, apply (DESIGN D11). Pure.

    activations ─► RunForward ─► SendActivation …  … gradients ─► RunBackward ─► SendGradient
                                                                       │ all micro-batches
                           next step ◄── RunApply ◄── decided ◄── Report (gradients held)

The loss VNode has nobody to wait for: its backward begins when its forwards are
done. What arrives may be late, early, doubled or out of order, and that never
changes what is computed: steps run one after the other, micro-batches in order,
gradients are handed on in (edge, micro-batch) order. State s stays intact until
step s+1 is decided, which every message of the step after it says by the way.

The shell runs `Run...` effects one at a time in the order given, feeds each
result back as a `...Done` event, and answers a message whose effects hold a
`Refuse` with that refusal. Two payloads are the same if their digests are; a
resent message (a higher `attempt` on the wire) is the same message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from p2pnet.v1 import common_pb2 as pb
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

AHEAD_STEPS_MAX = 2  # how many steps beyond the present one are kept for later


@dataclass(slots=True)
class _Box:
    """What has arrived for one step over one kind of edge, by (edge, micro-batch).

    Payloads are kept until they are used, digests until the step is over.
    """

    edges: int
    payloads: dict[tuple[int, int], object] = field(default_factory=dict)
    digests: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def put(self, place: tuple[int, int], payload: object, digest: bytes) -> bool:
        """False: another payload was here before. The same one again changes nothing."""
        if place in self.digests:
            return self.digests[place] == digest
        self.digests[place] = digest
        self.payloads[place] = payload
        return True

    def has(self, micro_batch: int) -> bool:
        return all((edge, micro_batch) in self.payloads for edge in range(self.edges))

    def take(self, micro_batch: int) -> tuple[object, ...]:
        """In order of edges, whatever the order of arrival."""
        return tuple(self.payloads.pop((edge, micro_batch)) for edge in range(self.edges))


@dataclass(slots=True)
class _Step:
    activations: _Box
    gradients: _Box
    forwards_run: int = 0  # micro-batches 0 .. n-1 were handed to the shell
    forwards_done: int = 0  # 0 .. n-1 came back
    backwards_run: int = 0
    backwards_done: int = 0
    metrics: list[Metrics] = field(default_factory=list)


class StepCore:
    """The training steps of one VNode, from the state after `base_step`, under one epoch.

    For another epoch, or after a state is loaded, a new core is made.

    Attributes:
        applied_step: the state's step; `reported_step`: the last one reported;
            `decided_step`: the last one known to be decided.
        failed: why the VNode does nothing until it gets a state; "" if it is well.
    """

    def __init__(self, wiring: Wiring, *, epoch: int, base_step: int) -> None:
        if bool(wiring.consumers) == wiring.is_loss:
            raise ValueError(f"{wiring.vnode}: a loss, and only a loss, has no consumers")
        self.wiring = wiring
        self.epoch = epoch
        self.applied_step = base_step
        self.reported_step = base_step
        self.decided_step = base_step
        self.failed = ""
        self._applying = False
        self._save_step = -1  # asked for, to be done as soon as it is applied
        self._steps: dict[int, _Step] = {}
        self._edge_of = {
            (consumer.vnode, consumer.slot): edge for edge, consumer in enumerate(wiring.consumers)
        }

    def handle(self, event: Event, now: float) -> Sequence[Effect]:
        """Takes one event. Raises ValueError for a result that nothing was asked for."""
        match event:
            case ActivationArrived() | GradientArrived():
                return self._arrived(event)
            case Decided(epoch=epoch, step=step):
                return self._fence(epoch, step) or self._advance()
            case SaveRequested(epoch=epoch, step=step):
                return self._fence(epoch, step) or self._save(step)
            case ForwardDone():
                return self._forward_done(event)
            case BackwardDone():
                return self._backward_done(event)
            case ApplyDone():
                return self._apply_done(event)
            case ComputeFailed():
                self.failed = event.reason
                return [Trouble(event.step, event.micro_batch, event.reason, event.bad_input)]

    def wants(self, event: Arrival) -> bool:
        """Whether `handle` would look at the payload, which may then be decoded.

        The event as the message's head tells it; its digest may be b"", if none is stated.
        """
        if self._fault(event) or event.step <= self.applied_step:
            return False
        step = self._steps.get(event.step)
        known = step is not None and self._box(step, event).digests.get(self._place(event))
        return not (known and event.digest)  # one that is stated is compared as it is

    def deadline(self) -> float | None:
        """None: a step that does not move is the orchestrator's to notice, who hears all."""
        return None

    def check(self) -> None:
        """A step is applied only when decided, decided only when reported; all is bounded."""
        assert self.applied_step <= self.decided_step <= self.reported_step
        assert self.reported_step <= self.applied_step + 1
        assert not self._applying or self.decided_step > self.applied_step
        for number, step in self._steps.items():
            assert self.applied_step < number <= self.applied_step + 1 + AHEAD_STEPS_MAX
            assert number == self.applied_step + 1 or step.forwards_run == 0
            assert step.backwards_done <= step.backwards_run <= step.forwards_done
            assert step.forwards_done <= step.forwards_run <= self.wiring.micro_batches
            for box in (step.activations, step.gradients):
                assert len(box.payloads) <= len(box.digests)
                assert len(box.digests) <= box.edges * self.wiring.micro_batches

    # What peers send

    def _fence(self, epoch: int, decided_step: int) -> list[Effect]:
        """Refuses what is of another epoch; else takes note of what is decided."""
        wrong = self._foreign(epoch, decided_step)
        if not wrong:
            self.decided_step = max(self.decided_step, decided_step)
        return wrong

    def _foreign(self, epoch: int, decided_step: int) -> list[Effect]:
        if epoch != self.epoch:
            older = epoch < self.epoch
            code = pb.REFUSAL_CODE_STALE_EPOCH if older else pb.REFUSAL_CODE_UNKNOWN_EPOCH
            detail = f"{self.wiring.vnode} trains under epoch {self.epoch}, not {epoch}"
            return [Refuse(code, detail)]
        # A step is decided when *every* VNode has reported it: whoever says so before
        # we did is wrong, and must not make us skip the decision.
        if decided_step > self.reported_step:
            return [self._bad(f"has not reported step {decided_step}: it cannot be decided")]
        return []

    def _fault(self, event: Arrival) -> list[Effect]:
        """Why a message is refused whatever its payload is."""
        return (
            self._misdirected(event)
            or self._foreign(event.epoch, event.decided_step)
            or self._untimely(event)
        )

    def _arrived(self, event: Arrival) -> Sequence[Effect]:
        if wrong := self._misdirected(event):
            return wrong
        refusal = self._fence(event.epoch, event.decided_step) or self._keep(event)
        return [*refusal, *self._advance()]

    def _misdirected(self, event: Arrival) -> list[Effect]:
        if isinstance(event, ActivationArrived):
            inputs = self.wiring.inputs
            if not 0 <= event.slot < len(inputs) or inputs[event.slot].source != event.source:
                return [self._bad(f"has no input {event.slot} from {event.source[:80]}")]
        elif (event.consumer, event.slot) not in self._edge_of:
            return [self._bad(f"does not feed input {event.slot} of {event.consumer[:80]}")]
        if not 0 <= event.micro_batch < self.wiring.micro_batches:
            return [self._bad(f"knows no micro-batch {event.micro_batch}")]
        return []

    def _untimely(self, event: Arrival) -> list[Effect]:
        if event.step <= self.applied_step:
            return []  # late: all that it could change is done
        if self.failed:
            detail = f"{self.wiring.vnode} waits for a state, since it failed: {self.failed}"
            return [Refuse(pb.REFUSAL_CODE_FAILED, detail)]
        if event.step > self.applied_step + 1 + AHEAD_STEPS_MAX:
            detail = f"{self.wiring.vnode} is at step {self.applied_step + 1}: try again later"
            return [Refuse(pb.REFUSAL_CODE_BUSY, detail)]
        return []

    def _keep(self, event: Arrival) -> list[Effect]:
        refusal = self._untimely(event)
        if refusal or event.step <= self.applied_step:
            return refusal
        step = self._steps.get(event.step)
        if step is None:
            wiring = self.wiring
            step = _Step(_Box(len(wiring.inputs)), _Box(len(wiring.consumers)))
            self._steps[event.step] = step
        if not self._box(step, event).put(self._place(event), event.payload, event.digest):
            return [self._bad(f"has got another tensor for this place in step {event.step}")]
        return []

    def _place(self, event: Arrival) -> tuple[int, int]:
        if isinstance(event, ActivationArrived):
            return event.slot, event.micro_batch
        return self._edge_of[event.consumer, event.slot], event.micro_batch

    def _box(self, step: _Step, event: Arrival) -> _Box:
        return step.activations if isinstance(event, ActivationArrived) else step.gradients

    def _save(self, step: int) -> Sequence[Effect]:
        if step < self.applied_step or (step == self.applied_step and self._applying):
            return [self._bad(f"is past the state after step {step}")]
        if step == self.applied_step:
            return [RunSave(step)]
        self._save_step = step
        return self._advance()

    # What the shell has done

    def _forward_done(self, event: ForwardDone) -> Sequence[Effect]:
        step = self._current(event.step)
        self._in_order(event.micro_batch, step.forwards_done, step.forwards_run)
        step.forwards_done += 1
        if event.metrics is not None:
            step.metrics.append(event.metrics)
        sends = [
            SendActivation(
                event.step, event.micro_batch, to.vnode, to.slot, event.output, self.decided_step
            )
            for to in self.wiring.consumers
        ]
        return [*sends, *self._advance()]

    def _backward_done(self, event: BackwardDone) -> Sequence[Effect]:
        step = self._current(event.step)
        self._in_order(event.micro_batch, step.backwards_done, step.backwards_run)
        step.backwards_done += 1
        effects: list[Effect] = [
            SendGradient(
                event.step, event.micro_batch, source.source, slot, gradient, self.decided_step
            )
            for slot, (source, gradient) in enumerate(
                zip(self.wiring.inputs, event.gradients, strict=True)
            )
            if not source.is_network_input
        ]
        if step.backwards_done == self.wiring.micro_batches:
            self.reported_step = event.step
            effects.append(Report(event.step, _combined(step.metrics)))
        return [*effects, *self._advance()]

    def _apply_done(self, event: ApplyDone) -> Sequence[Effect]:
        if not self._applying or event.step != self.applied_step + 1:
            raise ValueError(f"step {event.step} was not to be applied")
        self._applying = False
        self.applied_step = event.step
        self._steps.pop(event.step)
        if self._save_step == event.step:  # before the next step can touch the state
            return [RunSave(event.step), *self._advance()]
        return self._advance()

    # What is to be done next

    def _advance(self) -> list[Effect]:
        """All that can be started now for the present step."""
        number = self.applied_step + 1
        step = self._steps.get(number)
        if step is None or self._applying or self.failed:
            return []
        effects: list[Effect] = []
        micro_batches = self.wiring.micro_batches
        while step.forwards_run < micro_batches and step.activations.has(step.forwards_run):
            inputs = step.activations.take(step.forwards_run)
            effects.append(RunForward(number, step.forwards_run, inputs))
            step.forwards_run += 1
        # A loss has to know the samples of the whole batch before it can weigh a part.
        ready = step.forwards_done
        if self.wiring.is_loss and ready < micro_batches:
            ready = 0
        while step.backwards_run < ready and step.gradients.has(step.backwards_run):
            gradients = step.gradients.take(step.backwards_run)
            weight = _weight(step.metrics, step.backwards_run)
            effects.append(RunBackward(number, step.backwards_run, gradients, weight))
            step.backwards_run += 1
        if self.reported_step == number and self.decided_step >= number:
            self._applying = True
            effects.append(RunApply(number))
        return effects

    def _current(self, number: int) -> _Step:
        if number != self.applied_step + 1 or number not in self._steps:
            raise ValueError(f"a result of step {number}, which does not run")
        return self._steps[number]

    def _in_order(self, micro_batch: int, done: int, run: int) -> None:
        if micro_batch != done or done >= run:
            raise ValueError(f"a result of micro-batch {micro_batch}, which was not due")

    def _bad(self, what: str) -> Refuse:
        return Refuse(pb.REFUSAL_CODE_BAD_REQUEST, f"{self.wiring.vnode} {what}")


def _weight(metrics: Sequence[Metrics], micro_batch: int) -> float:
    """The micro-batch's share of the samples, so that parts sum up to the mean over all."""
    if not metrics:
        return 1.0  # no loss: the weight is in the gradients that arrive
    return metrics[micro_batch].samples / sum(part.samples for part in metrics)


def _combined(metrics: Sequence[Metrics]) -> Metrics | None:
    if not metrics:
        return None
    return Metrics(
        sum(_weight(metrics, i) * part.loss for i, part in enumerate(metrics)),
        sum(part.correct for part in metrics),
        sum(part.samples for part in metrics),
    )
