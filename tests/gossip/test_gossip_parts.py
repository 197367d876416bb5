"""The parts of membership by themselves: ring, groups, health, rumours, probing."""

from __future__ import annotations

import pytest
from gossip_world import keypair

from p2pnet.gossip.events import GossipConfig
from p2pnet.gossip.health import LocalHealth, suspicion_s
from p2pnet.gossip.probing import Watch
from p2pnet.gossip.ring import Ring, position
from p2pnet.gossip.rumours import Rumours
from p2pnet.net.groups import ip_group


def test_the_ring_is_in_the_order_of_hashes_and_goes_round() -> None:
    ring = Ring()
    peers = [keypair(number).peer_id for number in range(1, 8)]
    for peer_id in peers:
        ring.add(peer_id)
    order = sorted(peers, key=position)
    third = order[2]
    assert list(ring.after(third)) == order[3:] + order[:2]
    assert list(ring.before(third)) == [*order[:2][::-1], *order[3:][::-1]]
    ring.remove(order[3])
    assert next(ring.after(third)) == order[4]
    assert list(ring.all()) == [p for p in order if p != order[3]]


@pytest.mark.parametrize(
    ("addr", "group"),
    [
        ("/ip4/8.8.4.4/tcp/1", "8.8.4.0/24"),
        ("/ip4/8.8.4.200/udp/7/quic", "8.8.4.0/24"),
        ("/ip6/2a00:1450:4001:81b::200e/tcp/1", "2a00:1450:4001::/48"),
        ("/ip4/127.0.0.1/tcp/1", "me"),
        ("/ip4/10.1.2.3/tcp/1", "me"),
        ("/ip6/fe80::1/tcp/1", "me"),
        ("/dns4/example.org/tcp/1", "me"),
        ("/ip4/999.1.1.1/tcp/1", "me"),
        ("/ip4", "me"),
        ("", "me"),
    ],
)
def test_public_addresses_group_by_network_and_others_by_peer(addr: str, group: str) -> None:
    assert ip_group("me", addr) == group


@pytest.mark.parametrize(
    ("confirmations", "possible", "members", "expected"),
    [
        (0, 3, 5, 6.0),  # nobody confirms: the longest
        (1, 3, 5, 4.25),  # 6 - 3.5 * log 2 / log 4
        (3, 3, 5, 2.5),  # all do: the shortest
        (0, 0, 2, 2.5),  # nobody could: no use in waiting
        (3, 3, 1000, 7.5),  # log10 of the members
        (0, 3, 100, 12.0),
    ],
)
def test_a_suspicion_lasts_longer_the_fewer_confirm_it(
    confirmations: int, possible: int, members: int, expected: float
) -> None:
    lasting = suspicion_s(confirmations, possible, members, min_s=2.5, max_s=6.0)
    assert lasting == pytest.approx(expected)


def test_health_is_lost_by_lateness_and_comes_back_with_time() -> None:
    health = LocalHealth(1.0)
    assert health.score(0) == 0
    health.late(0.6, 10.0)
    assert health.score(10.5) == 1
    health.late(2.5, 10.5)
    assert health.score(10.6) == 4
    health.accused(10.6)
    assert health.score(10.6) == 4  # no more than this
    assert [health.score(t) for t in (11.7, 12.7, 14.7, 100.0)] == [3, 2, 0, 0]


def test_rumours_are_told_so_often_the_newest_first_and_are_bounded() -> None:
    rumours = Rumours(2)
    first, second, third = (bytes([n]) * 10 for n in range(3))
    rumours.add(("a", ""), first, 2)
    rumours.add(("b", ""), second, 3)
    assert [key for key, _ in rumours.take(1000)] == [("b", ""), ("a", "")]
    assert [key for key, _ in rumours.take(12)] == [("b", "")]
    assert len(rumours) == 2
    rumours.add(("c", ""), third, 1)  # the oldest makes way
    assert sorted(key for key, _ in rumours.take(1000)) == [("b", ""), ("c", "")]
    assert rumours.take(1000) == []


def test_whom_we_cannot_reach_but_others_can_we_accuse_ever_more_slowly() -> None:
    config = GossipConfig()
    watch = Watch(0.0)
    needed = []
    for _ in range(3):
        probes = 0
        while not watch.refusing(config):
            watch.missed(float(probes), probes + 0.01, config)
            probes += 1
        needed.append(probes)
        watch.refuted(0.0)
    assert needed == [2, 4, 8]
    watch.answered()
    assert watch.backoff == 0
