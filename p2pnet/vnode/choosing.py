"""Raw or compressed: which gets a tensor to a peer sooner, by what was measured. Pure.

A tensor of n bytes takes n/w raw, with w the way's bytes a second; compressed it takes
n/z + r n/w + n/u, with z and u the CPU's bytes a second there and back, and r how much is
left of it. w is the largest of the last delivery rates (as BBR estimates a bottleneck,
Cardwell et al. 2016: whatever else a message waits for makes its rate smaller); z and r
come from compressing a sample now and then.
"""

from __future__ import annotations

from collections import deque

from p2pnet.bounded import keep_latest

RATES_KEPT = 16
PEERS_MAX = 1024
EDGES_MAX = 4096
SAMPLE_EVERY = 64  # tensors of one edge
MEASURED_BYTES_MIN = 64 << 10  # what is smaller says nothing of the bandwidth ...
QUICK_BYTES_MAX = 4 << 10  # ... and what is smaller than that says how far away a peer is
GAIN_MIN = 0.9  # compressed must take less than so much of the time
UNPACKS_FASTER = 3.0  # than it packs: zstd's own figures, level 1
WEIGHT = 0.25  # of a new sample
ELAPSED_S_MIN = 50e-6


class CodecChooser:
    """What is known of the ways to peers, of the CPU, and of the tensors of each edge."""

    def __init__(self) -> None:
        self._rates: dict[str, deque[float]] = {}  # bytes/s, by peer
        self._away_s: dict[str, float] = {}  # there and back
        self._pack_rate = 0.0  # bytes/s; 0: not known
        self._edges: dict[str, tuple[float, int]] = {}  # what is left, and until the next sample

    def delivered(self, peer_id: str, size_bytes: int, elapsed_s: float) -> None:
        """A peer has taken so many bytes in that time, there and back."""
        away_s = self._away_s.get(peer_id, 0.0)
        if size_bytes <= QUICK_BYTES_MAX:
            nearest_s = min(away_s, elapsed_s) if away_s else elapsed_s
            keep_latest(self._away_s, peer_id, nearest_s, PEERS_MAX)
        elif size_bytes >= MEASURED_BYTES_MIN:
            rates = self._rates.get(peer_id) or deque[float](maxlen=RATES_KEPT)
            rates.append(size_bytes / max(elapsed_s - away_s, ELAPSED_S_MIN))
            keep_latest(self._rates, peer_id, rates, PEERS_MAX)

    def sampled(self, edge: str, size_bytes: int, left: float, elapsed_s: float) -> None:
        """So many bytes of an edge's tensor became `left` of them (0 to 1) in that time."""
        if not size_bytes:
            return
        rate = size_bytes / max(elapsed_s, 1e-9)
        self._pack_rate = _mixed(self._pack_rate, rate) if self._pack_rate else rate
        known = self._edges.get(edge)
        left = left if known is None else _mixed(known[0], left)
        keep_latest(self._edges, edge, (left, SAMPLE_EVERY), EDGES_MAX)

    def wants_sample(self, peer_id: str, edge: str, size_bytes: int) -> bool:
        """Whether a sample of the tensor at hand may change the choice."""
        if size_bytes < MEASURED_BYTES_MIN or not self._rates.get(peer_id):
            return False
        left, until = self._edges.get(edge, (0.0, 0))
        if until > 0:
            self._edges[edge] = left, until - 1
            return False
        # Where even nothing left of it would be no gain, there is nothing to find out.
        if self._pack_rate and not self._gains(peer_id, 0.0):
            keep_latest(self._edges, edge, (left or 1.0, SAMPLE_EVERY), EDGES_MAX)
            return False
        return True

    def compresses(self, peer_id: str, edge: str, size_bytes: int) -> bool:
        """Whether to compress a tensor."""
        known = self._edges.get(edge)
        if size_bytes < MEASURED_BYTES_MIN or known is None or not self._rates.get(peer_id):
            return False
        return self._gains(peer_id, known[0])

    def _gains(self, peer_id: str, left: float) -> bool:
        if not self._pack_rate:
            return False
        raw_s = 1 / max(self._rates[peer_id])  # a byte
        packed_s = (1 + 1 / UNPACKS_FASTER) / self._pack_rate + left * raw_s
        return packed_s < GAIN_MIN * raw_s


def _mixed(old: float, new: float) -> float:
    return (1 - WEIGHT) * old + WEIGHT * new
