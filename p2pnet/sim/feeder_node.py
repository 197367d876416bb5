"""The shipped feed core on a simulated machine: what `client/run.py` does. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pnet.client import events as ev
from p2pnet.client.feed import Feed
from p2pnet.core import Core, Tick
from p2pnet.keys import sha256
from p2pnet.sim import streams
from p2pnet.sim.calls import Calls
from p2pnet.sim.compute import batch_of
from p2pnet.sim.crew import Hop
from p2pnet.sim.driver import Driver
from p2pnet.sim.hints import Hints
from p2pnet.sim.machine import Machine
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import ActivationArrived, Decided

TRAIN = "Orchestrator/Train"
_FEED_TIMEOUT_S = 5.0
_LOOKUP_S = 0.2
_BUSY_PAUSE_S = 0.05
_TRIES = 6
_CODE = 70
_BATCH_BYTES = 64
_LATER = (common_pb2.REFUSAL_CODE_BUSY, common_pb2.REFUSAL_CODE_UNKNOWN_EPOCH)


class FeederNode(Driver[ev.Event, ev.Effect]):
    """One training run of `steps` steps, on a machine that orchestrates and hosts nothing.

    Attributes:
        results: what it was given, in order; `finished_s`: when it was over, if it is.
        gave_up: why, if it has.
    """

    def __init__(
        self,
        machine: Machine,
        calls: Calls,
        hints: Hints,
        network_id: str,
        graph: CompiledGraph,
        steps: int,
        on_result: Callable[[ev.StepResult], None] = lambda result: None,
    ) -> None:
        super().__init__(machine)
        self.results: list[ev.StepResult] = []
        self.finished_s: float | None = None
        self.gave_up = ""
        self.recoveries: list[tuple[float, str]] = []
        self.core = Feed(network_id, graph.name)
        self._calls = calls
        self._hints = hints
        self._network_id = network_id
        self._graph = graph
        self._steps = steps
        self._given = 0
        self._on_result = on_result
        self._streams: dict[int, streams.End] = {}
        self._out = (0, 0)  # the epoch that is fed, and what is decided in it

    def begin(self) -> None:
        """Looks for the orchestrator until there is one, and trains."""
        found = self._hints.get(self.machine, self._network_id)
        if found is None:
            self.machine.after(_LOOKUP_S, self.begin)
        else:
            self._feed(ev.OrchestratorFound(*found))

    def _feed(self, event: ev.Event) -> None:
        self.hand_in(event, _CODE, type(event).__name__.encode())

    def _driven(self) -> Core[ev.Event | Tick, ev.Effect]:
        return self.core

    def _carry_out(self, effect: ev.Effect) -> None:
        after = self.machine.after
        match effect:
            case ev.FindOrchestrator():
                after(_LOOKUP_S, self._look)
            case ev.OpenStream(stream, peer):
                after(0.0, self._open, stream, peer)
            case ev.CloseStream(stream):
                end = self._streams.pop(stream, None)
                if end is not None:
                    end.close()
            case ev.Send(stream, command):
                after(0.0, self._send, stream, command)
            case ev.FeedStep():
                self._feed_step(effect)
            case ev.TellDecided():
                self._tell(effect)
            case ev.Started(step, _):
                self._given = step
                norms = self._graph.staleness + 1 if self._graph.clip_norm else 0
                after(0.0, self._feed, ev.Pace(self._graph.window, norms))
                after(0.0, self._give)
            case ev.Deliver(result):
                self.results.append(result)
                self._on_result(result)
                after(0.0, self._give)
            case ev.Recovery(reason):
                self.recoveries.append((self.machine.world.now, reason))
            case ev.Finished():
                self.finished_s = self.machine.world.now
            case ev.GiveUp(error):
                self.gave_up = str(error)
            case _:
                pass

    def _give(self) -> None:
        """As `client.epochs.in_flight`: one batch more than the network can use at a time."""
        while self._given <= len(self.results) + self._graph.window:
            if self.core.over or self.core.full:
                return
            if self._given == self._steps:
                self._feed(ev.NoMore())
                return
            self._given += 1
            self._feed(ev.BatchGiven(ev.Batch(self._given, _BATCH_BYTES)))

    def _look(self) -> None:
        found = self._hints.get(self.machine, self._network_id)
        if found is None:
            self._feed(ev.NotFound("no record of it is found"))
        else:
            self._feed(ev.OrchestratorFound(*found))

    # The stream

    def _open(self, stream: int, peer: str) -> None:
        other = self.machine.world.by_id[peer]
        mine, theirs = streams.pair(self.machine, other)
        self._streams[stream] = mine
        mine.heard = lambda event: self._feed(ev.Told(stream, event))
        mine.ended = lambda reason: self._over(stream, reason)

        def opened(reply: Any) -> None:
            if reply is None:
                mine.close("it could not be opened")
                self._over(stream, "the orchestrator does not answer")
            elif stream in self._streams:
                self._feed(ev.StreamOpened(stream))

        self._calls.call(peer, TRAIN, theirs, timeout_s=_FEED_TIMEOUT_S, done=opened)

    def _over(self, stream: int, reason: str) -> None:
        if self._streams.pop(stream, None) is not None:
            self._feed(ev.StreamEnded(stream, reason))

    def _send(self, stream: int, command: Any) -> None:
        end = self._streams.get(stream)
        if end is not None:
            end.send(command)

    # Batches

    def _feed_step(self, step: ev.FeedStep) -> None:
        if step.epoch != self._out[0]:
            self._out = (step.epoch, 0)
        self._out = (step.epoch, max(self._out[1], step.decided_step))
        parts = self._graph.micro_batches
        for part in range(parts):
            for source in (*self._graph.inputs, TARGET):
                content = batch_of(source, step.step, part)
                for node, slot in self._graph.consumers(source):
                    arrival = ActivationArrived(
                        epoch=step.epoch,
                        step=step.step,
                        micro_batch=part,
                        node=node,
                        source=source,
                        slot=slot,
                        payload=content,
                        digest=sha256(content),
                        decided_step=step.decided_step,
                        batch_samples=parts,
                        norms=step.norms,
                    )
                    host = step.locations[self._graph.home(node)]
                    self._hop(host, step.epoch, step.step, arrival, 0)

    def _tell(self, told: ev.TellDecided) -> None:
        decided = Decided(told.epoch, told.step, told.norms)
        names = (*self._graph.inputs, TARGET)
        nodes = [node for name in names for node, _ in self._graph.consumers(name)]
        for host in dict.fromkeys(told.locations[self._graph.home(node)] for node in nodes):
            self._hop(host, told.epoch, told.step + 1, decided, 0)

    def _hop(
        self, host: str, epoch: int, step: int, event: ActivationArrived | Decided, tries: int
    ) -> None:
        """Until it is taken; what goes wrong holds up the step."""
        if self._out[0] != epoch or step <= self._out[1]:
            return  # out of date

        def answered(reply: vnode_pb2.HopReply | None) -> None:
            if reply is None:
                self._feed(ev.FeedFailed(epoch, step, host, "no answer"))
            elif reply.HasField("refusal"):
                if reply.refusal.code in _LATER and tries < _TRIES:
                    pause_s = _BUSY_PAUSE_S * 2**tries
                    self.machine.after(pause_s, self._hop, host, epoch, step, event, tries + 1)
                    return
                newer = int(reply.refusal.epoch)
                detail = reply.refusal.detail
                self._feed(ev.FeedFailed(epoch, step, host, detail, newer if newer > epoch else 0))

        self._calls.call(
            host,
            "VNode/Train",
            Hop(self._network_id, event),
            timeout_s=_FEED_TIMEOUT_S,
            done=answered,
        )
