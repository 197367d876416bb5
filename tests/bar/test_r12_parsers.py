"""R12: malformed frames at every parser of peers' bytes: DHT, membership, net, logs, hosting.

Short form and row as written: 100,000 frames, of which each parser gets its share
(`fuzz.parsers.PARSERS`); `--as-written` sends 1,000,000. Hypothesis draws the seeds, and
each seed expands to 200 frames: samples mutated by bytes, by protobuf fields and by values
(then signed anew), and noise. Only the errors that a parser documents may come out of it,
each frame within 50 ms of CPU time; what is declared beyond a limit is refused before it
is there.
"""

from __future__ import annotations

import gc
import math
import resource
from typing import Any

import pytest
from fuzz.hop_parsers import HOP_PARSERS
from fuzz.huge import HUGE, judge_huge
from fuzz.judge import judge
from fuzz.log_parsers import LOG_PARSERS
from fuzz.parsers import PARSERS as NET_PARSERS
from fuzz.parsers import Parser
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

PARSERS = (*NET_PARSERS, *LOG_PARSERS, *HOP_PARSERS)
FRAMES = 200  # of one seed
AS_WRITTEN = 10  # times as many
KEPT_BYTES_MAX = 48 << 20  # by all the caches behind one parser
SENT: dict[str, int] = {}


def run(parser: Parser, frames: int, first_seed: int = 0) -> int:
    """Judges at least so many frames; returns how many the parser refused."""
    refused: list[int] = []

    @settings(
        max_examples=math.ceil(frames / FRAMES),
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(first_seed, 2**32 - 1))
    def batch(seed: int) -> None:
        refused.append(judge(parser, seed, FRAMES))

    # The pauses of the collector are not the parser's: it shall look at what is new alone.
    gc.collect()
    gc.freeze()
    try:
        batch()
    finally:
        gc.unfreeze()
    SENT[parser.name] = len(refused) * FRAMES
    assert SENT[parser.name] >= frames
    return sum(refused)


def peak_rss_bytes() -> int:
    """The most that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name.replace(" ", "-"))
def test_r12_only_documented_errors_come_out(parser: Parser, scale: Any, figure: Any) -> None:
    before = peak_rss_bytes()
    refused = run(parser, parser.share * (AS_WRITTEN if scale.as_written else 1))
    assert peak_rss_bytes() - before < KEPT_BYTES_MAX
    figure(f"R12 {parser.name}: {SENT[parser.name]} frames, {refused} refused, none else")


def test_r12_all_in_all_it_is_a_hundred_thousand_frames() -> None:
    assert sum(parser.share for parser in PARSERS) >= 100_000


@pytest.mark.parametrize("name", HUGE)
def test_r12_what_is_beyond_a_limit_is_refused_before_it_is_there(name: str) -> None:
    judge_huge(name)


class NeverRaisedError(Exception):
    """Stands where a parser catches what its libraries raise."""


# Which guard is taken out, and at which target that has to show.
MUTANTS = {
    "p2pnet.dht.wire.DecodeError": "kad-dht message",
    "p2pnet.dht.core.MalformedError": "DHT request",
    "p2pnet.dht.records.DecodeError": "record set",
    "p2pnet.dht.canonical.DecodeError": "record",
    "p2pnet.keys.InvalidSignature": "manifest",
    "p2pnet.net.multiaddr.ValueError": "multiaddr as bytes",
    "p2pnet.net.streams.UnicodeDecodeError": "stream that a peer opens",
    "p2pnet.net.libp2p.DecodeError": "identify message",
    "p2pnet.net.session.DecodeError": "session",
    "p2pnet.net.tls.ValueError": "certificate",
    "p2pnet.gossip.messages.DecodeError": "gossip request",
    "p2pnet.gossip.statements.DecodeError": "advert",
    "p2pnet.gossip.membership.RemoteError": "gossip answer",
    "p2pnet.log.reader.RemoteError": "answer to a reader",
    "p2pnet.log.proposer.RemoteError": "answer to a proposer",
    "p2pnet.log.stored.DecodeError": "entry in a store",
    "p2pnet.vnode.admission.RemoteError": "allocation",
    "p2pnet.causality.MalformedError": "timestamp",
    "p2pnet.net.hop_frames.DecodeError": "hop at a host",
    "p2pnet.vnode.codecs.zstandard.ZstdError": "tensor",
}


@pytest.mark.parametrize("guard", MUTANTS)
def test_r12_mutant_without_a_guard(monkeypatch: pytest.MonkeyPatch, guard: str) -> None:
    (parser,) = (parser for parser in PARSERS if parser.name == MUTANTS[guard])
    monkeypatch.setattr(guard, NeverRaisedError, raising=False)
    with pytest.raises(AssertionError, match=f"{parser.name}: .* on frame"):
        run(parser, parser.share, first_seed=1 << 31)  # what caches have not seen


LIMITS = {
    "p2pnet.dht.records.AUTHORS_MAX": "20,000 records",
    "p2pnet.net.streams._PROPOSALS_MAX": "proposals without an end",
    "p2pnet.gossip.messages.STATEMENTS_MAX": "100,000 statements",
    "p2pnet.gossip.statements.ADDRS_MAX": "an advert with 2,000 addresses",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_r12_mutant_without_a_limit(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    judge_huge(LIMITS[limit])
    monkeypatch.setattr(limit, 1 << 40)
    with pytest.raises(AssertionError):
        judge_huge(LIMITS[limit])
