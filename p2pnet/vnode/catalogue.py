"""The closed catalogue of components, by the names of torch.nn (DESIGN D9). Without torch.

A shape is of one sample: the batch dimension, which torch counts as number 0,
is left out. FLOPs count an addition and a multiplication as one each; those of
the elementwise components are rough, they only steer placement.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from p2pnet.errors import SpecError
from p2pnet.vnode.config import Config, Key, betas, choice, flag, lengths, number, whole

Shape = tuple[int, ...]

ADD_INPUTS_MAX = 64


class DoesNotFit(Exception):
    """A shape rule refuses its inputs; says what was expected of them."""


def _no_params(config: Config) -> dict[str, Shape]:
    return {}


def _same(config: Config, inputs: tuple[Shape, ...]) -> Shape:
    return inputs[0]


def _elements(config: Config, inputs: tuple[Shape, ...], output: Shape) -> int:
    return math.prod(output)


def _per_element(cost: int) -> Callable[[Config, tuple[Shape, ...], Shape], int]:
    return lambda config, inputs, output: cost * math.prod(output)


@dataclass(frozen=True, slots=True)
class Component:
    """What is known of a type: config, shape rule, parameters (torch's names), cost of a sample.

    `shape` raises DoesNotFit. `flops` are those of a forward, `backward` is how many
    times as many a backward takes.
    """

    keys: tuple[Key, ...] = ()
    inputs_min: int = 1
    inputs_max: int = 1
    shape: Callable[[Config, tuple[Shape, ...]], Shape] = _same
    params: Callable[[Config], dict[str, Shape]] = _no_params
    flops: Callable[[Config, tuple[Shape, ...], Shape], int] = _elements
    backward: int = 1


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss takes a prediction and the target "y", and gives one number a batch, the mean."""

    keys: tuple[Key, ...]
    target: Callable[[Shape], tuple[Shape, str]]  # of a prediction: y's shape and dtype
    flops_per_element: int


@dataclass(frozen=True, slots=True)
class OptimizerType:
    """`copies`: how many tensors of a parameter's size it keeps; `scalars`: how many numbers."""

    keys: tuple[Key, ...]
    copies: Callable[[Config], int]
    scalars: int
    conflict: Callable[[Config], str]  # what is wrong with keys that fit one by one, or ""


# --- Linear -------------------------------------------------------------------


def _linear_shape(config: Config, inputs: tuple[Shape, ...]) -> Shape:
    given, wanted = inputs[0], _int(config["in_features"])
    if not given or given[-1] != wanted:
        last = "" if len(given) < 2 else " in the last dimension"
        raise DoesNotFit(f"in_features={wanted} values a sample{last}")
    return (*given[:-1], _int(config["out_features"]))


def _linear_params(config: Config) -> dict[str, Shape]:
    n_in, n_out = _int(config["in_features"]), _int(config["out_features"])
    return {"weight": (n_out, n_in)} | ({"bias": (n_out,)} if config["bias"] else {})


def _linear_flops(config: Config, inputs: tuple[Shape, ...], output: Shape) -> int:
    return math.prod(output) * (2 * _int(config["in_features"]) + bool(config["bias"]))


# --- LayerNorm ----------------------------------------------------------------


def _layer_norm_shape(config: Config, inputs: tuple[Shape, ...]) -> Shape:
    wanted = _shape(config["normalized_shape"])
    if inputs[0][-len(wanted) :] != wanted:
        raise DoesNotFit(f"a sample that ends in normalized_shape={show(wanted)}")
    return inputs[0]


def _layer_norm_params(config: Config) -> dict[str, Shape]:
    shape = _shape(config["normalized_shape"])
    if not config["elementwise_affine"]:
        return {}
    return {"weight": shape} | ({"bias": shape} if config["bias"] else {})


# --- Flatten, Softmax, Add ----------------------------------------------------


def _flatten_shape(config: Config, inputs: tuple[Shape, ...]) -> Shape:
    given = inputs[0]
    start, end = (_axis(config, key, len(given)) for key in ("start_dim", "end_dim"))
    if start > end:
        raise DoesNotFit("start_dim to come no later than end_dim")
    return (*given[:start], math.prod(given[start : end + 1]), *given[end + 1 :])


def _softmax_shape(config: Config, inputs: tuple[Shape, ...]) -> Shape:
    _axis(config, "dim", len(inputs[0]))
    return inputs[0]


def _axis(config: Config, key: str, dims: int) -> int:
    """A sample's dimension, from 0, of a config key that counts as torch does."""
    axis = _int(config[key])
    axis = axis - 1 if axis > 0 else axis + dims
    if not 0 <= axis < dims:
        raise DoesNotFit(
            f"a sample with dimension {key}={config[key]} (0 is the batch and stays as it is)"
        )
    return axis


def _add_shape(config: Config, inputs: tuple[Shape, ...]) -> Shape:
    if any(shape != inputs[0] for shape in inputs):
        raise DoesNotFit("inputs of the same shape")
    return inputs[0]


def _add_flops(config: Config, inputs: tuple[Shape, ...], output: Shape) -> int:
    return (len(inputs) - 1) * math.prod(output)


# --- losses -------------------------------------------------------------------


def _class_target(prediction: Shape) -> tuple[Shape, str]:
    if not prediction:
        raise DoesNotFit("a prediction of one value a class")
    return prediction[1:], "int64"  # torch: [N, classes, d1, ...] against [N, d1, ...]


def _same_target(prediction: Shape) -> tuple[Shape, str]:
    return prediction, "float32"


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


COMPONENTS: dict[str, Component] = {
    "Linear": Component(
        keys=(whole("in_features"), whole("out_features"), flag("bias", True)),
        shape=_linear_shape,
        params=_linear_params,
        flops=_linear_flops,
        backward=2,  # a product for the input's gradient, one for the weight's
    ),
    "LayerNorm": Component(
        keys=(
            lengths("normalized_shape"),
            number("eps", 1e-5, above_zero=True),
            flag("elementwise_affine", True),
            flag("bias", True),
        ),
        shape=_layer_norm_shape,
        params=_layer_norm_params,
        flops=_per_element(8),
        backward=2,
    ),
    "Flatten": Component(
        keys=(
            whole("start_dim", -8, 8, default=1, but=0),
            whole("end_dim", -8, 8, default=-1, but=0),
        ),
        shape=_flatten_shape,
        flops=_per_element(0),
    ),
    "ReLU": Component(),
    "GELU": Component(keys=(choice("approximate", "none", "tanh"),), flops=_per_element(10)),
    "Tanh": Component(flops=_per_element(6)),
    "Sigmoid": Component(flops=_per_element(4)),
    # torch's own default for dim is a deprecated guess
    "Softmax": Component(
        keys=(whole("dim", -8, 8, default=-1, but=0),),
        shape=_softmax_shape,
        flops=_per_element(5),
    ),
    "Add": Component(
        inputs_min=2, inputs_max=ADD_INPUTS_MAX, shape=_add_shape, flops=_add_flops, backward=0
    ),
}

# Only the mean over the batch: a ragged last batch is weighted by its size.
LOSSES: dict[str, Loss] = {
    "MSELoss": Loss((choice("reduction", "mean"),), _same_target, 3),
    "CrossEntropyLoss": Loss(
        (choice("reduction", "mean"), number("label_smoothing", 0.0, high=1.0)), _class_target, 8
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
    "Adam": OptimizerType(
        keys=(
            number("lr", 1e-3),
            betas("betas", 0.9, 0.999),
            number("eps", 1e-8),
            number("weight_decay", 0.0),
        ),
        copies=_adam_copies,
        scalars=1,  # how many steps it has made
        conflict=_no_conflict,
    ),
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


def show(shape: Shape) -> str:
    """A shape for people: "[3, 64]"."""
    return str(list(shape))


def _nearest(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name[:64].lower(), list(by_lower), n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(by_lower[lower] for lower in near)}?"
    return f"there are {', '.join(by_lower.values())}"


def _int(value: object) -> int:
    assert isinstance(value, int)  # the config was filled by its keys
    return value


def _shape(value: object) -> Shape:
    assert isinstance(value, tuple)
    return value
