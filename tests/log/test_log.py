"""What a log entry has to be, and the history that entries make."""

from __future__ import annotations

import log_helpers as given
import pytest

from p2pnet import keys
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.log.history import (
    History,
    check_entry,
    keepers_of_next,
    manifest_grants,
    new_cancellation,
    new_claim,
    new_closing,
    new_commit,
    parse_entry,
    placement_of,
)
from p2pnet.v1 import common_pb2, log_pb2, records_pb2

A, B = given.key(1), given.key(2)


def test_a_history_knows_claim_commit_and_keepers() -> None:
    keepers = tuple(sorted((A.peer_id, B.peer_id)))
    history = given.claimed(A, given.manifest(anybody=True, keepers=keepers), commits=2)
    assert (history.epoch, history.orchestrator, history.next_slot) == (1, A.peer_id, 4)
    assert history.commit is not None
    assert history.commit.step == 40
    assert history.keepers == keepers
    assert history.previous == keys.sha256(history.entries[-1].payload)

    assert history.manifest is not None
    assert history.add(given.claim(history, B, history.manifest)) == ""
    assert (history.epoch, history.orchestrator) == (2, B.peer_id)
    assert history.commit.step == 40  # a claim takes over what was committed
    assert history.keepers == keepers  # by default they stay
    assert [slot for slot, _ in history.claims] == [1, 4]
    assert history.genesis == given.GENESIS
    assert history.placement == {"fc1": B.peer_id}
    assert placement_of(history.claims[0][1]) == {"fc1": A.peer_id}


def test_a_commit_counts_only_under_the_last_claim() -> None:
    history = given.claimed(A, commits=1)
    late = given.claimed(A, commits=1)  # what A still believes
    assert history.add(given.claim(history, B)) == ""
    stale = new_commit(late, A, 40, given.states("stale"))
    stale, _ = given.resign(A, stale, slot=history.next_slot, previous=history.previous)
    with pytest.raises(ForgedError, match="has epoch 1, but the last claim has 2"):
        check_entry(stale, history)
    # Written to a directory all the same, it stands there and does not count.
    assert "has epoch 1, but the last claim has 2" in history.add(stale)
    assert history.next_slot == 5
    assert history.commit is not None
    assert history.commit.step == 20


def without_manifest(signed: common_pb2.Signed) -> common_pb2.Signed:
    entry = log_pb2.LogEntry.FromString(signed.payload)
    entry.claim.ClearField("manifest")
    return B.sign(keys.LOG_ENTRY, entry.SerializeToString(deterministic=True))


def twice(payload: bytes) -> bytes:
    """The same entry in other bytes: its network id stands there twice."""
    return log_pb2.LogEntry(network_id=given.NETWORK).SerializeToString() + payload


