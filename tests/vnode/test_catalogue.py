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
    ("SiLU", {}, (2, 3)),
    ("RMSNorm", {"normalized_shape": [6]}, (3, 6)),
    ("RMSNorm", {"normalized_shape": [6], "elementwise_affine": False, "eps": 1e-3}, (6,)),
    ("BatchNorm1d", {"num_features": 5}, (5,)),
    ("BatchNorm1d", {"num_features": 5, "affine": False}, (5, 3)),
    ("BatchNorm2d", {"num_features": 5, "momentum": 0.3}, (5, 3, 4)),
    ("Dropout", {"p": 0.2}, (2, 3)),
    ("Identity", {}, (2, 3)),
    ("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3}, (3, 7, 8)),
    (
        "Conv2d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": [3, 2], "stride": 2, "padding": [1, 0],
         "dilation": [2, 1], "groups": 2, "bias": False},
        (4, 7, 8),
    ),
    ("MaxPool2d", {"kernel_size": 2}, (3, 7, 8)),
    ("MaxPool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}, (3, 7, 8)),
    ("MaxPool2d", {"kernel_size": 2, "stride": 3, "dilation": 2, "ceil_mode": True}, (3, 9, 8)),
    ("AvgPool2d", {"kernel_size": [3, 2], "stride": [2, 1], "padding": [1, 0]}, (3, 7, 8)),
    ("AvgPool2d", {"kernel_size": 2, "ceil_mode": True, "count_include_pad": False}, (3, 7, 5)),
    ("AvgPool2d", {"kernel_size": 9, "ceil_mode": True}, (3, 4, 4)),
    ("AdaptiveAvgPool2d", {"output_size": [1, 2]}, (3, 7, 8)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "written", "sample"), CASES)
def test_shapes_and_parameters_are_torchs(
    name: str, written: dict[str, Any], sample: Shape
) -> None:
    component = COMPONENTS[name]
    config = fill("node", component.keys, written)
    module = getattr(nn, name)(**config)
    assert component.shape(config, (sample,)) == tuple(module(torch.zeros(2, *sample)).shape[1:])
    buffers = {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in module.named_buffers()
    }
    assert component.buffers(config) == buffers
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
        ("RMSNorm", {"normalized_shape": 6}, (5,)),
        ("BatchNorm1d", {"num_features": 5}, (4,)),
        ("BatchNorm1d", {"num_features": 5}, (5, 3, 3)),
        ("BatchNorm2d", {"num_features": 5}, (5, 3)),
        ("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 9}, (3, 7, 8)),
        ("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 1}, (2, 7, 8)),
        ("MaxPool2d", {"kernel_size": 9}, (3, 7, 8)),
        ("MaxPool2d", {"kernel_size": 2, "padding": 2}, (3, 7, 8)),
    ],
)
def test_what_torch_refuses_does_not_fit(name: str, written: dict[str, Any], sample: Shape) -> None:
    config = fill("node", COMPONENTS[name].keys, written)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
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


def test_classes_may_be_last() -> None:
    kind = LOSSES["CrossEntropyLoss"]
    config = fill("loss", kind.keys, {"class_dim": -1})
    assert kind.target(config, (7, 5, 10)) == ((7, 5), "int64")


