"""Caller sessions: who is let in, who is not, and that the tables stay bounded."""

from __future__ import annotations

import random

import pytest

from p2pnet.errors import ForgedError, MalformedError, RefusedError, VersionError
from p2pnet.keys import RECORD, KeyPair
from p2pnet.net.session import (
    NONCE_LIFE_S,
    SESSION_LIFE_S,
    SessionTable,
    choose_version,
    make_proof,
    version_range,
)
from p2pnet.v1 import common_pb2, session_pb2

ALICE = KeyPair.from_seed(b"a" * 32)
BOB = KeyPair.from_seed(b"b" * 32)
DIGEST = b"d" * 32
NONCE = b"n" * 32
TOKEN = b"t" * 32


def challenge(table: SessionTable, now: float, nonce: bytes = NONCE) -> session_pb2.ChallengeReply:
    return table.challenge(session_pb2.ChallengeRequest(versions=version_range()), now, nonce)


def let_in(table: SessionTable, keypair: KeyPair, now: float, token: bytes) -> None:
    reply = challenge(table, now, token[::-1])
    table.open(make_proof(keypair, reply, DIGEST), now, token)


def test_a_proof_opens_a_session_for_its_author() -> None:
    table = SessionTable(DIGEST)
    reply = table.open(make_proof(ALICE, challenge(table, 0.0), DIGEST), 1.0, TOKEN)
    assert (reply.token, reply.version, reply.lifetime_s) == (TOKEN, 1, SESSION_LIFE_S)
    assert table.caller(TOKEN, 2.0) == ALICE.peer_id
    assert table.caller(b"another", 2.0) is None
    table.check()


def test_a_session_ends() -> None:
    table = SessionTable(DIGEST)
    let_in(table, ALICE, 0.0, TOKEN)
    assert table.caller(TOKEN, SESSION_LIFE_S - 0.001) == ALICE.peer_id
    assert table.caller(TOKEN, SESSION_LIFE_S) is None
    table.check()
    assert table.caller(TOKEN, 0.0) is None  # forgotten, not only old


@pytest.mark.parametrize(("later_s", "good"), [(NONCE_LIFE_S - 0.001, True), (NONCE_LIFE_S, False)])
def test_a_challenge_ends(later_s: float, good: bool) -> None:
    table = SessionTable(DIGEST)
    proof = make_proof(ALICE, challenge(table, 5.0), DIGEST)
    if good:
        table.open(proof, 5.0 + later_s, TOKEN)
    else:
        with pytest.raises(RefusedError, match="older than 10 s"):
            table.open(proof, 5.0 + later_s, TOKEN)


def test_a_proof_replayed_is_refused() -> None:
    table = SessionTable(DIGEST)
    proof = make_proof(ALICE, challenge(table, 0.0), DIGEST)
    table.open(proof, 0.0, TOKEN)
    with pytest.raises(RefusedError, match="used"):
        table.open(proof, 0.0, b"u" * 32)
    assert table.caller(b"u" * 32, 0.0) is None


def test_a_failed_proof_uses_its_challenge_up() -> None:
    table = SessionTable(DIGEST)
    reply = challenge(table, 0.0)
    with pytest.raises(ForgedError):
        table.open(make_proof(ALICE, reply, b"other" * 8), 0.0, TOKEN)
    with pytest.raises(RefusedError, match="used"):
        table.open(make_proof(ALICE, reply, DIGEST), 0.0, TOKEN)


def test_a_proof_for_another_server_is_forged() -> None:
    table = SessionTable(DIGEST)
    proof = make_proof(ALICE, challenge(table, 0.0), b"x" * 32)
    with pytest.raises(ForgedError, match="another server"):
        table.open(proof, 0.0, TOKEN)


def test_a_signature_of_another_kind_or_key_is_forged() -> None:
    for spoil in ("domain", "key", "payload"):
        table = SessionTable(DIGEST)
        request = make_proof(ALICE, challenge(table, 0.0), DIGEST)
        if spoil == "domain":
            request.proof.CopyFrom(ALICE.sign(RECORD, request.proof.payload))
        elif spoil == "key":
            request.proof.public_key = BOB.public_key
        else:
            proof = session_pb2.SessionProof.FromString(request.proof.payload)
            proof.versions.max = 2
            request.proof.payload = proof.SerializeToString()
        with pytest.raises(ForgedError):
            table.open(request, 0.0, TOKEN)
        assert table.caller(TOKEN, 0.0) is None, spoil


