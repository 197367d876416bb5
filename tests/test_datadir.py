"""A data dir: private, one node's at a time, and with hints that may be damaged."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from p2pnet import datadir
from p2pnet.datadir import DataDir, default_data_dir, read_whole, write_whole
from p2pnet.errors import ResourceError, UsageError

PEERS = [f"/ip4/192.0.2.{n}/tcp/4001/p2p/12D3KooW{n}" for n in range(3)]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    """An open one, as a node has it."""
    found = DataDir(tmp_path / "node")
    found.open()
    return found


def test_the_default_is_the_users_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("P2PNET_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_data_dir() == Path("/home/ada/.p2pnet")
    monkeypatch.setenv("P2PNET_DATA_DIR", "")
    assert default_data_dir() == Path("/home/ada/.p2pnet")
    monkeypatch.setenv("P2PNET_DATA_DIR", "/srv/node")
    assert default_data_dir() == Path("/srv/node")
    assert DataDir(Path("~/node")).path == Path("/home/ada/node")


def test_it_is_made_private(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "deep" / "node")
    data.open()
    assert mode(data.path) == 0o700
    assert mode(data.path / "lock") == 0o600
    data.close()


def test_it_is_one_nodes_at_a_time(data: DataDir) -> None:
    other = DataDir(data.path)
    with pytest.raises(ResourceError, match="another node is running") as error:
        other.open()
    assert f"p2pnet leave --data-dir {data.path}" in str(error.value)
    other.close()  # who did not get it gives nothing back
    with pytest.raises(ResourceError):
        DataDir(data.path).open()
    data.close()
    data.close()
    other.open()
    other.close()


def test_a_node_that_was_killed_leaves_no_lock_behind(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from p2pnet.datadir import DataDir\n"
        "DataDir(Path(sys.argv[1])).open(); os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=30)
    assert died.returncode == -9
    data = DataDir(tmp_path)
    data.open()
    data.close()


def test_what_cannot_be_a_data_dir_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(ResourceError, match="choose another one with --data-dir"):
            DataDir(path).open()


# The control socket


def test_a_running_nodes_socket_is_found(data: DataDir) -> None:
    path = data.new_socket()
    assert DataDir(data.path).socket() == path
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))  # it is a name that can be bound to
    assert data.new_socket() == path  # and again after a crash that has left one
    assert not path.exists()
    data.close()
    with pytest.raises(UsageError, match="no node is running") as error:
        DataDir(data.path).socket()
    assert "p2pnet join" in str(error.value)


def test_where_a_path_is_too_long_for_a_socket_it_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tempfile.mkdtemp(prefix="p2p-t-", dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", short)
    data = DataDir(tmp_path / ("long" * 40))
    data.open()
    path = data.new_socket()
    assert len(os.fsencode(path)) <= datadir.SOCKET_PATH_BYTES_MAX
    assert data.path not in path.parents
    assert mode(path.parent) == 0o700
    assert data.socket() == path
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    assert data.new_socket() == path
    os.chmod(path.parent, 0o777)  # another user may have made it
    with pytest.raises(ResourceError, match="belongs to somebody else"):
        data.new_socket()
    os.chmod(path.parent, 0o700)
    data.close()
    os.rmdir(short)  # nothing is left


def test_two_data_dirs_have_two_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "SOCKET_PATH_BYTES_MAX", 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    nodes = [DataDir(tmp_path / name) for name in "ab"]
    for node in nodes:
        node.open()
    assert nodes[0].new_socket() != nodes[1].new_socket()
    for node in nodes:
        node.close()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


# Peers that were met before


def test_peers_that_an_older_version_remembered_are_read(data: DataDir) -> None:
    assert data.remembered_peers() == []
    (data.path / "peers.json").write_text(json.dumps(PEERS))
    assert DataDir(data.path).remembered_peers() == PEERS
    (data.path / "peers.json").write_text(json.dumps(PEERS * 100))
    assert len(data.remembered_peers()) == datadir.PEERS_KEPT
    data.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'"one"', b"{}", b"\xff\xfe", b"[" * 100_000, b'["a"' + b" " * (1 << 20) + b"]"],
)
def test_a_damaged_list_of_peers_is_only_a_hint_lost(data: DataDir, content: bytes) -> None:
    (data.path / "peers.json").write_bytes(content)
    assert data.remembered_peers() == []
    data.close()


def test_what_is_no_text_in_a_list_is_left_out(data: DataDir) -> None:
    (data.path / "peers.json").write_text(json.dumps([1, PEERS[0], None, [PEERS[1]]]))
    assert data.remembered_peers() == PEERS[:1]
    data.close()


# Files


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert read_whole(path, 10) is None
    write_whole(path, b"0123456789")
    assert read_whole(path, 10) == b"0123456789"
    with pytest.raises(ResourceError, match="over 9 bytes"):
        read_whole(path, 9)
    with pytest.raises(ResourceError, match="cannot be read"):
        read_whole(tmp_path, 9)


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="cannot be written: No space left"):
        write_whole(path, b"three")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]
