"""The closed catalogue of components, by the names of torch.nn (DESIGN D9). Without torch.

A shape is of one sample: the batch dimension, which torch counts as number 0,
is left out. FLOPs count an addition and a multiplication as one each; those of
the elementwise components are rough, they only steer placement.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from p2pnet.errors import SpecError
from p2pnet.vnode import rules
from p2pnet.vnode.config import (
    DIMS_MAX,
    LENGTH_MAX,
    Config,
    Key,
    betas,
    choice,
    factor,
    flag,
    lengths,
    number,
    pair,
    whole,
    whole_numbers,
)
from p2pnet.vnode.rules import DoesNotFit as DoesNotFit
from p2pnet.vnode.rules import Shape as Shape
from p2pnet.vnode.rules import Shapes
from p2pnet.vnode.rules import show as show

INPUTS_MAX = 64
_LISTED_MAX = 8
TIED_HOME = "Embedding"  # whose weight a tied node shares
LOCAL_HEAD = "LocalHead"  # a block's own loss: it takes "y" as the network's loss does


@dataclass(frozen=True, slots=True)
class Component:
    """What is known of a type: config, shape rule, parameters (torch's names), cost of a sample.

    `shape` raises DoesNotFit. `flops` are those of a forward, `backward` is how many
    times as many a backward takes. `within`: how many values a forward keeps for its
    backward beside inputs and output. `whole`: it takes whole numbers, int64. `tied`: its
    weight is an Embedding's, whose config its rules are given.
    """

    keys: tuple[Key, ...] = ()
    inputs_min: int = 1
    inputs_max: int = 1
    shape: Callable[[Config, Shapes], Shape] = rules.same
    params: Callable[[Config], dict[str, Shape]] = rules.no_params
    buffers: Callable[[Config], dict[str, tuple[Shape, str]]] = rules.no_buffers
    within: Callable[[Config, Shapes], int] = rules.nothing_within
    whole: bool = False
    tied: bool = False
    flops: Callable[[Config, Shapes, Shape], int] = rules.elements
    backward: int = 1


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss takes a prediction and the target "y", and gives one number a batch, the mean."""

    keys: tuple[Key, ...]
    target: Callable[[Config, Shape], tuple[Shape, str]]  # of a prediction: y's shape and dtype
    flops_per_element: int


@dataclass(frozen=True, slots=True)
class OptimizerType:
    """`copies`: how many tensors of a parameter's size it keeps; `scalars`: how many numbers."""

    keys: tuple[Key, ...]
    copies: Callable[[Config], int]
    scalars: int
    conflict: Callable[[Config], str]  # what is wrong with keys that fit one by one, or ""


# --- optimizers ---------------------------------------------------------------


def _sgd_copies(config: Config) -> int:
    return 1 if config["momentum"] else 0


def _adam_copies(config: Config) -> int:
    return 2


def _sgd_conflict(config: Config) -> str:
    if config["nesterov"] and (not config["momentum"] or config["dampening"]):
        return "nesterov=true needs a momentum above 0 and a dampening of 0"
    return ""


def _no_conflict(config: Config) -> str:
    return ""


def _adam(weight_decay: float) -> OptimizerType:
    return OptimizerType(
        keys=(
            number("lr", 1e-3),
            betas("betas", 0.9, 0.999),
            number("eps", 1e-8),
            number("weight_decay", weight_decay),
        ),
        copies=_adam_copies,
        scalars=1,  # how many steps it has made
        conflict=_no_conflict,
    )


_SMOOTHING = number("label_smoothing", 0.0, high=1.0)
# Which dimension of a prediction has a value a class: 1 as in torch, or -1, the last.
_CLASS_DIM = whole("class_dim", -1, 1, default=1, but=0)
_EPS = number("eps", 1e-5, above_zero=True)


def _dim(name: str, default: int | None = None) -> Key:
    """A dimension as torch counts them; 0, the batch, stays as it is."""
    return whole(name, -DIMS_MAX, DIMS_MAX, default=default, but=0)


def _probability(name: str, default: float) -> Key:
    return number(name, default, high=1.0)


def _batch_norm(*dims: int) -> Component:
    return Component(
        # the cumulative average, torch's momentum=None, is not there
        keys=(whole("num_features"), _EPS, _probability("momentum", 0.1), flag("affine", True)),
        shape=rules.batch_norm_shape(*dims),
        params=rules.batch_norm_params,
        buffers=rules.batch_norm_buffers,
        within=rules.as_its_input,
        flops=rules.per_element(8),
        backward=2,
    )


COMPONENTS: dict[str, Component] = {
    "Linear": Component(
        keys=(whole("in_features"), whole("out_features"), flag("bias", True)),
        shape=rules.linear_shape,
        params=rules.linear_params,
        flops=rules.linear_flops,
        backward=2,  # a product for the input's gradient, one for the weight's
    ),
    "LayerNorm": Component(
        keys=(
            lengths("normalized_shape"),
            _EPS,
            flag("elementwise_affine", True),
            flag("bias", True),
        ),
        shape=rules.ends_in_shape,
        params=rules.layer_norm_params,
        flops=rules.per_element(8),
        backward=2,
    ),
    "RMSNorm": Component(
        # torch's eps=None is float32's epsilon
        keys=(
            lengths("normalized_shape"),
            number("eps", 2.0**-23, above_zero=True),
            flag("elementwise_affine", True),
        ),
        shape=rules.ends_in_shape,
        params=rules.rms_norm_params,
        within=rules.as_its_input,
        flops=rules.per_element(6),
        backward=2,
    ),
    "BatchNorm1d": _batch_norm(1, 2),
    "BatchNorm2d": _batch_norm(3),
    "Flatten": Component(
        keys=(_dim("start_dim", 1), _dim("end_dim", -1)),
        shape=rules.flatten_shape,
        flops=rules.per_element(0),
    ),
    "ReLU": Component(),
    "GELU": Component(keys=(choice("approximate", "none", "tanh"),), flops=rules.per_element(10)),
    "SiLU": Component(flops=rules.per_element(5)),
    "Tanh": Component(flops=rules.per_element(6)),
    "Sigmoid": Component(flops=rules.per_element(4)),
    # torch's own default for dim is a deprecated guess
    "Softmax": Component(keys=(_dim("dim", -1),), shape=rules.any_axis, flops=rules.per_element(5)),
    "Dropout": Component(keys=(_probability("p", 0.5),), within=rules.as_its_input),
    "Identity": Component(flops=rules.per_element(0)),
    "Add": Component(
        inputs_min=2,
        inputs_max=INPUTS_MAX,
        shape=rules.all_alike,
        flops=rules.one_by_one,
        backward=0,
    ),
    "Mul": Component(
        inputs_min=2,
        inputs_max=INPUTS_MAX,
        shape=rules.all_alike,
        flops=rules.one_by_one,
        backward=2,
    ),
    "Concat": Component(
        keys=(_dim("dim", 1),),
        inputs_min=2,
        inputs_max=INPUTS_MAX,
        shape=rules.concat_shape,
        flops=rules.per_element(0),
    ),
    "Scale": Component(keys=(factor("factor"),)),
    "Mean": Component(
        keys=(whole_numbers("dim", -DIMS_MAX, DIMS_MAX), flag("keepdim", False)),
        shape=rules.mean_shape,
        flops=rules.every_input,
    ),
    "Transpose": Component(
        keys=(_dim("dim0"), _dim("dim1")), shape=rules.transpose_shape, flops=rules.per_element(0)
    ),
    "Permute": Component(
        keys=(whole_numbers("dims", 0, DIMS_MAX),),
        shape=rules.permute_shape,
        flops=rules.per_element(0),
    ),
    "Reshape": Component(
        keys=(whole_numbers("shape", -1, LENGTH_MAX),),
        shape=rules.reshape_shape,
        flops=rules.per_element(0),
    ),
    "Narrow": Component(
        keys=(_dim("dim"), whole("start", 0), whole("length")),
        shape=rules.narrow_shape,
        flops=rules.per_element(0),
    ),
    "Conv2d": Component(
        keys=(
            whole("in_channels"),
            whole("out_channels"),
            pair("kernel_size"),
            pair("stride", default=1),
            pair("padding", 0, default=0),
            pair("dilation", default=1),
            whole("groups", default=1),
            flag("bias", True),
        ),
        shape=rules.conv_shape,
        params=rules.conv_params,
        within=rules.conv_within,
        flops=rules.conv_flops,
        backward=2,
    ),
    "MaxPool2d": Component(
        keys=(
            pair("kernel_size"),
            pair("stride", as_key="kernel_size"),
            pair("padding", 0, default=0),
            pair("dilation", default=1),
            flag("ceil_mode", False),
        ),
        shape=rules.pool_shape,
        within=rules.as_its_input,
        flops=rules.window_flops,
    ),
    "AvgPool2d": Component(
        keys=(
            pair("kernel_size"),
            pair("stride", as_key="kernel_size"),
            pair("padding", 0, default=0),
            flag("ceil_mode", False),
            flag("count_include_pad", True),
        ),
        shape=rules.pool_shape,
        flops=rules.window_flops,
    ),
    "AdaptiveAvgPool2d": Component(
        keys=(pair("output_size"),), shape=rules.adaptive_shape, flops=rules.every_input
    ),
    TIED_HOME: Component(
        keys=(whole("num_embeddings"), whole("embedding_dim")),
        whole=True,
        shape=rules.embedding_shape,
        params=rules.embedding_params,
        flops=rules.per_element(1),
        backward=2,
    ),
    "TiedLinear": Component(
        # `kept_as`: whether the model has a layer of its own for it
        keys=(choice("kept_as", "module", "function"),),
        tied=True,
        shape=rules.tied_shape,
        flops=rules.tied_flops,
        backward=2,
    ),
    "PositionalEmbedding": Component(
        # `kept_as`: what the model has for it, which only its export needs to know
        keys=(
            whole("num_embeddings"),
            whole("embedding_dim"),
            choice("kept_as", "embedding", "parameter", "batched parameter"),
        ),
        shape=rules.positional_shape,
        params=rules.embedding_params,
        backward=1,
    ),
    "MultiheadAttention": Component(
        keys=(
            whole("embed_dim"),
            whole("num_heads"),
            _probability("dropout", 0.0),
            flag("bias", True),
            flag("causal", False),
            flag("need_weights", False),  # other arithmetic, in torch as here
        ),
        shape=rules.attention_shape,
        params=rules.attention_params,
        within=rules.attention_within,
        flops=rules.attention_flops,
        backward=2,
    ),
    "ScaledDotProductAttention": Component(
        keys=(flag("causal", False), _probability("dropout", 0.0)),
        inputs_min=3,
        inputs_max=3,
        shape=rules.product_shape,
        within=rules.product_within,
        flops=rules.product_flops,
        backward=2,
    ),
    LOCAL_HEAD: Component(
        keys=(
            choice("loss", "CrossEntropyLoss", "MSELoss"),
            choice("over", "all", "last", "picture"),
            whole("in_features"),
            whole("out_features"),
            whole("hidden", 0, default=0),
            _SMOOTHING,
            _CLASS_DIM,
        ),
        inputs_min=2,
        inputs_max=2,
        shape=rules.head_shape,
        params=rules.head_params,
        flops=rules.head_flops,
        backward=2,
    ),
}

# What the second entry of an Embedding is.
TIED = COMPONENTS["TiedLinear"]

# Only the mean over the batch: a ragged last batch is weighted by its size.
LOSSES: dict[str, Loss] = {
    "MSELoss": Loss((choice("reduction", "mean"),), rules.same_target, 3),
    "CrossEntropyLoss": Loss(
        (choice("reduction", "mean"), _SMOOTHING, _CLASS_DIM), rules.class_target, 8
    ),
}

OPTIMIZERS: dict[str, OptimizerType] = {
    "SGD": OptimizerType(
        keys=(
            number("lr", 1e-3),
            number("momentum", 0.0),
            number("dampening", 0.0),
            number("weight_decay", 0.0),
            flag("nesterov", False),
        ),
        copies=_sgd_copies,
        scalars=0,
        conflict=_sgd_conflict,
    ),
    "Adam": _adam(weight_decay=0.0),
    "AdamW": _adam(weight_decay=0.01),
}


def find_component(where: str, name: str) -> Component:
    """The component `name`; `where` is the node that asks. Raises SpecError if there is none."""
    if name not in COMPONENTS:
        raise SpecError(f"{where} has the unknown type {name!r}: {_nearest(name, COMPONENTS)}")
    return COMPONENTS[name]


def find_loss(where: str, name: str) -> Loss:
    """The loss `name`; raises SpecError if there is none."""
    if name not in LOSSES:
        raise SpecError(f"{where} has the unknown loss type {name!r}: {_nearest(name, LOSSES)}")
    return LOSSES[name]


def find_optimizer(name: str) -> OptimizerType:
    """The optimizer `name`; raises SpecError if there is none."""
    if name not in OPTIMIZERS:
        raise SpecError(f"optimizer has the unknown type {name!r}: {_nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name]


def _nearest(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}
    wanted = name[:64].lower()
    near = difflib.get_close_matches(wanted, list(by_lower), n=3, cutoff=0.5)
    if near:
        near = [wanted] if wanted in by_lower else near
        return f"did you mean {' or '.join(by_lower[lower] for lower in near)}?"
    if len(by_lower) > _LISTED_MAX:
        return f"docs/models.md lists the {len(by_lower)} that there are"
    return f"there are {', '.join(by_lower.values())}"
