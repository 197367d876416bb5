"""Who keeps a network's log on peers. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from p2pnet.dht.keyspace import name_key, network_key, peer_position, position

KEEPERS = 5
KEEPERS_LEAST = 3


def first_keepers(name: str, alive: Sequence[str], granted: Sequence[str] = ()) -> tuple[str, ...]:
    """The keepers of the first slot, sorted: those closest to the network's name.

    Its id cannot choose them: it is made from them. `granted` as for `next_keepers`.
    """
    return _choose(name_key(name), (), alive, granted)


def next_keepers(
    network_id: str, present: Sequence[str], alive: Sequence[str], granted: Sequence[str] = ()
) -> tuple[str, ...]:
    """The keepers of the slot after the next one, sorted; `alive` is not empty.

    Living keepers stay, dead ones are replaced by the members closest to the network.
    `granted`: who may orchestrate it, where not everybody may; they come first, for only
    who knows a network can take it over.
    """
    return _choose(network_key(network_id), present, alive, granted)


def _choose(
    key: bytes, present: Sequence[str], alive: Sequence[str], granted: Sequence[str]
) -> tuple[str, ...]:
    """An odd number, at most KEEPERS, so that a majority outlives as many as possible.

    Who sees few members may see too few: three keepers never become fewer, and if need
    be dead ones make up the number.
    """
    target = position(key)
    may, stay = dict.fromkeys(granted), dict.fromkeys(present)
    closest = sorted(
        dict.fromkeys(alive),
        key=lambda peer: (peer not in may, peer not in stay, peer_position(peer) ^ target),
    )
    wanted = max(1, min(KEEPERS, len(closest) - 1 + len(closest) % 2))
    least = min(KEEPERS_LEAST, len(stay) - 1 + len(stay) % 2)
    if wanted < least:
        away = sorted(
            (peer for peer in stay if peer not in closest),
            key=lambda peer: peer_position(peer) ^ target,
        )
        return tuple(sorted((closest + away)[:least]))
    return tuple(sorted(closest[:wanted]))
