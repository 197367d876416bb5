"""The catalogue's rules: what a component makes of a sample's shape, and what it costs.

A rule of shapes raises DoesNotFit. Shapes are those of one sample: torch's dimension 0,
the batch, is left out, so that torch's dimension 1 is number 0 here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from p2pnet.vnode.config import Config

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


class DoesNotFit(Exception):
    """A shape rule refuses its inputs; says what was expected of them."""


def show(shape: Shape) -> str:
    """A shape for people: "[3, 64]"."""
    return str(list(shape))


def as_int(value: object) -> int:
    assert isinstance(value, int)  # the config was filled by its keys
    return value


def as_shape(value: object) -> Shape:
    assert isinstance(value, tuple)
    return value


def axis(config: Config, key: str, dims: int) -> int:
    """A sample's dimension, from 0, of a config key that counts as torch does."""
    return _axis(f"{key}={config[key]}", as_int(config[key]), dims)


def _axis(what: str, number: int, dims: int) -> int:
    place = number - 1 if number > 0 else number + dims
    if not number or not 0 <= place < dims:
        raise DoesNotFit(f"a sample with dimension {what} (0 is the batch and stays as it is)")
    return place


# --- whatever the shape -------------------------------------------------------


def same(config: Config, inputs: Shapes) -> Shape:
    return inputs[0]


def no_params(config: Config) -> dict[str, Shape]:
    return {}


def no_buffers(config: Config) -> dict[str, tuple[Shape, str]]:
    return {}


def nothing_within(config: Config, inputs: Shapes) -> int:
    return 0


def as_its_input(config: Config, inputs: Shapes) -> int:
    return math.prod(inputs[0])


def elements(config: Config, inputs: Shapes, output: Shape) -> int:
    return math.prod(output)


def per_element(cost: int) -> Callable[[Config, Shapes, Shape], int]:
    return lambda config, inputs, output: cost * math.prod(output)


def all_alike(config: Config, inputs: Shapes) -> Shape:
    if any(shape != inputs[0] for shape in inputs):
        raise DoesNotFit("inputs of the same shape")
    return inputs[0]


def one_by_one(config: Config, inputs: Shapes, output: Shape) -> int:
    return (len(inputs) - 1) * math.prod(output)


# --- Linear -------------------------------------------------------------------


def linear_shape(config: Config, inputs: Shapes) -> Shape:
    given, wanted = inputs[0], as_int(config["in_features"])
    if not given or given[-1] != wanted:
        last = "" if len(given) < 2 else " in the last dimension"
        raise DoesNotFit(f"in_features={wanted} values a sample{last}")
    return (*given[:-1], as_int(config["out_features"]))


def linear_params(config: Config) -> dict[str, Shape]:
    n_in, n_out = as_int(config["in_features"]), as_int(config["out_features"])
    return {"weight": (n_out, n_in)} | ({"bias": (n_out,)} if config["bias"] else {})


def linear_flops(config: Config, inputs: Shapes, output: Shape) -> int:
    return math.prod(output) * (2 * as_int(config["in_features"]) + bool(config["bias"]))


# --- norms --------------------------------------------------------------------


def ends_in_shape(config: Config, inputs: Shapes) -> Shape:
    wanted = as_shape(config["normalized_shape"])
    if inputs[0][-len(wanted) :] != wanted:
        raise DoesNotFit(f"a sample that ends in normalized_shape={show(wanted)}")
    return inputs[0]


def layer_norm_params(config: Config) -> dict[str, Shape]:
    shape = as_shape(config["normalized_shape"])
    if not config["elementwise_affine"]:
        return {}
    return {"weight": shape} | ({"bias": shape} if config["bias"] else {})


def rms_norm_params(config: Config) -> dict[str, Shape]:
    return {"weight": as_shape(config["normalized_shape"])} if config["elementwise_affine"] else {}


def batch_norm_shape(*dims: int) -> Callable[[Config, Shapes], Shape]:
    """For samples of so many dimensions, the first of them the channels."""

    def shape(config: Config, inputs: Shapes) -> Shape:
        wanted = as_int(config["num_features"])
        if len(inputs[0]) not in dims or inputs[0][0] != wanted:
            raise DoesNotFit(
                f"num_features={wanted} channels in the first of "
                f"{' or '.join(map(str, dims))} dimensions"
            )
        return inputs[0]

    return shape


