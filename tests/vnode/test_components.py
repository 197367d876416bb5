"""Components in torch: made as torch makes them, and each with a backward of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from p2pnet.errors import MalformedError, ResourceError, SpecError
from p2pnet.vnode import components
from p2pnet.vnode.catalogue import COMPONENTS, LOSSES
from p2pnet.vnode.components import Component, init_seed
from p2pnet.vnode.config import fill
from p2pnet.vnode.messages import Metrics
from p2pnet.vnode.optimizers import Optimizer

CONFIGS: dict[str, dict[str, object]] = {
    "Linear": {"in_features": 6, "out_features": 4},
    "LayerNorm": {"normalized_shape": 6},
}
MAKES = {"Linear": lambda: nn.Linear(6, 4), "LayerNorm": lambda: nn.LayerNorm(6)} | {
    name: getattr(nn, name)
    for name in ("Flatten", "ReLU", "GELU", "Tanh", "Sigmoid", "MSELoss", "CrossEntropyLoss")
}
MAKES["Softmax"] = lambda: nn.Softmax(-1)


def a_component(type: str, **changes: object) -> Component:
    return Component("v", type, CONFIGS.get(type, {}), seed=0, **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_catalogue_and_torch_agree() -> None:
    assert set(components._MODULES) == {*COMPONENTS, *LOSSES}
    for type, kind in COMPONENTS.items():
        config = fill("v", kind.keys, CONFIGS.get(type, {}))
        shapes = {name: tuple(p.shape) for name, p in a_component(type)._params.items()}
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


@pytest.mark.parametrize("type", sorted(COMPONENTS))
def test_forward_and_backward_are_torchs(type: str) -> None:
    torch.manual_seed(3)
    inputs = [torch.randn(5, 2, 6) for _ in range(3 if type == "Add" else 1)]
    component = a_component(type)
    torch.manual_seed(init_seed(0, "v"))
    plain = MAKES[type]() if type != "Add" else None
    copies = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = plain(*copies) if plain else copies[0] + copies[1] + copies[2]
    gradient = torch.randn(expected.shape)
    expected.backward(gradient)

    output, metrics = component.forward("k", inputs)
    assert metrics is None
    assert torch.equal(output, expected)
    assert not output.requires_grad
    assert torch.equal(component.infer(inputs), expected)
    got, params = component.backward("k", [gradient])
    assert all(torch.equal(a, b.grad) for a, b in zip(got, copies, strict=True))
    plain_params = list(plain.parameters()) if plain else []
    assert all(torch.equal(a, b.grad) for a, b in zip(params, plain_params, strict=True))
    assert not any(tensor.requires_grad for tensor in inputs)


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
