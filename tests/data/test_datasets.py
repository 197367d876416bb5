"""Data by reference, and the order of its samples, which is pinned for good."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from p2pnet.data.datasets import batches, open_data, sample_order
from p2pnet.errors import UsageError


def test_digits() -> None:
    x, y = open_data("digits:train")
    x_test, y_test = open_data("digits:test")
    assert (x.shape, y.shape, x_test.shape) == ((1437, 64), (1437,), (360, 64))
    assert (x.dtype, y.dtype) == (np.float32, np.int64)
    assert (x.min(), x.max()) == (0, 1)
    assert all(abs(np.bincount(y) / 1437 - np.bincount(y_test) / 360) < 0.01)
    both = {row.tobytes() for row in x} & {row.tobytes() for row in x_test}
    assert not both


def splitmix64(state: int) -> int:
    """One output, as the paper's reference code has it."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_order_is_the_documented_one() -> None:
    import hashlib

    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    start = int.from_bytes(hashlib.sha256(b"7\x003").digest()[:8], "big")
    gamma = 0x9E3779B97F4A7C15
    keys = [splitmix64((start + index * gamma) % 2**64) for index in range(100)]
    assert sample_order(100, 7, 3).tolist() == sorted(range(100), key=keys.__getitem__)


def test_the_order_is_pinned() -> None:
    assert sample_order(10, 0, 1).tolist() == [1, 7, 3, 0, 8, 9, 4, 5, 2, 6]
    assert sample_order(0, 0, 1).tolist() == []
    assert sample_order(1, 0, 1).tolist() == [0]


def test_every_epoch_and_seed_has_its_own_order() -> None:
    orders = [tuple(sample_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 25


def test_places_are_evenly_taken() -> None:
    counts = np.zeros((8, 8))
    for epoch in range(2000):
        counts[sample_order(8, 1, epoch), np.arange(8)] += 1
    chi_squared = ((counts - 250) ** 2 / 250).sum()
    assert chi_squared < 98  # 49 degrees of freedom: exceeded by chance once in 25,000 times


def test_a_million_samples_are_ordered_quickly() -> None:
    begun = time.perf_counter()
    order = sample_order(1_000_000, 0, 0)
    assert time.perf_counter() - begun < 5
    assert np.array_equal(np.sort(order), np.arange(1_000_000))


def test_batches_keep_the_ragged_last_one() -> None:
    x = np.arange(20, dtype=np.float32).reshape(10, 2)
    y = np.arange(10)
    parts = list(batches(x, y, 4, seed=0, epoch=2))
    assert [len(part) for part, _ in parts] == [4, 4, 2]
    order = sample_order(10, 0, 2)
    assert np.array_equal(np.concatenate([part for part, _ in parts]), x[order])
    assert np.array_equal(np.concatenate([part for _, part in parts]), y[order])
    assert [len(part) for part, _ in batches(x, y, 4, 0, 2, smallest=3)] == [4, 4]
    with pytest.raises(UsageError):
        next(batches(x, y, 0, 0, 0))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"my data{suffix}"
    tensors = {"x": np.arange(6.0).reshape(3, 2), "y": np.array([1, 0, 2], np.int32)}
    np.savez(path, **tensors) if suffix == ".npz" else save_file(tensors, path)
    x, y = open_data("file://" + str(path).replace(" ", "%20"))
    assert np.array_equal(x, tensors["x"])
    assert np.array_equal(y, tensors["y"])
    assert (x.dtype, y.dtype) == (np.float32, np.int64)


def written(path: Path, name: str, **tensors: object) -> str:
    np.savez(path / name, **tensors)  # type: ignore[arg-type]
    return f"file://{path / name}"


def test_bad_data_says_what_is_wrong(tmp_path: Path) -> None:
    x, y = np.zeros((3, 2), np.float32), np.zeros(3)
    (tmp_path / "junk.npz").write_bytes(b"PK junk")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "a.csv").write_text("1,2")
    (tmp_path / "dir.npz").mkdir()
    cases = {
        "mnist": "digits:train",
        "digits:all": "digits:train",
        str(tmp_path / "d.npz"): "file:///srv",
        f"file://{tmp_path}/none.npz": "there is no file",
        f"file://{tmp_path}/none.safetensors": "there is no file",
        f"file://{tmp_path}/a.csv": ".npz or .safetensors",
        f"file://{tmp_path}/junk.npz": "cannot be read",
        f"file://{tmp_path}/empty.npz": "cannot be read",
        f"file://{tmp_path}/dir.npz": "cannot be read",
        f"file://{tmp_path}/junk.safetensors": "cannot be read",
        written(tmp_path, "noy.npz", x=x): "holds x: it has to hold",
        written(tmp_path, "other.npz", a=x, b=y): "holds a, b: it has to hold",
        written(tmp_path, "lengths.npz", x=x, y=y[:2]): "3 samples in x and 2 in y",
        written(tmp_path, "none.n.npz", x=x[:0], y=y[:0]): "at least one sample",
        written(tmp_path, "scalar.npz", x=x, y=np.array(1)): "single number",
        written(tmp_path, "words.npz", x=x, y=np.array(["a", "b", "c"])): "has to hold numbers",
        written(tmp_path, "pickle.npz", x=x, y=np.array([{}, 1, 2], object)): "cannot be read",
    }
    for ref, says in cases.items():
        with pytest.raises(UsageError, match=says) as caught:
            open_data(ref)
        assert "\n" not in str(caught.value)
