"""A VNode's state at rest: safetensors, the same bytes for the same state (DESIGN D9, D12).

    param.<name>           a parameter
    buffer.<name>          a buffer
    opt.<param>.<key>      the optimizer's: exp_avg, exp_avg_sq, step, momentum_buffer
    metadata {"step": "<n>"}   the state after step n

One metadata key only: safetensors sorts tensors (by dtype, then name), but keeps
metadata in a hash map, whose order is not the same from run to run.

numpy alone: exporting and checking weights needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from p2pnet.errors import MalformedError
from p2pnet.vnode.tensors import Array, raw_bytes

PARAM = "param."
BUFFER = "buffer."
OPTIMIZER = "opt."

_HEADER_BYTES_MAX = 1 << 20
_STEP_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tensor of a state has to be."""

    dtype: str  # numpy's name: "float32"
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{shape_text(self.shape)}]"


def encode_state(tensors: Mapping[str, Array], step: int) -> bytes:
    """The state after `step` as safetensors; equal states give equal bytes."""
    plain = {name: _contiguous(tensors[name]) for name in sorted(tensors)}
    encoded: bytes = safetensors.numpy.save(plain, {"step": str(step)})
    return encoded


def decode_state(data: bytes) -> tuple[dict[str, Array], int]:
    """The tensors of a state, writable, and its step.

    Raises:
        MalformedError: not safetensors, or without a step.
    """
    step = _step_of(data)
    try:
        loaded = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise MalformedError(f"a state is not valid safetensors: {error}") from None
    # safetensors hands out views of read-only bytes, which torch does not take
    return {name: np.array(loaded[name]) for name in sorted(loaded)}, step


def check_state(tensors: Mapping[str, Array], expected: Mapping[str, Expected]) -> None:
    """Names, dtypes and shapes are exactly the expected ones.

    Raises:
        MalformedError: says which tensor is missing, unknown or of another form.
    """
    for name in sorted(expected):
        if name not in tensors:
            raise MalformedError(f"a state lacks the tensor {name}")
        found = Expected(tensors[name].dtype.name, tensors[name].shape)
        if found != expected[name]:
            raise MalformedError(f"a state's {name} is {found}, not {expected[name]}")
    for name in sorted(tensors):
        if name not in expected:
            raise MalformedError(f"a state has a tensor {name[:80]!r} that does not belong there")


def weights_of(vnode: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The parameters and buffers of a VNode's state under their export names, `VNODE.NAME`."""
    return {
        f"{vnode}.{name.removeprefix(kind)}": tensors[name]
        for kind in (PARAM, BUFFER)
        for name in sorted(tensors)
        if name.startswith(kind)
    }


def encode_export(tensors: Mapping[str, Array]) -> bytes:
    """A safetensors file of weights by their export names, without metadata."""
    encoded: bytes = safetensors.numpy.save({n: _contiguous(tensors[n]) for n in sorted(tensors)})
    return encoded


def model_digest(tensors: Mapping[str, Array]) -> str:
    """The digest of a network's weights, lower-case hex (DESIGN section 5).

    SHA-256 over, for every parameter and buffer in order of name (by code point):
    `name \\0 dtype \\0 shape \\0` in UTF-8, then the tensor's row-major little-endian
    bytes. The name is `VNODE.PARAM`; dtype is written as numpy and torch name it,
    "float32"; shape as its lengths with commas, "64,128", and "" for a scalar.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name}\0{array.dtype.name}\0{shape_text(array.shape)}\0".encode())
        digest.update(raw_bytes(array))
    return digest.hexdigest()


def shape_text(shape: Iterable[int]) -> str:
    """A shape as `model_digest` writes it: "64,128"."""
    return ",".join(map(str, shape))


def _contiguous(array: Array) -> Array:
    # not np.ascontiguousarray, which makes a scalar a vector; and safetensors wants
    # arrays, not numpy's scalars
    array = np.asarray(array)
    return array if array.flags.c_contiguous else array.copy(order="C")


def _step_of(data: bytes) -> int:
    """The metadata's step; `safetensors.numpy.load` does not hand out the metadata."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _HEADER_BYTES_MAX):
        raise MalformedError("a state is not valid safetensors: its header does not fit")
    try:
        header: Any = json.loads(data[8 : 8 + length])
        text = header["__metadata__"]["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MalformedError("a state does not say after which step it is") from None
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20):
        raise MalformedError("a state does not say after which step it is")
    step = int(text)
    if step > _STEP_MAX:
        raise MalformedError("a state does not say after which step it is")
    return step
