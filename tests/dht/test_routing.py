"""The routing table: buckets, eviction, spares."""

from __future__ import annotations

import random

import pytest
from dht_samples import keypair

from p2pnet.dht.keyspace import common_prefix_bits, peer_position, position
from p2pnet.dht.routing import GROUP_TABLE_MAX, Contact, K, RoutingTable

OWN = keypair(0).peer_id
PEERS = [keypair(n).peer_id for n in range(1, 120)]


def contact(
    peer_id: str, seen_at: float = 0.0, addrs: tuple[str, ...] = ("/a",), group: str = ""
) -> Contact:
    """A server, of an IP group of its own unless one is given."""
    return Contact(peer_id, addrs, True, seen_at, group or peer_id)


def in_bucket(bits: int) -> list[str]:
    """The sample peers of one bucket."""
    own = peer_position(OWN)
    return [p for p in PEERS if common_prefix_bits(own, peer_position(p)) == bits]


def test_closest_is_by_xor_distance() -> None:
    table = RoutingTable(OWN)
    for peer_id in PEERS:
        table.seen(contact(peer_id))
    table.check()
    here = [c.peer_id for c in table]
    for n in range(10):
        target = position(b"key %d" % n)
        expected = sorted(here, key=lambda p: peer_position(p) ^ target)[:20]
        assert [c.peer_id for c in table.closest(target, 20)] == expected


def test_a_full_bucket_keeps_its_oldest_and_asks_for_the_longest_silent() -> None:
    table = RoutingTable(OWN, k=3)
    first, second, third, fourth, *rest = in_bucket(0)
    for at, peer_id in enumerate((first, second, third)):
        assert table.has_room(peer_id)
        assert table.seen(contact(peer_id, at)) is None
    table.seen(contact(first, 5))  # seen again: now the second is the longest silent
    assert not table.has_room(fourth)
    assert table.seen(contact(fourth, 6)) == contact(second, 1)
    assert table.get(fourth) is None
    table.check()
    table.remove(second)  # it did not answer
    assert table.get(fourth) == contact(fourth, 6)
    assert len(table) == 3
    table.check()
    for at, peer_id in enumerate(rest[:20]):
        table.seen(contact(peer_id, 10 + at))
        table.check()
    assert {c.peer_id for c in table} == {first, third, fourth}
    table.remove(first)
    assert table.get(rest[:20][-1]) is not None, "the latest spare comes in"


def test_addresses_stay_until_newer_ones_come() -> None:
    table = RoutingTable(OWN)
    peer_id = PEERS[0]
    table.seen(contact(peer_id, 0, ("/old",)))
    table.seen(contact(peer_id, 1, ()))
    table.moved(PEERS[1], ("/unknown peer",))
    known = table.get(peer_id)
    assert known is not None
    assert known.addrs == ("/old",)
    table.moved(peer_id, ("/new",))
    known = table.get(peer_id)
    assert known is not None
    assert (known.addrs, known.seen_at) == (("/new",), 1)
    assert len(table) == 1


def test_we_are_not_in_our_own_table() -> None:
    table = RoutingTable(OWN)
    table.seen(contact(OWN))
    assert len(table) == 0


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_events_keeps_the_invariants(seed: int) -> None:
    rng = random.Random(seed)
    table = RoutingTable(OWN, k=4)
    for now in range(500):
        peer_id = rng.choice(PEERS)
        match rng.randrange(3):
            case 0:
                table.remove(peer_id)
            case 1:
                table.touch(peer_position(peer_id), now)
            case _:
                table.seen(contact(peer_id, now))
        table.check()
    assert table.stale(501) == sorted(table.stale(501))
    assert len(table) > 4


def test_an_ip_group_has_few_places_once_there_are_others() -> None:
    table = RoutingTable(OWN)
    crowd, others = PEERS[:40], PEERS[40:100]
    for peer_id in crowd:  # as in a swarm of one laboratory
        table.seen(contact(peer_id, group="crowd"))
        table.check()
    assert sum(c.group == "crowd" for c in table) == K
    for peer_id in others:
        table.seen(contact(peer_id))
        table.check()
    assert sum(c.group == "crowd" for c in table) == GROUP_TABLE_MAX
    assert not table.admits(contact(crowd[-1], group="crowd"))
    before = len(table)
    table.seen(contact(crowd[-1], group="crowd"))
    assert len(table) == before


def test_a_contact_that_moves_into_a_full_group_goes() -> None:
    table = RoutingTable(OWN)
    for peer_id in PEERS[:60]:
        table.seen(contact(peer_id))
    crowd = [c.peer_id for c in table][: GROUP_TABLE_MAX + 1]
    for peer_id in crowd:
        table.seen(contact(peer_id, group="crowd"))
        table.check()
    assert table.get(crowd[-1]) is None
    assert all(table.get(peer_id) is not None for peer_id in crowd[:-1])