def refusals() -> list[object]:
    history = given.claimed(A, commits=1)
    claim = given.claim(history, B)
    commit = new_commit(history, A, 40, given.states())
    skipped = given.claimed(A, commits=1)
    skipped.epoch = 2
    closed = given.manifest(A)
    wrong_sum = common_pb2.Signed()
    wrong_sum.CopyFrom(commit)
    wrong_sum.signature = bytes(64)
    other_name = log_pb2.LogEntry.FromString(claim.payload)
    other_name.claim.orchestrator = A.peer_id
    blob = {"fc1": common_pb2.BlobRef(digest=b"short")}
    cases = [
        (wrong_sum, ForgedError, "is not signed by it"),
        (given.resign(A, commit, previous=bytes(32))[0], ForgedError, "does not follow"),
        (given.resign(A, commit, slot=5)[0], MalformedError, "for slot 5, not 3"),
        (given.resign(A, commit, slot=0)[0], MalformedError, "no slot"),
        (given.resign(A, commit, network_id="ab" * 16)[0], ForgedError, "not this one's"),
        (given.resign(A, commit, network_id="../x")[0], MalformedError, "not a network id"),
        (given.resign(B, commit)[0], ForgedError, "holds the claim"),
        (new_commit(skipped, A, 40, given.states()), ForgedError, "last claim has 1"),
        (new_commit(history, A, 20, given.states()), ForgedError, "step 20 is committed"),
        (new_commit(history, A, 40, {}), MalformedError, "names 1 to"),
        (new_commit(history, A, 40, blob), MalformedError, "a state that cannot be"),
        (given.claim(history, B, genesis=given.GENESIS), ForgedError, "only a network's first"),
        (given.resign(B, claim, hosts=[B.peer_id] * 2)[0], MalformedError, "sorted, each once"),
        (given.resign(B, claim, hosts=["x"])[0], MalformedError, "does not hold"),
        (given.resign(B, claim, placement={"fc1": 1})[0], MalformedError, "does not name"),
        (given.resign(B, claim, placement={"x" * 65: 0})[0], MalformedError, "64 characters"),
        (given.resign(B, claim, placement={"": 0})[0], MalformedError, "64 characters"),
        (given.resign(B, claim, keepers=[A.peer_id])[0], ForgedError, "as its manifest says"),
        (given.claim(skipped, B), ForgedError, "has epoch 3, but the next is 2"),
        (
            B.sign(keys.LOG_ENTRY, other_name.SerializeToString()),
            ForgedError,
            "is signed by",
        ),
        (given.claim(history, B, closed), ForgedError, "not that of network"),
        (without_manifest(claim), ForgedError, "not that of network"),
        (
            given.resign(A, commit, keepers=[B.peer_id, B.peer_id])[0],
            MalformedError,
            "sorted, each once",
        ),
        (given.resign(A, commit, keepers=["nobody!"])[0], MalformedError, "not base58"),
        (A.sign(keys.LOG_ENTRY, b"\xff\xff"), MalformedError, "not a LogEntry"),
        (A.sign(keys.LOG_ENTRY, twice(commit.payload)), MalformedError, "canonical"),
        (
            A.sign(
                keys.LOG_ENTRY, log_pb2.LogEntry(network_id="0" * 32, slot=3).SerializeToString()
            ),
            MalformedError,
            "neither a claim",
        ),
        (A.sign(keys.RECORD, commit.payload), ForgedError, "is not signed by it"),
        (A.sign(keys.LOG_ENTRY, bytes((4 << 20) + 1)), MalformedError, "at most 4 MiB"),
    ]
    return [pytest.param(history, *case, id=case[2][:30].replace(" ", "-")) for case in cases]


@pytest.mark.parametrize(("history", "entry", "kind", "words"), refusals())
def test_what_would_not_count_is_refused(
    history: History, entry: common_pb2.Signed, kind: type[Exception], words: str
) -> None:
    before = history.next_slot
    with pytest.raises(kind, match=words):
        check_entry(entry, history)
    assert history.next_slot == before


def test_a_manifest_grants_whom_it_names() -> None:
    closed = given.manifest(A)
    network = given.network_of(closed)
    assert manifest_grants(network, closed, A.peer_id)
    assert not manifest_grants(network, closed, B.peer_id)
    history = History(network)
    with pytest.raises(ForgedError, match="the owner does not let"):
        check_entry(given.claim(history, B, closed), history)
    assert history.add(given.claim(history, A, closed)) == ""

    stolen = A.sign(keys.MANIFEST, closed.payload)
    with pytest.raises(ForgedError, match="another than its owner signed"):
        manifest_grants(network, stolen, A.peer_id)


def test_extend_takes_known_entries_and_refuses_another_past() -> None:
    long, short = given.claimed(A, commits=3), given.claimed(A, commits=1)
    assert short.extend(long.entries) == 2
    assert short.extend(long.entries) == 0
    assert short.previous == long.previous
    with pytest.raises(MalformedError, match="for slot 4, not 1"):
        History(given.NETWORK).extend(long.entries[3:])
    other = given.claimed(B)
    with pytest.raises(ForgedError, match="two entries"):
        other.extend(long.entries)


def test_a_log_on_peers_cannot_lose_its_keepers() -> None:
    history = given.claimed(A, given.manifest(anybody=True, keepers=[A.peer_id]))
    with pytest.raises(ForgedError, match="names no keepers"):
        check_entry(new_commit(history, A, 20, given.states(), keepers=()), history)


