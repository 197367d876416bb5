"""A swarm that trains networks: every node keeps logs, hosts and orchestrates. Pure.

orchestra = Orchestra(World(seed), nodes=8)
job = orchestra.submit(steps=12)                 # a network, and who feeds it
orchestra.world.run(lambda: job.done, 300.0, every_s=0.1)
orchestra.violations()                           # of `log/checker.py`; none, if all is well
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from p2pnet.client.events import StepResult
from p2pnet.dht.manifest import network_id_of
from p2pnet.gossip.events import GossipConfig
from p2pnet.keys import MANIFEST, KeyPair, sha256
from p2pnet.log import checker
from p2pnet.log.checker import Recording, Violation
from p2pnet.log.history import new_cancellation
from p2pnet.log.keepers import first_keepers
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.costs import HostView
from p2pnet.sim.calls import Calls
from p2pnet.sim.compute import Golden
from p2pnet.sim.conductor_run import ConductorRun
from p2pnet.sim.feeder_node import FeederNode
from p2pnet.sim.gossip_node import GossipNode
from p2pnet.sim.grow import acquaint_gossip
from p2pnet.sim.hints import Hints
from p2pnet.sim.host_node import MEMORY_BYTES, HostNode
from p2pnet.sim.keeper_node import KeeperNode
from p2pnet.sim.machine import Clock, Machine
from p2pnet.sim.orchestrator_node import OrchestratorNode, Witness
from p2pnet.sim.views import GossipView, Oracle, View
from p2pnet.sim.world import World
from p2pnet.v1 import common_pb2, orchestrator_pb2, records_pb2
from p2pnet.vnode.compiling import compile_graph
from p2pnet.vnode.draft import Draft, Settings, TensorSpec
from p2pnet.vnode.graph import CompiledGraph

RESUBMIT_S = 8.0
GFLOPS = 10.0, 40.0
OWNER = KeyPair.from_seed(sha256(b"owner"))


@lru_cache(maxsize=64)
def chain(name: str, vnodes: int, cut_every: int, replicas: int = 1) -> CompiledGraph:
    """A chain of so many VNodes, its loss included."""
    inputs = ["x", *(f"fc{number}" for number in range(1, vnodes - 1))]
    layer = {"in_features": 4, "out_features": 4}
    nodes = [
        Draft(f"fc{number}", "Linear", layer, (source,))
        for number, source in enumerate(inputs, start=1)
    ]
    return compile_graph(
        name=name,
        inputs={"x": TensorSpec((4,))},
        nodes=nodes,
        loss=Draft("loss", "CrossEntropyLoss", {}, (nodes[-1].id,)),
        optimizer="SGD",
        optimizer_config={"lr": 0.1},
        settings=Settings(cut_every=cut_every, replicas=replicas),
    )


@lru_cache(maxsize=64)
def golden_of(graph_json: bytes) -> Golden:
    """The undisturbed run of a graph; all its runs are judged by one."""
    return Golden(CompiledGraph.from_json(graph_json))


@lru_cache(maxsize=64)
def _parsed(graph_json: bytes) -> CompiledGraph:
    return CompiledGraph.from_json(graph_json)


@lru_cache(maxsize=1024)
def manifest_of(
    name: str, spec_digest: bytes, keepers: tuple[str, ...], orchestrators: tuple[str, ...] = ()
) -> common_pb2.Signed:
    """A manifest by the simulator's owner; without orchestrators named anybody may be one."""
    manifest = records_pb2.Manifest(
        owner=OWNER.public_key,
        name=name,
        spec_digest=spec_digest,
        any_orchestrator=not orchestrators,
        orchestrators=orchestrators,
        keepers=keepers,
    )
    return OWNER.sign(MANIFEST, manifest.SerializeToString(deterministic=True))


@dataclass(eq=False)
class Node:
    """One machine with all the roles that a PNode has."""

    machine: Machine
    calls: Calls
    keeper: KeeperNode
    host: HostNode
    orchestrator: OrchestratorNode
    gossip: GossipNode | None = None


