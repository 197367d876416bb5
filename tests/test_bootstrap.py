"""Where a node starts from: lists, multiaddrs, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pnet import bootstrap
from p2pnet.bootstrap import Bootstrap, parse_list, read, read_all
from p2pnet.errors import UsageError
from p2pnet.keys import KeyPair

ONE, TWO = (KeyPair.from_seed(bytes([n]) * 32).peer_id for n in (1, 2))
A = f"/ip4/192.0.2.1/tcp/4001/p2p/{ONE}"
B = f"/dns4/peer.example/tcp/4001/p2p/{TWO}"


def test_a_list_has_an_address_a_line_and_comments() -> None:
    text = f"# our peers\n\n  {A}  # the first\r\n{B}\n{A}\n"
    assert parse_list(text, "peers.txt") == Bootstrap((A, B))


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "/ip4/192.0.2.1/tcp/4001",
        f"/ip4/192.0.2.1/udp/4001/p2p/{ONE}",
        f"/ip4/999.0.2.1/tcp/4001/p2p/{ONE}",
        f"/ip4/192.0.2.1/tcp/99999/p2p/{ONE}",
        "/ip4/192.0.2.1/tcp/4001/p2p/0OIl",
    ],
)
def test_a_broken_line_is_named_and_the_others_used(line: str) -> None:
    found = parse_list(f"{A}\n{line}\n{B}", "peers.txt")
    assert found.addrs == (A, B)
    [problem] = found.problems
    assert problem.startswith("peers.txt, line 2: ")
    assert problem.endswith("; the line is left out")
    assert "\n" not in problem


def test_a_list_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "ADDRS_MAX", 3)
    many = "\n".join(A.replace("4001", str(port)) for port in range(5000, 5010))
    assert len(parse_list(many, "peers.txt").addrs) == 3
    monkeypatch.setattr(bootstrap, "LIST_BYTES_MAX", 100)
    file = tmp_path / "peers.txt"
    file.write_text(many)
    with pytest.raises(UsageError, match="at most 100 bytes"):
        read(str(file))


def test_a_source_is_a_multiaddr_or_a_file(tmp_path: Path) -> None:
    assert read(A) == Bootstrap((A,))
    file = tmp_path / "peers.txt"
    file.write_text(f"{A}\n{B}\n")
    assert read(str(file)) == Bootstrap((A, B))


def test_what_is_neither_says_so(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for source, why in (
        (str(tmp_path / "none.txt"), "No such file"),
        (str(tmp_path), "directory"),
        (str(binary), "it is not text"),
        ("/ip4/192.0.2.1/tcp/4001", "/p2p/PEER_ID is missing"),
        ("/dns4/x/tcp/0x1/p2p/" + ONE, "--bootstrap"),
    ):
        with pytest.raises(UsageError, match=why) as error:
            read(source)
        assert str(error.value).startswith(f"--bootstrap {source}: ")
        assert "\n" not in str(error.value)


def test_what_is_given_comes_before_the_environment_and_that_before_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "peers.txt"
    file.write_text(f"{B}\nnonsense\n")
    monkeypatch.setenv("P2PNET_BOOTSTRAP", f"{A},{file}")
    found = read_all([])
    assert found.addrs == (A, B)
    assert len(found.problems) == 1
    assert read_all([str(file), A, str(file)]).addrs == (B, A)
    monkeypatch.setenv("P2PNET_BOOTSTRAP", "")
    packaged = read_all([])
    assert packaged.problems == ()  # of our own list there is nothing to complain
    monkeypatch.delenv("P2PNET_BOOTSTRAP")
    assert read_all([]) == packaged
