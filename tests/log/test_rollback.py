"""Claims with standbys, and claims that go back to the commit before the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import log_helpers as given
import pytest

from p2pnet.errors import ForgedError, MalformedError
from p2pnet.log.checker import Decided, Recording, check
from p2pnet.log.history import History, check_entry, new_commit, parse_entry, standbys_of
from p2pnet.v1 import common_pb2, log_pb2
from p2pnet.vnode.standing import Standing, follow, unseal_standing

A, B, C, D = (given.key(number) for number in range(1, 5))
PLACEMENT = {"fc1": A.peer_id, "fc2": B.peer_id}
Standbys = Mapping[str, Sequence[str]]


def test_a_claim_says_who_follows_what() -> None:
    history = History(given.NETWORK)
    standbys = {"fc1": (B.peer_id, C.peer_id), "fc2": ()}
    assert history.add(given.claim(history, A, placement=PLACEMENT, standbys=standbys)) == ""
    assert history.placement == PLACEMENT
    assert history.standbys == {"fc1": (B.peer_id, C.peer_id)}
    assert sorted(history.claims[0][1].hosts) == given.keys_of([A, B, C])
    assert history.add(given.claim(history, B, placement=PLACEMENT)) == ""
    assert history.standbys == {}


@pytest.mark.parametrize(
    ("vnode", "hosts"),
    [
        ("fc9", [1]),  # which the claim does not place
        ("fc1", []),
        ("fc1", [0]),  # its own host
        ("fc1", [1, 1]),
        ("fc1", [1, 2, 3]),  # more than there can be
        ("fc1", [4]),  # which the claim does not name
    ],
)
def test_standbys_that_cannot_be(vnode: str, hosts: list[int]) -> None:
    names = given.keys_of([A, B, C, D])
    claim = log_pb2.Claim(epoch=1, orchestrator=A.peer_id, hosts=names, placement={"fc1": 0})
    claim.standbys[vnode].hosts.extend(hosts)
    entry = log_pb2.LogEntry(network_id=given.NETWORK, slot=1, claim=claim)
    signed = common_pb2.Signed(payload=entry.SerializeToString(deterministic=True))
    with pytest.raises(MalformedError, match="standbys"):
        parse_entry(signed)
    del claim.standbys[vnode].hosts[:]
    claim.standbys.clear()
    claim.standbys["fc1"].hosts.extend([1, 2])
    entry.claim.CopyFrom(claim)
    signed.payload = entry.SerializeToString(deterministic=True)
    assert standbys_of(parse_entry(signed).claim) == {"fc1": (names[1], names[2])}


def back_to(history: History, step: int) -> common_pb2.Signed:
    signed: common_pb2.Signed = given.claim(history, B, from_step=step)
    return signed


def test_a_claim_goes_back_to_the_commit_before_the_last() -> None:
    history = given.claimed(A, commits=3)  # of steps 20, 40, 60
    assert history.add(back_to(history, 40)) == ""
    assert history.commit is not None
    assert history.commit.step == 40
    assert history.before is None  # the states of step 20 are nobody's any more
    again = new_commit(history, B, 60, given.states("3 again"))
    assert history.add(again) == ""
    assert (history.commit.step, history.before and history.before.step) == (60, 40)


@pytest.mark.parametrize("step", [20, 41, 60, 80])
def test_no_claim_goes_back_elsewhere(step: int) -> None:
    history = given.claimed(A, commits=3)
    with pytest.raises(ForgedError, match="the commit before the last is of step 40"):
        check_entry(back_to(history, step), history)


@pytest.mark.parametrize("commits", [0, 1])
def test_without_two_commits_there_is_no_way_back(commits: int) -> None:
    history = given.claimed(A, commits=commits)
    with pytest.raises(ForgedError, match="none is before it"):
        check_entry(back_to(history, 20), history)


def test_twice_in_a_row_there_is_no_way_back() -> None:
    history = given.claimed(A, commits=3)
    history.add(back_to(history, 40))
    with pytest.raises(ForgedError, match="none is before it"):
        check_entry(back_to(history, 20), history)


def test_who_has_gone_back_cannot_commit_an_older_step_again() -> None:
    history = given.claimed(A, commits=3)
    history.add(back_to(history, 40))
    with pytest.raises(ForgedError, match="step 40 is committed"):
        check_entry(new_commit(history, B, 40, given.states()), history)


def test_a_host_that_keeps_no_entries_follows_all_the_way_back() -> None:
    history = given.claimed(A, commits=3)
    at = Standing(given.NETWORK)
    manifest = history.manifest
    assert manifest is not None
    for number in range(len(history.entries)):
        at, _ = follow(at, manifest, history.entries[number : number + 1])
    assert (at.committed_step, at.before_step) == (60, 40)
    kept, _ = unseal_standing(given.NETWORK, at.seal())
    assert kept == at
    history.add(back_to(history, 40))
    after, claim = follow(kept, manifest, history.entries[-1:])
    assert claim is not None
    assert (after.epoch, after.committed_step, after.before_step) == (2, 40, 0)


def test_the_checker_lets_steps_be_done_again_after_that_and_only_then() -> None:
    history = given.claimed(A, commits=3)
    history.add(back_to(history, 40))
    history.add(new_commit(history, B, 60, given.states("3 again")))
    recording = Recording(given.NETWORK, [Decided("x", entry) for entry in history.entries])
    assert check(recording) == []

    wrong = given.claimed(A, commits=3)
    wrong.entries.append(back_to(wrong, 20))
    seen = [Decided("x", entry) for entry in wrong.entries]
    assert [v.rule for v in check(Recording(given.NETWORK, seen))] == ["back by one commit"]  # type: ignore[arg-type]
