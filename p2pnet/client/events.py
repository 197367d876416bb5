"""What goes into the core of a training run and what comes out of it. Plain data.

`Feed` decides (`p2pnet.client.feed`); who carries the effects out is `TrainingRun`, or the
simulator. Times in seconds, peers by peer id, steps from 1. A stream is one call of
`Orchestrator/Train`, by a number that the core gives it: what comes of an older one is late.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2pnet.core import Tick
from p2pnet.errors import P2PNetError
from p2pnet.v1 import orchestrator_pb2


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step is computed from. The core only counts its bytes."""

    content: object
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """A decided step. The loss is the mean over `samples`; `correct` counts classifications.

    Where not `known`, the step counts, but its result was lost on its way or with an
    orchestrator: the loss is NaN, and `samples` is 0.
    """

    step: int
    loss: float
    correct: int
    samples: int
    known: bool = True


# Events


@dataclass(frozen=True, slots=True)
class OrchestratorFound:
    """Who orchestrates the network, under which epoch as far as is known. Begins a run too."""

    peer: str
    epoch: int


@dataclass(frozen=True, slots=True)
class NotFound:
    """Nobody that orchestrates it was found."""

    reason: str


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The orchestrator has let the stream in."""

    stream: int


@dataclass(frozen=True, slots=True)
class Told:
    """The orchestrator says something."""

    stream: int
    event: orchestrator_pb2.TrainEvent


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The stream is over, or could not be opened."""

    stream: int
    reason: str


@dataclass(frozen=True, slots=True)
class Pace:
    """What the graph asks of its feeder. After `Started`, before the first batch.

    `window`: how many steps may be out at a time, from 1; `norms`: of how many decided
    steps the VNodes want the gradients' norms, 0 where nothing is clipped.
    """

    window: int
    norms: int


@dataclass(frozen=True, slots=True)
class BatchGiven:
    """The next step's batch. Not before `Started`, and not while the core is `full`."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class NoMore:
    """There are no more batches: commit, and end."""


@dataclass(frozen=True, slots=True)
class FeedFailed:
    """A host was not reached, or has refused a batch or a decision that `step` waits for.

    `newer_epoch`: of which it says that it has begun; 0: it says nothing of the kind.
    """

    epoch: int
    step: int
    host: str
    reason: str
    newer_epoch: int = 0


Event = (
    OrchestratorFound | NotFound | StreamOpened | Told | StreamEnded | Pace | BatchGiven | NoMore
    | FeedFailed | Tick
)  # fmt: skip


# Effects


@dataclass(frozen=True, slots=True)
class FindOrchestrator:
    """Look for who orchestrates the network now: `OrchestratorFound` or `NotFound`.

    One at a time, and each is answered once.
    """


@dataclass(frozen=True, slots=True)
class OpenStream:
    """Open a stream: `StreamOpened` or `StreamEnded`. The one before is over."""

    stream: int
    peer: str


@dataclass(frozen=True, slots=True)
class CloseStream:
    """Hang up. Nothing of that stream is heeded any more."""

    stream: int


@dataclass(frozen=True, slots=True)
class Send:
    """A command to the orchestrator, in order, as soon as the stream is open."""

    stream: int
    command: orchestrator_pb2.TrainCommand


@dataclass(frozen=True, slots=True)
class FeedStep:
    """Send a batch to the VNodes that read it, after those of the steps before.

    Every step up to `decided_step` is decided: what is still being fed of those, or of
    another epoch, is out of date. `norms`: see `vnode.proto`, `TrainRequest`.
    """

    epoch: int
    step: int
    batch: Batch
    locations: Mapping[str, str]  # VNode -> host
    decided_step: int
    norms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TellDecided:
    """Say that steps are decided to the hosts that batches go to: no batch is going there now."""

    epoch: int
    step: int
    locations: Mapping[str, str]
    norms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The network can be trained: batches are welcome, from the one after `step` on."""

    step: int
    graph: bytes


@dataclass(frozen=True, slots=True)
class Deliver:
    """A step's result: every step's, once, in order."""

    result: StepResult


@dataclass(frozen=True, slots=True)
class Recovery:
    """The network goes on after something that went wrong."""

    reason: str


@dataclass(frozen=True, slots=True)
class Say:
    """Something that the person who waits should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """All that was fed is committed; the run is over."""

    done: orchestrator_pb2.TrainDone


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The run is over: whoever waits for it gets this error."""

    error: P2PNetError


Effect = (
    FindOrchestrator | OpenStream | CloseStream | Send | FeedStep | TellDecided | Started
    | Deliver | Recovery | Say | Finished | GiveUp
)  # fmt: skip
