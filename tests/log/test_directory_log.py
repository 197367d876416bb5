"""The log in a directory: one winner a slot, and damage is named."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import log_helpers as given
import pytest

from p2pnet.errors import LocalError, MalformedError, ResourceError
from p2pnet.log.directory import DirectoryLog
from p2pnet.log.history import History

A = given.key(1)


def filled(root: Path, commits: int = 3) -> tuple[DirectoryLog, History]:
    log, history = DirectoryLog(root / "deep" / "logs"), given.claimed(A, commits=commits)
    for slot, entry in enumerate(history.entries, start=1):
        assert log.append(entry, slot) == entry
    return log, history


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    log, history = filled(tmp_path)
    assert log.read(given.NETWORK) == history.entries
    assert log.read(given.NETWORK, 3) == history.entries[2:]
    assert log.read(given.NETWORK, 5) == []
    assert log.read("0" * 32) == []
    names = sorted(os.listdir(tmp_path / "deep" / "logs" / given.NETWORK))
    assert names == [f"{slot:08d}.entry" for slot in range(1, 5)]  # no temporary is left


def test_of_many_claimants_one_wins_and_all_know_it(tmp_path: Path) -> None:
    empty = History(given.NETWORK)
    claims = [given.claim(empty, given.key(number)) for number in range(1, 17)]
    with ThreadPoolExecutor(8) as pool:
        winners = list(pool.map(lambda claim: DirectoryLog(tmp_path).append(claim, 1), claims))
    assert winners.count(winners[0]) == 16
    assert winners[0] in claims
    assert DirectoryLog(tmp_path).read(given.NETWORK) == [winners[0]]


def test_a_second_entry_never_replaces_the_first(tmp_path: Path) -> None:
    log, history = filled(tmp_path)
    other = given.claim(History(given.NETWORK), given.key(2))
    assert log.append(other, 1) == history.entries[0]
    assert log.append(history.entries[0], 1) == history.entries[0]  # the same again is no harm
    assert log.read(given.NETWORK) == history.entries


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "swapped"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    log, _ = filled(tmp_path)
    folder = tmp_path / "deep" / "logs" / given.NETWORK
    path = folder / "00000002.entry"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        del data[-20:]
    elif damage == "empty":
        data.clear()
    elif damage == "flipped":
        data[10] ^= 1
    else:
        data = bytearray((folder / "00000003.entry").read_bytes())
    path.write_bytes(data)
    with pytest.raises(LocalError, match=r"the log is damaged: .*00000002\.entry"):
        log.read(given.NETWORK)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    log, _ = filled(tmp_path)
    (tmp_path / "deep" / "logs" / given.NETWORK / "00000002.entry").unlink()
    with pytest.raises(LocalError, match=r"00000002\.entry is missing"):
        log.read(given.NETWORK)


def test_slots_are_filled_in_order(tmp_path: Path) -> None:
    history = given.claimed(A, commits=1)
    with pytest.raises(LocalError, match="after an empty one"):
        DirectoryLog(tmp_path).append(history.entries[1], 2)
    with pytest.raises(LocalError, match="put into slot 3"):
        DirectoryLog(tmp_path).append(history.entries[1], 3)


def test_no_name_leads_out_of_the_directory(tmp_path: Path) -> None:
    bad, _ = given.resign(A, given.claimed(A).entries[0], network_id="../../etc")
    with pytest.raises(MalformedError, match="not a network id"):
        DirectoryLog(tmp_path).append(bad, 1)
    with pytest.raises(MalformedError, match="not a network id"):
        DirectoryLog(tmp_path).read("../../etc")


def test_a_directory_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write the log at"):
        DirectoryLog(tmp_path / "file").append(given.claimed(A).entries[0], 1)