def test_entries_are_the_same_bytes_each_time() -> None:
    history = given.claimed(A)
    blobs = {f"v{number}": common_pb2.BlobRef(digest=bytes(32)) for number in range(50)}
    backwards = dict(reversed(blobs.items()))
    assert new_commit(history, A, 20, blobs) == new_commit(history, A, 20, backwards)
    assert len(parse_entry(new_commit(history, A, 20, blobs)).commit.states) == 50


def on_peers(**limits: int) -> common_pb2.Signed:
    return given.manifest(anybody=True, keepers=[A.peer_id], limits=records_pb2.Limits(**limits))


def test_on_peers_what_does_not_count_cannot_be_decided() -> None:
    history = given.claimed(A, on_peers())
    with pytest.raises(ForgedError, match="holds the claim"):
        history.add(new_commit(history, B, 20, given.states()))


@pytest.mark.parametrize("graph", [b"another", b""])
def test_the_first_claim_holds_the_graph_that_the_manifest_names(graph: bytes) -> None:
    history = History(given.NETWORK)
    for genesis in (log_pb2.Genesis(graph=graph), None):
        claim = new_claim(history, A, given.OPEN, placement={}, genesis=genesis)
        with pytest.raises(ForgedError, match="does not hold the graph"):
            check_entry(claim, history)


def test_the_first_keepers_are_the_manifests() -> None:
    signed = on_peers()
    history = History(given.network_of(signed))
    claim = given.claim(history, A, signed, keepers=[B.peer_id])
    assert keepers_of_next(history, claim) == (A.peer_id,)
    history.add(claim)
    assert keepers_of_next(history, claim) == history.keepers == (B.peer_id,)


def test_the_owners_limits_hold() -> None:
    signed = on_peers(hosts_max=2, claims_max=2)
    history = History(given.network_of(signed))
    wide = {f"v{number}": given.key(number).peer_id for number in (1, 2, 3)}
    with pytest.raises(ForgedError, match="names 3 hosts; the owner allows 2"):
        check_entry(given.claim(history, A, signed, placement=wide), history)
    for pair in (A, B):
        assert history.add(given.claim(history, pair, signed)) == ""
    with pytest.raises(ForgedError, match="allows 2 claims, and all are used"):
        check_entry(given.claim(history, A, signed), history)


def test_after_the_owners_closing_nothing_counts() -> None:
    history = given.claimed(A, commits=1)
    word = new_cancellation(given.OWNER, given.NETWORK, "it is trained", 5)
    closing = new_closing(history, B, word)
    late = new_commit(history, A, 40, given.states())
    assert history.add(closing) == ""
    assert history.closing is not None
    assert history.closing.reason == "it is trained"
    for entry in (late, given.claim(history, B), new_closing(history, B, word)):
        again, _ = given.resign(A if entry is late else B, entry, slot=4, previous=history.previous)
        with pytest.raises(ForgedError, match="has closed it"):
            check_entry(again, history)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        (new_cancellation(A, given.NETWORK, "", 5), "another than the network's owner"),
        (new_cancellation(given.OWNER, "0" * 32, "", 5), "is network"),
        (given.OWNER.sign(keys.RECORD, b""), "is not signed by it"),
        (given.OWNER.sign(keys.CANCELLATION, b"\xff"), "not a Cancellation"),
    ],
    ids=["not-the-owner", "another-network", "another-domain", "no-cancellation"],
)
def test_only_the_owner_closes_a_network(word: common_pb2.Signed, words: str) -> None:
    history = given.claimed(A)
    with pytest.raises(ForgedError, match=words):
        check_entry(new_closing(history, A, word), history)


def test_what_nobody_has_claimed_cannot_be_closed() -> None:
    history = History(given.NETWORK)
    word = new_cancellation(given.OWNER, given.NETWORK, "", 5)
    with pytest.raises(ForgedError, match="nobody has claimed"):
        check_entry(new_closing(history, A, word), history)
