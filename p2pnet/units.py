"""Sizes and durations as people write them: "4GiB", "512 MB", "65536"; "30d", "90 min"."""

from __future__ import annotations

import re

from p2pnet.errors import UsageError

_UNITS = {
    "": 1, "b": 1,
    "k": 2**10, "kb": 10**3, "kib": 2**10,
    "m": 2**20, "mb": 10**6, "mib": 2**20,
    "g": 2**30, "gb": 10**9, "gib": 2**30,
    "t": 2**40, "tb": 10**12, "tib": 2**40,
}  # fmt: skip

_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(text: str) -> int:
    """Bytes of a size; KiB, MiB, GiB, TiB are powers of 1024, KB to TB of 1000.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match and _UNITS.get(match[2].lower())
    if not match or not unit:
        raise UsageError(f"{text!r} is not a size: write for example 512MiB or 4GiB")
    return int(float(match[1]) * unit)


def parse_duration(text: str) -> float:
    """Seconds of a duration: s, m or min, h, d, w; without a unit it is seconds.

    Raises:
        UsageError: not a duration.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match and _SECONDS.get(match[2].lower())
    if not match or not unit:
        raise UsageError(f"{text!r} is not a duration: write for example 30d, 12h or 90s")
    return float(match[1]) * unit


def format_size(size_bytes: float) -> str:
    """A size for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
