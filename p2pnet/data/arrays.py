"""Single arrays in .npy files, as `p2pnet infer` reads and writes them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from p2pnet.datadir import write_whole
from p2pnet.errors import UsageError

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
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    write_whole(path, file.getvalue())
