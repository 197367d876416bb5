"""Batches as a network's graph wants them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from p2pnet.errors import UsageError
from p2pnet.vnode.draft import TARGET
from p2pnet.vnode.graph import CompiledGraph
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


def as_array(value: Any) -> Array:
    """An array, or a torch.Tensor, or what numpy takes for one."""
    if hasattr(value, "detach"):  # without importing torch
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def named(graph: CompiledGraph, x: Any) -> dict[str, Array]:
    """The network's inputs by name.

    `x` is an array where there is one input; else a dict by name, or a tuple in the order
    of the names' alphabet.

    Raises:
        UsageError: not as many as there are inputs, or another name.
    """
    names = list(graph.inputs)
    if isinstance(x, Mapping):
        given = {str(name): as_array(value) for name, value in x.items()}
    else:
        values = x if isinstance(x, tuple) else (x,)
        if len(values) != len(names):
            raise UsageError(
                f"network {graph.name} has the inputs {', '.join(names)}: give a dict with an "
                f"array for each, or a tuple in this order, instead of {len(values)} array(s)"
            )
        given = {name: as_array(value) for name, value in zip(names, values, strict=True)}
    for name in given:
        _check_known(graph, name)
    for name in names:
        if name not in given:
            raise UsageError(f"network {graph.name} also needs the input {name!r}")
    return given


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
    samples, parts = sizes[0], graph.micro_batches
    if samples > graph.batch_max:
        raise UsageError(
            f"a batch of {graph.name} has at most {graph.batch_max} samples, which is what hosts "
            f"lend memory for, and this one has {samples}"
        )
    if samples < parts:
        raise UsageError(
            f"a batch of {samples} samples cannot be split into the {parts} micro-batches of "
            f"{graph.name}: feed larger batches, leave the last one out where it is smaller, or "
            "submit the network with fewer micro_batches"
        )
    return Content(inputs, target)


def split(content: Content, micro_batches: int) -> list[Content]:
    """A batch's micro-batches, not copied: N // M samples each, the first N % M one more."""
    targets = np.array_split(content.target, micro_batches)
    inputs = {name: np.array_split(array, micro_batches) for name, array in content.inputs.items()}
    return [
        Content({name: parts[index] for name, parts in inputs.items()}, target)
        for index, target in enumerate(targets)
    ]


def fitted(graph: CompiledGraph, name: str, array: Array) -> Array:
    """A batch as the graph wants it: dtype, and shape without the first dimension.

    Raises:
        UsageError: says what was expected.
    """
    _check_known(graph, name)
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


def _check_known(graph: CompiledGraph, name: str) -> None:
    if name != TARGET and name not in graph.inputs:
        raise UsageError(f"network {graph.name} has no input {name!r}: {', '.join(graph.inputs)}")
