"""The fuzzer itself: its samples are good ones, and the same seed makes the same frames."""

from __future__ import annotations

from random import Random

import pytest
import trio
from fuzz import hop_parsers, log_parsers, parsers
from fuzz.hop_parsers import HOP_PARSERS
from fuzz.log_parsers import LOG_PARSERS
from fuzz.mutations import bytes_of, fields_of, mutated, scrambled
from fuzz.parsers import PARSERS as NET_PARSERS
from fuzz.parsers import Parser

PARSERS = (*NET_PARSERS, *LOG_PARSERS, *HOP_PARSERS)
GOOD: dict[str, tuple[bytes, ...]] = {
    "kad-dht message": parsers.KAD,
    "batch of requests": (parsers.BATCH,),
    "record set": (parsers.SET,),
    "record": parsers.SIGNED_RECORDS,
    "manifest": (parsers.written(parsers.manifest()),),
    "multiaddr as bytes": parsers.RAW_ADDRS,
    "multiaddr as text": tuple(addr.encode() for addr in parsers.ADDRS[:3]),
    "gossip message": parsers.GOSSIP,
    "event": parsers.EVENTS,
    "advert": tuple(advert.raw for advert in parsers.ADVERTS),
    "accusation": tuple(accusation.raw for accusation in parsers.ACCUSATIONS),
    "gossip request": parsers.GOSSIP[:3],
    "peers on disk": (parsers.KNOWN,),
    "records on disk": (parsers.HELD,),
    "certificate": (parsers.CERTIFICATE.cert_der,),
    "log entry": tuple(map(parsers.written, log_parsers.ENTRIES)),
    "proof of an entry": log_parsers.DECIDED,
    "keeper": log_parsers.CALLS,
    "answer to a reader": (parsers.written(log_parsers.TOLD),),
    "claim that is shown": (parsers.written(log_parsers.ENTRIES[0]),),
    "allocation": (parsers.written(log_parsers.ALLOCATE),),
    "compiled graph": (log_parsers.GRAPH.to_json(),),
    "service": (log_parsers.GOOD_SERVICE,),
    "timestamp": (b"019ab5dd7e33-0002",),
    "hop at a host": hop_parsers.TO_A_HOST[:2],
    "hop at a caller": hop_parsers.TO_A_CALLER[:1],
    "tensor": hop_parsers.PACKED,
    "entry in a store": (parsers.written(log_parsers.ENTRIES[0]),),
    "standing on disk": (log_parsers.STANDING,),
    "stream that a peer opens": parsers.OPENINGS,
    "stream that we open": parsers.ACCEPTED[:1],
    "identify message": (
        parsers.HELLO + parsers.frame(b"/ipfs/id/1.0.0\n") + parsers.frame(parsers.IDENTIFY),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_the_samples_are_what_an_honest_peer_sends(name: str) -> None:
    (parser,) = (parser for parser in PARSERS if parser.name == name)
    for sample in GOOD[name]:
        read = parser.start(Random(0))
        if parser.waits:
            trio.run(read, sample)
        else:
            read(sample)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_the_same_seed_makes_the_same_frames_and_others_do_not(parser: Parser) -> None:
    def frames(seed: int) -> list[bytes]:
        rng = Random(seed)
        return [parser.frame(rng) for _ in range(30)]

    assert frames(1) == frames(1)
    assert frames(1) != frames(2)


def test_fields_are_taken_apart_and_put_together_again() -> None:
    for sample in (*parsers.KAD, *parsers.GOSSIP, *parsers.SIGNED_RECORDS, parsers.SET):
        fields = fields_of(sample)
        assert fields
        assert bytes_of(fields) == sample
    for wrong in (b"\x0a\x05ab", b"\x0b", b"\x08", b"\xff" * 12):
        assert fields_of(wrong) is None


def test_values_are_scrambled_in_a_copy() -> None:
    before = parsers.GOSSIP_MESSAGES[0].SerializeToString()
    rng = Random(1)
    assert any(scrambled(rng, parsers.GOSSIP_MESSAGES[0]) != parsers.GOSSIP_MESSAGES[0]
               for _ in range(5))  # fmt: skip
    assert parsers.GOSSIP_MESSAGES[0].SerializeToString() == before


def test_a_mutated_frame_has_its_bound() -> None:
    rng = Random(3)
    assert max(len(mutated(rng, parsers.KAD)) for _ in range(2000)) <= 8 << 10
