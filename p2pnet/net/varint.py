"""Messages on a stream: each after its length as an unsigned varint.

The varint is that of github.com/multiformats/unsigned-varint: base 128, little
end first, at most 9 bytes; kad-dht and most libp2p protocols frame this way.
"""

from __future__ import annotations

from p2pnet.errors import MalformedError

_VARINT_BYTES_MAX = 9


def encode_varint(value: int) -> bytes:
    """The varint of a number from 0 to 2**63 - 1; raises ValueError outside."""
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{value} does not fit a varint")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def frame(message: bytes) -> bytes:
    """A message behind its length."""
    return encode_varint(len(message)) + message


class Unframer:
    """Takes a stream's bytes as they come and gives back whole messages.

    `message_bytes_max` is checked when the length is read, before a byte of the
    message is kept.
    """

    def __init__(self, message_bytes_max: int) -> None:
        self._max = message_bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes.

        Raises:
            MalformedError: a length that is too large or no varint.
        """
        self._buffer += data
        messages: list[bytes] = []
        while (header := self._length()) is not None:
            length, start = header
            if len(self._buffer) < start + length:
                break
            messages.append(bytes(self._buffer[start : start + length]))
            del self._buffer[: start + length]
        return messages

    def _length(self) -> tuple[int, int] | None:
        """The length of the first message and where it begins, if that has come."""
        value = 0
        for i, byte in enumerate(self._buffer[:_VARINT_BYTES_MAX]):
            value |= (byte & 0x7F) << 7 * i
            if not byte & 0x80:
                if value > self._max:
                    raise MalformedError(f"a message of {value} bytes, over {self._max}")
                return value, i + 1
        if len(self._buffer) >= _VARINT_BYTES_MAX:
            raise MalformedError("a length that is no varint")
        return None
