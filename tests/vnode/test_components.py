"""Components in torch: made as torch makes them, and each with a backward of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2pnet.errors import MalformedError, ResourceError, SpecError
from p2pnet.vnode.catalogue import COMPONENTS, LOSSES, Shape
from p2pnet.vnode.components import Component, clip_scale, draw_seed, gradient_squares, init_seed
from p2pnet.vnode.config import fill
from p2pnet.vnode.messages import Metrics
from p2pnet.vnode.modules import MODULES
from p2pnet.vnode.optimizers import Optimizer

CONFIGS: dict[str, dict[str, object]] = {
    "Linear": {"in_features": 6, "out_features": 4},
    "LayerNorm": {"normalized_shape": 6},
    "RMSNorm": {"normalized_shape": 6},
    "BatchNorm1d": {"num_features": 2},
    "BatchNorm2d": {"num_features": 2},
    "Conv2d": {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "stride": 2, "padding": 1},
    "MaxPool2d": {"kernel_size": 2},
    "AvgPool2d": {"kernel_size": 2, "padding": 1},
    "AdaptiveAvgPool2d": {"output_size": 2},
    "Embedding": {"num_embeddings": 7, "embedding_dim": 6},
    "PositionalEmbedding": {"num_embeddings": 9, "embedding_dim": 6},
    "MultiheadAttention": {"embed_dim": 6, "num_heads": 2, "causal": True},
    "ScaledDotProductAttention": {"causal": True},
    "Scale": {"factor": -0.3},
    "Mean": {"dim": -1},
    "Transpose": {"dim0": 1, "dim1": 2},
    "Permute": {"dims": [0, 2, 1]},
    "Reshape": {"shape": [0, 3, -1]},
    "Narrow": {"dim": 2, "start": 1, "length": 3},
    "Dropout": {"p": 0.0},
    "LocalHead": {"over": "all", "in_features": 12, "out_features": 3},
}
SAMPLE: Shape = (2, 6)
PICTURE: Shape = (2, 6, 4)
SAMPLES: dict[str, list[Shape]] = {
    "Add": [SAMPLE] * 3,
    "Mul": [SAMPLE] * 3,
    "Concat": [SAMPLE] * 2,
    "ScaledDotProductAttention": [SAMPLE] * 3,
    "BatchNorm2d": [PICTURE],
    "Conv2d": [PICTURE],
    "MaxPool2d": [PICTURE],
    "AvgPool2d": [PICTURE],
    "AdaptiveAvgPool2d": [PICTURE],
}


class Places(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(torch.arange(x.shape[1]))


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return super().forward(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def attended(*inputs: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*inputs, is_causal=True)


# By type: plain torch, as people write it
MAKES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "Linear": lambda: nn.Linear(6, 4),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "BatchNorm1d": lambda: nn.BatchNorm1d(2),
    "BatchNorm2d": lambda: nn.BatchNorm2d(2),
    "Conv2d": lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "AvgPool2d": lambda: nn.AvgPool2d(2, padding=1),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(2),
    "Embedding": lambda: nn.Embedding(7, 6),
    "PositionalEmbedding": lambda: Places(9, 6),
    "MultiheadAttention": lambda: Attention(6, 2, batch_first=True),
    "ScaledDotProductAttention": lambda: attended,
    "Softmax": lambda: nn.Softmax(-1),
    "Scale": lambda: lambda x: x * -0.3,
    "Mean": lambda: lambda x: x.mean(-1),
    "Transpose": lambda: lambda x: x.transpose(1, 2),
    "Permute": lambda: lambda x: x.permute(0, 2, 1),
    "Reshape": lambda: lambda x: x.reshape(5, 2, 3, 2),
    "Narrow": lambda: lambda x: x[:, :, 1:4],
    "Add": lambda: lambda a, b, c: a + b + c,
    "Mul": lambda: lambda a, b, c: a * b * c,
    "Concat": lambda: lambda *inputs: torch.cat(inputs, dim=1),
    "Dropout": lambda: nn.Dropout(0.0),
} | {
    name: getattr(nn, name)
    for name in ("Flatten", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "Identity")
}


def a_component(type: str, **changes: Any) -> Component:
    own = ("optimizer", "optimizer_config", "stash", "device")
    options = {key: changes.pop(key) for key in own if key in changes}
    return Component("v", type, CONFIGS.get(type, {}) | changes, seed=0, **options)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_catalogue_and_torch_agree() -> None:
    assert set(MODULES) == {*COMPONENTS, *LOSSES} - {"TiedLinear"}
    assert set(MAKES) == set(COMPONENTS) - {"TiedLinear", "LocalHead"}
    for type, kind in COMPONENTS.items():
        if not kind.tied:
            config = fill("v", kind.keys, CONFIGS.get(type, {}))
            shapes = {name: tuple(p.shape) for name, p in a_component(type).params.items()}
            assert list(shapes.items()) == list(kind.params(config).items())


def test_the_seed_is_pinned() -> None:
    assert init_seed(0, "fc1") == 0xB06938C8C66D17B0
    assert init_seed(2**63 - 1, "ümlaut") == 0x8B0A83A01308A5B


def test_the_beginning_is_torchs_own() -> None:
    torch.manual_seed(init_seed(5, "v"))
    plain = nn.Linear(6, 4)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    made = Component("v", "Linear", CONFIGS["Linear"], seed=5).state()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(made["param.weight"], plain.weight.detach().numpy())
    assert np.array_equal(made["param.bias"], plain.bias.detach().numpy())
    other = Component("w", "Linear", CONFIGS["Linear"], seed=5).state()
    assert not np.array_equal(made["param.weight"], other["param.weight"])


@pytest.mark.parametrize("type", sorted(MAKES))
def test_forward_and_backward_are_torchs(type: str) -> None:
    torch.manual_seed(3)
    inputs = [torch.randn(5, *shape) for shape in SAMPLES.get(type, [SAMPLE])]
    if type == "Embedding":
        inputs = [torch.randint(7, (5, 4))]
    component = a_component(type)
    torch.manual_seed(init_seed(0, "v"))
    plain = MAKES[type]()
    learning = isinstance(plain, nn.Module)
    whole = not inputs[0].is_floating_point()
    copies = [tensor.clone().requires_grad_(not whole) for tensor in inputs]
    expected = plain(*copies)
    gradient = torch.randn(expected.shape)
    if expected.requires_grad:
        expected.backward(gradient)

    output, metrics = component.forward("k", inputs)
    assert metrics is None
    assert torch.equal(output, expected)
    assert not output.requires_grad
    got, params = component.backward("k", [gradient])
    for mine, theirs in zip(got, copies, strict=True):
        assert (mine is None) == whole
        assert mine is None or torch.equal(mine, theirs.grad)
    plain_params = list(plain.parameters()) if learning else []
    assert all(torch.equal(a, b.grad) for a, b in zip(params, plain_params, strict=True))
    assert not any(tensor.requires_grad for tensor in inputs)
    before = component.state()
    for name, tensor in plain.named_buffers() if learning else ():
        assert torch.equal(component.held_buffers()[name], tensor)
        assert not np.array_equal(before[f"buffer.{name}"], tensor.numpy())
    component.apply(params)
    for name, tensor in plain.named_buffers() if learning else ():
        assert np.array_equal(component.state()[f"buffer.{name}"], tensor.numpy())
    if learning:
        plain.load_state_dict(
            {
                name.partition(".")[2]: torch.from_numpy(array)
                for name, array in component.state().items()
            }
        )
        plain.eval()
    assert torch.equal(component.infer(inputs), plain(*inputs))


def test_what_leaves_is_in_row_major_order() -> None:
    """As after a hop: what is computed from it may depend on that."""
    component = a_component("Transpose")
    output, _ = component.forward(0, [torch.randn(3, 2, 6)])
    (gradient,), _ = component.backward(0, [torch.randn(3, 6, 2)])
    assert output.is_contiguous()
    assert gradient is not None
    assert gradient.is_contiguous()


def test_a_tied_weight_has_two_entries_and_one_gradient() -> None:
    component = a_component("Embedding")
    torch.manual_seed(init_seed(0, "v"))
    plain = nn.Embedding(7, 6)
    tokens = torch.tensor([[1, 1], [6, 2]])
    hidden, _ = component.forward("in", [tokens])
    scores, _ = component.forward("out", [hidden], entry=1)
    expected = F.linear(plain(tokens), plain.weight)
    assert torch.equal(scores, expected)
    gradient = torch.randn(scores.shape)
    expected.backward(gradient)
    (back,), head = component.backward("out", [gradient])
    assert back is not None
    (none,), embedding = component.backward("in", [back])
    assert none is None
    assert torch.equal(head[0] + embedding[0], plain.weight.grad)
    assert torch.equal(component.infer([hidden], entry=1), scores)


def test_running_statistics_wait_for_the_step() -> None:
    component, plain = a_component("BatchNorm1d"), nn.BatchNorm1d(2)
    fresh = component.state()
    for part in range(3):
        x = torch.randn(5, 2, 6) + part
        component.forward(part, [x])
        plain(x)
        seen = component.infer([x])
        assert torch.equal(seen, nn.BatchNorm1d(2).eval()(x))  # still those of before
    for part in range(3):
        component.backward(part, [torch.zeros(5, 2, 6)])
    assert all(np.array_equal(component.state()[name], fresh[name]) for name in fresh)
    held = component.held_buffers()
    assert int(held["num_batches_tracked"]) == 3
    assert torch.equal(held["running_var"], plain.running_var)
    component.forget()
    assert component.held_buffers() == {}
    component.apply([torch.zeros(2), torch.zeros(2)], buffers=held)
    assert np.array_equal(component.state()["buffer.running_mean"], plain.running_mean.numpy())


def test_a_stashing_component_goes_on_with_what_it_holds() -> None:
    component = a_component("BatchNorm1d", stash=True)
    component.forward(1, [torch.randn(5, 2, 6)])
    held = component.held_buffers()
    component.forward(2, [torch.randn(5, 2, 6)])  # of the next step
    component.apply(component.backward(1, [torch.ones(5, 2, 6)])[1], buffers=held)
    assert int(component.held_buffers()["num_batches_tracked"]) == 2
    assert component.state()["buffer.num_batches_tracked"] == 1


def test_a_stashed_pass_keeps_the_weights_of_its_forward() -> None:
    options: dict[str, Any] = {"optimizer": "SGD", "optimizer_config": {"lr": 1.0}}
    component = a_component("Linear", stash=True, **options)
    plain = a_component("Linear", **options)
    x, gradient = torch.randn(2, 6), torch.randn(2, 4)
    component.forward(1, [x])
    component.forward(2, [x])
    plain.forward(2, [x])
    expected = plain.backward(2, [gradient])
    before = component.state()["param.weight"]
    component.apply(component.backward(1, [gradient])[1])
    assert not np.array_equal(component.state()["param.weight"], before)
    (back,), params = component.backward(2, [gradient])
    assert torch.equal(back, expected[0][0])  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(params, expected[1], strict=True))


def test_a_draw_is_the_seeds() -> None:
    component = a_component("Dropout", p=0.5)
    assert component.draws
    x = torch.ones(4, 50)
    before = torch.random.get_rng_state()
    one, again, other = (component.forward(i, [x], draw=d)[0] for i, d in enumerate((5, 5, 6)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    assert torch.equal(one, F.dropout(x, 0.5))
    assert torch.equal(component.infer([x]), x)
    assert draw_seed(0, "drop", 3, 1) == 0xDCC41052ADE2870B
    assert not a_component("Linear").draws


def test_gradients_are_clipped_as_torch_does_it() -> None:
    component = a_component("Linear", optimizer_config={"lr": 1.0})
    torch.manual_seed(init_seed(0, "v"))
    plain = nn.Linear(6, 4)
    x, gradient = torch.randn(3, 6), torch.randn(3, 4)
    plain(x).backward(gradient)
    component.forward(0, [x])
    _, params = component.backward(0, [gradient])
    squares = gradient_squares(params)
    norm = math.sqrt(math.fsum(squares))
    assert norm == pytest.approx(
        float(nn.utils.get_total_norm([p.grad for p in plain.parameters()]))
    )
    nn.utils.clip_grads_with_norm_(plain.parameters(), 0.5, torch.tensor(norm))
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    component.apply(params, norm=norm, clip_norm=0.5)
    assert np.array_equal(component.state()["param.weight"], plain.weight.detach().numpy())
    assert clip_scale(0.1, 0.5) == 1.0
    assert gradient_squares([]) == []


@pytest.mark.parametrize("type", ["MultiheadAttention", "ScaledDotProductAttention"])
def test_a_sequence_in_parts_is_the_whole_sequence(type: str) -> None:
    component = a_component(type)
    x = torch.randn(3, 9, 6)
    inputs = [x] * (3 if type.startswith("Scaled") else 1)
    whole = component.infer(inputs)
    cache = component.new_cache()
    assert cache is not None
    parts = [
        component.infer([tensor[:, low:high] for tensor in inputs], cache=cache)
        for low, high in ((0, 4), (4, 5), (5, 8), (8, 9))
    ]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-6)
    assert cache.tokens == 9
    assert cache.size_bytes == 2 * 4 * 3 * 9 * 6


def test_places_go_on_in_the_next_part_until_there_are_none() -> None:
    component = a_component("PositionalEmbedding")
    x = torch.randn(1, 9, 6)
    cache = component.new_cache()
    parts = [component.infer([x[:, low : low + 3]], cache=cache) for low in (0, 3, 6)]
    assert torch.equal(torch.cat(parts, dim=1), component.infer([x]))
    with pytest.raises(
        MalformedError, match="v knows 9 places, and the sequence has now 10 tokens"
    ):
        component.infer([x[:, :1]], cache=cache)
    assert a_component("Linear").new_cache() is None
    assert a_component("MultiheadAttention", causal=False).new_cache() is None


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("over", ["all", "last", "picture"])
@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "MSELoss"])
def test_a_blocks_head_is_a_loss_with_weights(loss: str, over: str, hidden: int) -> None:
    shape = {"all": (2, 6), "last": (4, 6), "picture": (3, 5, 2)}[over]
    config = {
        "loss": loss, "over": over, "hidden": hidden, "in_features": 6 if over == "last" else 12,
        "out_features": 3, "class_dim": -1,
    }  # fmt: skip
    head = a_component("LocalHead", **config)
    assert head.is_loss
    x = torch.randn(2, *shape)
    places = (2, 4) if over == "last" else (2,)
    y = torch.randint(3, places) if loss == "CrossEntropyLoss" else torch.randn(*places, 3)
    value, metrics = head.forward(0, [x, y], [True, False])
    assert metrics is not None
    assert metrics.loss == float(value)
    (back, none), params = head.backward(0, [], 0.5)
    assert back is not None
    assert back.shape == x.shape
    assert none is None
    assert len(params) == (6 if hidden else 4)
    head.forward(0, [x, y], [True, False])
    twice, _ = head.backward(0, [], 1.0)
    assert torch.allclose(twice[0], 2 * back)  # type: ignore[arg-type, operator]


def test_gradients_are_held_until_applied() -> None:
    component = a_component("Linear", optimizer="SGD", optimizer_config={"lr": 1.0})
    before = component.state()
    component.forward("k", [torch.ones(2, 6)])
    _, gradients = component.backward("k", [torch.ones(2, 4)])
    assert all(np.array_equal(component.state()[name], before[name]) for name in before)
    component.apply(gradients)
    assert np.allclose(component.state()["param.weight"], before["param.weight"] - 2)


def test_a_backward_stays_inside() -> None:
    source = torch.ones(2, 6, requires_grad=True)
    component = a_component("Linear")
    component.forward("k", [source * 2])
    component.backward("k", [torch.ones(2, 4)])
    assert source.grad is None


def test_only_what_is_wanted_is_computed() -> None:
    component = a_component("Add")
    component.forward("k", [torch.ones(2, 3)] * 2, [True, False])
    (wanted, unwanted), params = component.backward("k", [torch.ones(2, 3)])
    assert wanted is not None
    assert unwanted is None
    assert params == []
    component.forward("k", [torch.ones(2, 3)] * 2, [False, False])  # nothing at all to do
    assert component.backward("k", [torch.ones(2, 3)]) == ([None, None], [])


def test_gradients_of_several_consumers_are_summed_in_order() -> None:
    component = a_component("ReLU")
    component.forward("k", [torch.ones(1, 1)])
    big, small = torch.full((1, 1), 1e8), torch.full((1, 1), 1.0)
    (in_order,), _ = component.backward("k", [big, -big, small])
    component.forward("k", [torch.ones(1, 1)])
    (otherwise,), _ = component.backward("k", [big, small, -big])
    assert float(in_order) == 1
    assert float(otherwise) == 0


def test_losses() -> None:
    prediction = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    loss, metrics = a_component("CrossEntropyLoss").forward(
        0, [prediction, torch.tensor([0, 0, 0])], [True, False]
    )
    expected = nn.functional.cross_entropy(prediction, torch.tensor([0, 0, 0]))
    assert torch.equal(loss, expected)
    assert metrics == Metrics(float(expected), 2, 3)
    component = a_component("MSELoss")
    _, metrics = component.forward(0, [prediction, torch.zeros(3, 2)], [True, False])
    assert metrics == Metrics(2.5, 0, 3)
    (half, target), _ = component.backward(0, [], 0.5)
    assert target is None
    assert torch.allclose(half, prediction / 6)


def test_pixelwise_classes() -> None:
    prediction, target = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
    loss, metrics = a_component("CrossEntropyLoss").forward(0, [prediction, target])
    assert torch.equal(loss, nn.functional.cross_entropy(prediction, target))
    assert metrics is not None
    assert metrics.samples == 8


BAD_INPUTS = {
    "width": ("Linear", [torch.ones(2, 5)]),
    "dtype": ("Linear", [torch.ones(2, 6, dtype=torch.float64)]),
    "no batch": ("ReLU", [torch.tensor(1.0)]),
    "add broadcasts": ("Add", [torch.ones(2, 3), torch.ones(2, 1)]),
    "mse broadcasts": ("MSELoss", [torch.ones(2, 3), torch.ones(2, 1)]),
    "batches differ": ("CrossEntropyLoss", [torch.ones(2, 3), torch.zeros(3, dtype=torch.int64)]),
    "empty batch": ("CrossEntropyLoss", [torch.ones(0, 3), torch.zeros(0, dtype=torch.int64)]),
    "probabilities": ("CrossEntropyLoss", [torch.ones(2, 3), torch.ones(2, 3)]),
    "short target": ("CrossEntropyLoss", [torch.ones(2, 3), torch.zeros(2, dtype=torch.int32)]),
    "class too high": ("CrossEntropyLoss", [torch.ones(2, 3), torch.tensor([0, 3])]),
    "class ignored by torch": ("CrossEntropyLoss", [torch.ones(2, 3), torch.tensor([0, -100])]),
    "one input": ("MSELoss", [torch.ones(2, 3)]),
    "no samples": ("Linear", [torch.ones(0, 6)]),
    "numbers for tokens": ("Embedding", [torch.ones(2, 3)]),
    "token too high": ("Embedding", [torch.tensor([[0, 7]])]),
    "token too low": ("Embedding", [torch.tensor([[0, -1]])]),
    "no batch of pictures": ("MaxPool2d", [torch.ones(2, 6, 4)]),
    "channels": ("Conv2d", [torch.ones(2, 3, 6, 4)]),
    "too long": ("PositionalEmbedding", [torch.ones(2, 10, 6)]),
    "places broadcast": ("PositionalEmbedding", [torch.ones(2, 3, 1)]),
    "mul broadcasts": ("Mul", [torch.ones(2, 3), torch.ones(2, 1)]),
    "two queries": ("MultiheadAttention", [torch.ones(2, 3, 6), torch.ones(2, 3, 6)]),
    "head's class": ("LocalHead", [torch.ones(2, 12), torch.tensor([0, 3])]),
    "head's target": ("LocalHead", [torch.ones(2, 12), torch.ones(2)]),
    "mixed shapes": ("CrossEntropyLoss", [torch.ones(2, 3, 4), torch.tensor([0, 1])]),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_inputs_that_do_not_fit(name: str) -> None:
    type, inputs = BAD_INPUTS[name]
    component = a_component(type)
    with pytest.raises(MalformedError, match=r"^v "):
        component.forward("k", inputs)
    with pytest.raises(MalformedError, match=r"^v "):
        component.infer(inputs)


@pytest.mark.parametrize(
    ("type", "few", "enough"),
    [("BatchNorm1d", (1, 2), (2, 2)), ("BatchNorm2d", (1, 2, 1, 1), (1, 2, 1, 2))],
)
def test_one_value_a_channel_is_nothing_to_learn_from(
    type: str, few: tuple[int, ...], enough: tuple[int, ...]
) -> None:
    component = a_component(type)
    with pytest.raises(
        MalformedError, match=rf"^v \({type}\) got one value a channel, .* larger b"
    ):
        component.forward("k", [torch.ones(few)])
    component.forward("k", [torch.ones(enough)])
    assert component.infer([torch.ones(few)]).shape == few


def test_a_gradient_that_does_not_fit_leaves_the_pass_as_it_is() -> None:
    component = a_component("Linear")
    component.forward("k", [torch.ones(2, 6)])
    for gradient in (torch.ones(2, 1), torch.ones(1, 4), torch.ones(2, 4, dtype=torch.float64)):
        with pytest.raises(MalformedError, match=r"v got a gradient"):
            component.backward("k", [torch.ones(2, 4), gradient])
    component.backward("k", [torch.ones(2, 4)])
    with pytest.raises(KeyError):
        component.backward("k", [torch.ones(2, 4)])


@pytest.mark.parametrize(
    ("type", "config"),
    [("Conv9d", {}), ("Linear", {"in_features": 3}), ("ReLU", {"inplace": True}),
     ("Linear", {"in_features": 2, "out_features": 2, "device": "meta"})],
)  # fmt: skip
def test_the_catalogue_is_closed(type: str, config: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=r"^v "):
        Component("v", type, config, seed=0)


def test_too_large_for_this_machine() -> None:
    with pytest.raises(ResourceError, match="not enough memory for v"):
        Component("v", "Linear", {"in_features": 2**30, "out_features": 2**30}, seed=0)


def stepped(optimizer: str, config: dict[str, object], steps: int = 2) -> Component:
    component = a_component("Linear", optimizer=optimizer, optimizer_config=config)
    for _ in range(steps):
        component.forward(0, [torch.ones(2, 6)])
        component.apply(component.backward(0, [torch.ones(2, 4)])[1])
    return component


OPTIMIZER_STATES = {
    "Adam": ("Adam", {}, {"exp_avg", "exp_avg_sq", "step"}),
    "SGD": ("SGD", {}, set()),
    "SGD with momentum": ("SGD", {"momentum": 0.9, "nesterov": True}, {"momentum_buffer"}),
}


@pytest.mark.parametrize("name", OPTIMIZER_STATES)
def test_a_state_goes_on_where_it_was(name: str) -> None:
    optimizer, config, keys = OPTIMIZER_STATES[name]
    component = stepped(optimizer, config)
    state = component.state()
    assert set(state) == {"param.weight", "param.bias"} | {
        f"opt.{param}.{key}" for param in ("weight", "bias") for key in keys
    }
    other = stepped(optimizer, config, steps=5)
    other.load(state, 2)
    for one in (component, other):
        one.forward(0, [torch.ones(2, 6)])
        one.apply(one.backward(0, [torch.ones(2, 4)])[1])
    after, also = component.state(), other.state()
    assert set(after) == set(also)
    for tensor in after:
        assert np.array_equal(after[tensor], also[tensor]), tensor
        assert tensor.endswith("step") or not np.array_equal(after[tensor], state[tensor])


@pytest.mark.parametrize(
    ("type", "config"),
    [
        ("Adam", {}),
        ("AdamW", {}),
        ("AdamW", {"lr": 0.1, "weight_decay": 0.3}),
        ("Adam", {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ],
    ids=str,
)
def test_optimizers_are_torchs_to_the_bit(type: str, config: dict[str, object]) -> None:
    torch.manual_seed(4)
    params = {"a": torch.randn(7, 5), "b": torch.randn(3)}
    plain = [nn.Parameter(param.clone()) for param in params.values()]
    theirs = getattr(torch.optim, type)(plain, **config)
    ours = Optimizer(type, config)
    for _ in range(5):
        gradients = [torch.randn(param.shape) for param in plain]
        for param, gradient in zip(plain, gradients, strict=True):
            param.grad = gradient.clone()
        theirs.step()
        ours.step(params, gradients)
    for (name, param), other in zip(params.items(), plain, strict=True):
        assert torch.equal(param, other)
        kept = {key: value for key, value in theirs.state[other].items() if value is not None}
        assert sorted(ours.state[name]) == sorted(kept)
        assert all(torch.equal(ours.state[name][key], kept[key]) for key in kept)
        shapes = {key: tuple(value.shape) for key, value in kept.items()}
        assert ours.kept(param.shape) == shapes


def test_weights_alone_begin_anew_at_step_0_only() -> None:
    weights = {name: a for name, a in stepped("Adam", {}).state().items() if "param." in name}
    component = stepped("Adam", {})
    component.load(weights, 0)
    assert set(component.state()) == set(weights)
    with pytest.raises(MalformedError, match=r"lacks the tensor opt\."):
        component.load(weights, 2)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    component = stepped("Adam", {})
    before = component.state()
    good = stepped("Adam", {}, steps=4).state()
    bad_states = {
        "missing": {name: array for name, array in good.items() if name != "param.bias"},
        "unknown": good | {"buffer.b": np.zeros(1, np.float32)},
        "shape": good | {"param.bias": np.zeros(5, np.float32)},
        "dtype": good | {"opt.bias.exp_avg": np.zeros(4)},
        "scalar": good | {"opt.bias.step": np.zeros(1, np.float32)},
        "negative": good | {"opt.bias.step": np.array(-1, np.float32)},
        "nan": good | {"opt.bias.step": np.array(np.nan, np.float32)},
        "half": good | {"opt.weight.step": np.array(0.5, np.float32)},
    }
    for name, state in bad_states.items():
        with pytest.raises(MalformedError):
            component.load(state, 4)
        after = component.state()
        assert all(np.array_equal(after[key], before[key]) for key in before), name
    component.load(good, 4)
