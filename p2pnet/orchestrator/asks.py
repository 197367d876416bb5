"""What others want of an orchestrated network, and wait for. Pure.

A part of `Conductor`. Every ask gets exactly one `Answer`.
"""

from __future__ import annotations

from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.desk import Desk
from p2pnet.orchestrator.training import Training
from p2pnet.v1 import common_pb2

CUT_S = 30.0

BUSY = common_pb2.REFUSAL_CODE_BUSY
FAILED = common_pb2.REFUSAL_CODE_FAILED

Ask = m.CutAsked | m.HostLeaves | m.Resign | m.CancelAsked


class Asks:
    """Cuts that are wanted, hosts and an orchestrator that go, and the owner's end.

    Attributes:
        leaves: peers that go, by ask; resigns: asks of this orchestrator's own node.
        closing: the ask of the owner, and what was signed.
    """

    def __init__(self, desk: Desk) -> None:
        self.leaves: dict[int, str] = {}
        self.resigns: dict[int, None] = {}
        self.closing: tuple[int, common_pb2.Signed] | None = None
        self._desk = desk
        self._cuts: dict[int, float] = {}  # until when

    def take(self, event: Ask) -> None:
        """Somebody asks."""
        desk = self._desk
        match event:
            case m.CutAsked():
                self._cuts[event.ask] = desk.now + CUT_S
            case m.HostLeaves():
                desk.hosts.leaves(event.peer_id)
                desk.standby_gone(event.peer_id, "it is leaving")
                self.leaves[event.ask] = event.peer_id
            case m.Resign():
                self.resigns[event.ask] = None
            case m.CancelAsked():
                if self.closing is None:
                    self.closing = (event.ask, event.cancellation)
                else:
                    desk.answer(event.ask, BUSY, "it is being cancelled already")

    def deadline(self) -> float | None:
        """When somebody has waited long enough."""
        return min(self._cuts.values(), default=None)

    def tick(self) -> None:
        """Answers those who have."""
        desk = self._desk
        for ask in [ask for ask, until in self._cuts.items() if desk.now >= until]:
            del self._cuts[ask]
            desk.answer(ask, BUSY, f"{desk.graph.name} is {desk.state}: {desk.detail}")

    def serve_cuts(self, training: Training) -> None:
        """Makes the cuts that are wanted, or says that they are made. The network is ready."""
        desk, committed = self._desk, self._desk.history.commit is not None
        for ask in list(self._cuts):
            if training.feeding and not committed:
                del self._cuts[ask]
                desk.answer(
                    ask,
                    BUSY,
                    f"{desk.graph.name} has no cut yet: ask again when it has trained for "
                    f"{desk.graph.cut_every} steps",
                )
            elif committed and (training.feeding or not training.undecided_work):
                del self._cuts[ask]
                desk.answer(ask)
            else:
                training.cut_now()

    def serve_leaves(self) -> str:
        """Answers peers that are free to go; returns one that still hosts something, or ""."""
        desk = self._desk
        hosts = {*desk.placement.values()}
        kept_by = desk.history.keepers if desk.lost_keeper else ()
        for ask, peer in list(self.leaves.items()):
            if peer not in hosts and peer not in kept_by:
                del self.leaves[ask]
                desk.answer(ask)
        return next((peer for peer in self.leaves.values() if peer in hosts), "")

    def nowhere_to_go(self, reason: str) -> None:
        """The peers that leave are told that their VNodes stay."""
        for ask in list(self.leaves):
            del self.leaves[ask]
            self._desk.answer(ask, FAILED, f"the VNodes have nowhere to go: {reason}")

    def resigned(self) -> None:
        """This orchestrator's node may go."""
        asks, self.resigns = list(self.resigns), {}
        for ask in asks:
            self._desk.answer(ask)

    def closed(self, code: common_pb2.RefusalCode | None = None, why: str = "") -> None:
        """The owner's end is in the log, or cannot be, and why."""
        if self.closing is not None:
            ask, _ = self.closing
            self.closing = None
            self._desk.answer(ask, code, why)

    def refuse_all(self, code: common_pb2.RefusalCode, why: str) -> None:
        """It is over: nobody waits in vain."""
        self.closed(code, why)
        for ask in [*self._cuts, *self.leaves, *self.resigns]:
            self._desk.answer(ask, code, why)
        self._cuts, self.leaves, self.resigns = {}, {}, {}

    @property
    def any(self) -> bool:
        """Whether somebody waits."""
        return any((self._cuts, self.leaves, self.resigns, self.closing))
