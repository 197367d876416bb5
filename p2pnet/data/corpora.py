"""Texts to train language models on, as samples of so many bytes.

`x` is a stretch of the text and `y` the same one byte later, so that the model learns to
say each next byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from p2pnet.data import text
from p2pnet.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]

REFERENCE = "python-reference:"
PARTS = ("train", "test")
TEXT = "text:"
TEXT_BYTES_MAX = 1 << 30
TRAIN_SHARE = 0.9  # of the reference's bytes, from its beginning; the rest is for tests


def is_text(ref: str) -> bool:
    """Whether `open_text` is for it."""
    return ref.startswith((TEXT, REFERENCE))


def open_text(ref: str) -> Array:
    """A text's tokens, int64 [n]: its bytes.

    `ref` is text:FILE, or python-reference:train or python-reference:test, the language
    reference that comes with Python (some 700 KB): the first nine tenths, or the last.

    Raises:
        UsageError: no such text.
    """
    if ref.startswith(TEXT):
        return _tokens(_read(Path(ref.removeprefix(TEXT))))
    part = ref.removeprefix(REFERENCE)
    if not ref.startswith(REFERENCE) or part not in PARTS:
        raise UsageError(
            f"{ref!r} is no text: write text:FILE, {REFERENCE}train or {REFERENCE}test"
        )
    from pydoc_data.topics import topics

    tokens = text.encode("\n".join(topics[topic] for topic in sorted(topics)))
    end = int(TRAIN_SHARE * len(tokens))
    return tokens[:end] if part == PARTS[0] else tokens[end:]


def samples(tokens: Array, length: int) -> tuple[Array, Array]:
    """Stretches one after the other: `x` and `y`, int64 [n, length]; what is left over is not used.

    Raises:
        UsageError: the text is too short for one.
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise UsageError(
            f"a text of {len(tokens)} bytes is too short: the network takes {length} at a time, "
            "and needs the next one of each"
        )
    end = count * length
    return tokens[:end].reshape(count, length), tokens[1 : end + 1].reshape(count, length)


def _read(path: Path) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > TEXT_BYTES_MAX:
            raise UsageError(f"{path} has {size_bytes} bytes, and a text at most {TEXT_BYTES_MAX}")
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None


def _tokens(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8).astype(np.int64)
