"""Who keeps a network's log. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from p2pnet.dht.keyspace import network_key, peer_position, position

KEEPERS = 5


def choose_keepers(
    network_id: str, present: Sequence[str], alive: Sequence[str]
) -> tuple[str, ...]:
    """The keepers of the slot after the next one, sorted; `alive` is not empty.

    Living keepers stay, dead ones are replaced by the members closest to the network. An
    odd number, at most KEEPERS, so that a majority outlives as many as possible.
    """
    living = dict.fromkeys(alive)
    target = position(network_key(network_id))
    closest = sorted(living, key=lambda peer: peer_position(peer) ^ target)
    stay = [peer for peer in present if peer in living]
    wanted = min(KEEPERS, len(living) - 1 + len(living) % 2)
    chosen = (stay + [peer for peer in closest if peer not in stay])[: max(1, wanted)]
    return tuple(sorted(chosen))
