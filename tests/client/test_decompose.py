"""Any traceable module becomes nodes that compute what it computes, to the bit, and learn so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from models_zoo import EXAMPLES, Example
from torch import Tensor, nn

from p2pnet.client.models import spec_of, states_of, torch_names
from p2pnet.errors import SpecError
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.compiling import from_json
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array

STEPS = 50


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def graph_of(model: nn.Module, shape: object, **settings: Any) -> CompiledGraph:
    options: dict[str, Any] = {"loss": "CrossEntropyLoss", "optimizer": {"type": "SGD", "lr": 0.1}}
    graph = load_spec(spec_of(model, name="n", input_shape=shape, **(options | settings)))
    assert from_json(graph.to_json()) == graph
    return graph


def types(graph: CompiledGraph) -> list[tuple[str, str]]:
    return [(node.id, node.type) for node in graph.nodes]


def same(model: nn.Module, shape: tuple[int, ...], tokens: int = 0) -> CompiledGraph:
    """The graph of a model, whose forward and gradients are the model's to the bit."""
    graph = graph_of(model, shape, loss="MSELoss")
    torch.manual_seed(2)
    x = torch.randint(tokens, (4, *shape)) if tokens else torch.randn(4, *shape)
    by_hand = ByHand(graph, states_of(model, graph))
    model.eval()
    assert torch.equal(by_hand.infer(x.numpy()), model(x))
    model.train()
    target = torch.randn(4, *graph.target.shape)
    F.mse_loss(model(x), target).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    by_hand.train(x.numpy(), target.numpy())
    same_weights(graph, by_hand, model)
    return graph


def same_weights(graph: CompiledGraph, by_hand: ByHand, model: nn.Module) -> None:
    found = torch_names(graph, by_hand.weights())
    expected = model.state_dict()
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor.numpy()), name


# --- three models -------------------------------------------------------------


def plainly(example: Example, model: nn.Module, parts: int, clip: float) -> list[float]:
    """Plain torch with the same micro-batches; each one's loss weighs by its samples."""
    optimizer = example.plain_optimizer(model)
    losses = []
    for x, y in example.batches(STEPS):
        optimizer.zero_grad()
        loss = 0.0
        for part_x, part_y in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
            weight = len(part_x) / len(x)
            value = example.measure(model(torch.from_numpy(part_x)), torch.from_numpy(part_y))
            value.backward(torch.full_like(value, weight))  # type: ignore[no-untyped-call]
            loss += float(value.detach()) * weight
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss)
    return losses


@pytest.mark.parametrize(("parts", "clip"), [(4, 0.0), (3, 0.3)])
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_fifty_steps_are_torchs(name: str, parts: int, clip: float) -> None:
    example = EXAMPLES[name]
    model = example.make()
    graph = graph_of(
        model, example.input_shape, loss=example.loss, optimizer=example.optimizer,
        micro_batches=parts, clip_norm=clip,
    )  # fmt: skip
    by_hand = ByHand(graph, states_of(model, graph))
    x, _ = example.batches(1)[0]
    assert torch.equal(by_hand.infer(x), model.eval()(torch.from_numpy(x)))
    expected = plainly(example, model.train(), parts, clip)
    losses = [by_hand.train(x, y) for x, y in example.batches(STEPS)]
    assert sum(losses[-10:]) < sum(losses[:10])
    if not clip:  # the norm of all is summed in another order than torch's
        assert losses == expected
        same_weights(graph, by_hand, model)
        return
    found = torch_names(graph, by_hand.weights())
    for key, tensor in model.state_dict().items():
        apart = np.linalg.norm(found[key] - tensor.numpy())
        assert apart <= 1e-6 * np.linalg.norm(tensor.numpy()), key


def test_what_is_cheap_goes_where_its_input_is_made() -> None:
    graph = graph_of(EXAMPLES["resnet"].make(), (3, 8, 8))
    assert {node.id: node.group for node in graph.nodes if node.id.startswith("layer1")} == {
        "layer1.conv1": "layer1.conv1", "layer1.bn1": "layer1.conv1",
        "layer1.relu": "layer1.conv1", "layer1.conv2": "layer1.conv2",
        "layer1.bn2": "layer1.conv2", "layer1.add": "layer1.conv2",
        "layer1.relu_1": "layer1.conv2",
    }  # fmt: skip
    assert graph.loss.group == graph.node(graph.output).group
    apart = graph_of(EXAMPLES["resnet"].make(), (3, 8, 8), fuse=False)
    assert not any(node.group for node in (*apart.nodes, apart.loss))


