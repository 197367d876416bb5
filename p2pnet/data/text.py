"""Text as tokens: the bytes of its UTF-8, 0 to 255. No vocabulary, nothing to download."""

from __future__ import annotations

import codecs
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

TOKENS = 256


def encode(text: str) -> Array:
    """The tokens of a text, int64 [n]; lone surrogates become question marks."""
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64)


def decode(tokens: Array) -> str:
    """The text of tokens, int64 [n]; what is no UTF-8 becomes U+FFFD."""
    return bytes(tokens.astype(np.uint8)).decode("utf-8", "replace")


class Decoder:
    """Tokens to text as they come: half a character is kept until the rest of it is there."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The characters that this token completes, often none or one."""
        return self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was begun and never completed."""
        return self._decoder.decode(b"", final=True)
