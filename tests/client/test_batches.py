"""Batches: what fits a network, under which names, and in which parts it goes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_network import batch, small_graph

from p2pnet.client.batches import Content, checked, named, split
from p2pnet.errors import UsageError
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.graph import CompiledGraph

X, Y = batch(1)


def two_inputs() -> CompiledGraph:
    return load_spec(
        {
            "name": "two",
            "inputs": {
                "left": {"shape": [3], "dtype": "float32"},
                "right": {"shape": [3], "dtype": "float32"},
            },
            "nodes": [{"id": "sum", "type": "Add", "inputs": ["left", "right"]}],
            "loss": {"id": "loss", "type": "MSELoss"},
            "optimizer": {"type": "SGD", "lr": 0.1},
        }
    )


@given(st.integers(1, 64), st.integers(0, 100))
def test_micro_batches_are_as_numpy_splits_and_nothing_is_lost(parts: int, more: int) -> None:
    samples = parts + more
    x, y = np.arange(2 * samples).reshape(samples, 2), np.arange(samples)
    micro = split(Content({"x": x}, y), parts)
    assert [len(it.target) for it in micro] == [
        samples // parts + (index < samples % parts) for index in range(parts)
    ]
    assert all(len(it.inputs["x"]) == len(it.target) for it in micro)
    assert np.array_equal(np.concatenate([it.inputs["x"] for it in micro]), x)
    assert np.array_equal(np.concatenate([it.target for it in micro]), y)
    assert all(it.inputs["x"].base is not None for it in micro)  # not copied


def test_a_batch_that_is_smaller_than_its_parts_is_refused_with_advice() -> None:
    graph = small_graph(micro_batches=4)
    assert len(checked(graph, {"x": X[:4]}, Y[:4]).target) == 4
    with pytest.raises(UsageError, match="3 samples cannot be split into the 4 micro-batches"):
        checked(graph, {"x": X[:3]}, Y[:3])


def test_the_largest_batch_is_the_networks_own() -> None:
    graph = small_graph(batch_max=3)
    checked(graph, {"x": X[:3]}, Y[:3])
    with pytest.raises(UsageError, match="at most 3 samples"):
        checked(graph, {"x": X[:4]}, Y[:4])
    x, y = batch(1, samples=1025)
    with pytest.raises(UsageError, match="at most 1024 samples"):
        checked(small_graph(), {"x": x}, y)


@pytest.mark.parametrize("x", [X, X.tolist(), torch.from_numpy(X), {"x": X}, (X,)])
def test_one_input_needs_no_name(x: Any) -> None:
    (name,) = named(small_graph(), x)
    assert name == "x"
    assert np.allclose(named(small_graph(), x)["x"], X)


def test_several_inputs_go_by_name_or_in_order() -> None:
    graph, a, b = two_inputs(), np.zeros(3), np.ones(3)
    for x in ({"right": b, "left": a}, (a, b)):
        got = named(graph, x)
        assert got["left"] is a
        assert got["right"] is b


WRONG: dict[str, tuple[Any, str]] = {
    "one for two": (X, r"has the inputs left, right: .* instead of 1 array"),
    "three for two": ((X, X, X), "instead of 3"),
    "a name too few": ({"left": X}, "also needs the input 'right'"),
    "another name": ({"left": X, "middle": X}, "has no input 'middle': left, right"),
}


@pytest.mark.parametrize("what", WRONG)
def test_inputs_that_are_not_the_networks(what: str) -> None:
    x, why = WRONG[what]
    with pytest.raises(UsageError, match=why):
        named(two_inputs(), x)
