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
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from p2pnet.errors import MalformedError, ResourceError
from p2pnet.vnode.catalogue import LOCAL_HEAD, LOSSES, find_component
from p2pnet.vnode.config import fill
from p2pnet.vnode.given import Inputs, form_of
from p2pnet.vnode.messages import Metrics
from p2pnet.vnode.modules import CACHED, MODULES, Cache, Embedding, LocalHead
from p2pnet.vnode.optimizers import Optimizer
from p2pnet.vnode.rules import as_int
from p2pnet.vnode.state import BUFFER, OPTIMIZER, PARAM, Expected, check_state
from p2pnet.vnode.tensors import Array

_CPU = torch.device("cpu")


def init_seed(seed: int, vnode: str) -> int:
    """What torch's generator is seeded with before a VNode's module is made.

    The first 8 bytes, big-endian and unsigned, of SHA-256 over the seed in decimal,
    a zero byte and the VNode's id, in UTF-8. In plain torch:

        torch.manual_seed(init_seed(0, "fc1")); fc1 = torch.nn.Linear(64, 128)
    """
    digest = hashlib.sha256(f"{seed}\0{vnode}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def draw_seed(seed: int, node: str, step: int, micro_batch: int) -> int:
    """What torch's generator is seeded with before a forward that draws (Dropout).

    As `init_seed`, over the four in decimal and UTF-8 with zero bytes between (DESIGN D11).
    """
    digest = hashlib.sha256(f"{seed}\0{node}\0{step}\0{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def gradient_squares(gradients: Sequence[Tensor]) -> list[float]:
    """The square of each gradient's norm, of the norm as torch computes it in float32.

    Their sum's root is what torch.nn.utils.clip_grad_norm_ takes for the global norm.
    """
    if not gradients:
        return []
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    return [norm * norm for norm in norms.tolist()]


@dataclass(slots=True)
class _Pass:
    """What a forward leaves for its backward: this component's own piece of autograd graph."""

    leaves: list[Tensor]
    output: Tensor
    params: list[Tensor]  # as the forward had them


class Component:
    """A module of the closed catalogue with its optimizer. Not thread-safe.

    Tensors come and go in the CPU's memory, wherever it computes.

    Args:
        config, optimizer_config: torch's keyword arguments; what is not given is the default.
        optimizer: SGD, Adam or AdamW; of no use to a component without parameters.
        device: where it computes, as torch names it: "cpu", "cuda:0".
        stash: a forward's weights are kept until its backward, whatever is applied meanwhile.

    Attributes:
        is_loss: it takes "y", gives one number, and its backward begins with it.
        draws: a forward draws random numbers, by `draw`.

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
        device: str = "cpu",
        stash: bool = False,
    ) -> None:
        keys = LOSSES[type].keys if type in LOSSES else find_component(vnode, type).keys
        self._config = fill(vnode, keys, config)
        self.vnode = vnode
        self.type = type
        self._given = Inputs(vnode, type, self._config)
        self.is_loss = type in LOSSES or type == LOCAL_HEAD
        self.draws = any(self._config.get(key, 0.0) for key in ("p", "dropout"))
        self._device = torch.device(device)
        self._stash = stash
        with torch.random.fork_rng(devices=[]), self._memory():
            torch.manual_seed(init_seed(seed, vnode))
            self._module = MODULES[type](**self._config).to(self._device)
        # What a forward in training changes, or does otherwise than in inference.
        self._buffers = dict(self._module.named_buffers())
        self._has_modes = self.draws or bool(self._buffers)
        self._params = dict(self._module.named_parameters())
        self._optimizer = Optimizer(optimizer, optimizer_config or {})
        self._passes: dict[Hashable, _Pass] = {}
        self._pending: dict[str, Tensor] = {}  # buffers as the forwards since have made them

    @property
    def params(self) -> Mapping[str, Tensor]:
        """The parameters by torch's names, in torch's order: that of their gradients."""
        return self._params

    @torch.no_grad()
    def infer(
        self, inputs: Sequence[Tensor], *, entry: int = 0, cache: Cache | None = None
    ) -> Tensor:
        """The output as in torch's eval mode, with nothing kept for a backward.

        `cache` is one of `new_cache`: the inputs are the next part of its sequence then.
        Raises as `forward`.
        """
        self._given.check(inputs, entry=entry, before=cache.tokens if cache else 0)
        with self._inputs_fit(inputs), self._evaluating():
            here = [tensor.to(self._device) for tensor in inputs]
            output = self._compute(here, entry, cache)
        return _sent(output)

    def new_cache(self) -> Cache | None:
        """For a sequence that will come in parts; None if the component needs none."""
        if self.type not in CACHED or not self._config.get("causal", True):
            return None
        return Cache()

    def forward(
        self,
        key: Hashable,
        inputs: Sequence[Tensor],
        wants_gradient: Sequence[bool] | None = None,
        *,
        entry: int = 0,
        draw: int = 0,
    ) -> tuple[Tensor, Metrics | None]:
        """The output, and for a loss what it says of the batch.

        `key` names the pass until its `backward` (a step's micro-batch); a new
        pass of that name takes the old one's place. `wants_gradient` says for which
        inputs somebody upstream waits; by default for all. Inputs of whole numbers
        have none. `entry` 1 and on are those by a tied weight. `draw` seeds what is random.
        Buffers that it changes are *held* too, see `held_buffers`.

        Raises:
            MalformedError: inputs that the component cannot take.
            ResourceError: not enough memory.
        """
        self._given.check(inputs, entry=entry)
        self._given.check_learnable(inputs)
        wanted = wants_gradient or [True] * len(inputs)
        leaves = [
            tensor.detach().to(self._device).requires_grad_(want and tensor.is_floating_point())
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
        with torch.enable_grad(), self._inputs_fit(inputs), self._drawing(draw), self._holding():
            if self.is_loss:
                output, metrics = self._loss(*leaves)
            else:
                output, metrics = self._compute(leaves, entry), None
        self._passes[key] = _Pass(leaves, output, list(self._params.values()))
        return _sent(output.detach()), metrics

    def backward(
        self, key: Hashable, gradients: Sequence[Tensor], weight: float = 1.0
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """The gradients of the inputs (None where not wanted) and of the parameters.

        Of all parameters, in their order, by whichever entry the forward went.
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
                    f"{self.vnode} got a gradient {form_of(gradient)} "
                    f"for an output {form_of(output)}"
                )
        if self.is_loss:
            total = torch.full_like(output, weight)
        else:
            total = gradients[0]
            for gradient in gradients[1:]:
                total = total + gradient
        targets = [leaf for leaf in done.leaves if leaf.requires_grad] + done.params
        found: list[Tensor] = []
        if targets:
            with self._memory():
                found = list(torch.autograd.grad(output, targets, total.to(self._device)))
        del self._passes[key]
        rest = iter([_sent(tensor) for tensor in found])
        inputs = [next(rest) if leaf.requires_grad else None for leaf in done.leaves]
        return inputs, list(rest)

    def discard(self, key: Hashable) -> None:
        """Drops the pass of that name, if there is one: it gets no backward."""
        self._passes.pop(key, None)

    def held_buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers as the forwards since the last `apply` have made them."""
        return {name: tensor.to(_CPU, copy=True) for name, tensor in self._pending.items()}

    def apply(
        self,
        gradients: Sequence[Tensor],
        *,
        norm: float = 0.0,
        clip_norm: float = 0.0,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One step of the optimizer with the parameters' gradients, in torch's order of them.

        With a `clip_norm`, they are scaled as torch.nn.utils.clip_grad_norm_ does it for the
        global norm `norm`. `buffers` become the state's; by default those that are held.
        """
        if self._params:
            here = [gradient.to(self._device) for gradient in gradients]
            if clip_norm:
                scale = clip_scale(norm, clip_norm)
                here = [gradient * scale for gradient in here]
            if self._stash:
                self._renew()
            self._optimizer.step(self._params, here)
        adopted = self._pending if buffers is None else buffers
        if adopted:
            for name, tensor in adopted.items():
                self._buffers[name].copy_(tensor)
        if not self._stash:
            self._pending = {}

    def forget(self) -> None:
        """Drops every pass that waits for its backward, and the buffers that are held."""
        self._passes.clear()
        self._pending = {}

    def state(self) -> dict[str, Array]:
        """Copies of parameters, buffers and the optimizer's state, named as in `state`."""
        tensors = self._weights()
        for name, kept in self._optimizer.state.items():
            tensors |= {f"{OPTIMIZER}{name}.{key}": tensor for key, tensor in kept.items()}
        return {
            name: np.array(tensor.detach().to(_CPU).numpy()) for name, tensor in tensors.items()
        }

    def load(self, tensors: Mapping[str, Array], step: int) -> None:
        """Takes a state, all of it or nothing of it.

        What an optimizer keeps may only be lacking at step 0, where it begins anew.

        Raises:
            MalformedError: names, shapes, dtypes or an optimizer's step are not as they have to be.
        """
        expected = {name: form_of(tensor) for name, tensor in self._weights().items()}
        fresh = step == 0 and not any(name.startswith(OPTIMIZER) for name in tensors)
        kept = [] if fresh else self._kept()
        expected |= {name: Expected("float32", shape) for _, _, name, shape in kept}
        check_state(tensors, expected)
        for _, key, name, _ in kept:
            if key == "step" and not _is_count(float(tensors[name])):
                raise MalformedError(f"a state's {name} is {tensors[name]}: no count of steps")
        if self._stash:
            self._renew()
        with torch.no_grad():
            for name, tensor in self._weights().items():
                tensor.copy_(torch.from_numpy(np.array(tensors[name])))
        self._optimizer.state = {}
        for param, key, name, _ in kept:
            state = self._optimizer.state.setdefault(param, {})
            kept_tensor = torch.from_numpy(np.array(tensors[name]))
            state[key] = kept_tensor if key == "step" else kept_tensor.to(self._device)
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
        buffers = {BUFFER + name: buffer for name, buffer in self._buffers.items()}
        return {**params, **buffers}

    def _compute(self, inputs: Sequence[Tensor], entry: int, cache: Cache | None = None) -> Tensor:
        output: Tensor
        if entry:
            assert isinstance(self._module, Embedding)
            output = self._module.scores(*inputs)
        elif cache is not None:
            output = self._module(*inputs, cache=cache)
        else:
            output = self._module(*inputs)
        return output

    def _loss(self, given: Tensor, target: Tensor) -> tuple[Tensor, Metrics]:
        """The loss, and what it says: of classes, how many were right."""
        prediction, measure = given, self._module
        if isinstance(self._module, LocalHead):
            prediction, measure = self._module.predict(given, target), self._module.loss
        loss: Tensor = measure(prediction, target)
        value = float(loss.detach())
        if target.is_floating_point():
            return loss, Metrics(value, 0, len(target))
        guess = prediction.detach().argmax(dim=as_int(self._config["class_dim"]))
        return loss, Metrics(value, int((guess == target).sum()), target.numel())

    def _renew(self) -> None:
        """Other tensors for the same parameters: what is stepped in place is not an old pass's."""
        for name, param in self._params.items():
            path, _, last = name.rpartition(".")
            fresh = nn.Parameter(param.detach().clone())
            setattr(self._module.get_submodule(path), last, fresh)
            self._params[name] = fresh

    @contextmanager
    def _drawing(self, draw: int) -> Iterator[None]:
        if not self.draws:
            yield
            return
        devices = [] if self._device.type == "cpu" else [self._device]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(draw)
            yield

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """A forward sees the buffers as the last one left them, and the state's stay."""
        own = self._buffers
        if not own:
            yield
            return
        # Each has its own copy: what a backward looks back at must not change.
        fresh = {name: self._pending.get(name, tensor).clone() for name, tensor in own.items()}
        try:
            self._module._buffers.update(fresh)
            yield
            self._pending = fresh
        finally:
            self._module._buffers.update(own)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        if not self._has_modes:
            yield
            return
        self._module.eval()
        try:
            yield
        finally:
            self._module.train()

    @contextmanager
    def _inputs_fit(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        with self._memory():
            try:
                yield
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                if _no_memory(error):
                    raise
                raise self._given.misfit(inputs) from error

    @contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _no_memory(error):
                raise
            raise ResourceError(f"there is not enough memory for {self.vnode}") from None


def clip_scale(norm: float, clip_norm: float) -> float:
    """What gradients are multiplied by: torch.nn.utils.clip_grad_norm_'s, in float32 as there."""
    total = torch.tensor(norm, dtype=torch.float32)
    return float(torch.clamp(clip_norm / (total + 1e-6), max=1.0))


def _sent(tensor: Tensor) -> Tensor:
    """As it is where it arrives: in row-major order, on which what is computed may depend."""
    return tensor.to(_CPU).contiguous()


def _is_count(value: float) -> bool:
    return math.isfinite(value) and value >= 0 and value.is_integer()


def _no_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no exception of its own for the CPU's memory
    return "DefaultCPUAllocator" in str(error)
