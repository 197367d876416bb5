"""What an owner signs, and whom a submission is taken to first."""

from __future__ import annotations

import pytest
from memory_wire import keypair_of
from small_network import small_graph

from p2pnet.client.terms import Terms, new_manifest
from p2pnet.dht.keyspace import name_key, peer_position, position
from p2pnet.dht.manifest import grants, network_id_of, open_manifest
from p2pnet.errors import UsageError
from p2pnet.log.keepers import first_keepers
from p2pnet.v1 import common_pb2

PEERS = [keypair_of(name).peer_id for name in "abcdefghij"]


def manifest(terms: Terms, keepers: tuple[str, ...] = (), state_url: str = "") -> common_pb2.Signed:
    return new_manifest(
        keypair_of("owner"),
        small_graph(),
        terms,
        keepers=keepers,
        state_url=state_url,
        now_ms=1000,
        nonce=b"n" * 16,
    )


@pytest.mark.parametrize(
    ("members", "keepers"), [(0, 0), (1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (10, 5)]
)
def test_an_odd_number_of_members_keeps_the_log_first(members: int, keepers: int) -> None:
    chosen = first_keepers("small", PEERS[:members])
    assert len(chosen) == keepers
    assert list(chosen) == sorted(chosen)
    target = position(name_key("small"))
    distances = {peer: peer_position(peer) ^ target for peer in PEERS[:members]}
    others = [distances[peer] for peer in PEERS[:members] if peer not in chosen]
    assert all(distances[peer] < other for peer in chosen for other in others)
    assert first_keepers("small", PEERS[:members][::-1]) == chosen


def test_by_default_anybody_may_and_nothing_is_limited() -> None:
    signed = manifest(Terms(), keepers=first_keepers("small", PEERS))
    opened = open_manifest(signed)
    assert opened.any_orchestrator
    assert len(opened.keepers) == 5
    assert not opened.state_url
    assert not opened.HasField("limits")
    assert all(grants(opened, peer) for peer in PEERS)


def test_what_the_terms_say_is_signed() -> None:
    terms = Terms((PEERS[3], PEERS[1], PEERS[3]), hosts_max=4, claims_max=9, expires_in_s=60)
    opened = open_manifest(manifest(terms, keepers=(PEERS[0],)))
    assert [grants(opened, peer) for peer in PEERS[:4]] == [False, True, False, True]
    assert list(opened.orchestrators) == sorted([PEERS[1], PEERS[3]])
    limits = opened.limits
    assert (limits.hosts_max, limits.claims_max, limits.expires_at_ms) == (4, 9, 61_000)


def test_with_a_store_there_are_no_keepers() -> None:
    signed = manifest(Terms(), keepers=tuple(PEERS[:3]), state_url="file:///srv/state")
    opened = open_manifest(signed)
    assert not opened.keepers
    assert opened.state_url == "file:///srv/state"
    assert network_id_of(signed) != network_id_of(manifest(Terms(), keepers=tuple(PEERS[:3])))


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        (Terms(("nobody!",)), "p2pnet members"),
        (Terms(tuple(PEERS * 7)), "at most 64"),
        (Terms(hosts_max=-1), "number of hosts"),
        (Terms(claims_max=2**32), "number of claims"),
        (Terms(expires_in_s=-1.0), "100 years"),
        (Terms(expires_in_s=float("inf")), "100 years"),
        (Terms(expires_in_s=float("nan")), "100 years"),
    ],
)
def test_terms_that_cannot_be(terms: Terms, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        terms.check()


def test_whom_a_submission_is_taken_to() -> None:
    Terms().check()
    first = Terms().candidates(PEERS, "small", PEERS[7])
    assert first[0] == PEERS[7]
    assert sorted(first) == sorted(PEERS)
    target = position(name_key("small"))
    assert first[1:] == sorted(first[1:], key=lambda peer: peer_position(peer) ^ target)
    allowed = Terms((PEERS[2], PEERS[5], keypair_of("away").peer_id))
    assert sorted(allowed.candidates(PEERS, "small", PEERS[7])) == sorted([PEERS[2], PEERS[5]])
    with pytest.raises(UsageError, match="none of the peers that may"):
        Terms((keypair_of("away").peer_id,)).candidates(PEERS, "small", PEERS[7])
