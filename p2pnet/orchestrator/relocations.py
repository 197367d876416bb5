"""What has moved in a network, by whom it was noticed and how long that took. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from p2pnet.log.history import History, placement_of
from p2pnet.orchestrator.desk import Desk
from p2pnet.v1 import orchestrator_pb2

KEPT = 1000


class Relocations:
    """The last of them, the oldest first."""

    def __init__(self) -> None:
        self.rows: list[orchestrator_pb2.Relocation] = []

    def take_over(self, history: History) -> None:
        """What moved from claim to claim, as the log says; it does not say how long that took."""
        before: dict[str, str] = {}
        for _, claim in history.claims:
            now = placement_of(claim)
            for vnode, host in _moved(before, now):
                self._add(vnode, before[vnode], host, claim.epoch, claim.reason)
            before = now

    def note(self, desk: Desk, placement: Mapping[str, str], reason: str, since: float) -> None:
        """The network moves to a placement; what is wrong was noticed at `since`."""
        for vnode, host in _moved(desk.placement, placement):
            before = desk.placement[vnode]
            self._add(vnode, before, host, desk.epoch, reason, desk.now - since)
            desk.note(
                "relocated",
                vnode=vnode,
                from_host=before,
                to_host=host,
                epoch=desk.epoch,
                reason=reason,
            )

    def _add(
        self, vnode: str, before: str, host: str, epoch: int, reason: str, seconds: float = 0.0
    ) -> None:
        self.rows.append(
            orchestrator_pb2.Relocation(
                vnode=vnode,
                from_host=before,
                to_host=host,
                epoch=epoch,
                reason=reason,
                seconds=seconds,
            )
        )
        del self.rows[:-KEPT]


def _moved(before: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(vnode, host) for vnode, host in sorted(now.items()) if before.get(vnode, host) != host]
