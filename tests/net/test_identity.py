"""A node's identity on disk: made once, private, and never trusted when it cannot be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from p2pnet.errors import ResourceError
from p2pnet.net.identity import load_or_create

if os.name != "posix":
    pytest.skip("file modes are POSIX's", allow_module_level=True)


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "identity.key"
    made = load_or_create(path)
    assert path.read_bytes() == made.seed
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create(path) == made
    assert os.listdir(path.parent) == ["identity.key"], "no draft is left behind"


def test_two_are_different(tmp_path: Path) -> None:
    assert load_or_create(tmp_path / "a").peer_id != load_or_create(tmp_path / "b").peer_id


def test_a_race_has_one_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "identity.key"
    link = os.link

    def someone_was_faster(draft: Path, target: Path) -> None:
        target.write_bytes(b"w" * 32)
        target.chmod(0o600)
        link(draft, target)

    monkeypatch.setattr(os, "link", someone_was_faster)
    assert load_or_create(path).seed == b"w" * 32


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_wrong_size_is_refused_and_left_alone(tmp_path: Path, size: int) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(b"x" * size)
    path.chmod(0o600)
    with pytest.raises(ResourceError, match="should hold 32 bytes"):
        load_or_create(path)
    assert path.read_bytes() == b"x" * size


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666], ids=oct)
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(b"x" * 32)
    path.chmod(mode)
    with pytest.raises(ResourceError, match="chmod 600"):
        load_or_create(path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "identity.key").mkdir()
    with pytest.raises(ResourceError, match="cannot read"):
        load_or_create(tmp_path / "identity.key")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ResourceError, match=r"data directory|cannot read"):
        load_or_create(tmp_path / "file" / "identity.key")
