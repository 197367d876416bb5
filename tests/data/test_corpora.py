"""Texts as samples: each byte's answer is the next one, and nothing is left out but the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnet.data import corpora
from p2pnet.data.corpora import is_text, open_text, samples
from p2pnet.data.text import decode
from p2pnet.errors import UsageError


@given(st.integers(1, 20), st.integers(0, 100))
def test_the_answer_to_each_byte_is_the_next(length: int, more: int) -> None:
    tokens = np.arange(length + 1 + more)
    x, y = samples(tokens, length)
    assert x.shape == y.shape == ((len(tokens) - 1) // length, length)
    assert np.array_equal(y, x + 1)
    assert np.array_equal(x.reshape(-1), tokens[: x.size])


def test_a_file_is_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a text"
    path.write_bytes("naïve\n".encode())
    tokens = open_text(f"text:{path}")
    assert tokens.dtype == np.int64
    assert decode(tokens) == "naïve\n"


def test_the_reference_is_a_real_text_in_two_parts() -> None:
    train, test = open_text("python-reference:train"), open_text("python-reference:test")
    assert len(train) > 400_000
    assert len(train) / (len(train) + len(test)) == pytest.approx(0.9, abs=1e-4)
    assert "statement" in decode(train)
    assert "statement" in decode(test)


@pytest.mark.parametrize("ref", ["text:/there/is/none", "python-reference:all", "text:"])
def test_a_text_that_is_not_there(ref: str) -> None:
    assert is_text(ref)
    with pytest.raises(UsageError, match=r"no file|no text|cannot be read"):
        open_text(ref)


def test_texts_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"12345678")
    tokens = open_text(f"text:{path}")
    assert len(samples(tokens, 7)[0]) == 1
    with pytest.raises(UsageError, match="a text of 8 bytes is too short"):
        samples(tokens, 8)
    monkeypatch.setattr(corpora, "TEXT_BYTES_MAX", 7)
    with pytest.raises(UsageError, match="has 8 bytes, and a text at most 7"):
        open_text(f"text:{path}")


def test_other_data_are_no_texts() -> None:
    assert not is_text("digits:train")
    with pytest.raises(UsageError, match="is no text"):
        open_text("digits:train")
