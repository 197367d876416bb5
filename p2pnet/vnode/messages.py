"""What goes into a host's step core and what comes out of it (`p2pnet.vnode.step`). Plain data.

Payloads are opaque: whatever the shell hands in comes back in an effect.
Steps are counted from 1, micro-batches and slots from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pnet.v1 import common_pb2 as pb


@dataclass(frozen=True, slots=True)
class Pace:
    """How the steps of a network follow each other (DESIGN D11).

    `staleness`: a forward may use a state so many steps older than the one before its
    step. `ahead`: 0, and a step is applied when it is decided; else (`local`) as soon as its
    gradients are held, at most so many steps before it is decided, with a snapshot of
    every `snapshot_every`th state.
    """

    micro_batches: int = 1
    staleness: int = 0
    ahead: int = 0
    snapshot_every: int = 0
    clips: bool = False


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a loss says of a batch: the mean loss, how many were right, out of how many."""

    loss: float
    correct: int
    samples: int


# Events: what peers send


@dataclass(frozen=True, slots=True)
class ActivationArrived:
    """`norms`: of the gradients of the last decided steps, the newest last, where it matters."""

    epoch: int
    step: int
    micro_batch: int
    node: str  # whom it is for
    source: str
    slot: int  # ours
    payload: object
    digest: bytes
    decided_step: int
    batch_samples: int = 1  # of all micro-batches together
    norms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class GradientArrived:
    """The gradient of what `node` gave to `consumer` as its input `slot`."""

    epoch: int
    step: int
    micro_batch: int
    node: str  # whom it is for
    consumer: str
    slot: int  # the consumer's
    payload: object
    digest: bytes
    decided_step: int
    batch_samples: int = 1
    norms: tuple[float, ...] = ()


Arrival = ActivationArrived | GradientArrived


@dataclass(frozen=True, slots=True)
class Decided:
    """Every step up to `step` is decided."""

    epoch: int
    step: int
    norms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SaveRequested:
    """The states after `step`, which is decided, are to be stored."""

    epoch: int
    step: int
    norms: tuple[float, ...] = ()


# Events: what the shell has done. Stages are counted from 0.


@dataclass(frozen=True, slots=True)
class ForwardDone:
    stage: int
    step: int
    micro_batch: int
    outputs: tuple[object, ...]  # one an output edge
    metrics: Metrics | None = None  # the loss's


@dataclass(frozen=True, slots=True)
class Sent:
    """All activations of a `SendActivations` were taken."""

    stage: int
    step: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class BackwardDone:
    stage: int
    step: int
    micro_batch: int
    gradients: tuple[object, ...]  # one an input edge that wants one


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
    | ForwardDone | Sent | BackwardDone | ApplyDone | ComputeFailed
)  # fmt: skip


# Effects


@dataclass(frozen=True, slots=True)
class RunForward:
    stage: int
    step: int
    micro_batch: int
    inputs: tuple[object, ...]  # one an input edge
    batch_samples: int


@dataclass(frozen=True, slots=True)
class SendActivations:
    stage: int
    step: int
    micro_batch: int
    outputs: tuple[object, ...]  # one an output edge
    batch_samples: int
    decided_step: int
    norms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RunBackward:
    stage: int
    step: int
    micro_batch: int
    gradients: tuple[object, ...]  # one an output edge that brings one


@dataclass(frozen=True, slots=True)
class SendGradients:
    stage: int
    step: int
    micro_batch: int
    gradients: tuple[object, ...]  # one an input edge that wants one
    batch_samples: int
    decided_step: int
    norms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The step's gradients are held; `metrics` are the loss's, where it is here."""

    step: int
    metrics: Metrics | None


@dataclass(frozen=True, slots=True)
class RunApply:
    """`norm`: of all gradients of the network, where it clips."""

    step: int
    norm: float


@dataclass(frozen=True, slots=True)
class RunSave:
    step: int


@dataclass(frozen=True, slots=True)
class Refuse:
    code: pb.RefusalCode
    detail: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """The step cannot be done here; the VNodes wait for a new epoch."""

    step: int
    micro_batch: int
    reason: str
    bad_input: bool


Effect = (
    RunForward | SendActivations | RunBackward | SendGradients | Report | RunApply | RunSave
    | Refuse | Trouble
)  # fmt: skip
