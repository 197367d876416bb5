"""`auto`: what gets a tensor there sooner, by measurement; and it is rarely measured."""

from __future__ import annotations

from p2pnet.vnode.choosing import SAMPLE_EVERY, CodecChooser

MB = 1 << 20
TENSOR = 128 << 10


def chooser(line_bytes_s: float, *, left: float, pack_bytes_s: float = 400 * MB) -> CodecChooser:
    """What has sent a few tensors over a line, and has sampled one."""
    it = CodecChooser()
    it.delivered("b", 100, 0.05)
    for _ in range(3):
        it.delivered("b", TENSOR, 0.05 + TENSOR / line_bytes_s)
    if it.wants_sample("b", "edge", TENSOR):
        it.sampled("edge", 64 << 10, left, (64 << 10) / pack_bytes_s)
    return it


def test_a_slow_line_is_worth_the_work() -> None:
    assert chooser(10 * MB, left=0.5).compresses("b", "edge", TENSOR)
    assert not chooser(10 * MB, left=0.97).compresses("b", "edge", TENSOR)


def test_a_fast_line_is_not() -> None:
    assert not chooser(900 * MB, left=0.1).compresses("b", "edge", TENSOR)
    assert not chooser(200 * MB, left=0.6).compresses("b", "edge", TENSOR)


def test_nothing_is_compressed_before_anything_is_known() -> None:
    it = CodecChooser()
    assert not it.wants_sample("b", "edge", TENSOR)
    assert not it.compresses("b", "edge", TENSOR)
    it.delivered("b", TENSOR, 1.0)
    assert it.wants_sample("b", "edge", TENSOR)
    assert not it.compresses("b", "edge", TENSOR)


def test_small_tensors_go_as_they_are() -> None:
    it = chooser(1 * MB, left=0.1)
    assert it.compresses("b", "edge", TENSOR)
    assert not it.compresses("b", "edge", 1000)
    assert not it.wants_sample("b", "edge", 1000)


def test_samples_are_rare() -> None:
    it = chooser(10 * MB, left=0.5)
    samples = 0
    for _ in range(10 * SAMPLE_EVERY):
        if it.wants_sample("b", "edge", TENSOR):
            samples += 1
            it.sampled("edge", 64 << 10, 0.5, 0.0002)
    assert samples in (9, 10)


def test_a_line_too_fast_for_any_ratio_is_hardly_sampled() -> None:
    it = chooser(2000 * MB, left=0.0)
    assert not any(it.wants_sample("b", "other", TENSOR) for _ in range(5 * SAMPLE_EVERY))


def test_waiting_is_not_taken_for_a_slow_line() -> None:
    """A host that holds its replies back: the quickest of the last deliveries counts."""
    it = chooser(900 * MB, left=0.1)
    for _ in range(5):
        it.delivered("b", TENSOR, 2.0)
    assert not it.compresses("b", "edge", TENSOR)
    for _ in range(20):
        it.delivered("b", TENSOR, 2.0)  # it has become slow
    assert it.compresses("b", "edge", TENSOR)


def test_a_change_of_the_data_is_followed() -> None:
    it = chooser(10 * MB, left=1.0)
    assert not it.compresses("b", "edge", TENSOR)
    for _ in range(20):
        it.sampled("edge", 64 << 10, 0.2, 0.0002)
    assert it.compresses("b", "edge", TENSOR)


def test_tables_are_bounded() -> None:
    it = CodecChooser()
    for number in range(6000):
        it.delivered(f"peer{number}", TENSOR, 0.1)
        it.delivered(f"peer{number}", 10, 0.1)
        it.sampled(f"edge{number}", 1000, 0.5, 0.001)
    assert len(it._rates) <= 1024
    assert len(it._away_s) <= 1024
    assert len(it._edges) <= 4096
