"""Sizes and durations as people write them."""

from __future__ import annotations

import pytest

from p2pnet.errors import UsageError
from p2pnet.units import format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("65536", 65536),
        ("0", 0),
        ("12 b", 12),
        ("1k", 1024),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("512 MB", 512_000_000),
        ("512MiB", 512 << 20),
        ("4GiB", 4 << 30),
        (" 4gib ", 4 << 30),
        ("1.5 GiB", 3 << 29),
        ("2T", 2 << 40),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "4 GiBs", "-1", "1e9", "GiB", "1,5 GiB", "4 Gi B", "nan", "inf", "1.GiB", "४ KB x"]
)
def test_what_is_no_size_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match="write for example"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize("power", range(0, 45, 5))
def test_what_is_printed_can_be_read_again(power: int) -> None:
    assert parse_size(format_size(1 << power)) == 1 << power


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5 min", 90), ("12h", 43200), ("30d", 2592000), ("1W", 604800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "30 days", "-1d", "1e3", "inf"])
def test_what_is_no_duration_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(UsageError, match="write for example"):
        parse_duration(text)