OTHERS: list[tuple[str, dict[str, Any], list[Shape], Shape | None]] = [
    ("Mul", {}, [(2, 3), (2, 3)], (2, 3)),
    ("Mul", {}, [(2, 3), (1, 3)], None),
    ("Concat", {}, [(2, 3), (4, 3)], (6, 3)),
    ("Concat", {"dim": -1}, [(2, 3), (2, 1)], (2, 4)),
    ("Concat", {"dim": -1}, [(2, 3), (4, 3)], None),
    ("Scale", {"factor": -0.5}, [(2,)], (2,)),
    ("Mean", {"dim": [-1, 1]}, [(2, 3, 4)], (3,)),
    ("Mean", {"dim": 2, "keepdim": True}, [(2, 3, 4)], (2, 1, 4)),
    ("Mean", {"dim": [1, -3]}, [(2, 3, 4)], None),
    ("Mean", {"dim": 0}, [(2, 3, 4)], None),
    ("Transpose", {"dim0": 1, "dim1": -1}, [(2, 3, 4)], (4, 3, 2)),
    ("Transpose", {"dim0": 1, "dim1": 4}, [(2, 3, 4)], None),
    ("Permute", {"dims": [0, 3, 1, 2]}, [(2, 3, 4)], (4, 2, 3)),
    ("Permute", {"dims": [1, 0, 2, 3]}, [(2, 3, 4)], None),
    ("Reshape", {"shape": [0, 2, -1]}, [(5, 8)], (5, 2, 4)),
    ("Reshape", {"shape": [-1]}, [(5, 8)], (40,)),
    ("Reshape", {"shape": [3, -1]}, [(5, 8)], None),
    ("Reshape", {"shape": [-1, -1]}, [(5, 8)], None),
    ("Reshape", {"shape": [5, 8, 0]}, [(5, 8)], None),
    ("Reshape", {"shape": [41]}, [(5, 8)], None),
    ("Narrow", {"dim": -1, "start": 2, "length": 3}, [(4, 5)], (4, 3)),
    ("Narrow", {"dim": -1, "start": 3, "length": 3}, [(4, 5)], None),
    ("Embedding", {"num_embeddings": 5, "embedding_dim": 3}, [(7,)], (7, 3)),
    ("TiedLinear", {"num_embeddings": 5, "embedding_dim": 3}, [(7, 3)], (7, 5)),
    ("TiedLinear", {"num_embeddings": 5, "embedding_dim": 3}, [(7, 4)], None),
    ("PositionalEmbedding", {"num_embeddings": 5, "embedding_dim": 3}, [(4, 3)], (4, 3)),
    ("PositionalEmbedding", {"num_embeddings": 5, "embedding_dim": 3}, [(6, 3)], None),
    ("MultiheadAttention", {"embed_dim": 6, "num_heads": 2}, [(4, 6)], (4, 6)),
    ("MultiheadAttention", {"embed_dim": 6, "num_heads": 4}, [(4, 6)], None),
    ("MultiheadAttention", {"embed_dim": 6, "num_heads": 2}, [(4, 5)], None),
    ("ScaledDotProductAttention", {}, [(2, 4, 3), (2, 5, 3), (2, 5, 6)], (2, 4, 6)),
    ("ScaledDotProductAttention", {}, [(2, 4, 3), (2, 5, 2), (2, 5, 6)], None),
]


@pytest.mark.parametrize(("name", "written", "samples", "expected"), OTHERS)
def test_shapes_of_what_torch_has_no_class_for(
    name: str, written: dict[str, Any], samples: list[Shape], expected: Shape | None
) -> None:
    component = COMPONENTS[name]
    keys = COMPONENTS["Embedding"].keys if component.tied else component.keys
    config = fill("node", keys, written)
    assert component.inputs_min <= len(samples) <= component.inputs_max
    if expected is None:
        with pytest.raises(DoesNotFit):
            component.shape(config, tuple(samples))
    else:
        assert component.shape(config, tuple(samples)) == expected
        assert component.flops(config, tuple(samples), expected) >= 0
        assert component.within(config, tuple(samples)) >= 0


@pytest.mark.parametrize("prediction", [(10,), (10, 4)])
@pytest.mark.parametrize("name", list(LOSSES))
def test_targets_are_what_torchs_loss_takes(name: str, prediction: Shape) -> None:
    config = fill("loss", LOSSES[name].keys, {})
    shape, dtype = LOSSES[name].target(config, prediction)
    target = torch.zeros(2, *shape, dtype=getattr(torch, dtype))
    config.pop("class_dim", None)
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


# torch's own default is a deprecated guess; or None, for the dtype's epsilon
OURS = (("Softmax", "dim"), ("RMSNorm", "eps"))


def test_the_usual_epsilon_is_float32s() -> None:
    config = fill("n", COMPONENTS["RMSNorm"].keys, {"normalized_shape": 2})
    assert config["eps"] == torch.finfo(torch.float32).eps


def test_component_defaults_are_torchs() -> None:
    for name, component in {**COMPONENTS, **LOSSES}.items():
        for key in component.keys:
            signature = inspect.signature(getattr(nn, name, object)).parameters
            if key.default is None or key.name not in signature or (name, key.name) in OURS:
                continue
            usual = signature[key.name].default
            pairs = isinstance(key.default, tuple)
            assert key.default == ((usual, usual) if pairs else usual), (name, key.name)


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
        (
            "Conv2d",
            {"in_channels": 1, "out_channels": 1, "kernel_size": [1, 2, 3]},
            "or two of them",
        ),
        ("Conv2d", {"in_channels": 1, "out_channels": 1, "kernel_size": 0}, "of at least 1"),
        ("MaxPool2d", {"kernel_size": 2, "stride": "same"}, "not 'same'"),
        ("Dropout", {"p": 1.5}, "at least 0 and at most 1, not 1.5"),
        ("Scale", {"factor": float("inf")}, "factor to be a number, not inf"),
        ("Reshape", {"shape": [-2]}, "1 to 8 whole numbers of -1 to"),
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
