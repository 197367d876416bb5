"""The history checker: a good history passes, and each thing that cannot be is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from p2pnet.keys import LOG_ENTRY, KeyPair, sha256
from p2pnet.log.checker import (
    Accepted,
    Acknowledged,
    Decided,
    Heard,
    Observation,
    Recording,
    Saved,
    ToldCommitted,
    check,
)
from p2pnet.v1 import common_pb2, log_pb2

NETWORK = "ab" * 16
ONE, TWO, HOST, OTHER = (KeyPair.from_seed(bytes([n]) * 32) for n in range(1, 5))


def _state(step: int) -> bytes:
    return sha256(b"state %d" % step)


def _golden(step: int) -> dict[str, bytes]:
    return {"fc": _state(step)}


def _loss(step: int) -> float:
    return 1.0 / step


class _Log:
    """Entries as their writers sign them, in a chain; nothing is checked."""

    def __init__(self) -> None:
        self.entries: list[common_pb2.Signed] = []

    def claim(
        self, key: KeyPair, epoch: int, *, host: KeyPair = HOST, signer: KeyPair | None = None
    ) -> common_pb2.Signed:
        claim = log_pb2.Claim(
            epoch=epoch, orchestrator=key.peer_id, hosts=[host.peer_id], placement={"fc": 0}
        )
        return self._add(signer or key, log_pb2.LogEntry(claim=claim))

    def commit(
        self, key: KeyPair, epoch: int, step: int, *, digest: bytes = b"", vnode: str = "fc"
    ) -> common_pb2.Signed:
        ref = common_pb2.BlobRef(digest=digest or _state(step))
        commit = log_pb2.Commit(epoch=epoch, step=step, states={vnode: ref})
        return self._add(key, log_pb2.LogEntry(commit=commit))

    def closing(self, key: KeyPair) -> common_pb2.Signed:
        return self._add(key, log_pb2.LogEntry(closing=log_pb2.Closing()))

    def _add(self, key: KeyPair, entry: log_pb2.LogEntry) -> common_pb2.Signed:
        entry.network_id = NETWORK
        entry.slot = len(self.entries) + 1
        entry.previous = sha256(self.entries[-1].payload) if self.entries else b""
        signed = key.sign(LOG_ENTRY, entry.SerializeToString(deterministic=True))
        self.entries.append(signed)
        return signed


def _good() -> tuple[_Log, list[Observation]]:
    log = _Log()
    log.claim(ONE, 1)
    log.commit(ONE, 1, 2)
    log.claim(TWO, 2, host=OTHER)
    log.commit(TWO, 2, 4)
    return log, [
        Accepted("fc", 1, ONE.peer_id, HOST.peer_id),
        Accepted("fc", 2, TWO.peer_id, OTHER.peer_id),
        Accepted("fc", 2, TWO.peer_id, OTHER.peer_id),  # said twice
        Saved(HOST.peer_id, "fc", 2, _state(2)),
        Saved(OTHER.peer_id, "fc", 4, _state(4)),
        *(Heard("feeder", step, _loss(step)) for step in range(1, 5)),
        ToldCommitted("feeder", 4),
    ]


def _rules(log: _Log, more: list[Observation]) -> list[str]:
    seen: list[Observation] = [Decided("a keeper", entry) for entry in log.entries]
    seen += [Acknowledged(ONE.peer_id, entry) for entry in log.entries[:2]]
    recording = Recording(NETWORK, [*seen, *more])
    return [violation.rule for violation in check(recording, golden=_golden, loss=_loss)]


def test_a_good_history_passes() -> None:
    assert _rules(*_good()) == []


def test_an_empty_one_too() -> None:
    assert check(Recording(NETWORK)) == []


def test_two_entries_for_one_slot() -> None:
    log, more = _good()
    fork = _Log()
    fork.entries = log.entries[:3]
    found = _rules(log, [*more, Decided("another keeper", fork.commit(TWO, 2, 3))])
    assert found == ["one entry a slot"]


def test_a_slot_that_nobody_saw() -> None:
    log, more = _good()
    del log.entries[2]
    assert "no gaps" in _rules(log, more)


def test_an_entry_that_is_not_signed() -> None:
    log, more = _good()
    log.entries[3].signature = bytes(64)
    assert "signed" in _rules(log, more)


def test_an_entry_that_does_not_follow_the_one_before() -> None:
    log, _ = _good()
    other = _Log()
    other.claim(TWO, 1)
    log.entries[0] = other.entries[0]
    assert "a chain" in _rules(log, [])


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda log: log.commit(ONE, 1, 5), "nothing stale is kept"),
        (lambda log: log.commit(ONE, 2, 5), "nothing stale is kept"),
        (lambda log: log.claim(ONE, 4), "epochs grow by one"),
        (lambda log: log.claim(ONE, 2), "epochs grow by one"),
        (lambda log: log.claim(ONE, 3, signer=TWO), "epochs grow by one"),
        (lambda log: log.commit(TWO, 2, 4), "one commit a step"),
        (lambda log: log.commit(TWO, 2, 3), "commits go on"),
        (lambda log: log.commit(TWO, 2, 6, digest=_state(5)), "one run of steps"),
        (lambda log: log.commit(TWO, 2, 6), "stored before committed"),
        (lambda log: log.commit(TWO, 2, 6, vnode="act"), "whole cuts"),
        (lambda log: (log.closing(TWO), log.commit(TWO, 2, 6)), "nothing stale is kept"),
    ],
)
def test_entries_that_cannot_be(spoil: Callable[[_Log], object], rule: str) -> None:
    log, more = _good()
    spoil(log)
    assert rule in _rules(log, more)


def test_a_commit_that_was_acknowledged_and_is_lost() -> None:
    log, more = _good()
    fork = _Log()
    fork.entries = list(log.entries)
    lost = fork.commit(TWO, 2, 6)
    assert "nothing acknowledged is lost" in _rules(log, [*more, ToldCommitted("feeder", 6)])
    log.claim(ONE, 3)
    found = _rules(log, [*more, Acknowledged(TWO.peer_id, lost)])
    assert "nothing acknowledged is lost" in found


def test_a_stale_commit_that_its_writer_takes_for_good() -> None:
    log, more = _good()
    stale = log.commit(ONE, 1, 5)
    assert "no stale commit" in _rules(log, [*more, Acknowledged(ONE.peer_id, stale)])


@pytest.mark.parametrize(
    ("accepted", "rule"),
    [
        (Accepted("fc", 2, TWO.peer_id, HOST.peer_id), "one host a claim"),
        (Accepted("fc", 3, TWO.peer_id, HOST.peer_id), "no host without a claim"),
        (Accepted("fc", 2, ONE.peer_id, HOST.peer_id), "no host without a claim"),
        (Accepted("act", 2, TWO.peer_id, OTHER.peer_id), "the host that the claim names"),
    ],
)
def test_hosts_that_should_not_have_accepted(accepted: Accepted, rule: str) -> None:
    log, more = _good()
    assert rule in _rules(log, [*more, accepted])


@pytest.mark.parametrize(
    ("steps", "rule"),
    [
        ((1, 2, 2), "every step once, in order"),
        ((1, 3), "every step once, in order"),
        ((2, 1), "every step once, in order"),
    ],
)
def test_results_that_come_twice_or_not_at_all(steps: tuple[int, ...], rule: str) -> None:
    log, _ = _good()
    assert rule in _rules(log, [Heard("feeder", step, _loss(step)) for step in steps])


def test_the_result_of_another_step() -> None:
    log, _ = _good()
    assert "the result of that step" in _rules(log, [Heard("feeder", 1, _loss(2))])


def test_a_violation_says_what_shows_it() -> None:
    log, more = _good()
    log.commit(TWO, 2, 4)
    recording = Recording(NETWORK, [*(Decided("a", entry) for entry in log.entries), *more])
    (violation,) = check(recording)
    assert str(violation) == (
        "two commits of step 4 count; "
        f"slot 4: a commit of step 4 in epoch 2 by …{TWO.peer_id[-8:]}; "
        f"slot 5: a commit of step 4 in epoch 2 by …{TWO.peer_id[-8:]}"
    )
