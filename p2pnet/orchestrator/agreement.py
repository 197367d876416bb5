"""What is being claimed, and whether the hosts agree to it once it is. Pure.

A part of `Conductor`. All hosts of VNodes have to agree; who is only to follow may fail,
and is done without.
"""

from __future__ import annotations

from collections.abc import Mapping

from p2pnet.errors import RemoteError
from p2pnet.keys import short
from p2pnet.orchestrator import messages as m
from p2pnet.orchestrator.allocations import allocate_requests, check_accepted
from p2pnet.orchestrator.desk import Desk
from p2pnet.orchestrator.hosts import all_hosts, by_host
from p2pnet.orchestrator.training import Training
from p2pnet.orchestrator.watching import LEASE_S
from p2pnet.v1 import common_pb2

BUSY = common_pb2.REFUSAL_CODE_BUSY
FAILED = common_pb2.REFUSAL_CODE_FAILED
STATE_LOST = common_pb2.REFUSAL_CODE_STATE_LOST


class Agreement:
    """A placement that is to be, from when it is chosen until every host has answered.

    Attributes:
        placement, standbys: what is chosen; `live`: it goes on in memory.
        lives_from: the epoch that VNodes have all decided steps of in memory; 0: none.
        why_not: why it has failed, "" as long as it has not.
    """

    def __init__(self, desk: Desk, training: Training) -> None:
        self.placement: dict[str, str] = {}
        self.standbys: dict[str, tuple[str, ...]] = {}
        self.live = False
        self.lives_from = 0
        self.why_not = ""
        self._desk = desk
        self._training = training
        self._asked: dict[str, None] = {}  # hosts whose answer is awaited
        self._acceptances: list[common_pb2.Signed] = []
        self._without: dict[str, None] = {}  # who only follows, and has not agreed

    @property
    def hosts(self) -> tuple[str, ...]:
        """Who hosts or follows something in it, sorted."""
        return all_hosts(self.placement, self.standbys)

    @property
    def pending(self) -> bool:
        """Whether an answer is awaited."""
        return bool(self._asked)

    @property
    def can_live(self) -> bool:
        """Whether it is worth asking to go on in memory: the next claim follows that epoch."""
        in_memory = 0 < self.lives_from == self._desk.epoch == self._desk.history.epoch
        return in_memory and self._training.live_step > 0

    def choose(
        self,
        placement: Mapping[str, str],
        standbys: Mapping[str, tuple[str, ...]],
        *,
        live: bool = False,
    ) -> None:
        """That is to be claimed, without standbys that something speaks against."""
        well, now = self._desk.hosts.well, self._desk.now
        left = {
            vnode: tuple(peer for peer in peers if well(peer, now))
            for vnode, peers in standbys.items()
        }
        self.placement = dict(placement)
        self.standbys = {vnode: peers for vnode, peers in left.items() if peers}
        self.live = live

    def ask(self, claim: common_pb2.Signed) -> None:
        """It is claimed: the hosts are asked."""
        desk, training = self._desk, self._training
        # The commit that was on its way may have come as far as the last decided step, and
        # a claim of ours that we had given up may have come in between.
        live_step = training.live_step
        self.live = self.live and live_step > 0 and desk.epoch == self.lives_from + 1
        self._acceptances.clear()
        self._without.clear()
        self.why_not = ""
        requests = allocate_requests(
            desk.history,
            desk.graph,
            claim,
            self.placement,
            self.standbys,
            lease_s=LEASE_S,
            step=desk.committed_step,
            states=desk.states,
            state_url=desk.charter.state_url,
            live_step=live_step if self.live else 0,
            norms=training.norms if self.live else (),
        )
        self._asked = dict.fromkeys(requests)
        desk.out += [m.Allocate(host, request) for host, request in requests.items()]

    def awaits(self, host: str, epoch: int) -> bool:
        """Whether that answer is to come."""
        return epoch == self._desk.epoch and host in self._asked

    def accepted(self, event: m.Allocated) -> bool:
        """A host says yes. Returns whether that was the last answer."""
        desk = self._desk
        wanted = by_host(self.placement).get(event.host, ())
        try:
            check_accepted(
                desk.history.network_id,
                desk.epoch,
                event.host,
                wanted,
                event.acceptances,
                self.standbys,
            )
        except RemoteError as error:
            return self.refused(event.host, str(error), 0)
        self._acceptances += event.acceptances
        return self._answered(event.host)

    def refused(self, host: str, reason: str, code: int) -> bool:
        """A host says no, or nothing. Returns whether that was the last answer."""
        desk = self._desk
        cannot_live = self.live and code == FAILED  # but from the cut it can
        if code == STATE_LOST:
            why = f"peer {short(host)}: {reason}"
            desk.lost.said(desk.committed_step, desk.epoch, why, desk.now)
        elif code != BUSY and not cannot_live:  # busy is: in a moment
            desk.hosts.shun(host, desk.now)
        if host in self.placement.values():
            self.why_not = self.why_not or f"peer {short(host)} did not agree: {reason}"
        else:
            self._without[host] = None
        desk.note("refused", host=host, epoch=desk.epoch, reason=reason)
        return self._answered(host)

    def gone(self, host: str, reason: str) -> bool:
        """A peer is no more. Returns whether its was the last answer."""
        if host in self.placement.values():
            self._desk.hosts.shun(host, self._desk.now)
            self.why_not = self.why_not or reason
        elif host in self._asked:
            self._without[host] = None
        return host in self._asked and self._answered(host)

    def forget(self) -> None:
        """No answer matters any more."""
        self._asked.clear()

    def settle(self) -> None:
        """All have agreed: it is what there is now."""
        desk = self._desk
        desk.hosts.lost(desk.hosts_now, self.hosts)
        desk.placement, desk.standbys = dict(self.placement), dict(self.standbys)
        desk.unfollowed.clear()
        for host in self._without:
            desk.standby_gone(host, "it has not agreed to follow")
        desk.out.append(m.Publish(desk.epoch, tuple(self._acceptances), desk.history.keepers))

    def fail(self) -> None:
        """It comes to nothing. Some may have agreed, and are not chosen again."""
        self._desk.hosts.lost(self.hosts, self._desk.hosts_now)

    def _answered(self, host: str) -> bool:
        del self._asked[host]
        return not self._asked
