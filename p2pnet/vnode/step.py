"""The order of training steps on one host: forward, backward, apply (DESIGN D11). Pure.

    activations ─► RunForward ─► SendActivations …  … gradients ─► RunBackward ─► SendGradients
                                                                       │ all of the step
                              next step ◄── RunApply ◄── decided ◄── Report (gradients held)

One core runs all stages (`p2pnet.vnode.stages`) of a network on its host. What arrives may
be late, early, doubled or out of order, and that never changes what is computed: in each
stage micro-batches go one after the other, through all steps, and each has a number in that
sequence. A backward goes before a forward, and few forwards wait for their backward, so
that no more activations are kept than the pipeline needs (1F1B: Narayanan et al.,
"PipeDream", SOSP 2019).

When a step is applied is a matter of `Pace`:
- usually when it is decided, that is when every VNode has reported that it holds its
  gradients. State s stays intact until step s+1 is decided, which every message of the
  step after it says by the way. With a staleness of k, forwards of the next k steps go on
  meanwhile, and their backwards use the weights that their forwards used;
- in `local` at once, since nobody else's gradients matter; but no step is begun that is
  more than `ahead` steps after the last decided one.

The shell runs `Run...` effects one at a time in the order given, feeds each result back as
a `...Done` event, and answers a message whose effects hold a `Refuse` with that refusal.
"""

from __future__ import annotations

import math
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
from p2pnet.vnode.messages import GradientArrived as GradientArrived
from p2pnet.vnode.stages import Stage

AHEAD_STEPS_MAX = 2  # how many steps beyond the present one are kept for later
QUEUE_MAX = 8  # micro-batches that wait on an edge
IN_FLIGHT_MAX = 8  # forwards of a stage that wait for their backward
UNSENT_MAX = 4  # forwards of a stage whose outputs are not all taken; or `ahead`, if more
RUNNING_MAX = 2  # computations that the shell has at a time: one runs, one is next

Place = tuple[int, bool, int]  # stage, forward?, which of its edges that way


@dataclass(slots=True)
class _Line:
    """One stage: how far it is. Micro-batches are numbered through all steps, from 0.

    Of each number the order is forward begun, done, sent; backward begun, done.
    """

    stage: Stage
    begun: int
    forwarded: int
    sent: int
    turned: int  # backward begun
    backwarded: int


@dataclass(slots=True)
class _Inbox:
    """What has arrived over one edge, by number. Digests are kept until the step is applied."""

    payloads: dict[int, object] = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)

    def put(self, number: int, payload: object, digest: bytes) -> bool:
        """False: another payload was here before. The same one again changes nothing."""
        if number in self.digests:
            return digest in (b"", self.digests[number]) or not self.digests[number]
        self.digests[number] = digest
        self.payloads[number] = payload
        return True


