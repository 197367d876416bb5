"""What this node says of itself, and when it contradicts what is said of it. Pure."""

from __future__ import annotations

import math

from p2pnet.gossip.coordinates import Coordinate
from p2pnet.gossip.events import Description
from p2pnet.gossip.statements import INCARNATION_MAX, OpenAdvert, Versions, build_advert
from p2pnet.keys import KeyPair

_SURE = 0.5  # a coordinate with a larger error is worth nothing to others
_STRANGER_S = 5.0  # before an accusation is refuted that counts for nobody; then twice as long
_STRANGER_S_MAX = 600.0
_MOVED_S = 0.005  # further than this, and than this share of the way from the middle,
_MOVED_SHARE = 0.25  # is a move worth telling


class Ourselves:
    """Our advert: its description, incarnation and sequence."""

    def __init__(
        self,
        keypair: KeyPair,
        description: Description,
        versions: Versions,
        *,
        incarnation: int,
        refute_interval_s: float,
    ) -> None:
        self._keypair = keypair
        self._description = description
        self._versions = versions
        self._incarnation = incarnation
        self._sequence = 0
        self._left = False
        self._refute_interval_s = refute_interval_s
        self._refuted_at = -math.inf
        self._stranger_pause_s = _STRANGER_S
        self._coordinate: Coordinate | None = None
        self._place_at: float | None = None  # when our advert may say where we are
        self.refute_at: float | None = None  # when a refutation is due

    @property
    def left(self) -> bool:
        """True once we said that we go."""
        return self._left

    def advert(self) -> OpenAdvert:
        """Our advert as things are now, signed."""
        return build_advert(
            self._keypair,
            incarnation=self._incarnation,
            sequence=self._sequence,
            left=self._left,
            addrs=self._description.addrs,
            grpc_targets=self._description.grpc_targets,
            grpc_certificate=self._description.grpc_certificate,
            capabilities=self._description.capabilities,
            versions=self._versions,
            coordinate=self._coordinate,
        )

    def describe(self, description: Description) -> bool:
        """We are different from now on; False if not."""
        if description == self._description:
            return False
        self._description = description
        self._sequence += 1
        return True

    def moved(self, here: Coordinate, now: float, pause_s: float) -> bool:
        """We are here; True if our advert says something else by much, and may say this now.

        The first time not before `pause_s` are over either: a network that starts would else
        hear of all its members at once.
        """
        if self._place_at is None:
            self._place_at = now + pause_s
        if self._left or here.error > _SURE or now < self._place_at:
            return False
        old = self._coordinate
        if old is not None:
            moved_s = math.dist(old.axes, here.axes) + abs(old.height - here.height)
            if moved_s < max(_MOVED_S, _MOVED_SHARE * (math.hypot(*old.axes) + old.height)):
                return False
        self._coordinate, self._place_at = here, now + pause_s
        self._sequence += 1
        return True

    def leave(self) -> None:
        """We go."""
        self._left = True
        self._sequence += 1
        self.refute_at = None

    def met(self, advert: OpenAdvert) -> bool:
        """An advert in our name came by; True if ours must outdo it.

        It is from an earlier run, by a clock that has been set back since.
        """
        ours = (self._incarnation, self._left, self._sequence)
        if self._left or advert.order <= ours or advert.incarnation >= INCARNATION_MAX:
            return False
        self._incarnation, self._sequence = advert.incarnation + 1, 0
        return True

    def accused(self, incarnation: int, now: float, *, counts: bool = True) -> bool:
        """We are accused; True if a refutation is to come sooner than one was.

        Not without a pause between two, and a longer one where the accusation counts for
        nobody: a liar shall not make us flood the others.
        """
        if self._left or incarnation != self._incarnation:
            return False
        pause_s = self._refute_interval_s
        if not counts:
            # Twice as long each time, or one stranger could keep everybody talking.
            quiet = now - self._refuted_at > 2 * self._stranger_pause_s
            pause_s = _STRANGER_S if quiet else min(2 * self._stranger_pause_s, _STRANGER_S_MAX)
        refute_at = max(now, self._refuted_at + pause_s)
        if self.refute_at is not None and self.refute_at <= refute_at:
            return False
        if not counts:
            self._stranger_pause_s = pause_s
        self.refute_at = refute_at
        return True

    def refute(self, now: float) -> bool:
        """True if a refutation is due: then our incarnation is a new one."""
        if self.refute_at is None or now < self.refute_at:
            return False
        self.refute_at = None
        if self._incarnation >= INCARNATION_MAX:
            return False
        self._refuted_at = now
        self._incarnation, self._sequence = self._incarnation + 1, 0
        return True
