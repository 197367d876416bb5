"""What the parts of a conductor share: the network, the time, and what is to be done. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from p2pnet.keys import KeyPair
from p2pnet.log.history import History
from p2pnet.log.keepers import next_keepers
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.hosts import HostBook
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2
from p2pnet.vnode.graph import CompiledGraph

REASON_CHARS_MAX = 200


@dataclass(slots=True)
class Desk:
    """One network, as its orchestrator has it.

    Attributes:
        epoch: of our claim; `placement`: VNode -> peer id; `ready`: whether every host
            has agreed to it.
        state, detail: for people.
        alive: the living members.
        trouble: says that something is wrong under the present epoch.
        log_is_free: has what waits for the log written.
        out: effects of the event that is being handled, at `now`.
    """

    key: KeyPair
    history: History
    manifest: common_pb2.Signed
    charter: records_pb2.Manifest  # what is in the manifest
    graph: CompiledGraph
    submitted: Mapping[str, common_pb2.BlobRef]
    trouble: Callable[[str], None]
    log_is_free: Callable[[], None]
    epoch: int = 0
    placement: dict[str, str] = field(default_factory=dict)
    ready: bool = False
    state: str = "placing"
    detail: str = ""
    hosts: HostBook = field(default_factory=HostBook)
    alive: dict[str, None] = field(default_factory=dict)
    now: float = 0.0
    out: list[m.Effect] = field(default_factory=list)

    @property
    def committed_step(self) -> int:
        """The step of the last commit; 0 if there is none."""
        return 0 if self.history.commit is None else int(self.history.commit.step)

    @property
    def states(self) -> Mapping[str, common_pb2.BlobRef]:
        """The states of the last commit, or those that the network was submitted with."""
        if self.history.commit is not None:
            return self.history.commit.states
        genesis = self.history.genesis
        return self.submitted if genesis is None else genesis.states

    @property
    def next_keepers(self) -> tuple[str, ...]:
        """Who is to keep the slot after the next one; nobody for a log in a store."""
        charter, history = self.charter, self.history
        if charter.state_url:
            return ()
        staying = [peer for peer in self.alive if not self.hosts.is_leaving(peer)]
        return next_keepers(
            history.network_id,
            history.keepers or charter.keepers,
            staying or [self.key.peer_id],
            () if charter.any_orchestrator else charter.orchestrators,
        )

    @property
    def lost_keeper(self) -> str:
        """A keeper that is gone or goes, and can be replaced; "" if there is none."""
        keepers = self.history.keepers
        if not keepers or self.next_keepers == keepers:
            return ""
        staying = self.next_keepers
        return next((peer for peer in keepers if peer not in staying), "")

    @property
    def log_has_majority(self) -> bool:
        """Whether enough keepers are among the living."""
        keepers = self.history.keepers
        return 2 * sum(keeper in self.alive for keeper in keepers) > len(keepers)

    def locations(self) -> list[pnode_pb2.Location]:
        """Where every VNode lives."""
        return [
            pnode_pb2.Location(vnode=vnode, host=host, epoch=self.epoch)
            for vnode, host in sorted(self.placement.items())
        ]

    def well(self, placement: Mapping[str, str]) -> bool:
        """Whether nothing speaks against any host of a placement."""
        return all(self.hosts.well(host, self.now) for host in placement.values())

    def note(self, event: str, **fields: object) -> None:
        """Something that people may want to know of."""
        known = {"network": self.graph.name, "network_id": self.history.network_id}
        self.out.append(m.Note(event, {**known, **fields}))

    def answer(self, ask: int, code: common_pb2.RefusalCode | None = None, why: str = "") -> None:
        """The answer to something that was asked for."""
        refusal = None if code is None else common_pb2.Refusal(code=code, detail=why)
        self.out.append(m.Answer(ask, refusal))
