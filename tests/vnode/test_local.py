"""Local learning: blocks, their heads, and that no gradient leaves a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import ByHand
from models_zoo import EXAMPLES
from torch import nn

from p2pnet.client.models import spec_of, states_of, torch_names
from p2pnet.errors import MalformedError, SpecError
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.compiling import compile_graph, from_json
from p2pnet.vnode.draft import Draft, Settings, TensorSpec
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.local import with_heads


def wide(n_in: int = 8, n_out: int = 8) -> dict[str, object]:
    return {"in_features": n_in, "out_features": n_out}


INPUTS = {"x": TensorSpec((8,))}
NODES = [
    Draft("flat", "Flatten", {}, ("x",)),
    Draft("a", "Linear", wide(), ("flat",)),
    Draft("act", "ReLU", {}, ("a",)),
    Draft("b", "Linear", wide(), ("act",), "g"),
    Draft("c", "Linear", wide(), ("b",), "g"),
    Draft("skip", "Add", {}, ("act", "c")),
    Draft("out", "Linear", wide(8, 3), ("skip",)),
]
LOSS = Draft("loss", "CrossEntropyLoss", {"label_smoothing": 0.1}, ("out",))


def local(head: str = "linear", nodes: list[Draft] = NODES, loss: Draft = LOSS) -> CompiledGraph:
    drafts, last = with_heads(INPUTS, nodes, loss, head=head)
    graph = compile_graph(
        name="local", inputs=INPUTS, nodes=drafts, loss=last, optimizer="SGD",
        optimizer_config={"lr": 0.1}, settings=Settings(learning="local"),
    )  # fmt: skip
    assert from_json(graph.to_json()) == graph
    return graph


def test_blocks_are_groups_and_each_has_a_head() -> None:
    graph = local()
    assert [(node.id, node.group) for node in graph.nodes] == [
        ("flat", "flat"), ("a", "a"), ("act", "a"), ("act.head", "a"), ("b", "g"), ("c", "g"),
        ("skip", "g"), ("skip.head", "g"), ("out", "out"),
    ]  # fmt: skip
    assert graph.loss.group == "out"
    head = graph.node("skip.head")
    assert (head.type, head.inputs, head.output) == ("LocalHead", ("skip", "y"), TensorSpec(()))
    assert head.config["label_smoothing"] == 0.1
    assert head.param_shapes == {
        "norm.weight": (8,), "norm.bias": (8,), "out.weight": (3, 8), "out.bias": (3,),
    }  # fmt: skip
    assert "hidden.weight" in local("mlp").node("skip.head").param_shapes
    assert [graph.takes_target(node) for node in ("act.head", "act", "loss")] == [True, False, True]
    assert graph.consumers("y") == (("act.head", 1), ("skip.head", 1), ("loss", 1))
    assert graph.window == 20  # the steps of a cut


def test_gradients_stay_inside_of_a_block() -> None:
    graph = local()
    flows = {
        (node.id, ref): graph.gradient_flows(node.id, slot)
        for node in (*graph.nodes, graph.loss)
        for slot, ref in enumerate(node.inputs)
    }
    assert [edge for edge, flow in flows.items() if flow] == [
        ("act", "a"), ("act.head", "act"), ("c", "b"), ("skip", "c"), ("skip.head", "skip"),
        ("loss", "out"),
    ]  # fmt: skip
    chain = compile_graph(
        name="chain", inputs=INPUTS, nodes=NODES, loss=LOSS, optimizer="SGD", optimizer_config={}
    )
    assert all(chain.gradient_flows(node.id, 0) for node in chain.nodes if node.inputs != ("x",))
    assert not chain.gradient_flows("flat", 0)
    assert not chain.gradient_flows("loss", 1)


def test_what_waits_for_a_slower_block_is_in_the_memory_that_a_vnode_needs() -> None:
    graph = local()
    chain = replace(graph, learning="chain")
    more = {v: graph.memory_bytes(v) - chain.memory_bytes(v) for v in graph.vnodes()}
    crossing = 20 * 1024 * 8 * 4  # steps, samples, values of float32
    assert {vnode: size for vnode, size in more.items() if size} == {
        "flat": crossing, "act": crossing, "skip": crossing,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer"])
def test_every_block_learns_and_nothing_crosses(name: str) -> None:
    example = EXAMPLES[name]
    model = example.make()
    if name == "transformer":  # blocks cannot share a weight
        model.head = nn.Linear(16, 17, bias=False)
    spec = spec_of(
        model, name=name, loss="CrossEntropyLoss", optimizer={"type": "Adam", "lr": 0.01},
        input_shape=example.input_shape, learning="local",
    )  # fmt: skip
    graph = load_spec(spec)
    torch.manual_seed(1)
    by_hand = ByHand(graph, states_of(model, graph))
    before = by_hand.weights()
    losses = [by_hand.train(x, y) for x, y in example.batches(1, 12) * 15]
    assert losses[-1] < 0.8 * losses[0]
    assert by_hand.crossed == 0
    after = by_hand.weights()
    assert not [key for key in before if np.array_equal(before[key], after[key])]
    assert sorted(torch_names(graph, after)) == sorted(model.state_dict())


def test_what_no_head_helps() -> None:
    with pytest.raises(SpecError, match="head is linear or mlp, not 'deep'"):
        local("deep")
    with pytest.raises(SpecError, match="loss belongs to the block of out: out"):
        local(loss=Draft("loss", "CrossEntropyLoss", {}, ("out",), "elsewhere"))
    pixels: dict[str, Any] = {"in_features": 4, "out_features": 4}
    with pytest.raises(SpecError, match="put it in one group with the node after it"):
        with_heads(
            {"x": TensorSpec((2, 4))},
            [
                Draft("a", "Linear", pixels, ("x",)),
                Draft("flat", "Flatten", {}, ("a",)),
                Draft("b", "Linear", wide(), ("flat",)),
                Draft("t", "Reshape", {"shape": [4, 2]}, ("b",)),
            ],
            Draft("loss", "CrossEntropyLoss", {}, ("t",)),
        )


def broken(change: Any) -> SpecError | MalformedError:
    drafts, last = with_heads(INPUTS, NODES, LOSS)
    drafts, settings = change(drafts)
    with pytest.raises(SpecError) as error:
        compile_graph(
            name="broken", inputs=INPUTS, nodes=drafts, loss=last, optimizer="SGD",
            optimizer_config={}, settings=settings,
        )  # fmt: skip
    return error.value


def test_what_cannot_learn_so_is_said() -> None:
    learning = Settings(learning="local")
    assert "a would learn nothing: no LocalHead and no loss" in str(
        broken(lambda drafts: ([d for d in drafts if d.id != "act.head"], learning))
    )
    assert "act.head is a LocalHead, which needs learning: local" in str(
        broken(lambda drafts: (drafts, Settings()))
    )
    after = Draft("after", "Tanh", {}, ("act.head",))
    assert "after takes 'act.head', a LocalHead, whose output none takes" in str(
        broken(lambda drafts: ([*drafts, after], learning))
    )
    head = Draft("h", "LocalHead", {"in_features": 8, "out_features": 3}, ("y", "y"), "a")
    assert "h: a LocalHead takes a node and y" in str(
        broken(lambda drafts: ([*drafts, head], learning))
    )
    other = {"in_features": 8, "out_features": 3, "loss": "MSELoss"}
    head = Draft("h", "LocalHead", other, ("act", "y"), "a")
    assert "h: MSELoss takes a target of float32" in str(
        broken(lambda drafts: ([*drafts, head], learning))
    )
