"""What a node knows, in few bytes: a digest for each bucket of the ring. Pure.

Two nodes whose digests of a bucket are alike know the same of its members, and
need not tell each other (anti-entropy by digests, as in Merkle trees: Demers et
al., PODC 1987, section 1.3; DeCandia et al., "Dynamo", SOSP 2007, section 4.7).
A digest is over what is said of the *live* members: one who left or failed is
told about only to whoever holds it live, so that what one node forgets does not
come back from another.
"""

from __future__ import annotations

from collections.abc import Callable

from p2pnet.gossip.ring import bucket
from p2pnet.keys import sha256

DEPTH_MAX = 12  # 4,096 buckets
DIGEST_BYTES = 8
EMPTY = bytes(DIGEST_BYTES)
_MEMBERS_A_BUCKET = 8


def depth_for(members: int) -> int:
    """Into how many buckets, 2**depth, a ring of so many members is cut."""
    return min(DEPTH_MAX, (members // _MEMBERS_A_BUCKET).bit_length())


class Digests:
    """Digests by (depth, bucket), computed when asked for and kept until a member changes.

    Args:
        content: what is known of a bucket's members, as bytes; b"" for none.
        base: digests that hold for every bucket in which nothing was changed here.
    """

    def __init__(self, content: Callable[[int, int], bytes], base: Digests | None = None) -> None:
        self._content = content
        self._base = base
        self._kept: dict[int, bytes] = {}
        self._changed: set[int] = set()

    def changed(self, peer_id: str) -> None:
        """Something is known of this member that was not."""
        node = _node(DEPTH_MAX, bucket(peer_id, DEPTH_MAX))
        while node:
            self._kept.pop(node, None)
            if self._base is not None:
                self._changed.add(node)
            node >>= 1

    def get(self, depth: int, index: int) -> bytes:
        """One bucket's digest; EMPTY where there is nobody."""
        node = _node(depth, index)
        if self._base is not None and node not in self._changed:
            return self._base.get(depth, index)
        kept = self._kept.get(node)
        if kept is None:
            content = self._content(depth, index)
            kept = self._kept[node] = sha256(content)[:DIGEST_BYTES] if content else EMPTY
        return kept

    def check(self, depth: int) -> None:
        """Raises AssertionError if a kept digest of this depth or a finer one is not true."""
        for node, kept in self._kept.items():
            at = node.bit_length() - 1
            if at >= depth:
                content = self._content(at, node - (1 << at))
                assert kept == (sha256(content)[:DIGEST_BYTES] if content else EMPTY)

    def check_of(self, peer_id: str) -> None:
        """The same, of the finest bucket of one member."""
        index = bucket(peer_id, DEPTH_MAX)
        kept = self._kept.get(_node(DEPTH_MAX, index))
        content = self._content(DEPTH_MAX, index) if kept is not None else b""
        assert kept is None or kept == (sha256(content)[:DIGEST_BYTES] if content else EMPTY)


def _node(depth: int, index: int) -> int:
    # The buckets of all depths as one binary tree, numbered as a heap is.
    return 1 << depth | index
