"""What there is to say of a network in this orchestrator's hands. Pure, and read-only."""

from __future__ import annotations

from collections.abc import Mapping

from p2pnet.log.history import History
from p2pnet.orchestrator.agreement import Agreement
from p2pnet.orchestrator.desk import Desk
from p2pnet.orchestrator.logbook import Logbook
from p2pnet.orchestrator.relocations import Relocations
from p2pnet.orchestrator.training import Training
from p2pnet.orchestrator.watching import Watch
from p2pnet.v1 import common_pb2, orchestrator_pb2, pnode_pb2
from p2pnet.vnode.graph import CompiledGraph


class Overview:
    """The parts of a `Conductor`, as others may look at them.

    Attributes:
        taken_over: the epoch that we took the network with, where it had another's.
    """

    def __init__(self, desk: Desk) -> None:
        self.taken_over = 0
        self._desk = desk
        self._training = Training(desk)
        self._logbook = Logbook(desk)
        self._agreement = Agreement(desk, self._training)
        self._watch = Watch(desk)
        self._relocations = Relocations()

    @property
    def graph(self) -> CompiledGraph:
        """What is orchestrated."""
        return self._desk.graph

    @property
    def history(self) -> History:
        """The network's log, as far as it is known here. Not to be changed."""
        return self._desk.history

    @property
    def manifest(self) -> common_pb2.Signed:
        """What the network's owner signed."""
        return self._desk.manifest

    @property
    def network_id(self) -> str:
        """Whose conductor it is."""
        return self._desk.history.network_id

    @property
    def epoch(self) -> int:
        """Of our last claim; 0: none yet."""
        return self._desk.epoch

    @property
    def placement(self) -> Mapping[str, str]:
        """VNode -> peer id of its host."""
        return self._desk.placement

    @property
    def state(self) -> str:
        """In a word, for people: see `StatusReply.state`."""
        return self._desk.state

    @property
    def detail(self) -> str:
        """Why it is in that state."""
        return self._desk.detail

    @property
    def committed_step(self) -> int:
        """The step of the last commit; 0 if there is none."""
        return self._desk.committed_step

    @property
    def states(self) -> Mapping[str, common_pb2.BlobRef]:
        """The states of the last commit, or those that the network was submitted with."""
        return self._desk.states

    def holds(self, now: float) -> bool:
        """Whether this orchestrator's lease holds: not if the log takes nothing of it for long.

        Others may reach the log's keepers. If they do, they claim; if not, nothing is lost.
        """
        return self._logbook.holds(now)

    def needs(self, peer_id: str) -> bool:
        """Whether a peer hosts or follows a VNode, is about to, or keeps the log."""
        hosts = (*self._desk.hosts_now, *self._agreement.hosts)
        return peer_id in hosts or peer_id in self.history.keepers

    def locations(self) -> list[pnode_pb2.Location]:
        """Where every VNode lives, and its standbys."""
        return self._desk.locations()

    def status(self) -> orchestrator_pb2.StatusReply:
        """All that there is to say."""
        desk, training, health = self._desk, self._training, self._watch.health
        return orchestrator_pb2.StatusReply(
            network_id=self.network_id,
            name=desk.graph.name,
            state=desk.state,
            epoch=desk.epoch,
            step=training.step,
            committed_step=desk.committed_step,
            orchestrator=desk.key.peer_id,
            vnodes=[health[vnode] for vnode in desk.graph.vnodes() if vnode in health],
            locations=desk.locations(),
            relocations=self._relocations.rows,
            states=desk.states,
            steps_decided=training.steps_decided,
            step_bytes=training.step_bytes,
            detail=desk.detail,
            graph=desk.graph.to_json(),
            taken_over=self.taken_over,
        )
