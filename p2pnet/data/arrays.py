"""Single arrays in .npy files, as `p2pnet infer` reads and writes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from p2pnet.errors import ResourceError, UsageError

Array = np.ndarray[Any, np.dtype[Any]]


def read_npy(path: Path) -> Array:
    """An array, samples first; pickled objects are refused.

    Raises:
        UsageError: no such file, or no .npy.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or 'it is no .npy'}") from None
    except (ValueError, EOFError):
        raise UsageError(f"{path} is no .npy file of numbers: write it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise UsageError(f"{path} holds several arrays: give a .npy with one, samples first")
    return array


def write_npy(path: Path, array: Array) -> None:
    """Writes an array, all or nothing; raises ResourceError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{path} cannot be written: {error.strerror}") from error
