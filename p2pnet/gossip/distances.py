"""How far any two members are from each other, as this node can tell. Pure."""

from __future__ import annotations

from p2pnet.gossip.coordinates import Coordinate, Coordinates
from p2pnet.gossip.table import Table


class Distances:
    """What was measured or heard goes before what an advert says."""

    def __init__(self, coordinates: Coordinates, table: Table) -> None:
        self._coordinates = coordinates
        self._table = table

    def round_trip_s(self, a: str, b: str) -> float | None:
        """See `Membership.round_trip_s`."""
        if a == b:
            return 0.0
        me = self._table.me
        if me in (a, b):
            measured_s = self._coordinates.measured_s(b if a == me else a)
            if measured_s is not None:
                return measured_s
        one, other = self._where(a), self._where(b)
        return one.round_trip_s(other) if one is not None and other is not None else None

    def _where(self, peer_id: str) -> Coordinate | None:
        if peer_id == self._table.me:
            return self._coordinates.here
        heard = self._coordinates.heard_of(peer_id)
        entry = self._table.entry(peer_id)
        return heard if heard is not None or entry is None else entry.advert.coordinate
