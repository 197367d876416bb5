"""One VNode's component in torch: forward, a local backward, apply, its state.

A backward pass uses the component's own parameters, the inputs that it cached and
the gradients that arrive, nothing else: inputs are detached, so that no autograd
graph ever reaches beyond one component. The parameters' gradients are *held*, and
change nothing until `apply` (DESIGN D11).

Importing this module imports torch: only the compute thread does (`p2pnet.vnode.executor`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from p2pnet.errors import MalformedError, ResourceError
from p2pnet.vnode.catalogue import LOSSES, find_component
from p2pnet.vnode.config import fill
from p2pnet.vnode.messages import Metrics
from p2pnet.vnode.optimizers import Optimizer
from p2pnet.vnode.state import BUFFER, OPTIMIZER, PARAM, Expected, check_state
from p2pnet.vnode.tensors import Array


class Add(nn.Module):
    """The sum of its inputs, in slot order."""

    def forward(self, *inputs: Tensor) -> Tensor:
        total = inputs[0]
        for other in inputs[1:]:
            total = total + other
        return total


_MODULES: dict[str, Callable[..., nn.Module]] = {
    "Linear": nn.Linear,
    "LayerNorm": nn.LayerNorm,
    "Flatten": nn.Flatten,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "Softmax": nn.Softmax,
    "Add": Add,
    "MSELoss": nn.MSELoss,
    "CrossEntropyLoss": nn.CrossEntropyLoss,
}


def init_seed(seed: int, vnode: str) -> int:
    """What torch's generator is seeded with before a VNode's module is made.

    The first 8 bytes, big-endian and unsigned, of SHA-256 over the seed in decimal,
    a zero byte and the VNode's id, in UTF-8. In plain torch:

        torch.manual_seed(init_seed(0, "fc1")); fc1 = torch.nn.Linear(64, 128)
    """
    digest = hashlib.sha256(f"{seed}\0{vnode}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(slots=True)
class _Pass:
    """What a forward leaves for its backward: this component's own piece of autograd graph."""

    leaves: list[Tensor]
    output: Tensor