class StepCore:
    """The training steps of the VNodes of one network on this host, under one epoch.

    From the state after `base_step` on. For another epoch, or after a state is loaded, a
    new core is made.

    Attributes:
        applied_step: the states' step; `reported_step`: the last one reported;
            `decided_step`: the last one known to be decided.
        failed: why nothing is done until there is a new epoch; "" if all is well.
    """

    def __init__(
        self, name: str, stages: Sequence[Stage], pace: Pace, *, epoch: int, base_step: int
    ) -> None:
        self.epoch = epoch
        self.stages = tuple(stages)
        self.pace = pace
        self.applied_step = base_step
        self.reported_step = base_step
        self.decided_step = base_step
        self.failed = ""
        self._name = name
        self._applying = False
        self._running = 0
        self._save_step = -1  # asked for, to be done as soon as it is applied
        self._norms: dict[int, float] = {}  # of decided steps that are not applied
        self._samples: dict[int, int] = {}  # of the whole batch, by step
        self._metrics: dict[int, list[Metrics]] = {}
        first = base_step * pace.micro_batches
        self._lines = [_Line(stage, *([first] * 5)) for stage in self.stages]
        self._inboxes: dict[Place, _Inbox] = {}
        self._arrives: dict[tuple[str, int], Place] = {}  # (node, slot) of an activation
        self._returns: dict[tuple[str, str, int], Place] = {}  # (node, consumer, its slot)
        self._into: list[tuple[list[_Inbox], list[_Inbox]]] = []
        self._sources: dict[tuple[str, int], str] = {}
        for index, stage in enumerate(self.stages):
            forward, backward = [], []
            for count, edge in enumerate(stage.inputs):
                place = (index, True, count)
                self._arrives[edge.node, edge.slot] = place
                self._sources[edge.node, edge.slot] = edge.source
                forward.append(self._inboxes.setdefault(place, _Inbox()))
            for count, out in enumerate(out for out in stage.outputs if out.brings_gradient):
                place = (index, False, count)
                self._returns[out.node, out.consumer, out.slot] = place
                backward.append(self._inboxes.setdefault(place, _Inbox()))
            self._into.append((forward, backward))

    def handle(self, event: Event, now: float) -> Sequence[Effect]:
        """Takes one event. Raises ValueError for a result that nothing was asked for."""
        match event:
            case Decided():
                return self._fence(event) or self._advance()
            case SaveRequested():
                return self._fence(event) or self._save(event.step)
            case ForwardDone():
                return self._forward_done(event)
            case Sent():
                return self._sent(event)
            case BackwardDone():
                return self._backward_done(event)
            case ApplyDone():
                return self._apply_done(event)
            case ComputeFailed():
                self.failed = event.reason
                return [Trouble(event.step, event.micro_batch, event.reason, event.bad_input)]
            case _:
                return self._arrived(event)

    def wants(self, event: Arrival) -> bool:
        """Whether `handle` would look at the payload, which may then be decoded.

        The event as the message's head tells it.
        """
        if self._fault(event) or event.step <= self.applied_step:
            return False
        number = self._number(event.step, event.micro_batch)
        known = number in self._inboxes[self._place(event)].digests
        return not (known and event.digest)  # one that is stated is compared as it is

    def decision(self) -> tuple[int, tuple[float, ...]]:
        """What is decided, as whoever is sent something is told: the step, and the last norms."""
        if not self.pace.clips:
            return self.decided_step, ()
        newest = range(self.decided_step - self.pace.staleness, self.decided_step + 1)
        return self.decided_step, tuple(self._norms[n] for n in newest if n in self._norms)

    def deadline(self) -> float | None:
        """None: a step that does not move is the orchestrator's to notice, who hears all."""
        return None

    def check(self) -> None:
        """A step is applied only when decided (or `local`), decided only when reported."""
        pace = self.pace
        if not pace.ahead:
            assert self.applied_step <= self.decided_step <= self.reported_step
            assert self.reported_step <= self.applied_step + 1 + pace.staleness
            assert not self._applying or self.decided_step > self.applied_step
        assert self.applied_step <= self.reported_step
        assert 0 <= self._running <= RUNNING_MAX
        applied = self.applied_step * pace.micro_batches
        for line in self._lines:
            assert applied <= line.backwarded <= line.turned <= line.forwarded <= line.begun
            assert line.sent <= line.forwarded
            assert line.begun - line.backwarded <= IN_FLIGHT_MAX
            before = (line.begun - 1) // pace.micro_batches  # the step before the newest begun
            allowed = self.applied_step + self._applying + pace.staleness
            assert line.begun == applied or before <= allowed
        for inbox in self._inboxes.values():
            assert len(inbox.payloads) <= QUEUE_MAX
            assert len(inbox.digests) <= self._horizon * pace.micro_batches

    # What peers send

    def _fence(self, event: Arrival | Decided | SaveRequested) -> list[Effect]:
        """Refuses what is of another epoch; else takes note of what is decided."""
        says = isinstance(event, Decided | SaveRequested)
        step = event.step if says else event.decided_step  # type: ignore[union-attr]
        wrong = self._foreign(event.epoch) or self._early(step, event.norms)
        if not wrong:
            self.decided_step = max(self.decided_step, step)
            for back, norm in enumerate(reversed(event.norms)):
                if step - back > self.applied_step:
                    self._norms.setdefault(step - back, norm)
            self._trim_norms()
        return wrong

    def _foreign(self, epoch: int) -> list[Effect]:
        if epoch == self.epoch:
            return []
        older = epoch < self.epoch
        code = pb.REFUSAL_CODE_STALE_EPOCH if older else pb.REFUSAL_CODE_UNKNOWN_EPOCH
        return [Refuse(code, f"{self._name} trains under epoch {self.epoch}, not {epoch}")]

    def _early(self, decided_step: int, norms: Sequence[float]) -> list[Effect]:
        # A step is decided when *every* VNode has reported it: whoever says so before
        # we did is wrong, and must not make us skip the decision.
        if decided_step > self.reported_step:
            return [self._bad(f"has not reported step {decided_step}: it cannot be decided")]
        if any(not 0 <= norm < math.inf for norm in norms):  # nor NaN
            return [self._bad("is told a norm that is none")]
        for back, norm in enumerate(reversed(norms)):
            if self._norms.get(decided_step - back, norm) != norm:
                return [self._bad(f"is told another norm of step {decided_step - back}")]
        new = range(max(self.decided_step, self.applied_step) + 1, decided_step + 1)
        if self.pace.clips and any(decided_step - step >= len(norms) for step in new):
            return [self._bad(f"clips, and is not told the norm of step {decided_step}")]
        return []

    def _fault(self, event: Arrival) -> list[Effect]:
        """Why a message is refused whatever its payload is."""
        return (
            self._misdirected(event)
            or self._foreign(event.epoch)
            or self._early(event.decided_step, event.norms)
            or self._untimely(event)
        )

    def _arrived(self, event: Arrival) -> Sequence[Effect]:
        if wrong := self._misdirected(event):
            return wrong
        refusal = self._fence(event) or self._keep(event)
        return [*refusal, *self._advance()]

    def _misdirected(self, event: Arrival) -> list[Effect]:
        if isinstance(event, ActivationArrived):
            if self._sources.get((event.node, event.slot)) != event.source:
                what = f"input {event.slot} of {event.node[:80]} from {event.source[:80]}"
                return [self._bad(f"has no {what}")]
        elif (event.node, event.consumer, event.slot) not in self._returns:
            what = f"input {event.slot} of {event.consumer[:80]}"
            return [self._bad(f"has no {event.node[:80]} that feeds {what}")]
        if event.step < 1:
            return [self._bad(f"knows no step {event.step}")]
        if not 0 <= event.micro_batch < self.pace.micro_batches:
            return [self._bad(f"knows no micro-batch {event.micro_batch}")]
        known = self._samples.get(event.step, event.batch_samples)
        if event.batch_samples < 1 or event.batch_samples != known:
            return [self._bad(f"has another batch in step {event.step}")]
        return []

    def _untimely(self, event: Arrival) -> list[Effect]:
        if event.step <= self.applied_step:
            return []  # late: all that it could change is done
        if self.failed:
            detail = f"{self._name} waits for a new epoch here, since it failed: {self.failed}"
            return [Refuse(pb.REFUSAL_CODE_FAILED, detail)]
        if event.step > self.applied_step + self._horizon:
            detail = f"{self._name} is at step {self.applied_step + 1} here: try again later"
            return [Refuse(pb.REFUSAL_CODE_BUSY, detail)]
        index, forward, _ = self._place(event)
        line = self._lines[index]
        number = self._number(event.step, event.micro_batch)
        # Those that are due next always find room, so that who waits never waits for ever.
        if number >= (line.begun if forward else line.turned) + QUEUE_MAX:
            detail = f"{event.node} has {QUEUE_MAX} micro-batches waiting: try again later"
            return [Refuse(pb.REFUSAL_CODE_BUSY, detail)]
        return []

    def _keep(self, event: Arrival) -> list[Effect]:
        refusal = self._untimely(event)
        if refusal or event.step <= self.applied_step:
            return refusal
        number = self._number(event.step, event.micro_batch)
        inbox = self._inboxes[self._place(event)]
        if not inbox.put(number, event.payload, event.digest):
            return [self._bad(f"has got another tensor for this place in step {event.step}")]
        self._samples[event.step] = event.batch_samples
        return []

    def _place(self, event: Arrival) -> Place:
        if isinstance(event, ActivationArrived):
            return self._arrives[event.node, event.slot]
        return self._returns[event.node, event.consumer, event.slot]

    @property
    def _horizon(self) -> int:
        """How many steps after the applied one are taken."""
        return 1 + self.pace.staleness + AHEAD_STEPS_MAX

    def _save(self, step: int) -> Sequence[Effect]:
        if step < self.applied_step or (step == self.applied_step and self._applying):
            return [self._bad(f"is past the state after step {step}")]
        if step == self.applied_step:
            return [RunSave(step)]
        self._save_step = step
        return self._advance()

    # What the shell has done

    def _forward_done(self, event: ForwardDone) -> Sequence[Effect]:
        line = self._lines[event.stage]
        self._due(event, line.forwarded, line.begun)
        line.forwarded += 1
        self._ran()
        if event.metrics is not None:
            self._metrics.setdefault(event.step, []).append(event.metrics)
        effects: list[Effect] = []
        if line.stage.outputs:
            effects.append(
                SendActivations(
                    event.stage,
                    event.step,
                    event.micro_batch,
                    event.outputs,
                    self._samples[event.step],
                    *self.decision(),
                )
            )
        else:
            line.sent += 1
        if not line.stage.learns:
            line.turned += 1
            line.backwarded += 1
        return [*effects, *self._reports(), *self._advance()]

    def _sent(self, event: Sent) -> Sequence[Effect]:
        line = self._lines[event.stage]
        if line.sent >= line.forwarded:
            raise ValueError(f"micro-batch {event.micro_batch} was not to be sent")
        line.sent += 1  # in which order does not matter: they are counted
        return self._advance()

    def _backward_done(self, event: BackwardDone) -> Sequence[Effect]:
        line = self._lines[event.stage]
        self._due(event, line.backwarded, line.turned)
        line.backwarded += 1
        self._ran()
        effects: list[Effect] = []
        if event.gradients:
            effects.append(
                SendGradients(
                    event.stage,
                    event.step,
                    event.micro_batch,
                    event.gradients,
                    self._samples[event.step],
                    *self.decision(),
                )
            )
        return [*effects, *self._reports(), *self._advance()]

    def _reports(self) -> list[Effect]:
        """What is complete now, step by step."""
        effects: list[Effect] = []
        while all(
            line.backwarded >= (self.reported_step + 1) * self.pace.micro_batches
            for line in self._lines
        ):
            self.reported_step += 1
            metrics = self._metrics.pop(self.reported_step, [])
            effects.append(Report(self.reported_step, _combined(metrics)))
        return effects

    def _apply_done(self, event: ApplyDone) -> Sequence[Effect]:
        if not self._applying or event.step != self.applied_step + 1:
            raise ValueError(f"step {event.step} was not to be applied")
        self._applying = False
        self.applied_step = event.step
        self._ran()
        self._samples.pop(event.step, None)
        self._trim_norms()
        below = event.step * self.pace.micro_batches
        for inbox in self._inboxes.values():
            for number in range(below - self.pace.micro_batches, below):
                inbox.digests.pop(number, None)
        every = self.pace.snapshot_every
        if self._save_step == event.step or (every and event.step % every == 0):
            return [RunSave(event.step), *self._advance()]  # before the next step is applied
        return self._advance()

    # What is to be done next

    def _advance(self) -> list[Effect]:
        """What the shell may begin now."""
        effects: list[Effect] = []
        while not self.failed and self._running < RUNNING_MAX:
            effect = self._apply() or self._backward() or self._forward()
            if effect is None:
                break
            self._running += 1
            effects.append(effect)
        return effects

    def _apply(self) -> Effect | None:
        step = self.applied_step + 1
        due = self.reported_step if self.pace.ahead else self.decided_step
        if self._applying or due < step:
            return None
        self._applying = True
        return RunApply(step, self._norms.get(step, 0.0))

    def _backward(self) -> Effect | None:
        for index, line in enumerate(self._lines):
            number = line.turned
            inboxes = self._into[index][1]
            if number < line.forwarded and all(number in inbox.payloads for inbox in inboxes):
                line.turned += 1
                gradients = tuple(inbox.payloads.pop(number) for inbox in inboxes)
                return RunBackward(index, *self._where(number), gradients)
        return None

    def _forward(self) -> Effect | None:
        for index, line in enumerate(self._lines):
            number = line.begun
            step, micro_batch = self._where(number)
            if not self._may_begin(step) or number - line.backwarded >= IN_FLIGHT_MAX:
                continue
            # A far consumer says after a round trip that it has them: with a gradient to be
            # waited for in any case this costs nothing, in `local` it would set the pace.
            if line.forwarded - line.sent >= max(UNSENT_MAX, self.pace.ahead):
                continue
            inboxes = self._into[index][0]
            if all(number in inbox.payloads for inbox in inboxes):
                line.begun += 1
                inputs = tuple(inbox.payloads.pop(number) for inbox in inboxes)
                return RunForward(index, step, micro_batch, inputs, self._samples[step])
        return None

    def _may_begin(self, step: int) -> bool:
        """Whether a forward of that step has a state that it may use."""
        if self.pace.ahead and step > self.decided_step + self.pace.ahead:
            return False
        # A step that is about to be applied counts as applied: things run in order.
        return step <= self.applied_step + self._applying + 1 + self.pace.staleness

    def _trim_norms(self) -> None:
        """Keeps those that are to be used here, and those that others may not have heard of."""
        oldest = min(self.applied_step + 1, self.decided_step - self.pace.staleness)
        self._norms = {step: norm for step, norm in self._norms.items() if step >= oldest}

    def _where(self, number: int) -> tuple[int, int]:
        """Step and micro-batch of a number."""
        step, micro_batch = divmod(number, self.pace.micro_batches)
        return step + 1, micro_batch

    def _number(self, step: int, micro_batch: int) -> int:
        return (step - 1) * self.pace.micro_batches + micro_batch

    def _due(self, event: ForwardDone | BackwardDone, done: int, begun: int) -> None:
        number = self._number(event.step, event.micro_batch)
        if number != done or done >= begun:
            raise ValueError(
                f"a result of micro-batch {event.micro_batch} of step {event.step}, "
                "which was not due"
            )

    def _ran(self) -> None:
        if not self._running:
            raise ValueError("a result that nothing was asked for")
        self._running -= 1

    def _bad(self, what: str) -> Refuse:
        return Refuse(pb.REFUSAL_CODE_BAD_REQUEST, f"{self._name} {what}")


def _combined(metrics: Sequence[Metrics]) -> Metrics | None:
    """Of a whole batch, from those of its parts."""
    if not metrics:
        return None
    samples = sum(part.samples for part in metrics)
    loss = sum(part.loss * part.samples for part in metrics) / samples
    return Metrics(loss, sum(part.correct for part in metrics), samples)
