"""The shipped conductor and succession on a simulated machine: `orchestrator/shell.py`. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from p2pnet.core import Core, Tick
from p2pnet.dht.manifest import network_id_of
from p2pnet.log.history import History
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator import sightings
from p2pnet.orchestrator import succession as su
from p2pnet.orchestrator.conductor import Conductor
from p2pnet.orchestrator.costs import HostView
from p2pnet.sim import streams
from p2pnet.sim.calls import Calls
from p2pnet.sim.conductor_run import ConductorRun, host_view
from p2pnet.sim.driver import Driver
from p2pnet.sim.hints import Hints
from p2pnet.sim.log_client import LogClient, WasRead
from p2pnet.sim.machine import Machine
from p2pnet.sim.views import View
from p2pnet.v1 import common_pb2, orchestrator_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tenancy_events import ReadLog

LEASE_TIMEOUT_S = 1.5
_LOOK_S = 1.0
_CODE = 90

# (node, effect, whether it has been carried out): may end the process
CrashPoint = Callable[["OrchestratorNode", m.Effect, bool], None]


class OrchestratorNode(Driver[su.Event, su.Effect]):
    """The networks that one node looks after, and those that it would take over.

    Attributes:
        runs: by network id; `crash_point` is called before and after each effect of theirs.
    """

    def __init__(
        self,
        machine: Machine,
        calls: Calls,
        hints: Hints,
        view: View,
        kept: Callable[[], Mapping[str, History]],
        witness: Witness,
    ) -> None:
        super().__init__(machine)
        self.calls = calls
        self.hints = hints
        self.view = view
        self.crash_point: CrashPoint | None = None
        self.host_view: Callable[[str], HostView] = host_view
        self._kept = kept
        self._witness = witness
        self.core: su.Succession
        methods = calls.methods
        methods["Orchestrator/Lease"] = self._lease
        methods["Orchestrator/Report"] = self._report
        methods["Orchestrator/Train"] = self._train
        view.watchers.append(self._member_changed)
        machine.on_boot.append(self.boot)
        self.boot()

    def boot(self) -> None:
        """A process begins: it looks after nothing, and knows what its disk says."""
        self.core = su.Succession(self.peer_id)
        self.runs: dict[str, ConductorRun] = {}
        self.logs: dict[str, LogClient] = {}
        self._seen: dict[str, sightings.Sighting] = {}
        self._opened: dict[streams.End, None] = {}
        self.booted()
        self.machine.after(0.0, self._look)

    # What a scenario asks

    def submit(self, manifest: common_pb2.Signed, graph: CompiledGraph) -> ConductorRun:
        """Takes a new network."""
        return self._conduct(manifest, graph, m.Begin("submitted"))

    def log_of(self, manifest: common_pb2.Signed) -> LogClient:
        """This process's copy of a network's log."""
        network_id = network_id_of(manifest)
        log = self.logs.get(network_id)
        if log is None:
            log = self.logs[network_id] = LogClient(
                self.calls,
                manifest,
                network_id,
                lambda who, entry: self._witness.decided(network_id, who, entry),
            )
        return log

    def read_log(self, wanted: ReadLog, done: WasRead) -> None:
        """For the host on the same machine."""
        log = self.log_of(wanted.manifest)

        def read(entries: tuple[common_pb2.Signed, ...] | None, why: str) -> None:
            if entries is None and why.endswith("is not decided"):
                entries = tuple(log.history.entries[wanted.from_slot - 1 :])
            done(entries, why)

        log.read(wanted.from_slot, read, hints=wanted.keepers, at_least=wanted.at_least)

    # For its runs

    def make_conductor(
        self, history: History, manifest: common_pb2.Signed, graph: CompiledGraph
    ) -> Conductor:
        """The core of a new run."""
        return Conductor(self.machine.key, history, manifest, graph)

    def is_over(self, run: ConductorRun, code: int, reason: str) -> None:
        """A run has nothing more to do with its network."""
        network_id = run.core.network_id
        if self.runs.get(network_id) is run:
            del self.runs[network_id]
        sighting = sightings.of_history(run.core.history)
        if sighting is not None:
            self._saw(sighting)
        if code == common_pb2.REFUSAL_CODE_FAILED:
            self._hand(su.Failed(network_id))

    def acknowledged(self, network_id: str, entry: common_pb2.Signed) -> None:
        """An entry of ours is decided, we were told."""
        self._witness.acknowledged(network_id, self.peer_id, entry)

    def told(self, network_id: str, event: orchestrator_pb2.TrainEvent) -> None:
        """A feeder is told something."""
        self._witness.told(network_id, event)

    def noted(self, run: ConductorRun, event: str, fields: Mapping[str, object]) -> None:
        """Something happened that people may want to know of."""
        self._witness.noted(run, event, fields)

    # Calls

    def _lease(
        self, caller: str, request: orchestrator_pb2.LeaseRequest
    ) -> orchestrator_pb2.LeaseReply:
        epoch = self._holds(request.network_id)
        if not epoch:
            refusal = common_pb2.Refusal(code=common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK)
            return orchestrator_pb2.LeaseReply(refusal=refusal)
        return orchestrator_pb2.LeaseReply(epoch=epoch, lease_s=10)

    def _report(
        self, caller: str, report: orchestrator_pb2.ReportRequest
    ) -> orchestrator_pb2.ReportReply:
        run = self.runs.get(report.id.network_id)
        if run is not None:
            run.feed(m.ReportArrived(caller, report, report.ByteSize()))
        return orchestrator_pb2.ReportReply()

    def _train(self, caller: str, end: streams.End) -> bool:
        """A stream is opened; its first message says of which network."""
        if end in self._opened:
            return True  # the request came twice
        self._opened[end] = None

        def begin(command: orchestrator_pb2.TrainCommand) -> None:
            run = self.runs.get(command.begin.network_id)
            if run is not None:
                run.train(caller, end, int(command.begin.first_step_held))
                return
            refusal = common_pb2.Refusal(code=common_pb2.REFUSAL_CODE_UNKNOWN_NETWORK)
            end.send(orchestrator_pb2.TrainEvent(refused=refusal))
            end.close()

        end.heard = begin
        return True

    # Succession

    def _holds(self, network_id: str) -> int:
        run = self.runs.get(network_id)
        return 0 if run is None else max(run.core.epoch, run.core.history.epoch, 1)

    def _look(self) -> None:
        for history in (*self._kept().values(), *(log.history for log in self.logs.values())):
            known = self._seen.get(history.network_id)
            if known is not None and known.epoch == history.epoch and not history.closing:
                continue  # what it says is known
            sighting = sightings.of_history(history)
            if sighting is not None:
                self._saw(sighting)
        self._hand(su.Alive(tuple(self.view.alive())))
        self.machine.after(_LOOK_S, self._look)

    def _saw(self, sighting: sightings.Sighting) -> None:
        known = self._seen.get(sighting.network_id)
        if known is not None and not sighting.closed and sighting.epoch <= known.epoch:
            return
        self._seen[sighting.network_id] = sighting
        self._hand(sighting.known())

    def _member_changed(self, peer_id: str, alive: bool) -> None:
        self._hand(su.Alive(tuple(self.view.alive())))
        for run in list(self.runs.values()):
            if alive:
                run.feed(m.MemberCame(peer_id))
            else:
                run.feed(m.MemberGone(peer_id, "is gone"))

    def _hand(self, event: su.Event) -> None:
        self.hand_in(event, _CODE, type(event).__name__.encode())

    def _driven(self) -> Core[su.Event | Tick, su.Effect]:
        return self.core

    def _carry_out(self, effect: su.Effect) -> None:
        if isinstance(effect, su.AskLease):
            self._ask_lease(effect)
        else:
            self.machine.after(0.0, self._take_over, effect)

    def _ask_lease(self, ask: su.AskLease) -> None:
        network_id, peer_id = ask.network_id, ask.peer_id

        def answered(reply: orchestrator_pb2.LeaseReply | None) -> None:
            if reply is None:
                self._hand(su.LeaseSilent(network_id, peer_id))
            elif reply.HasField("refusal"):
                self._hand(su.LeaseDenied(network_id, peer_id))
            else:
                self._hand(su.LeaseHeld(network_id, peer_id, int(reply.epoch)))

        request = orchestrator_pb2.LeaseRequest(network_id=network_id)
        self.calls.call(
            peer_id, "Orchestrator/Lease", request, timeout_s=LEASE_TIMEOUT_S, done=answered
        )

    def _take_over(self, effect: su.TakeOver) -> None:
        sighting = self._seen.get(effect.network_id)
        if sighting is None or self._holds(effect.network_id):
            return
        log = self.log_of(sighting.manifest)

        def read(entries: tuple[common_pb2.Signed, ...] | None, why: str) -> None:
            genesis = log.history.genesis
            if self._holds(effect.network_id):
                return
            if entries is None or genesis is None:
                self._hand(su.Failed(effect.network_id))
                return
            graph = self._witness.graph(genesis.graph)
            self._conduct(sighting.manifest, graph, m.Begin(effect.reason, effect.epoch))

        log.read(1, read, hints=sighting.keepers)

    def _conduct(
        self, manifest: common_pb2.Signed, graph: CompiledGraph, begin: m.Begin
    ) -> ConductorRun:
        run = ConductorRun(self, self.log_of(manifest), manifest, graph)
        self.runs[run.core.network_id] = run
        run.feed(begin)
        return run


class Witness:
    """Who sees everything: what the nodes of a world tell it, for judges and figures."""

    def decided(self, network_id: str, who: str, entry: common_pb2.Signed) -> None:
        """`who` holds an entry to be decided."""

    def acknowledged(self, network_id: str, who: str, entry: common_pb2.Signed) -> None:
        """An entry of its own is decided, `who` was told."""

    def told(self, network_id: str, event: orchestrator_pb2.TrainEvent) -> None:
        """A feeder is told something."""

    def noted(self, run: ConductorRun, event: str, fields: Mapping[str, object]) -> None:
        """A conductor notes something."""

    def graph(self, data: bytes) -> CompiledGraph:
        """A graph from a log; the same bytes need not be read twice."""
        return CompiledGraph.from_json(data)
