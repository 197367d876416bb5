"""What a log entry has to be, and the history that entries make."""

from __future__ import annotations

import log_helpers as given
import pytest

from p2pnet import keys
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.log.history import (
    History,
    check_entry,
    manifest_grants,
    new_claim,
    new_commit,
    parse_entry,
)
from p2pnet.v1 import common_pb2, log_pb2

A, B = given.key(1), given.key(2)


def test_a_history_knows_claim_commit_and_keepers() -> None:
    keepers = tuple(sorted((A.peer_id, B.peer_id)))
    history = given.claimed(A, keepers=keepers, commits=2)
    assert (history.epoch, history.orchestrator, history.next_slot) == (1, A.peer_id, 4)
    assert history.commit is not None
    assert history.commit.step == 40
    assert history.keepers == keepers
    assert history.previous == keys.sha256(history.entries[-1].payload)

    assert history.add(new_claim(history, B, given.OPEN, keepers=keepers)) == ""
    assert (history.epoch, history.orchestrator) == (2, B.peer_id)
    assert history.commit.step == 40  # a claim takes over what was committed


def test_a_commit_counts_only_under_the_last_claim() -> None:
    history = given.claimed(A, commits=1)
    late = given.claimed(A, commits=1)  # what A still believes
    assert history.add(new_claim(history, B, given.OPEN)) == ""
    stale = new_commit(late, A, 40, given.states("stale"))
    stale, _ = given.resign(A, stale, slot=history.next_slot, previous=history.previous)
    with pytest.raises(ForgedError, match="has epoch 1, but the last claim has 2"):
        check_entry(stale, history)
    # Written to a directory all the same, it stands there and does not count.
    assert "has epoch 1, but the last claim has 2" in history.add(stale)
    assert history.next_slot == 5
    assert history.commit is not None
    assert history.commit.step == 20


def refusals() -> list[object]:
    history = given.claimed(A, commits=1)
    claim = new_claim(history, B, given.OPEN)
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
        (new_claim(skipped, B, given.OPEN), ForgedError, "has epoch 3, but the next is 2"),
        (
            B.sign(keys.LOG_ENTRY, other_name.SerializeToString()),
            ForgedError,
            "is signed by",
        ),
        (new_claim(history, B, closed), ForgedError, "not that of network"),
        (new_claim(history, B, common_pb2.Signed()), ForgedError, "not that of network"),
        (
            given.resign(A, commit, keepers=[B.peer_id, B.peer_id])[0],
            MalformedError,
            "sorted, each once",
        ),
        (given.resign(A, commit, keepers=["nobody!"])[0], MalformedError, "not base58"),
        (A.sign(keys.LOG_ENTRY, b"\xff\xff"), MalformedError, "does not parse"),
        (
            A.sign(
                keys.LOG_ENTRY, log_pb2.LogEntry(network_id="0" * 32, slot=3).SerializeToString()
            ),
            MalformedError,
            "neither a claim nor a commit",
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
        check_entry(new_claim(history, B, closed), history)
    assert history.add(new_claim(history, A, closed)) == ""

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
    history = given.claimed(A, keepers=(A.peer_id,))
    with pytest.raises(ForgedError, match="names no keepers"):
        check_entry(new_commit(history, A, 20, given.states(), keepers=()), history)


def test_entries_are_the_same_bytes_each_time() -> None:
    history = given.claimed(A)
    blobs = {f"v{number}": common_pb2.BlobRef(digest=bytes(32)) for number in range(50)}
    backwards = dict(reversed(blobs.items()))
    assert new_commit(history, A, 20, blobs) == new_commit(history, A, 20, backwards)
    assert len(parse_entry(new_commit(history, A, 20, blobs)).commit.states) == 50