@dataclass(eq=False)
class Job:
    """One network, who feeds it, and what was seen of it."""

    manifest: common_pb2.Signed
    graph: CompiledGraph
    feeder: FeederNode
    recording: Recording
    steps: int
    began_s: float
    claims: int = 0
    commits: int = 0
    relocated: dict[str, int] = field(default_factory=dict)  # VNode -> how often
    relocation_s: list[float] = field(default_factory=list)
    uncommitted: int = 0

    @property
    def done(self) -> bool:
        """Whether the run is over, one way or the other."""
        return self.feeder.finished_s is not None or bool(self.feeder.gave_up)

    @property
    def network_id(self) -> str:
        """Its id."""
        return self.recording.network_id


class Orchestra(Witness):
    """Nodes and jobs. `gossip`: the shipped membership instead of an oracle."""

    def __init__(
        self,
        world: World,
        nodes: int,
        *,
        clock: Callable[[int], Clock] = lambda number: Clock(),
        gossip: bool = False,
        late_s: tuple[float, float] = (1.0, 6.0),
        wrong: float = 0.0,
        replays: float = 0.0,
        compute_s: float = 0.01,
        resubmit_s: float = RESUBMIT_S,
    ) -> None:
        self.world = world
        self._resubmit_s = resubmit_s
        self.hints = Hints(world)
        self.jobs: dict[str, Job] = {}
        self.note_watchers: list[Callable[[ConductorRun, str, Mapping[str, object]], None]] = []
        self.decided_watchers: list[Callable[[str, str, common_pb2.Signed], None]] = []
        self._replays = replays
        machines = [world.machine(clock=clock(number)) for number in range(nodes)]
        self.oracle: Oracle | None = None
        gossips: list[GossipNode] = []
        if gossip:
            gossips = [GossipNode(machine, config=GossipConfig()) for machine in machines]
            acquaint_gossip(gossips)
        else:
            self.oracle = Oracle(world, machines, late_s=late_s, wrong=wrong)
        rng = world.rng_of("speeds")
        self._gflops = [rng.uniform(*GFLOPS) for _ in machines]
        self.nodes: list[Node] = []
        for number, machine in enumerate(machines):
            view: View
            if self.oracle is None:
                view = GossipView(gossips[number])
            else:
                view = self.oracle.views[machine.number]
            node = self._node(machine, view, compute_s)
            node.gossip = gossips[number] if gossips else None
            self.nodes.append(node)

    def submit(
        self,
        *,
        steps: int,
        vnodes: int = 3,
        cut_every: int = 2,
        replicas: int = 1,
        name: str = "job",
        orchestrators: Sequence[int] = (0,),
        granted: Sequence[int] = (),
    ) -> Job:
        """Submits a network to one node, or to several that will race; it is fed at once."""
        world = self.world
        graph = chain(name, vnodes, cut_every, replicas)
        peers = [node.machine.peer_id for node in self.nodes]
        may = tuple(sorted(peers[number] for number in granted))
        manifest = manifest_of(name, graph.digest, first_keepers(name, peers, may), may)
        network_id = network_id_of(manifest)
        machine = world.machine()
        calls = Calls(machine)
        feeder = FeederNode(
            machine,
            calls,
            self.hints,
            network_id,
            graph,
            steps,
            lambda result: self._heard(job, result),
        )
        job = Job(manifest, graph, feeder, Recording(network_id), steps, world.now)
        self.jobs[network_id] = job
        for number in orchestrators:
            self.nodes[number].orchestrator.submit(manifest, graph)
        world.after(self._resubmit_s, self._submit_again, job, orchestrators[-1] + 1)
        feeder.begin()
        return job

    def _submit_again(self, job: Job, number: int) -> None:
        """Whoever submits has no answer: it tries the next node, until the network is there."""
        if self.hints.get(job.feeder.machine, job.network_id) is not None:
            return
        node = self.nodes[number % len(self.nodes)]
        if node.machine.running and job.network_id not in node.orchestrator.runs:
            node.orchestrator.submit(job.manifest, job.graph)
        self.world.after(self._resubmit_s, self._submit_again, job, number + 1)

    def violations(self) -> list[Violation]:
        """All that cannot be, of all jobs."""
        found: list[Violation] = []
        for job in self.jobs.values():
            golden = golden_of(job.graph.to_json())
            found += checker.check(job.recording, golden=golden.states, loss=golden.loss)
        return found

    def cancel(self, job: Job) -> None:
        """The owner ends the network, through whoever orchestrates it."""
        runs = self.conductors(job)
        if runs:
            wall_ms = self.world.machines[0].wall_ms
            word = new_cancellation(OWNER, job.network_id, "it is done", wall_ms)
            runs[-1].ask(lambda ask: m.CancelAsked(ask, word), lambda refusal: None)

    def conductors(self, job: Job) -> list[ConductorRun]:
        """Who believes to orchestrate it, in living processes."""
        runs = [node.orchestrator.runs.get(job.network_id) for node in self.nodes]
        return [run for run in runs if run is not None and run.machine.alive]

    # As a `Witness`

    def decided(self, network_id: str, who: str, entry: common_pb2.Signed) -> None:
        """See `Witness`."""
        self.jobs[network_id].recording.note(checker.Decided(who, entry))
        for watcher in self.decided_watchers:
            watcher(network_id, who, entry)

    def acknowledged(self, network_id: str, who: str, entry: common_pb2.Signed) -> None:
        """See `Witness`."""
        self.jobs[network_id].recording.note(checker.Acknowledged(who, entry))

    def told(self, network_id: str, event: orchestrator_pb2.TrainEvent) -> None:
        """See `Witness`."""
        job = self.jobs[network_id]
        if event.HasField("committed"):
            step = int(event.committed.step)
            job.recording.note(checker.ToldCommitted(job.feeder.peer_id, step))
        elif event.HasField("uncommitted"):
            job.uncommitted += 1

    def noted(self, run: ConductorRun, event: str, fields: Mapping[str, object]) -> None:
        """See `Witness`."""
        job = self.jobs[run.core.network_id]
        if event == "claimed":
            job.claims += 1
        elif event == "committed":
            job.commits += 1
        elif event == "relocated":
            vnode = str(fields["vnode"])
            job.relocated[vnode] = job.relocated.get(vnode, 0) + 1
        for watcher in self.note_watchers:
            watcher(run, event, fields)

    def graph(self, data: bytes) -> CompiledGraph:
        """See `Witness`."""
        return _parsed(data)

    # Small things

    def _node(self, machine: Machine, view: View, compute_s: float) -> Node:
        calls = Calls(machine)
        calls.replays = self._replays
        keeper = KeeperNode(machine, calls)
        keeper.watchers.append(lambda who, net, entry: self.decided(net, who.peer_id, entry))
        orchestrator = OrchestratorNode(machine, calls, self.hints, view, keeper.histories, self)
        host = HostNode(machine, calls, self.hints, orchestrator.read_log, compute_s=compute_s)
        orchestrator.host_view = self._advert
        host.accept_watchers.append(self._accepted)
        host.save_watchers.append(self._saved)
        return Node(machine, calls, keeper, host, orchestrator)

    def _advert(self, peer_id: str) -> HostView:
        """What a peer says of itself."""
        machine = self.world.by_id[peer_id]
        host = self.nodes[machine.number].host
        used = sum(tenant.size_bytes for tenant in host.core.tenants())
        return HostView(
            peer_id,
            cpus=1.0,
            memory_free_bytes=MEMORY_BYTES - used,
            gflops=self._gflops[machine.number],
            vnodes=sum(len(crew.vnodes) for crew in host.crews.values()),
        )

    def _accepted(self, network_id: str, vnode: str, host: str, epoch: int, claimant: str) -> None:
        recording = self.jobs[network_id].recording
        recording.note(checker.Accepted(vnode, epoch, claimant, host))

    def _saved(self, network_id: str, host: str, vnode: str, step: int, digest: bytes) -> None:
        self.jobs[network_id].recording.note(checker.Saved(host, vnode, step, digest))

    def _heard(self, job: Job, result: StepResult) -> None:
        heard = checker.Heard(job.feeder.peer_id, result.step, result.loss)
        job.recording.note(heard)
