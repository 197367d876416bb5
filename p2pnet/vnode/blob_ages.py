"""Which blobs are whose and since when, and so which may go. Pure.

A blob belongs to every network that it was put for: networks that begin alike have
the same states. What was on disk when the node started belongs to nobody yet; a
network that names it takes it over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

# A blob that no commit names yet may be about to be named.
UNNAMED_KEPT_S = 60.0
# Long enough for a network that stands idle to be trained again, and so to name what is its
# own; where room is short they go before that.
UNKNOWN_KEPT_S = 30 * 24 * 3600.0


@dataclass(slots=True)
class _Blob:
    since: float
    networks: dict[str, bool] = field(default_factory=dict)  # does its last commit name it?


class BlobAges:
    """The blobs on this disk. Times in seconds of the node's clock.

    Args:
        found: what is there at the start, by digest: since when.
    """

    def __init__(self, found: Mapping[bytes, float]) -> None:
        self._blobs = {digest: _Blob(since) for digest, since in found.items()}

    def put(self, network_id: str, digest: bytes, now: float) -> None:
        """A network wants a blob kept."""
        blob = self._blobs.setdefault(digest, _Blob(now))
        blob.since = now
        blob.networks.setdefault(network_id, False)

    def retain(self, network_id: str, digests: Collection[bytes], now: float) -> list[bytes]:
        """A network says which of its blobs commits name; the blobs that may go now."""
        named = dict.fromkeys(digests)
        for digest in named:
            if digest in self._blobs:
                self._blobs[digest].networks[network_id] = True
        gone = []
        for digest, blob in self._blobs.items():
            if network_id in blob.networks and digest not in named:
                blob.networks[network_id] = False
                if blob.since < now - UNNAMED_KEPT_S:
                    del blob.networks[network_id]
                    if not blob.networks:
                        gone.append(digest)
            elif not blob.networks and blob.since < now - UNKNOWN_KEPT_S:
                gone.append(digest)
        for digest in gone:
            del self._blobs[digest]
        return gone

    def release(self, network_id: str, digest: bytes) -> bool:
        """A network wants a blob no longer that no commit of it names; whether it may go now."""
        blob = self._blobs.get(digest)
        if blob is None or blob.networks.get(network_id) is not False:
            return False
        del blob.networks[network_id]
        if blob.networks:
            return False
        del self._blobs[digest]
        return True

    def oldest_unnamed(self, now: float) -> bytes | None:
        """What goes first where there is no room, and is forgotten here; None: all is of use."""
        unnamed = [
            (blob.since, digest)
            for digest, blob in self._blobs.items()
            if blob.since < now - UNNAMED_KEPT_S and not any(blob.networks.values())
        ]
        if not unnamed:
            return None
        _, digest = min(unnamed)
        del self._blobs[digest]
        return digest