class Component:
    """A module of the closed catalogue with its optimizer. Not thread-safe.

    Args:
        config, optimizer_config: torch's keyword arguments; what is not given is the default.
        optimizer: SGD or Adam; of no use to a component without parameters.

    Raises:
        SpecError: an unknown type, or a config that it does not take.
        ResourceError: not enough memory.
    """

    def __init__(
        self,
        vnode: str,
        type: str,
        config: Mapping[str, object],
        *,
        seed: int,
        optimizer: str = "SGD",
        optimizer_config: Mapping[str, object] | None = None,
    ) -> None:
        kind = LOSSES[type] if type in LOSSES else find_component(vnode, type)
        keywords = fill(vnode, kind.keys, config)
        self.vnode = vnode
        self.type = type
        self.is_loss = type in LOSSES
        with torch.random.fork_rng(devices=[]), self._memory():
            torch.manual_seed(init_seed(seed, vnode))
            self._module = _MODULES[type](**keywords)
        self._params = dict(self._module.named_parameters())
        self._optimizer = Optimizer(optimizer, optimizer_config or {})
        self._passes: dict[Hashable, _Pass] = {}

    @torch.no_grad()
    def infer(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, with nothing kept for a backward. Raises as `forward`."""
        self._check(inputs)
        with self._inputs_fit(inputs):
            output: Tensor = self._module(*inputs)
        return output

    def forward(
        self, key: Hashable, inputs: Sequence[Tensor], wants_gradient: Sequence[bool] | None = None
    ) -> tuple[Tensor, Metrics | None]:
        """The output, and for a loss what it says of the batch.

        `key` names the pass until its `backward` (a step's micro-batch); a new
        pass of that name takes the old one's place. `wants_gradient` says for which
        inputs somebody upstream waits; by default for all. Inputs of whole numbers
        have none.

        Raises:
            MalformedError: inputs that the component cannot take.
            ResourceError: not enough memory.
        """
        self._check(inputs)
        wanted = wants_gradient or [True] * len(inputs)
        leaves = [
            tensor.detach().requires_grad_(want and tensor.is_floating_point())
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
        with torch.enable_grad(), self._inputs_fit(leaves):
            output: Tensor = self._module(*leaves)
        self._passes[key] = _Pass(leaves, output)
        return output.detach(), self._metrics(leaves, output) if self.is_loss else None

    def backward(
        self, key: Hashable, gradients: Sequence[Tensor], weight: float = 1.0
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """The gradients of the inputs (None where not wanted) and of the parameters.

        Gradients of the output are summed in the order given. A loss takes none and
        starts with `weight`, its micro-batch's share of the samples. Nothing is applied.

        Raises:
            MalformedError: a gradient of another shape or dtype than the output.
            KeyError: no forward of that name.
        """
        done = self._passes[key]
        output = done.output
        for gradient in gradients:
            if gradient.shape != output.shape or gradient.dtype != output.dtype:
                raise MalformedError(
                    f"{self.vnode} got a gradient {_form(gradient)} for an output {_form(output)}"
                )
        if self.is_loss:
            total = torch.full_like(output, weight)
        else:
            total = gradients[0]
            for gradient in gradients[1:]:
                total = total + gradient
        targets = [leaf for leaf in done.leaves if leaf.requires_grad]
        targets += self._params.values()
        found: list[Tensor] = []
        if targets:
            with self._memory():
                found = list(torch.autograd.grad(output, targets, total))
        del self._passes[key]
        rest = iter(found)
        inputs = [next(rest) if leaf.requires_grad else None for leaf in done.leaves]
        return inputs, list(rest)

    def apply(self, gradients: Sequence[Tensor]) -> None:
        """One step of the optimizer with the parameters' gradients, in torch's order of them."""
        if self._params:
            self._optimizer.step(self._params, gradients)

    def forget(self) -> None:
        """Drops every pass that waits for its backward."""
        self._passes.clear()

    def state(self) -> dict[str, Array]:
        """Copies of parameters, buffers and the optimizer's state, named as in `state`."""
        tensors = self._weights()
        for name, kept in self._optimizer.state.items():
            tensors |= {f"{OPTIMIZER}{name}.{key}": tensor for key, tensor in kept.items()}
        return {name: np.array(tensor.detach().numpy()) for name, tensor in tensors.items()}

    def load(self, tensors: Mapping[str, Array], step: int) -> None:
        """Takes a state, all of it or nothing of it.

        What an optimizer keeps may only be lacking at step 0, where it begins anew.

        Raises:
            MalformedError: names, shapes, dtypes or an optimizer's step are not as they have to be.
        """
        expected = {name: _expected(tensor) for name, tensor in self._weights().items()}
        fresh = step == 0 and not any(name.startswith(OPTIMIZER) for name in tensors)
        kept = [] if fresh else self._kept()
        expected |= {name: Expected("float32", shape) for _, _, name, shape in kept}
        check_state(tensors, expected)
        for _, key, name, _ in kept:
            if key == "step" and not _is_count(float(tensors[name])):
                raise MalformedError(f"a state's {name} is {tensors[name]}: no count of steps")
        with torch.no_grad():
            for name, tensor in self._weights().items():
                tensor.copy_(torch.from_numpy(np.array(tensors[name])))
        self._optimizer.state = {}
        for param, key, name, _ in kept:
            state = self._optimizer.state.setdefault(param, {})
            state[key] = torch.from_numpy(np.array(tensors[name]))
        self.forget()

    def _kept(self) -> list[tuple[str, str, str, tuple[int, ...]]]:
        """What the optimizer keeps after a step: parameter, key, name in a state, shape."""
        return [
            (param, key, f"{OPTIMIZER}{param}.{key}", shape)
            for param, tensor in self._params.items()
            for key, shape in self._optimizer.kept(tensor.shape).items()
        ]

    def _weights(self) -> dict[str, Tensor]:
        params = {PARAM + name: param for name, param in self._params.items()}
        buffers = {BUFFER + name: buffer for name, buffer in self._module.named_buffers()}
        return {**params, **buffers}

    def _check(self, inputs: Sequence[Tensor]) -> None:
        """What torch would take, but not as meant: it broadcasts, and ignores some targets."""
        first = inputs[0]
        if any(tensor.ndim == 0 or len(tensor) != len(first) for tensor in inputs):
            raise self._misfit(inputs)
        alike = all(tensor.shape == first.shape for tensor in inputs)
        if self.type in ("Add", "MSELoss") and not alike:
            raise self._misfit(inputs)
        if self.is_loss and (len(inputs) != 2 or not inputs[1].numel()):
            raise self._misfit(inputs)
        if self.type == "CrossEntropyLoss":
            target = inputs[1]
            if first.ndim < 2 or target.dtype != torch.int64:
                raise self._misfit(inputs)
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= first.shape[1]:
                raise MalformedError(
                    f"{self.vnode} got classes {low} to {high} for a prediction of "
                    f"{first.shape[1]} classes: they have to be 0 to {first.shape[1] - 1}"
                )

    def _metrics(self, inputs: Sequence[Tensor], loss: Tensor) -> Metrics:
        prediction, target = inputs
        value = float(loss.detach())
        if self.type != "CrossEntropyLoss":
            return Metrics(value, 0, len(target))
        correct = int((prediction.detach().argmax(dim=1) == target).sum())
        return Metrics(value, correct, target.numel())

    @contextmanager
    def _inputs_fit(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        with self._memory():
            try:
                yield
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                if _no_memory(error):
                    raise
                raise self._misfit(inputs) from error

    @contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _no_memory(error):
                raise
            raise ResourceError(f"there is not enough memory for {self.vnode}") from None

    def _misfit(self, inputs: Sequence[Tensor]) -> MalformedError:
        given = " and ".join(map(_form, inputs[:8]))
        return MalformedError(f"{self.vnode} ({self.type}) cannot take {given}")


def _is_count(value: float) -> bool:
    return math.isfinite(value) and value >= 0 and value.is_integer()


def _expected(tensor: Tensor) -> Expected:
    return Expected(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _form(tensor: Tensor) -> str:
    return str(_expected(tensor))


def _no_memory(error: Exception) -> bool:
    # torch has no exception of its own for the CPU's memory
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
