"""Batches as a network's graph wants them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from p2pnet.errors import UsageError
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.network import BATCH_SAMPLES
from p2pnet.vnode.tensors import Array


@dataclass(frozen=True, slots=True)
class Content:
    """What one step is computed from: arrays, samples first."""

    inputs: dict[str, Array]
    target: Array

    @property
    def size_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in (*self.inputs.values(), self.target))


def checked(graph: CompiledGraph, inputs: dict[str, Array], target: Array) -> Content:
    """A batch of as many inputs as targets that fits the graph.

    Raises:
        UsageError: says what was expected.
    """
    inputs = {name: fitted(graph, name, array) for name, array in inputs.items()}
    target = fitted(graph, TARGET, target)
    missing = [name for name in graph.inputs if name not in inputs]
    if missing:
        raise UsageError(f"network {graph.name} also needs the input {missing[0]!r}")
    sizes = sorted({len(target), *(len(array) for array in inputs.values())})
    if len(sizes) != 1 or not sizes[0]:
        raise UsageError(f"a batch needs as many inputs as targets, and at least one: {sizes}")
    if sizes[0] > BATCH_SAMPLES:
        raise UsageError(
            f"a batch has at most {BATCH_SAMPLES} samples, which is what hosts lend memory "
            f"for, and this one has {sizes[0]}"
        )
    return Content(inputs, target)


def fitted(graph: CompiledGraph, name: str, array: Array) -> Array:
    """A batch as the graph wants it: dtype, and shape without the first dimension.

    Raises:
        UsageError: says what was expected.
    """
    if name != TARGET and name not in graph.inputs:
        raise UsageError(f"network {graph.name} has no input {name!r}: {', '.join(graph.inputs)}")
    spec = graph.tensor(name)
    array = np.asarray(array)
    if np.dtype(spec.dtype).kind != array.dtype.kind or array.ndim == 0:
        raise UsageError(
            f"{name} has to be {spec.dtype}, samples first, and is {array.dtype.name}"
            f"{list(array.shape)}"
        )
    if array.shape[1:] != spec.shape:
        raise UsageError(
            f"{name} has to be {list(spec.shape)} a sample, and is {list(array.shape[1:])}"
        )
    return np.ascontiguousarray(array, dtype=spec.dtype)
