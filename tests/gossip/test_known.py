"""The signed cache of members: whom it keeps, and that nobody else can write in it."""

from __future__ import annotations

import pytest
from gossip_world import keypair

from p2pnet.errors import LocalError
from p2pnet.gossip import known
from p2pnet.gossip.capabilities import Capabilities
from p2pnet.gossip.events import Member, State
from p2pnet.gossip.known import KNOWN_MAX, Known, choose, parse, recalled, serialise
from p2pnet.gossip.statements import OpenAdvert, build_advert
from p2pnet.sealed import seal, unseal
from p2pnet.v1 import kept_pb2 as pb

ME = keypair(0).peer_id


def advert(n: int, *, addr: str = "", left: bool = False) -> OpenAdvert:
    """Peer n's own word."""
    addrs = (addr or f"/ip4/192.0.2.{n % 250}/tcp/{4000 + n}",)
    return build_advert(
        keypair(n), incarnation=1 + n, sequence=0, left=left, addrs=addrs,
        capabilities=Capabilities(cpus=2.0),
    )  # fmt: skip


def member(n: int, state: State = State.ALIVE, *, since: float = 0.0, addr: str = "") -> Member:
    """Peer n as somebody sees it."""
    said = advert(n, addr=addr, left=state is State.LEFT)
    return Member(keypair(n).peer_id, state, said, since)


def numbers(members: list[Member]) -> list[int]:
    """Whom of them one would keep, best first."""
    by_id = {keypair(n).peer_id: n for n in range(40)}
    return [by_id[k.advert.peer_id] for k in choose(members, ME, 100.0, 10**6)]


def kept(*ns: int) -> list[Known]:
    """These, as they are on disk."""
    return [Known(advert(n), 1000 + n) for n in ns]


def test_who_is_here_comes_before_who_failed_and_who_left_is_not_kept() -> None:
    members = [
        member(1, State.FAILED, since=5.0),
        member(2, State.LEFT),
        member(3, since=9.0),
        member(4, State.SUSPECT, since=1.0),
        member(5, State.FAILED, since=8.0),
        Member(ME, State.ALIVE, advert(0), 0.0),
    ]
    assert numbers(members) == [4, 3, 5, 1]


def test_one_of_each_neighbourhood_before_a_second_of_any() -> None:
    members = [member(n, since=float(n), addr=f"/ip4/8.8.8.{n}/tcp/1") for n in range(1, 20)]
    members += [member(20 + n, since=100.0, addr=f"/ip4/9.9.{n}.1/tcp/1") for n in range(5)]
    assert sorted(numbers(members)[:6]) == [1, 20, 21, 22, 23, 24]


def test_at_most_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "KNOWN_MAX", 10)
    assert len(numbers([member(n) for n in range(1, 40)])) == 10
    assert len(parse(serialise(kept(*range(40))))[0]) == 10


def test_through_a_file_and_back() -> None:
    peers = kept(*range(5))
    found, dropped = parse(serialise(peers))
    assert (found, dropped) == (peers, 0)
    assert [k.advert.signed for k in found] == [k.advert.signed for k in peers]
    assert KNOWN_MAX == 256


def test_it_is_remembered_when_a_member_was_last_here() -> None:
    members = [member(1, since=50.0), member(2, State.FAILED, since=70.0)]
    chosen = choose(members, ME, 100.0, 1_000_000)
    assert [k.heard_at_ms for k in chosen] == [1_000_000, 970_000]
    back = [recalled(k, 5.0, 1_060_000) for k in chosen]
    assert [(m.state, m.since) for m in back] == [(State.FAILED, -55.0), (State.FAILED, -85.0)]
    assert recalled(chosen[0], 5.0, 0).since == 5.0, "a clock that went back"


def test_who_changes_the_file_sends_nobody_astray() -> None:
    file = pb.KeptPeers.FromString(unseal(known.KIND, 1, serialise(kept(*range(6)))))
    adverts = [peer.advert for peer in file.peers]
    # Another address, under the old signature; another's signature; another purpose; no advert.
    adverts[1].payload = advert(1, addr="/ip4/203.0.113.66/tcp/6666").signed.payload
    adverts[2].CopyFrom(keypair(7).sign(b"p2pnet/v1/advert", adverts[2].payload))
    adverts[3].CopyFrom(keypair(3).sign(b"p2pnet/v1/record", adverts[3].payload))
    adverts[4].payload = b"\xff"
    file.peers.add().advert.CopyFrom(adverts[5])
    file.peers.add().advert.CopyFrom(advert(8, left=True).signed)
    found, dropped = parse(seal(known.KIND, 1, file.SerializeToString()))
    assert found == kept(0, 5)
    assert dropped == 6


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'["/ip4/192.0.2.1/tcp/1"]',
        seal(b"dht", 1, b""),
        seal(known.KIND, 9, b""),
        seal(known.KIND, 1, b"\xff"),
        serialise(kept(1))[:-1],
        bytes(known.FILE_BYTES_MAX + 1),
    ],
    ids=["empty", "json", "another", "version", "body", "cut", "long"],
)
def test_a_damaged_or_foreign_file_says_so(data: bytes) -> None:
    with pytest.raises(LocalError, match=r"^it "):
        parse(data)
