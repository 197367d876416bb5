"""The catalogue against torch itself: shapes, parameters and defaults."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import nn

from p2pnet.errors import SpecError
from p2pnet.vnode.catalogue import COMPONENTS, LOSSES, OPTIMIZERS, DoesNotFit, Shape
from p2pnet.vnode.config import fill

# type, config as written, sample shape
CASES: list[tuple[str, dict[str, Any], Shape]] = [
    ("Linear", {"in_features": 6, "out_features": 4}, (6,)),
    ("Linear", {"in_features": 6, "out_features": 4, "bias": False}, (3, 2, 6)),
    ("LayerNorm", {"normalized_shape": 6}, (3, 6)),
    ("LayerNorm", {"normalized_shape": [3, 6], "bias": False}, (2, 3, 6)),
    ("LayerNorm", {"normalized_shape": [6], "elementwise_affine": False, "eps": 1e-3}, (6,)),
    ("Flatten", {}, (2, 3, 4)),
    ("Flatten", {}, (5,)),
    ("Flatten", {"start_dim": 2}, (2, 3, 4)),
    ("Flatten", {"start_dim": -2, "end_dim": -1}, (2, 3, 4)),
    ("Flatten", {"start_dim": 1, "end_dim": 2}, (2, 3, 4)),
    ("ReLU", {}, (2, 3)),
    ("GELU", {"approximate": "tanh"}, (2, 3)),
    ("Tanh", {}, (7,)),
    ("Sigmoid", {}, ()),
    ("Softmax", {}, (2, 3)),
    ("Softmax", {"dim": 1}, (2, 3)),
]


@pytest.mark.parametrize(("name", "written", "sample"), CASES)
def test_shapes_and_parameters_are_torchs(
    name: str, written: dict[str, Any], sample: Shape
) -> None:
    component = COMPONENTS[name]
    config = fill("node", component.keys, written)
    module = getattr(nn, name)(**config)
    assert component.shape(config, (sample,)) == tuple(module(torch.zeros(2, *sample)).shape[1:])
    params = {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}
    assert list(component.params(config).items()) == list(params.items())
    assert sum(math.prod(shape) for shape in component.params(config).values()) == sum(
        tensor.numel() for tensor in module.parameters()
    )


@pytest.mark.parametrize(
    ("name", "written", "sample"),
    [
        ("Linear", {"in_features": 6, "out_features": 4}, (5,)),
        ("LayerNorm", {"normalized_shape": [3, 6]}, (6,)),
        ("Flatten", {"start_dim": 4}, (2, 3)),
        ("Flatten", {"start_dim": 2, "end_dim": 1}, (2, 3)),
        ("Softmax", {"dim": 3}, (2, 3)),
    ],
)
def test_what_torch_refuses_does_not_fit(name: str, written: dict[str, Any], sample: Shape) -> None:
    config = fill("node", COMPONENTS[name].keys, written)
    with pytest.raises((RuntimeError, IndexError)):
        getattr(nn, name)(**config)(torch.zeros(2, *sample))
    with pytest.raises(DoesNotFit):
        COMPONENTS[name].shape(config, (sample,))


@pytest.mark.parametrize(
    ("name", "written", "sample"),
    [("Flatten", {"start_dim": -3}, (2, 3)), ("Softmax", {"dim": -3}, (2, 3)), ("Flatten", {}, ())],
)
def test_the_batch_dimension_stays_as_it_is(
    name: str, written: dict[str, Any], sample: Shape
) -> None:
    config = fill("node", COMPONENTS[name].keys, written)
    with pytest.raises(DoesNotFit, match="0 is the batch"):
        COMPONENTS[name].shape(config, (sample,))


@pytest.mark.parametrize("prediction", [(10,), (10, 4)])
@pytest.mark.parametrize("name", list(LOSSES))
def test_targets_are_what_torchs_loss_takes(name: str, prediction: Shape) -> None:
    shape, dtype = LOSSES[name].target(prediction)
    config = fill("loss", LOSSES[name].keys, {})
    target = torch.zeros(2, *shape, dtype=getattr(torch, dtype))
    loss = getattr(nn, name)(**config)(torch.zeros(2, *prediction), target)
    assert loss.shape == ()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizers_defaults_and_state_are_torchs(name: str) -> None:
    kind = OPTIMIZERS[name]
    signature = inspect.signature(getattr(torch.optim, name)).parameters
    for key, value in fill("optimizer", kind.keys, {}).items():
        assert value == signature[key].default, key
    for written in ({}, {"momentum": 0.9}) if name == "SGD" else ({},):
        config = fill("optimizer", kind.keys, written)
        parameter = nn.Parameter(torch.ones(5, 3))
        optimizer = getattr(torch.optim, name)([parameter], **config)
        parameter.sum().backward()
        optimizer.step()
        kept = sum(
            tensor.numel()
            for tensor in optimizer.state[parameter].values()
            if isinstance(tensor, torch.Tensor)
        )
        assert kept == 15 * kind.copies(config) + kind.scalars


def test_component_defaults_are_torchs() -> None:
    for name, component in {**COMPONENTS, **LOSSES}.items():
        for key in component.keys:
            if key.default is not None and (name, key.name) != ("Softmax", "dim"):
                signature = inspect.signature(getattr(nn, name)).parameters
                assert key.default == signature[key.name].default, (name, key.name)


@pytest.mark.parametrize(
    ("name", "written", "words"),
    [
        ("Linear", {"in_features": 6}, "fc1 needs the config key out_features: a whole number"),
        ("Linear", {"in_features": 0, "out_features": 4}, "expects in_features to be a whole"),
        ("Linear", {"in_features": 6.0, "out_features": 4}, "not 6.0"),
        ("Linear", {"in_features": True, "out_features": 4}, "not True"),
        ("Linear", {"in_features": 6, "out_features": 4, "bias": "no"}, "true or false, not 'no'"),
        ("Linear", {"in_feature": 6}, "unknown config key 'in_feature': it takes in_features, "),
        ("ReLU", {"inplace": True}, "unknown config key 'inplace': it takes none"),
        ("LayerNorm", {"normalized_shape": []}, "expects normalized_shape to be"),
        ("LayerNorm", {"normalized_shape": 3, "eps": 0}, "eps to be a number above 0, not 0"),
        ("LayerNorm", {"normalized_shape": 3, "eps": float("nan")}, "above 0, not nan"),
        ("GELU", {"approximate": "fast"}, "'none' or 'tanh', not 'fast'"),
        ("Softmax", {"dim": 0}, "but not 0, not 0"),
    ],
)
def test_a_bad_config_names_node_key_and_what_was_expected(
    name: str, written: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=r"^fc1 ") as error:
        fill("fc1", COMPONENTS[name].keys, written)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"lr": -1}, "lr to be a number of at least 0, not -1"),
        ({"lr": 10**400}, "lr to be a number"),
        ({"betas": [0.9, 1.0]}, "two numbers of at least 0 and below 1"),
        ({"betas": [0.9]}, "two numbers"),
    ],
)
def test_a_bad_optimizer_is_named(written: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=r"^optimizer expects") as error:
        fill("optimizer", OPTIMIZERS["Adam"].keys, written)
    assert words in str(error.value)
