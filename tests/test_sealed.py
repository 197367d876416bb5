"""Files that say what they are and whether they are whole."""

from __future__ import annotations

import random

import pytest

from p2pnet.errors import LocalError
from p2pnet.sealed import HEAD_BYTES, seal, unseal


@pytest.mark.parametrize("body", [b"", b"x", bytes(100_000)], ids=["empty", "short", "long"])
def test_through_and_back(body: bytes) -> None:
    assert unseal(b"test", 3, seal(b"test", 3, body)) == body


def test_every_changed_bit_is_noticed() -> None:
    data = seal(b"abc", 1, b"a body")
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            with pytest.raises(LocalError):
                unseal(b"abc", 1, bytes(changed))


def test_every_cut_is_noticed() -> None:
    data = seal(b"test", 1, random.Random(0).randbytes(50))
    for length in range(len(data)):
        with pytest.raises(LocalError):
            unseal(b"test", 1, data[:length])
    assert len(data) == HEAD_BYTES + 50


def test_it_says_what_is_wrong() -> None:
    data = seal(b"one", 1, b"")
    for kind, version, what in ((b"two", 1, "another kind"), (b"one", 2, "of version 1, and")):
        with pytest.raises(LocalError, match=what):
            unseal(kind, version, data)
