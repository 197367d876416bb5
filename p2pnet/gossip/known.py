"""Members worth knowing after a restart: their own signed adverts, on disk. Pure.

Every advert is verified when it is read, so that who changes the file can make a
node forget members, and send it to nobody who did not say himself where he is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from p2pnet.errors import RemoteError
from p2pnet.gossip.events import Member, State
from p2pnet.gossip.statements import ADVERT_BYTES_MAX, OpenAdvert, open_advert
from p2pnet.net.groups import GroupOf, ip_group
from p2pnet.sealed import seal, unseal_message
from p2pnet.v1 import kept_pb2 as pb

KIND = b"peer"
VERSION = 1
KNOWN_MAX = 256
FILE_BYTES_MAX = KNOWN_MAX * (ADVERT_BYTES_MAX + 256)


@dataclass(frozen=True, slots=True)
class Known:
    """A member that was known once. `heard_at_ms`: until when it was here, by the wall clock."""

    advert: OpenAdvert
    heard_at_ms: int


def choose(
    members: Iterable[Member], me: str, now: float, wall_ms: int, group_of: GroupOf = ip_group
) -> list[Known]:
    """The members to start from another time, best first, at most 256.

    Those that are here before those that failed; among these one of each IP group
    before a second of any, as a neighbourhood goes down as one. Of a group first who
    has been here for longest and so will be (Maymounkov and Mazieres 2002, section
    2.2), or has failed last.
    """
    others = [m for m in members if m.peer_id != me and m.advert.addrs and not m.advert.left]
    here = [m for m in others if m.state.live]
    failed = [m for m in others if m.state is State.FAILED]
    here.sort(key=lambda m: (m.since, m.peer_id))
    failed.sort(key=lambda m: (-m.since, m.peer_id))
    chosen = [*_diverse(here, group_of), *_diverse(failed, group_of)][:KNOWN_MAX]
    return [
        Known(m.advert, wall_ms if m.state.live else wall_ms - round((now - m.since) * 1000))
        for m in chosen
    ]


def recalled(known: Known, now: float, wall_ms: int) -> Member:
    """A member as it is known after a restart: gone since it was last heard of."""
    since = now - max(0, wall_ms - known.heard_at_ms) / 1000
    return Member(known.advert.peer_id, State.FAILED, known.advert, since)


def serialise(peers: Sequence[Known]) -> bytes:
    """A file of at most 256 of them."""
    out = pb.KeptPeers()
    for peer in peers[:KNOWN_MAX]:
        out.peers.add(heard_at_ms=peer.heard_at_ms).advert.CopyFrom(peer.advert.signed)
    return seal(KIND, VERSION, out.SerializeToString())


def parse(data: bytes) -> tuple[list[Known], int]:
    """The members in a file whose adverts hold, in their order, and how many did not.

    Raises:
        LocalError: another kind of file, or a damaged one; says which.
    """
    kept = unseal_message(pb.KeptPeers, KIND, VERSION, data, FILE_BYTES_MAX)
    found: dict[str, Known] = {}
    for peer in kept.peers[:KNOWN_MAX]:
        try:
            advert = open_advert(peer.advert)
        except RemoteError:
            continue
        if not advert.left:
            found.setdefault(advert.peer_id, Known(advert, peer.heard_at_ms))
    return list(found.values()), len(kept.peers) - len(found)


def _diverse(members: Iterable[Member], group_of: GroupOf) -> list[Member]:
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(group_of(member.peer_id, member.advert.addrs[0]), []).append(member)
    rounds = zip_longest(*groups.values())
    return [member for one_of_each in rounds for member in one_of_each if member is not None]
