"""The orchestrator's side of a training run: who feeds batches, and what it is told. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from p2pnet.orchestrator.messages import Tell
from p2pnet.v1 import common_pb2, orchestrator_pb2

TrainEvent = orchestrator_pb2.TrainEvent


@dataclass(slots=True)
class Feeder:
    """The one who feeds; there is at most one, `stream` names its call.

    Attributes:
        last_step: the last step that it will feed, once it has no more batches.
        dirty: steps after the committed one may be under way, of this feeder or of
            one before: a new run begins with a new epoch.
        waits: it has come, and is not told to begin yet.
    """

    stream: int | None = None
    peer_id: str = ""
    last_step: int | None = None
    dirty: bool = False
    waits: bool = False

    @property
    def here(self) -> bool:
        """Whether somebody feeds."""
        return self.stream is not None

    def takes(self, stream: int, peer_id: str) -> None:
        """Somebody feeds from now on."""
        self.stream, self.peer_id = stream, peer_id
        self.last_step = None
        self.waits = True

    def leaves(self) -> None:
        """Nobody does."""
        self.stream, self.waits = None, False

    def tell(self, event: TrainEvent) -> list[Tell]:
        """Tells who feeds, if anybody does."""
        return [] if self.stream is None else [Tell(self.stream, event)]

    def refuse(self, code: common_pb2.RefusalCode, detail: str) -> list[Tell]:
        """Ends the run."""
        return self.tell(refused(code, detail))


def refused(code: common_pb2.RefusalCode, detail: str) -> TrainEvent:
    """The last event of a stream that is not taken, or not any more."""
    return TrainEvent(refused=common_pb2.Refusal(code=code, detail=detail))
