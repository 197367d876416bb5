"""Whatever bytes a peer signs as an entry, a proof or a history: refused, and nothing breaks."""

from __future__ import annotations

from typing import Any

import log_helpers as given
from google.protobuf.message import DecodeError
from hypothesis import given as example
from hypothesis import settings
from hypothesis import strategies as some

from p2pnet import keys
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.log.history import History, check_entry, new_cancellation, new_closing, new_commit
from p2pnet.log.proof import check_decided
from p2pnet.v1 import common_pb2, log_pb2

A, B = given.key(1), given.key(2)
PAIRS = {given.key(number).peer_id: given.key(number) for number in (11, 12, 13)}
OPEN = given.manifest(anybody=True, keepers=sorted(PAIRS))
NETWORK = given.network_of(OPEN)


def next_ones() -> list[tuple[History, common_pb2.Signed]]:
    """An entry of each kind that would count, with the history before it."""
    empty, begun = History(NETWORK), given.claimed(A, OPEN, commits=1)
    word = new_cancellation(given.OWNER, NETWORK, "enough", 1)
    return [
        (empty, given.claim(empty, A, OPEN)),
        (begun, given.claim(begun, B, OPEN)),
        (begun, new_commit(begun, A, 40, given.states(), result=(0.5, 3, 4))),
        (begun, new_closing(begun, B, word)),
    ]


NEXT = next_ones()
changes = some.lists(
    some.tuples(some.integers(0, 4000), some.integers(0, 255), some.booleans()), max_size=4
)


def changed(data: bytes, changes: list[tuple[int, int, bool]]) -> bytes:
    """Some bytes put in, or instead of others."""
    out = bytearray(data)
    for at, byte, instead in changes:
        at %= len(out) + 1
        out[at : at + instead] = bytes([byte])
    return bytes(out)


@settings(max_examples=300, deadline=None, derandomize=True)
@example(some.sampled_from(NEXT), changes, some.sampled_from([A, B]))
def test_an_entry_counts_or_is_refused(
    one: tuple[History, common_pb2.Signed], changes: list[tuple[int, int, bool]], by: Any
) -> None:
    history, signed = one
    forged = by.sign(keys.LOG_ENTRY, changed(signed.payload, changes))
    try:
        entry = check_entry(forged, history)
    except (MalformedError, ForgedError):
        return
    assert (entry.network_id, entry.slot) == (NETWORK, history.next_slot)
    assert entry.SerializeToString(deterministic=True) == forged.payload  # one form, one digest


@settings(max_examples=300, deadline=None, derandomize=True)
@example(some.sampled_from(NEXT), changes)
def test_a_changed_proof_proves_nothing_else(
    one: tuple[History, common_pb2.Signed], changes: list[tuple[int, int, bool]]
) -> None:
    history, signed = one
    honest = given.proof_of(history, signed, PAIRS)
    check_decided(signed, honest, history)
    try:
        forged = log_pb2.Proof.FromString(changed(honest.SerializeToString(), changes))
    except DecodeError:  # the wire's own parser says no
        return
    forged.DiscardUnknownFields()
    try:
        check_decided(signed, forged, history)
    except (MalformedError, ForgedError):
        return
    assert forged == honest


@settings(max_examples=100, deadline=None, derandomize=True)
@example(some.binary(max_size=200))
def test_garbage_is_no_entry(data: bytes) -> None:
    history = History(NETWORK)
    for signed in (
        A.sign(keys.LOG_ENTRY, data),
        common_pb2.Signed(payload=data, public_key=data[:32], signature=data[:64]),
    ):
        try:
            check_entry(signed, history)
        except (MalformedError, ForgedError):
            continue
        raise AssertionError("garbage counts")
