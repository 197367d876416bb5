"""Bytes as tokens: what comes out is what went in, and never half a character."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from p2pnet.data.text import Decoder, decode, encode


@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    tokens = encode(text)
    assert tokens.dtype == np.int64
    assert decode(tokens) == text
    decoder = Decoder()
    assert "".join(decoder.feed(int(token)) for token in tokens) + decoder.finish() == text


def test_half_a_character_is_kept_until_the_rest_comes() -> None:
    decoder = Decoder()
    assert [decoder.feed(int(token)) for token in encode("aß€")] == ["a", "", "ß", "", "", "€"]
    assert decoder.finish() == ""


@given(st.lists(st.integers(0, 255)))
def test_any_bytes_are_some_text(tokens: list[int]) -> None:
    decoder = Decoder()
    pieces = [decoder.feed(token) for token in tokens] + [decoder.finish()]
    assert "".join(pieces) == decode(np.array(tokens, np.int64))