def test_a_tied_head_is_a_second_entry_of_the_embedding() -> None:
    graph = graph_of(EXAMPLES["transformer"].make(), (12,))
    assert graph.home("head") == "tokens"
    assert graph.entries("tokens") == ("tokens", "head")
    assert "head" not in graph.vnodes()
    assert graph.target.shape == (12,)
    assert graph.loss.config["class_dim"] == -1
    assert graph.tensor("x").dtype == "int64"
    shorter = graph.at_length(3)
    assert shorter.tensor("head").shape == (3, 17)
    assert shorter.vnodes() == graph.vnodes()
    with pytest.raises(
        SpecError, match="places: PositionalEmbedding expects a sequence of at most"
    ):
        graph.at_length(13)


# --- operations, one by one ---------------------------------------------------


class Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.function(self.fc(x))
        return found


def chunked(x: Tensor) -> Tensor:
    one, other, last = x.chunk(3, dim=-1)
    return one * other + last


def heads(x: Tensor) -> Tensor:
    samples, tokens, width = x.shape
    split = x.view(samples, tokens, 2, width // 2).transpose(1, 2)
    found = F.scaled_dot_product_attention(split, split, split, is_causal=True)
    return found.transpose(1, 2).contiguous().view(samples, tokens, width)


FUNCTIONS: dict[str, tuple[Any, list[str]]] = {
    "relu": (F.relu, ["ReLU"]),
    "method": (lambda x: x.relu().sigmoid(), ["ReLU", "Sigmoid"]),
    "gelu": (lambda x: F.gelu(x, approximate="tanh"), ["GELU"]),
    "silu, tanh": (lambda x: torch.tanh(F.silu(x)), ["SiLU", "Tanh"]),
    "softmax": (lambda x: F.softmax(x, dim=-1), ["Softmax"]),
    "cat": (lambda x: torch.cat([x, x.tanh()], dim=1), ["Tanh", "Concat"]),
    "mul": (lambda x: x * torch.sigmoid(x), ["Sigmoid", "Mul"]),
    "subtraction": (lambda x: -(x - x.relu()), ["ReLU", "Scale", "Add", "Scale"]),
    "scale": (lambda x: 0.3 * x, ["Scale"]),
    "half": (lambda x: x / 2, ["Scale"]),
    "add": (lambda x: torch.add(x, x.relu()), ["ReLU", "Add"]),
    "mean": (lambda x: x.mean(1), ["Mean"]),
    "means": (lambda x: x.mean(dim=(1, 2), keepdim=True), ["Mean"]),
    "flatten": (lambda x: torch.flatten(x, 1), ["Flatten"]),
    "reshape": (lambda x: x.reshape(len(x), -1), ["Reshape"]),
    "view by sizes": (lambda x: x.view(x.size(0), x.size(1), 2, 3), ["Reshape"]),
    "unsqueeze": (lambda x: x.unsqueeze(1), ["Reshape"]),
    "transpose": (lambda x: x.transpose(1, 2), ["Transpose"]),
    "permute": (lambda x: x.permute(0, 2, 1), ["Permute"]),
    "chunk": (chunked, ["Narrow", "Narrow", "Mul", "Narrow", "Add"]),
    "cat of parts": (
        lambda x: torch.cat(x.chunk(3, -1), dim=1), ["Narrow", "Narrow", "Narrow", "Concat"],
    ),
    "last token": (lambda x: x[:, -1], ["Narrow", "Reshape"]),
    "slice": (lambda x: x[:, 1:, :4], ["Narrow", "Narrow"]),
    "attention": (
        heads, ["Reshape", "Transpose", "ScaledDotProductAttention", "Transpose", "Reshape"],
    ),
    "pooling": (
        lambda x: F.adaptive_avg_pool2d(
            F.avg_pool2d(F.max_pool2d(x.unsqueeze(1), 2, 1), 2, padding=1), 1
        ).flatten(1),
        ["Reshape", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "Flatten"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_methods(name: str) -> None:
    function, expected = FUNCTIONS[name]
    graph = same(Lambda(function), (3, 6))
    found = [node.type for node in graph.nodes]
    assert found[0] == "Linear"
    assert sorted(found[1:]) == sorted(expected)


def test_a_reshape_says_nothing_of_a_sequences_length() -> None:
    graph = graph_of(Lambda(heads), (3, 6), loss="MSELoss")
    assert graph.at_length(9).tensor(graph.output).shape == (9, 6)


class Learned(nn.Module):
    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.places = nn.Parameter(torch.randn(*([1] if batched else []), 8, 6))
        self.batched = batched

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        part = self.places[:, :length] if self.batched else self.places[:length]
        return self.fc(x) + part  # type: ignore[no-any-return]


@pytest.mark.parametrize("batched", [False, True])
def test_a_parameter_may_be_a_positional_embedding(batched: bool) -> None:
    graph = same(Learned(batched), (5, 6))
    assert types(graph) == [("fc", "Linear"), ("places", "PositionalEmbedding")]
    assert graph.node("places").param_shapes == {"weight": (8, 6)}


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_own_encoder(norm_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(9, 8)
            layer = nn.TransformerEncoderLayer(
                8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first, activation="gelu"
            )
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1] <= 20, "too long"
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            out: Tensor = self.encoder(self.tokens(x), mask=mask)
            return F.linear(out, self.tokens.weight)

    graph = same_but_for_inference(Model(), (5,), tokens=9)
    assert graph.home("linear") == "tokens"
    assert graph.node("encoder.layers.1.self_attn").config["causal"] is True


def same_but_for_inference(model: nn.Module, shape: tuple[int, ...], tokens: int) -> CompiledGraph:
    """torch's encoder computes otherwise when it does not learn; here it does not."""
    graph = graph_of(model, shape, loss="MSELoss")
    torch.manual_seed(2)
    x = torch.randint(tokens, (4, *shape))
    target = torch.randn(4, *graph.target.shape)
    by_hand = ByHand(graph, states_of(model, graph))
    F.mse_loss(model(x), target).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    by_hand.train(x.numpy(), target.numpy())
    same_weights(graph, by_hand, model)
    return graph


def test_attention_that_also_wants_its_weights_has_other_bits_and_keeps_them() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            found: Tensor = self.attention(x, x, x, attn_mask=mask)[0]
            return found

    graph = same_but_for_inference_of_numbers(Model(), (5, 8))
    assert graph.node("attention").config["need_weights"] is True


def same_but_for_inference_of_numbers(model: nn.Module, shape: tuple[int, ...]) -> CompiledGraph:
    graph = graph_of(model, shape, loss="MSELoss")
    torch.manual_seed(2)
    x, target = torch.randn(4, *shape), torch.randn(4, *shape)
    by_hand = ByHand(graph, states_of(model, graph))
    F.mse_loss(model(x), target).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    by_hand.train(x.numpy(), target.numpy())
    same_weights(graph, by_hand, model)
    return graph


def test_dropout_learns_with_and_infers_without() -> None:
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    graph = graph_of(model, None, loss="MSELoss")
    by_hand, again = (ByHand(graph, states_of(model, graph)) for _ in range(2))
    x, y = np.ones((4, 6), np.float32), np.ones((4, 2), np.float32)
    assert torch.equal(by_hand.infer(x), model.eval()(torch.from_numpy(x)))
    assert by_hand.train(x, y) == again.train(x, y)  # the seed is the step's
    assert by_hand.train(x, y) != by_hand.train(x, y)


def test_several_inputs_and_arguments_with_defaults() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.fc = nn.Embedding(5, 4), nn.Linear(3, 4)

        def forward(self, word: Tensor, numbers: Tensor, targets: Tensor | None = None) -> Tensor:
            if targets is not None:
                raise AssertionError
            return self.words(word) + self.fc(numbers)  # type: ignore[no-any-return]

    graph = graph_of(Model(), {"word": (), "numbers": (3,)})
    assert {name: (spec.shape, spec.dtype) for name, spec in graph.inputs.items()} == {
        "word": ((), "int64"), "numbers": ((3,), "float32"),
    }  # fmt: skip
    assert types(graph) == [("words", "Embedding"), ("fc", "Linear"), ("add", "Add")]


# --- what cannot be -----------------------------------------------------------


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]


def branching(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else x * 2


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.scale  # type: ignore[no-any-return]


BAD: dict[str, tuple[nn.Module, str]] = {
    "a function": (Lambda(torch.cumsum), "cannot be traced by torch.fx: .* missing 1 required"),
    "matmul": (
        Lambda(lambda x: x @ x.transpose(1, 2)),
        r"matmul in the model's forward \(test_decompose.py, line \d+\): matmul is not in the "
        "catalogue: attention is nn.MultiheadAttention or F.scaled_dot_product_attention",
    ),
    "subtraction": (Lambda(lambda x: x - 1), "a difference of other shapes"),
    "sin": (Lambda(torch.sin), r"sin is not in the catalogue: docs/models.md"),
    "the batch is mixed": (Lambda(lambda x: x.reshape(-1, 6)), "keep the samples apart"),
    "the batch is transposed": (Lambda(lambda x: x.transpose(0, 1)), "keep the samples apart"),
    "broadcast": (Lambda(lambda x: x + x.mean(1, keepdim=True)), r"a sum of \[3, 6\] and \[1, 6\]"),
    "division": (Lambda(lambda x: x / math.pi), "multiply by the reciprocal"),
    "branch": (Lambda(branching), "cannot be traced by torch.fx"),
    "two outputs": (Lambda(lambda x: (x, x)), "has to return one tensor"),
    "a parameter": (Mixed(), "a product of other shapes"),
    "frozen": (Frozen(), "weight of layer fc has requires_grad=False"),
    "a running mean of all": (
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(3, momentum=None)),
        "layer 1: BatchNorm1d with momentum=None is not there",
    ),
    "layer type": (
        nn.Sequential(nn.Linear(6, 6), nn.PReLU()), "layer 1 has the unknown type 'PReLU'",
    ),
    "layer setting": (
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(3, track_running_stats=False)),
        "layer 1: BatchNorm1d with track_running_stats=False is not there",
    ),
    "shapes": (
        nn.Sequential(nn.Linear(6, 6), nn.Linear(5, 6)), r"layer 1 fails for samples of \[3, 6\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_a_network_is_said_with_its_place(name: str) -> None:
    model, words = BAD[name]
    with pytest.raises(SpecError, match=words) as error:
        graph_of(model, (3, 6))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


class Changing(nn.Module):
    """Gives on what a change in place gives, what it was done to, or a view of that."""

    def __init__(self, change: Callable[[Tensor], Tensor] | None, given: str) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(6, 6), nn.ReLU(inplace=True)
        self.change, self.given = change, given

    def forward(self, x: Tensor) -> Tensor:
        before = self.fc(x)
        part = before.view(before.shape)
        after = self.relu(before) if self.change is None else self.change(before)
        return {"after": after, "before": before, "part": part}[self.given]


CHANGES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "a method": lambda x: x.relu_(),
    "a function": lambda x: F.relu(x, inplace=True),
    "a sum": lambda x: x.add_(x.tanh()),
    "out=": lambda x: torch.sigmoid(x, out=x),
    "a module": None,
}


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "out="])
def test_what_is_changed_in_place_is_what_the_operation_gives(change: str) -> None:
    assert len(graph_of(Changing(CHANGES[change], "after"), (6,)).nodes) >= 2


@pytest.mark.parametrize("given", ["before", "part"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_in_place_is_not_taken_as_it_was(change: str, given: str) -> None:
    with pytest.raises(SpecError, match=r"changes \w+ in place, which is taken again after that"):
        graph_of(Changing(CHANGES[change], given), (6,))


def test_a_forward_that_changes_its_own_weights_is_refused() -> None:
    class Model(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(0.9)
            return super().forward(x)

    with pytest.raises(SpecError, match="changes scale in place: the forward of a network"):
        graph_of(Model(), (6,))


def hooked(hang: Callable[[nn.Linear], object]) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    hang(model[0])  # type: ignore[arg-type]
    return model


HUNG: dict[str, Callable[[nn.Linear], object]] = {
    "layer 0 has a hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "layer 0 has a hook, which": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "0.weight has a hook": lambda layer: layer.weight.register_hook(lambda g: 2 * g),
    "layer 0 has a forward of its": lambda layer: setattr(layer, "forward", layer.forward),
    "spectral_norm and weight_norm": lambda layer: nn.utils.spectral_norm(layer),
}


@pytest.mark.parametrize("words", HUNG)
def test_what_was_hung_on_a_layer_is_not_left_out_unsaid(words: str) -> None:
    with pytest.raises(SpecError, match=words):
        graph_of(hooked(HUNG[words]), (6,))


def test_a_mask_that_is_not_causal_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(2)
            found: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
            return found

    with pytest.raises(SpecError, match="layer attention: a mask that is not the causal one"):
        graph_of(Model(), (5, 8))


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = EXAMPLES["resnet"].make().eval()
    before: dict[str, Array] = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    graph_of(model, (3, 8, 8))
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(np.array_equal(before[k], v.numpy()) for k, v in model.state_dict().items())