def batch_norm_params(config: Config) -> dict[str, Shape]:
    shape = (as_int(config["num_features"]),)
    return {"weight": shape, "bias": shape} if config["affine"] else {}


def batch_norm_buffers(config: Config) -> dict[str, tuple[Shape, str]]:
    shape = (as_int(config["num_features"]),)
    return {
        "running_mean": (shape, "float32"),
        "running_var": (shape, "float32"),
        "num_batches_tracked": ((), "int64"),
    }


# --- pictures -----------------------------------------------------------------


def conv_shape(config: Config, inputs: Shapes) -> Shape:
    given, wanted = inputs[0], as_int(config["in_channels"])
    if len(given) != 3 or given[0] != wanted:
        raise DoesNotFit(f"in_channels={wanted} channels of a height and a width")
    if as_int(config["out_channels"]) % as_int(config["groups"]) or (
        wanted % as_int(config["groups"])
    ):
        raise DoesNotFit(f"groups={config['groups']} to divide in_channels and out_channels")
    sides = zip(
        given[1:],
        *(as_shape(config[key]) for key in ("kernel_size", "stride", "padding", "dilation")),
        strict=True,
    )
    return (as_int(config["out_channels"]), *(_slid(*side) for side in sides))


def _slid(length: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How often a window fits (torch.nn.Conv2d's formula)."""
    room = length + 2 * padding - dilation * (kernel - 1) - 1
    if room < 0:
        raise DoesNotFit(f"at least the kernel's size, and {length} + 2 x {padding} is less")
    return room // stride + 1


def conv_params(config: Config) -> dict[str, Shape]:
    n_out = as_int(config["out_channels"])
    n_in = max(1, as_int(config["in_channels"]) // as_int(config["groups"]))
    weight = {"weight": (n_out, n_in, *as_shape(config["kernel_size"]))}
    return weight | ({"bias": (n_out,)} if config["bias"] else {})


def conv_flops(config: Config, inputs: Shapes, output: Shape) -> int:
    taps = math.prod(conv_params(config)["weight"][1:])
    return math.prod(output) * (2 * taps + bool(config["bias"]))


def conv_within(config: Config, inputs: Shapes) -> int:
    """The columns that a convolution may be unrolled into (im2col)."""
    return math.prod(conv_params(config)["weight"][1:]) * math.prod(conv_shape(config, inputs)[1:])


def pool_shape(config: Config, inputs: Shapes) -> Shape:
    given = inputs[0]
    if len(given) != 3:
        raise DoesNotFit("channels of a height and a width")
    ones = (1, 1)
    kernels, paddings = as_shape(config["kernel_size"]), as_shape(config["padding"])
    if any(2 * padding > kernel for kernel, padding in zip(kernels, paddings, strict=True)):
        raise DoesNotFit("a padding of at most half the kernel_size")
    sides = zip(
        given[1:],
        kernels,
        as_shape(config["stride"]),
        paddings,
        as_shape(config.get("dilation", ones)),
        strict=True,
    )
    return (given[0], *(_pooled(*side, up=bool(config["ceil_mode"])) for side in sides))


def _pooled(length: int, kernel: int, stride: int, padding: int, dilation: int, up: bool) -> int:
    if not up:
        return _slid(length, kernel, stride, padding, dilation)
    count = -(-(length + 2 * padding - dilation * (kernel - 1) - 1) // stride) + 1
    # The last window has to start inside of what is there (torch.nn.MaxPool2d).
    count -= (count - 1) * stride >= length + padding
    if count < 1:
        raise DoesNotFit(f"at least the kernel's size, and {length} + 2 x {padding} is less")
    return count


def adaptive_shape(config: Config, inputs: Shapes) -> Shape:
    if len(inputs[0]) != 3:
        raise DoesNotFit("channels of a height and a width")
    return (inputs[0][0], *as_shape(config["output_size"]))


def every_input(config: Config, inputs: Shapes, output: Shape) -> int:
    return sum(map(math.prod, inputs))


def window_flops(config: Config, inputs: Shapes, output: Shape) -> int:
    return math.prod(output) * math.prod(as_shape(config["kernel_size"]))


# --- words --------------------------------------------------------------------


def embedding_shape(config: Config, inputs: Shapes) -> Shape:
    return (*inputs[0], as_int(config["embedding_dim"]))


def embedding_params(config: Config) -> dict[str, Shape]:
    return {"weight": (as_int(config["num_embeddings"]), as_int(config["embedding_dim"]))}


def tied_shape(config: Config, inputs: Shapes) -> Shape:
    """Of the Embedding whose weight it is: back from the embedding to scores of its entries."""
    given, wanted = inputs[0], as_int(config["embedding_dim"])
    if not given or given[-1] != wanted:
        raise DoesNotFit(f"the embedding's embedding_dim={wanted} values in the last dimension")
    return (*given[:-1], as_int(config["num_embeddings"]))


def tied_flops(config: Config, inputs: Shapes, output: Shape) -> int:
    return math.prod(output) * 2 * as_int(config["embedding_dim"])


def positional_shape(config: Config, inputs: Shapes) -> Shape:
    given, (most, width) = inputs[0], embedding_params(config)["weight"]
    if len(given) != 2 or given[0] > most or given[1] != width:
        raise DoesNotFit(f"a sequence of at most {most} tokens of {width} values")
    return given


def attention_shape(config: Config, inputs: Shapes) -> Shape:
    wanted, heads = as_int(config["embed_dim"]), as_int(config["num_heads"])
    if wanted % heads:
        raise DoesNotFit(f"embed_dim={wanted} to be a multiple of num_heads={heads}")
    if len(inputs[0]) != 2 or inputs[0][1] != wanted:
        raise DoesNotFit(f"a sequence of tokens of embed_dim={wanted} values")
    return inputs[0]


def attention_params(config: Config) -> dict[str, Shape]:
    width = as_int(config["embed_dim"])
    bias: dict[str, Shape] = {"in_proj_bias": (3 * width,)} if config["bias"] else {}
    out: dict[str, Shape] = {"out_proj.weight": (width, width)}
    last: dict[str, Shape] = {"out_proj.bias": (width,)} if config["bias"] else {}
    return {"in_proj_weight": (3 * width, width), **bias, **out, **last}


def attention_flops(config: Config, inputs: Shapes, output: Shape) -> int:
    tokens, width = inputs[0]
    return 8 * tokens * width * width + 4 * tokens * tokens * width


def attention_within(config: Config, inputs: Shapes) -> int:
    tokens, width = inputs[0]
    return 4 * tokens * width + as_int(config["num_heads"]) * tokens * tokens


def product_shape(config: Config, inputs: Shapes) -> Shape:
    query, key, value = inputs
    if not all(len(shape) == len(query) >= 2 for shape in inputs) or not (
        query[:-2] == key[:-2] == value[:-2] and query[-1] == key[-1] and key[-2] == value[-2]
    ):
        raise DoesNotFit("a query, a key and a value of [..., tokens, values], as many of each")
    return (*query[:-1], value[-1])


def product_flops(config: Config, inputs: Shapes, output: Shape) -> int:
    return 4 * math.prod(inputs[0]) * inputs[1][-2]


def product_within(config: Config, inputs: Shapes) -> int:
    return math.prod(inputs[0][:-1]) * inputs[1][-2]


# --- other forms of the same --------------------------------------------------


def flatten_shape(config: Config, inputs: Shapes) -> Shape:
    given = inputs[0]
    start, end = (axis(config, key, len(given)) for key in ("start_dim", "end_dim"))
    if start > end:
        raise DoesNotFit("start_dim to come no later than end_dim")
    return (*given[:start], math.prod(given[start : end + 1]), *given[end + 1 :])


def any_axis(config: Config, inputs: Shapes) -> Shape:
    axis(config, "dim", len(inputs[0]))
    return inputs[0]


def concat_shape(config: Config, inputs: Shapes) -> Shape:
    first = inputs[0]
    place = axis(config, "dim", len(first))
    around = {(len(shape), shape[:place], shape[place + 1 :]) for shape in inputs}
    if len(around) > 1:
        raise DoesNotFit(f"inputs that differ in dimension dim={config['dim']} alone")
    return (*first[:place], sum(shape[place] for shape in inputs), *first[place + 1 :])


def transpose_shape(config: Config, inputs: Shapes) -> Shape:
    shape = list(inputs[0])
    one, other = (axis(config, key, len(shape)) for key in ("dim0", "dim1"))
    shape[one], shape[other] = shape[other], shape[one]
    return tuple(shape)


def permute_shape(config: Config, inputs: Shapes) -> Shape:
    given, dims = inputs[0], as_shape(config["dims"])
    if dims[0] != 0 or sorted(dims) != list(range(len(given) + 1)):
        raise DoesNotFit(f"the dims 0 to {len(given)}, each once and 0, the batch, first")
    return tuple(given[dim - 1] for dim in dims[1:])


def reshape_shape(config: Config, inputs: Shapes) -> Shape:
    """0 stands for what the input has at that place, and one -1 for what is left."""
    given, wanted = inputs[0], as_shape(config["shape"])
    if any(length == 0 and place >= len(given) for place, length in enumerate(wanted)):
        raise DoesNotFit(f"a dimension for each 0 of shape={show(wanted)}")
    shape = [given[place] if length == 0 else length for place, length in enumerate(wanted)]
    known = math.prod(length for length in shape if length != -1)
    total = math.prod(given)
    if shape.count(-1) > 1 or (total % known if -1 in shape else total != known):
        raise DoesNotFit(f"as many values as shape={show(wanted)} has")
    return tuple(total // known if length == -1 else length for length in shape)


def narrow_shape(config: Config, inputs: Shapes) -> Shape:
    given = inputs[0]
    place = axis(config, "dim", len(given))
    start, length = as_int(config["start"]), as_int(config["length"])
    if start + length > given[place]:
        raise DoesNotFit(f"at least {start + length} in dimension dim={config['dim']}")
    return (*given[:place], length, *given[place + 1 :])


def mean_shape(config: Config, inputs: Shapes) -> Shape:
    given, dims = inputs[0], as_shape(config["dim"])
    places = [_axis(f"{dim}", dim, len(given)) for dim in dims]
    if len(set(places)) < len(places):
        raise DoesNotFit("each dimension once in dim")
    if config["keepdim"]:
        return tuple(1 if place in places else length for place, length in enumerate(given))
    return tuple(length for place, length in enumerate(given) if place not in places)


# --- a block's head -----------------------------------------------------------


HEAD_POOL = 2  # a picture is pooled to so many by so many, at most


def head_features(config: Config, given: Shape) -> Shape:
    """What a head's layers take of a sample."""
    if config["over"] == "all":
        return (math.prod(given),)
    if config["over"] == "picture":
        if len(given) != 3:
            raise DoesNotFit("channels of a height and a width")
        return (given[0] * min(HEAD_POOL, given[1]) * min(HEAD_POOL, given[2]),)
    if not given:
        raise DoesNotFit("more than a single number a sample")
    return given


def head_shape(config: Config, inputs: Shapes) -> Shape:
    given, target = inputs
    features, outputs = head_features(config, given), as_int(config["out_features"])
    if features[-1] != config["in_features"]:
        raise DoesNotFit(f"in_features={config['in_features']} values of a sample")
    prediction = (*features[:-1], outputs)
    if config["loss"] == "CrossEntropyLoss":
        fits = target == (prediction[:-1] if config["class_dim"] == -1 else prediction[1:])
    else:
        fits = math.prod(target) == math.prod(prediction)
    if not fits:
        raise DoesNotFit(f"a target for predictions of {show(prediction)}")
    return ()


def head_params(config: Config) -> dict[str, Shape]:
    n_in, n_out = as_int(config["in_features"]), as_int(config["out_features"])
    norm: dict[str, Shape] = {"norm.weight": (n_in,), "norm.bias": (n_in,)}
    inner: dict[str, Shape] = {}
    if hidden := as_int(config["hidden"]):
        inner = {"hidden.weight": (hidden, n_in), "hidden.bias": (hidden,)}
    last: dict[str, Shape] = {"out.weight": (n_out, hidden or n_in), "out.bias": (n_out,)}
    return {**norm, **inner, **last}


def head_flops(config: Config, inputs: Shapes, output: Shape) -> int:
    rows = math.prod(head_features(config, inputs[0])[:-1])
    return 2 * rows * sum(math.prod(shape) for shape in head_params(config).values())


# --- losses: the target's shape and dtype, of a prediction --------------------


def class_target(config: Config, prediction: Shape) -> tuple[Shape, str]:
    if not prediction:
        raise DoesNotFit("a prediction of one value a class")
    if config["class_dim"] == -1:
        return prediction[:-1], "int64"
    return prediction[1:], "int64"  # torch: [N, classes, d1, ...] against [N, d1, ...]


def same_target(config: Config, prediction: Shape) -> tuple[Shape, str]:
    return prediction, "float32"
