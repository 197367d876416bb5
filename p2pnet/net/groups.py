"""IP groups: accusers from one neighbourhood of the internet count once. Pure.

Identities are free, addresses less so: a quorum is one of groups. Loopback and
private addresses tell nothing, so there every peer is a group of its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from functools import lru_cache

# (peer id, multiaddr or "") -> group
GroupOf = Callable[[str, str], str]

_V4_BITS = 24  # what one holder commonly gets
_V6_BITS = 48


# Asked for at every walk along a ring or a bucket, and parsing an address takes its time.
@lru_cache(maxsize=8192)
def ip_group(peer_id: str, addr: str) -> str:
    """The network of a multiaddr's IP address, or the peer id where that is not public."""
    parts = addr.split("/")
    if len(parts) < 3 or parts[1] not in ("ip4", "ip6"):
        return peer_id
    try:
        address = ipaddress.ip_address(parts[2])
    except ValueError:
        return peer_id
    if not address.is_global:
        return peer_id
    bits = _V4_BITS if address.version == 4 else _V6_BITS
    return str(ipaddress.ip_network((address, bits), strict=False))
