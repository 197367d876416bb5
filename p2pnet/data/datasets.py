"""Training data: where it comes from, and in which order its samples go.

The order is a function of (seed, epoch) that is written down here, so that it
outlives versions of numpy: whoever feeds a run again feeds the same batches.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from p2pnet.data.blobs import path_of
from p2pnet.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]

DIGITS_TRAIN = "digits:train"
DIGITS_TEST = "digits:test"


def open_data(ref: str) -> tuple[Array, Array]:
    """Samples and targets, `x` [n, ...] float32 and `y` [n, ...] int64 or float32.

    `ref` is digits:train, digits:test (scikit-learn's handwritten digits, pixels
    scaled to 0..1, stratified 80/20 with seed 0), or the file:// URL of an .npz or
    .safetensors file with `x` and `y`. Numbers of other widths are converted.

    Raises:
        UsageError: no such data, or not of this form.
    """
    if ref in (DIGITS_TRAIN, DIGITS_TEST):
        return _digits(ref)
    if not ref.startswith("file:"):
        raise UsageError(
            f"{ref!r} is no data: write digits:train, digits:test, a text (text:FILE, "
            "python-reference:train, python-reference:test) or a file, for example "
            "file:///srv/data.npz"
        )
    path = path_of(ref)
    tensors = _read(path)
    for key in ("x", "y"):
        if key not in tensors:
            found = ", ".join(sorted(tensors)[:8]) or "nothing"
            raise UsageError(f"{path} holds {found}: it has to hold x (samples first) and y")
    x, y = _numbers(path, "x", tensors["x"]), _numbers(path, "y", tensors["y"])
    if len(x) != len(y) or not len(x):
        raise UsageError(
            f"{path} holds {len(x)} samples in x and {len(y)} in y: "
            "there has to be one y for each sample, and at least one sample"
        )
    return x.astype(np.float32, copy=False), y


def sample_order(samples: int, seed: int, epoch: int) -> Array:
    """The order of an epoch's samples: a permutation of 0..samples-1, int64.

    Samples are sorted by a key each, a SplitMix64 sequence (Steele, Lea, Flood:
    "Fast splittable pseudorandom number generators", OOPSLA 2014) that begins at
    the first 8 bytes, big-endian, of SHA-256 over the seed in decimal, a zero byte
    and the epoch in decimal. No two keys are the same, for the mixer is a bijection.
    """
    start = int.from_bytes(hashlib.sha256(f"{seed}\0{epoch}".encode()).digest()[:8], "big")
    # All modulo 2**64, as arrays of uint64 compute.
    key = np.arange(1, samples + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key += np.array([start], np.uint64)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key ^= key >> np.uint64(31)
    return np.argsort(key, kind="stable").astype(np.int64, copy=False)


def batches(
    x: Array, y: Array, batch_size: int, seed: int, epoch: int, *, smallest: int = 1
) -> Iterator[tuple[Array, Array]]:
    """An epoch's batches in their order. Each is a copy.

    The last one may be smaller; with fewer than `smallest` samples it is left out.
    """
    if batch_size < 1:
        raise UsageError(f"a batch has at least 1 sample, not {batch_size}")
    order = sample_order(len(x), seed, epoch)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        if len(chosen) >= smallest:
            yield x[chosen], y[chosen]


def _digits(ref: str) -> tuple[Array, Array]:
    # A second to import, and nothing else needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    x = (digits.data / 16.0).astype(np.float32)
    y = digits.target.astype(np.int64)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=0.2, random_state=0, stratify=y
    )
    return (x_train, y_train) if ref == DIGITS_TRAIN else (x_test, y_test)


def _read(path: Path) -> dict[str, Array]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in ("x", "y") if key in file.files} or {
                    key: np.empty(0) for key in file.files
                }
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.numpy import load_file

            try:
                return dict(load_file(path))
            except (SafetensorError, TypeError, KeyError) as error:
                raise UsageError(f"{path} cannot be read as safetensors: {error}") from None
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as .npz: {error}") from None
    raise UsageError(f"{path} is of no kind that is known here: give an .npz or .safetensors file")


def _numbers(path: Path, key: str, array: Array) -> Array:
    if array.ndim == 0:
        raise UsageError(f"{key} in {path} is a single number: it has to have samples first")
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    if array.dtype.kind in "iub":
        return array.astype(np.int64, copy=False)
    raise UsageError(f"{key} in {path} holds {array.dtype}: it has to hold numbers")
