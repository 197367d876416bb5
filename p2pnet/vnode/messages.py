"""What goes into a VNode's step core and what comes out of it (`p2pnet.vnode.step`). Plain data.

Payloads are opaque: whatever the shell hands in comes back in an effect.
Steps are counted from 1, micro-batches and slots from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pnet.v1 import common_pb2 as pb


@dataclass(frozen=True, slots=True)
class InputSlot:
    """Where an input comes from: a VNode, or a network input, which wants no gradient."""

    source: str
    is_network_input: bool


@dataclass(frozen=True, slots=True)
class Consumer:
    """A VNode that takes the output, and as which of its inputs."""

    vnode: str
    slot: int


@dataclass(frozen=True, slots=True)
class Wiring:
    """A VNode's place in its network; the order of `consumers` is the order of summation."""

    vnode: str
    inputs: tuple[InputSlot, ...]
    consumers: tuple[Consumer, ...]
    is_loss: bool = False
    micro_batches: int = 1


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a loss says of a batch: the mean loss, how many were right, out of how many."""

    loss: float
    correct: int
    samples: int


# Events: what peers send


@dataclass(frozen=True, slots=True)
class ActivationArrived:
    epoch: int
    step: int
    micro_batch: int
    source: str
    slot: int  # ours
    payload: object
    digest: bytes
    decided_step: int


@dataclass(frozen=True, slots=True)
class GradientArrived:
    epoch: int
    step: int
    micro_batch: int
    consumer: str
    slot: int  # the consumer's
    payload: object
    digest: bytes
    decided_step: int


Arrival = ActivationArrived | GradientArrived


@dataclass(frozen=True, slots=True)
class Decided:
    """Every step up to `step` is decided."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class SaveRequested:
    """The state after `step`, which is decided, is to be stored."""

    epoch: int
    step: int


# Events: what the shell has done


@dataclass(frozen=True, slots=True)
class ForwardDone:
    step: int
    micro_batch: int
    output: object
    metrics: Metrics | None = None  # the loss VNode's


@dataclass(frozen=True, slots=True)
class BackwardDone:
    step: int
    micro_batch: int
    gradients: tuple[object, ...]  # one an input slot


@dataclass(frozen=True, slots=True)
class ApplyDone:
    step: int


@dataclass(frozen=True, slots=True)
class ComputeFailed:
    """A `Run...` effect failed; `bad_input`: the batch can never be right."""

    step: int
    micro_batch: int
    reason: str
    bad_input: bool


Event = (
    ActivationArrived | GradientArrived | Decided | SaveRequested
    | ForwardDone | BackwardDone | ApplyDone | ComputeFailed
)  # fmt: skip


# Effects


@dataclass(frozen=True, slots=True)
class RunForward:
    step: int
    micro_batch: int
    inputs: tuple[object, ...]  # in slot order


@dataclass(frozen=True, slots=True)
class SendActivation:
    step: int
    micro_batch: int
    consumer: str
    slot: int
    output: object
    decided_step: int


@dataclass(frozen=True, slots=True)
class RunBackward:
    step: int
    micro_batch: int
    gradients: tuple[object, ...]  # in the order of consumers; none for the loss
    weight: float  # what the loss starts with: the micro-batch's share of the samples


@dataclass(frozen=True, slots=True)
class SendGradient:
    step: int
    micro_batch: int
    producer: str
    slot: int  # ours
    gradient: object
    decided_step: int


@dataclass(frozen=True, slots=True)
class Report:
    """The step's gradients are held; `metrics` are the loss VNode's, of the whole batch."""

    step: int
    metrics: Metrics | None


@dataclass(frozen=True, slots=True)
class RunApply:
    step: int


@dataclass(frozen=True, slots=True)
class RunSave:
    step: int


@dataclass(frozen=True, slots=True)
class Refuse:
    code: pb.RefusalCode
    detail: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """The step cannot be done here; the VNode waits for a new state."""

    step: int
    micro_batch: int
    reason: str
    bad_input: bool


Effect = (
    RunForward | SendActivation | RunBackward | SendGradient | Report | RunApply | RunSave
    | Refuse | Trouble
)  # fmt: skip
