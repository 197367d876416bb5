"""Our requests under way: what each was for, until it is answered or not. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from p2pnet.gossip.events import GossipConfig, Send
from p2pnet.gossip.messages import Summary
from p2pnet.gossip.table import Table


class Purpose(Enum):
    """Why a peer is asked."""

    PROBE = auto()
    NEWS = auto()
    SYNC = auto()
    FAREWELL = auto()
    REST = auto()
    INQUIRY = auto()


@dataclass(slots=True)
class Asked:
    """One request that has not ended yet."""

    purpose: Purpose
    peer_id: str
    sent_at: float
    summary: Summary | None = None  # that a sync was asked with
    void: bool = False  # we stalled meanwhile: that no answer came says nothing


class Pending:
    """Requests by the id that the shell feeds their end back with."""

    def __init__(self, config: GossipConfig, table: Table) -> None:
        self._config = config
        self._table = table
        self._asked: dict[int, Asked] = {}
        self._next_rpc_id = 1

    def __contains__(self, rpc_id: int) -> bool:
        return rpc_id in self._asked

    @property
    def full(self) -> bool:
        """True while there are so many that only probes and farewells may join them."""
        return len(self._asked) >= self._config.pending_max

    def any(self, purpose: Purpose) -> bool:
        """Whether one for this purpose is under way."""
        return any(asked.purpose is purpose for asked in self._asked.values())

    def send(
        self,
        purpose: Purpose,
        peer_id: str,
        data: bytes,
        now: float,
        summary: Summary | None = None,
    ) -> Send:
        """One more."""
        rpc_id = self._next_rpc_id
        self._next_rpc_id += 1
        self._asked[rpc_id] = Asked(purpose, peer_id, now, summary)
        probe = purpose in (Purpose.PROBE, Purpose.INQUIRY)
        timeout_s = self._config.probe_timeout_s if probe else self._config.request_timeout_s
        entry = self._table.entry(peer_id)
        return Send(rpc_id, peer_id, entry.advert.addrs if entry else (), data, timeout_s)

    def ended(self, rpc_id: int) -> Asked | None:
        """It was answered, or was not; None if there is no such request."""
        return self._asked.pop(rpc_id, None)

    def stalled(self) -> None:
        """We were not there: answers may have come and gone."""
        for asked in self._asked.values():
            asked.void = True
