"""What a peer asks, and the answer. Pure."""

from __future__ import annotations

from p2pnet.gossip.coordinates import Coordinates
from p2pnet.gossip.detector import Detector
from p2pnet.gossip.events import Effect, PeerRefused, Reply
from p2pnet.gossip.intake import Intake
from p2pnet.gossip.messages import Kinds, read_request, write_message
from p2pnet.gossip.packing import Packer
from p2pnet.gossip.statements import Versions


class Answerer:
    """Takes what a request tells and answers with what its sender lacks."""

    def __init__(
        self,
        versions: Versions,
        detector: Detector,
        coordinates: Coordinates,
        packer: Packer,
        intake: Intake,
    ) -> None:
        self._versions = versions
        self._detector = detector
        self._coordinates = coordinates
        self._packer = packer
        self._intake = intake

    def asked(self, peer_id: str, data: bytes, now: float) -> list[Effect]:
        """A peer asks; the last effect is the `Reply`.

        Raises:
            MalformedError, ForgedError: no honest peer asks so; nothing of it was taken.
        """
        message = read_request(data)
        if not message.versions.overlaps(self._versions):
            return self._refuse(peer_id, message.versions)
        adverts, accusations = self._intake.verified(message)
        self._detector.heard(peer_id)
        if message.coordinate is not None:
            self._coordinates.hear(peer_id, message.coordinate)
        rest = message.kind == Kinds.KIND_SYNC_REST
        older, effects = self._intake.take(adverts, accusations, now, news=not rest)
        if message.kind == Kinds.KIND_SYNC:
            reply = self._packer.sync_reply(peer_id, message.summary, older)
        else:
            here = self._coordinates.here if message.kind == Kinds.KIND_PROBE else None
            reply = self._packer.probe(Kinds.KIND_PROBE_ACK, peer_id, here, older)
        return [*effects, Reply(reply)]

    def _refuse(self, peer_id: str, theirs: Versions) -> list[Effect]:
        detail = (
            f"this peer speaks gossip version {self._versions}, you speak {theirs}: "
            "upgrade the older of the two"
        )
        ours = (
            f"it speaks gossip version {theirs}, we speak {self._versions}: "
            "upgrade the older of the two"
        )
        reply = write_message(Kinds.KIND_REFUSED, self._versions, detail=detail)
        return [PeerRefused(peer_id, ours), Reply(reply)]