def test_garbage_is_malformed() -> None:
    table = SessionTable(DIGEST)
    garbage = session_pb2.OpenRequest(proof=common_pb2.Signed(payload=b"\xff\xff"))
    with pytest.raises(MalformedError):
        table.open(garbage, 0.0, TOKEN)
    challenge(table, 0.0)
    unsigned = session_pb2.OpenRequest(
        proof=common_pb2.Signed(payload=session_pb2.SessionProof(nonce=NONCE).SerializeToString())
    )
    with pytest.raises(MalformedError):
        table.open(unsigned, 0.0, TOKEN)


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 5), (1, 3), 3), ((2, 2), (1, 9), 2)],
)
def test_the_highest_version_that_both_speak(
    ours: tuple[int, int], theirs: tuple[int, int], chosen: int
) -> None:
    assert choose_version(ours, version_range(theirs)) == chosen


def test_no_version_in_common_says_both_ranges() -> None:
    with pytest.raises(VersionError, match="one side speaks 1, the other 2 to 4; the one with"):
        choose_version((1, 1), version_range((2, 4)))
    with pytest.raises(VersionError, match="one side speaks 1 to 2, the other 3 to 5"):
        choose_version((3, 5), version_range((1, 2)))


@pytest.mark.parametrize("theirs", [(0, 0), (0, 1), (2, 1)])
def test_versions_that_are_no_range(theirs: tuple[int, int]) -> None:
    with pytest.raises(MalformedError):
        choose_version((1, 1), version_range(theirs))


def test_versions_are_checked_at_each_door() -> None:
    table = SessionTable(DIGEST, (2, 3))
    with pytest.raises(VersionError):
        challenge(table, 0.0)
    reply = session_pb2.ChallengeReply(nonce=NONCE, versions=version_range((2, 3)))
    with pytest.raises(VersionError):
        make_proof(ALICE, reply, DIGEST, (1, 1))
    newer = session_pb2.ChallengeRequest(versions=version_range((3, 4)))
    reply = table.challenge(newer, 0.0, NONCE)
    reply.versions.CopyFrom(version_range((1, 1)))  # so that the proof names other versions
    with pytest.raises(VersionError):
        table.open(make_proof(ALICE, reply, DIGEST, (1, 1)), 0.0, TOKEN)


def test_the_caller_refuses_a_challenge_of_another_length() -> None:
    reply = session_pb2.ChallengeReply(nonce=b"short", versions=version_range())
    with pytest.raises(MalformedError, match="32 bytes, not 5"):
        make_proof(ALICE, reply, DIGEST)


def test_a_flood_of_challenges_drops_the_oldest() -> None:
    table = SessionTable(DIGEST, nonces_max=3)
    replies = [challenge(table, 0.0, bytes([i]) * 32) for i in range(4)]
    table.check()
    with pytest.raises(RefusedError):
        table.open(make_proof(ALICE, replies[0], DIGEST), 0.0, TOKEN)
    table.open(make_proof(ALICE, replies[1], DIGEST), 0.0, TOKEN)


def test_a_peer_that_opens_many_sessions_costs_only_its_own() -> None:
    table = SessionTable(DIGEST, sessions_max=5, sessions_per_peer_max=3)
    let_in(table, BOB, 0.0, b"b" * 32)
    for i in range(20):
        let_in(table, ALICE, 0.0, bytes([i]) * 31 + b"!")
        table.check()
    assert table.caller(b"b" * 32, 0.0) == BOB.peer_id
    assert [i for i in range(20) if table.caller(bytes([i]) * 31 + b"!", 0.0)] == [17, 18, 19]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_happens_the_table_is_sound(seed: int) -> None:
    rng = random.Random(seed)
    table = SessionTable(DIGEST, nonces_max=4, sessions_max=6, sessions_per_peer_max=2)
    peers = [KeyPair.from_seed(bytes([i]) * 32) for i in range(5)]
    given: dict[bytes, str] = {}
    now = 0.0
    for _ in range(300):
        now += rng.choice([0.1, 1.0, SESSION_LIFE_S / 8])
        token = rng.randbytes(32)
        peer = rng.choice(peers)
        let_in(table, peer, now, token)
        given[token] = peer.peer_id
        for known in rng.sample(sorted(given), min(4, len(given))):
            assert table.caller(known, now) in (given[known], None)
        table.check()
        assert table.caller(token, now) == peer.peer_id
