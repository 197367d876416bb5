"""The shipped conductor core on a simulated machine: what its shell does. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from p2pnet.core import Core, Tick
from p2pnet.errors import UsageError
from p2pnet.log.history import History
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.conductor import Phase
from p2pnet.orchestrator.costs import HostView
from p2pnet.orchestrator.planning import Planning, unplanned
from p2pnet.sim import streams
from p2pnet.sim.driver import Driver
from p2pnet.sim.log_client import LogClient
from p2pnet.v1 import common_pb2, orchestrator_pb2, pnode_pb2, vnode_pb2
from p2pnet.vnode.graph import CompiledGraph

if TYPE_CHECKING:
    from p2pnet.sim.orchestrator_node import OrchestratorNode

PROBE_TIMEOUT_S = 1.5
ALLOCATE_TIMEOUT_S = 5.0
HEARTBEAT_TIMEOUT_S = 2.0
READY_TIMEOUT_S = 10.0
SAVE_TIMEOUT_S = 10.0
COPIES = 4  # of a small state, beside the host's own
_PUBLISH_S = 2.0
_RECORD_S = 60.0
_CODE = 80


class ConductorRun(Driver[m.Event, m.Effect]):
    """One network in the hands of one process."""

    def __init__(
        self,
        node: OrchestratorNode,
        log: LogClient,
        manifest: common_pb2.Signed,
        graph: CompiledGraph,
    ) -> None:
        super().__init__(node.machine)
        self.node = node
        self.log = log
        self.over = False
        self.boots = node.machine.boots
        history = History(log.history.network_id)
        history.extend(log.history.entries)
        self.graph = graph
        self.core = node.make_conductor(history, manifest, graph)
        self._planning = Planning(graph)
        self._ask = 0
        self._asks: dict[int, Callable[[common_pb2.Refusal | None], None]] = {}
        self._streams: dict[int, streams.End] = {}
        self._feeders = 0
        self._published: m.Publish | None = None

    @property
    def ready(self) -> bool:
        """Whether every VNode is placed, as far as it knows."""
        return self.core.phase is Phase.READY

    def feed(self, event: m.Event) -> None:
        """Hands the core an event."""
        if not self.over and self.machine.boots == self.boots:
            self.hand_in(event, _CODE, type(event).__name__.encode())

    def ask(
        self, event: Callable[[int], m.Event], then: Callable[[common_pb2.Refusal | None], None]
    ) -> None:
        """Something that is answered by `Answer`."""
        self._ask += 1
        self._asks[self._ask] = then
        self.feed(event(self._ask))

    def train(self, caller: str, end: streams.End, held: int) -> None:
        """Somebody wants to feed."""
        self._feeders += 1
        feeder = self._feeders
        self._streams[feeder] = end

        def command(message: orchestrator_pb2.TrainCommand) -> None:
            if message.HasField("end"):
                self.feed(m.FeederEnds(feeder, int(message.end.last_step)))
            elif message.HasField("failed"):
                failed = message.failed
                self.feed(m.FeederFailed(feeder, int(failed.epoch), failed.host, failed.reason))

        def ended(reason: str) -> None:
            if self._streams.pop(feeder, None) is not None:
                self.feed(m.FeederLeft(feeder))

        end.heard, end.ended = command, ended
        self.feed(m.FeederCame(feeder, caller))

    def _driven(self) -> Core[m.Event | Tick, m.Effect]:
        return self.core

    def _carry_out(self, effect: m.Effect) -> None:
        machine, point = self.machine, self.node.crash_point
        if not self._lives():
            return
        if point is not None:
            point(self.node, effect, False)
            if not self._lives():
                return
        self._do(effect)
        if point is not None and machine.alive:
            point(self.node, effect, True)

    def _lives(self) -> bool:
        return self.machine.alive and self.machine.boots == self.boots

    def _do(self, effect: m.Effect) -> None:
        match effect:
            case m.ReadLog(from_slot):
                self.log.read(from_slot, self._log_read, hints=self._hints())
            case m.Append(entry):
                self.log.append(self.core.history, entry, self._appended)
            case m.MakePlan():
                self._probe(effect)
            case m.MakeReady(host, request):
                self._call(
                    host, "PNode/Ready", request, READY_TIMEOUT_S, partial(self._made_ready, host)
                )
            case m.Allocate(host, request):
                self._call(
                    host,
                    "PNode/Allocate",
                    request,
                    ALLOCATE_TIMEOUT_S,
                    partial(self._allocated, host, int(request.epoch)),
                )
            case m.Publish():
                if self._published is None:
                    self.machine.after(_PUBLISH_S, self._publish_again)
                self._published = effect
                self._publish(effect)
            case m.Withdraw():
                self._published = None
            case m.Beat(host, request):
                self._call(
                    host,
                    "PNode/Heartbeat",
                    request,
                    HEARTBEAT_TIMEOUT_S,
                    partial(self._beaten, host, int(request.epoch)),
                )
            case m.Release(host, epoch):
                drop = pnode_pb2.DropRequest(network_id=self.core.network_id, epoch=epoch)
                self._call(host, "PNode/Drop", drop, PROBE_TIMEOUT_S, lambda reply: None)
            case m.Store():
                self._store(effect)
            case m.Retain(holders, digests, claim):
                retain = vnode_pb2.RetainRequest(
                    network_id=self.core.network_id, digests=digests, claim=claim
                )
                for holder in holders:
                    self._call(holder, "Blob/Retain", retain, PROBE_TIMEOUT_S, lambda reply: None)
            case m.Tell(feeder, event):
                self._tell(feeder, event)
            case m.Answer(ask, refusal):
                self._asks.pop(ask)(refusal)
            case m.Note(event, fields):
                self.node.noted(self, event, fields)
            case m.Over(code, reason, _):
                self.over = True
                self.node.is_over(self, code, reason)

    # What comes of it

    def _log_read(self, entries: tuple[common_pb2.Signed, ...] | None, why: str) -> None:
        self.feed(m.LogSilent(why) if entries is None else m.LogRead(entries))

    def _appended(self, entry: common_pb2.Signed | None, ours: bool, why: str) -> None:
        if entry is None:
            self.feed(m.NotAppended(why))
            return
        if ours:
            self.node.acknowledged(self.core.network_id, entry)
        self.feed(m.Appended(entry))

    def _probe(self, plan: m.MakePlan) -> None:
        waiting = dict.fromkeys(plan.probe)
        absent: list[str] = []

        def probed(host: str, reply: Any) -> None:
            waiting.pop(host)
            if reply is None:
                absent.append(host)
            if not waiting:
                self._plan(plan, tuple(sorted(absent)))

        if not waiting:
            self.machine.after(0.0, self._plan, plan, ())
        request = pnode_pb2.DescribeRequest()
        for host in list(waiting):
            self._call(host, "PNode/Describe", request, PROBE_TIMEOUT_S, partial(probed, host))

    def _plan(self, plan: m.MakePlan, absent: tuple[str, ...]) -> None:
        alive = tuple(self.node.view.alive())
        out = dict.fromkeys((*plan.exclude, *absent))
        hosts = [self.node.host_view(peer) for peer in alive if peer not in out]
        try:
            planned = self._planning.plan(plan, hosts, self.machine.now)
        except UsageError as error:
            planned = unplanned(plan.purpose, error, len(alive), len(hosts))
        self.feed(replace(planned, alive=alive, absent=absent))

    def _made_ready(self, host: str, reply: pnode_pb2.ReadyReply | None) -> None:
        if reply is None:
            self.feed(m.HostReady(host, "it does not answer"))
        else:
            self.feed(m.HostReady(host, reply.refusal.detail))

    def _allocated(self, host: str, epoch: int, reply: pnode_pb2.AllocateReply | None) -> None:
        if reply is None:
            self.feed(m.NotAllocated(host, epoch, "it does not answer"))
        elif reply.HasField("refusal"):
            self.feed(m.NotAllocated(host, epoch, reply.refusal.detail, reply.refusal.code))
        else:
            self.feed(m.Allocated(host, epoch, tuple(reply.acceptances)))

    def _beaten(self, host: str, epoch: int, reply: pnode_pb2.HeartbeatReply | None) -> None:
        if reply is None:
            self.feed(m.NotBeaten(host, epoch, "it does not answer"))
        else:
            refusal = reply.refusal if reply.HasField("refusal") else None
            self.feed(m.Beaten(host, epoch, tuple(reply.vnodes), refusal))

    def _store(self, store: m.Store) -> None:
        others = [
            peer
            for peer in dict.fromkeys((*store.first, *self.node.view.alive()))
            if peer != store.host and peer not in store.avoid
        ]
        turned = [peer for peer in others if peer not in store.first]
        at = sum(store.host.encode()) % max(1, len(turned))
        copies = [*store.first, *turned[at:], *turned[:at]][:COPIES]
        request = vnode_pb2.SaveRequest(
            network_id=self.core.network_id,
            epoch=store.epoch,
            step=store.step,
            vnodes=store.vnodes,
            copy_to=copies,
            norms=store.norms,
        )

        def stored(reply: vnode_pb2.SaveReply | None) -> None:
            why = "it does not answer" if reply is None else reply.refusal.detail
            if reply is None or reply.HasField("refusal"):
                code = 0 if reply is None else reply.refusal.code
                self.feed(m.NotStored(store.host, store.epoch, store.step, why, code))
            else:
                self.feed(m.Stored(store.host, store.epoch, store.step, dict(reply.states)))

        self._call(store.host, "VNode/Save", request, SAVE_TIMEOUT_S, stored)

    def _tell(self, feeder: int, event: orchestrator_pb2.TrainEvent) -> None:
        end = self._streams.get(feeder)
        if end is None:
            return
        self.node.told(self.core.network_id, event)
        end.send(event)
        if event.HasField("done") or event.HasField("refused"):
            del self._streams[feeder]
            end.close("it is done")

    def _publish(self, publish: m.Publish) -> None:
        hints, core = self.node.hints, self.core
        value = (self.peer_id, publish.epoch)
        hints.put(self.machine, core.network_id, (publish.epoch,), value, _RECORD_S)
        for vnode, host in sorted(core.placement.items()):
            hints.put(
                self.machine,
                f"{core.network_id}/{vnode}",
                (publish.epoch,),
                (host, publish.epoch, self.peer_id),
                _RECORD_S,
            )

    def _publish_again(self) -> None:
        if self._published is not None and self._lives():
            self._publish(self._published)
            self.machine.after(_PUBLISH_S, self._publish_again)

    # Small things

    def _hints(self) -> tuple[str, ...]:
        return self.core.history.keepers

    def _call(
        self, host: str, method: str, request: Any, timeout_s: float, done: Callable[[Any], None]
    ) -> None:
        self.node.calls.call(host, method, request, timeout_s=timeout_s, done=done)


def host_view(peer_id: str) -> HostView:
    """A host like all the others."""
    return HostView(peer_id, cpus=1.0, memory_free_bytes=1 << 30, gflops=1.0)
