"""What the parts of a conductor share: the network, the time, and what is to be done. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from p2pnet.keys import KeyPair
from p2pnet.log.history import History
from p2pnet.log.keepers import next_keepers
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.hosts import HostBook, all_hosts
from p2pnet.orchestrator.lost_states import LostStates
from p2pnet.v1 import common_pb2, pnode_pb2, records_pb2
from p2pnet.vnode.graph import CompiledGraph

REASON_CHARS_MAX = 200


@dataclass(slots=True)
class Desk:
    """One network, as its orchestrator has it.

    Attributes:
        epoch: of our claim; `placement`: VNode -> peer id; `ready`: whether every host
            has agreed to it.
        standbys: VNode -> who is to follow it; `unfollowed`: VNodes that nobody has
            followed at every step of this epoch.
        lost: what hosts say of states that are nowhere to be had.
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
    standbys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unfollowed: dict[str, None] = field(default_factory=dict)
    lost: LostStates = field(default_factory=LostStates)
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
        """Where every VNode lives, and then where its standbys do."""
        return locations(self.epoch, self.placement, self.standbys)

    @property
    def hosts_now(self) -> tuple[str, ...]:
        """Who hosts or follows something, sorted."""
        return all_hosts(self.placement, self.standbys)

    @property
    def followers(self) -> dict[str, tuple[str, ...]]:
        """VNode -> who has followed it at every step, as far as is known."""
        return {
            vnode: peers for vnode, peers in self.standbys.items() if vnode not in self.unfollowed
        }

    def unfollow(self, vnodes: Iterable[str], why: str) -> None:
        """Nobody can take these VNodes over in memory any more, under this epoch."""
        fresh = [v for v in vnodes if v in self.standbys and v not in self.unfollowed]
        self.unfollowed.update(dict.fromkeys(fresh))
        if fresh:
            self.note("unfollowed", vnodes=fresh, epoch=self.epoch, reason=why)

    def well(self, placement: Mapping[str, str]) -> bool:
        """Whether nothing speaks against any host of a placement."""
        return all(self.hosts.well(host, self.now) for host in placement.values())

    def standby_gone(self, peer_id: str, why: str) -> None:
        """A peer follows nothing any more. Nothing stops for that."""
        self.unfollow([v for v, peers in self.standbys.items() if peer_id in peers], why)

    def note(self, event: str, **fields: object) -> None:
        """Something that people may want to know of."""
        known = {"network": self.graph.name, "network_id": self.history.network_id}
        self.out.append(m.Note(event, {**known, **fields}))

    def answer(self, ask: int, code: common_pb2.RefusalCode | None = None, why: str = "") -> None:
        """The answer to something that was asked for."""
        refusal = None if code is None else common_pb2.Refusal(code=code, detail=why)
        self.out.append(m.Answer(ask, refusal))


def locations(
    epoch: int, placement: Mapping[str, str], standbys: Mapping[str, Sequence[str]]
) -> list[pnode_pb2.Location]:
    """Where every VNode lives under an epoch, and then where its standbys do."""
    rows = [
        pnode_pb2.Location(vnode=vnode, host=host, epoch=epoch)
        for vnode, host in sorted(placement.items())
    ]
    return rows + [
        pnode_pb2.Location(vnode=vnode, host=host, epoch=epoch, standby=True)
        for vnode in sorted(standbys)
        for host in standbys[vnode]
    ]
