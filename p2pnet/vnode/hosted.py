"""A hosted VNode's component as its shell sees it: numpy in, numpy out, made at first use.

All of `do_...` run in the compute thread, which alone imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from p2pnet.errors import LocalError
from p2pnet.vnode.messages import Metrics
from p2pnet.vnode.state import decode_state, encode_state
from p2pnet.vnode.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor

    from p2pnet.vnode.components import Component


class HostedComponent:
    """A component, the step of its state, and the gradients held for the step after it.

    Args:
        type, config, optimizer, optimizer_config, seed: as `components.Component` takes them.
        wants_gradient: by input slot, False for network inputs.
    """

    def __init__(
        self,
        vnode: str,
        type: str,
        config: Mapping[str, object],
        *,
        seed: int,
        optimizer: str,
        optimizer_config: Mapping[str, object],
        wants_gradient: Sequence[bool],
    ) -> None:
        self.vnode = vnode
        self.step = 0  # of the state
        self._wants_gradient = tuple(wants_gradient)
        self._make: Callable[[], Component] = lambda: _component(
            vnode, type, config, seed, optimizer, optimizer_config
        )
        self._made: Component | None = None
        self._held: list[Tensor] | None = None

    @property
    def instantiated(self) -> bool:
        """Whether it is in memory yet."""
        return self._made is not None

    def do_forward(
        self, step: int, micro_batch: int, inputs: Sequence[Array]
    ) -> tuple[Array, Metrics | None]:
        """The output, and a loss's metrics; what a backward needs is kept. No array is copied.

        Raises:
            MalformedError: inputs that the component cannot take.
            ResourceError: not enough memory.
            SpecError: the component cannot be made.
        """
        self._follows(step)
        if micro_batch == 0:
            self._held = None  # of a step that was begun before and given up
        tensors = [_tensor(array) for array in inputs]
        output, metrics = self._component.forward(micro_batch, tensors, self._wants_gradient)
        return output.numpy(), metrics

    def do_backward(
        self, step: int, micro_batch: int, gradients: Sequence[Array], weight: float = 1.0
    ) -> list[Array | None]:
        """The inputs' gradients, None for network inputs; the parameters' gradients are held.

        Those of several micro-batches are added in the order of the calls.

        Raises:
            MalformedError: gradients of another shape than the output.
        """
        self._follows(step)
        tensors = [_tensor(array) for array in gradients]
        inputs, params = self._component.backward(micro_batch, tensors, weight)
        if self._held is None:
            self._held = params
        else:
            self._held = [one + other for one, other in zip(self._held, params, strict=True)]
        return [None if tensor is None else tensor.numpy() for tensor in inputs]

    def do_apply(self, step: int) -> None:
        """The state after `step`, from what is held; raises LocalError if nothing is."""
        self._follows(step)
        if self._held is None:
            raise LocalError(f"{self.vnode} holds no gradients for step {step}")
        self._component.apply(self._held)
        self._held = None
        self.step = step

    def do_infer(self, inputs: Sequence[Array]) -> Array:
        """The output; nothing is kept. Raises as `do_forward`."""
        return self._component.infer([_tensor(array) for array in inputs]).numpy()

    def do_save(self, step: int) -> bytes:
        """The state after `step`, safetensors; raises LocalError if it is at another step."""
        if step != self.step:
            raise LocalError(f"{self.vnode} is at step {self.step}, not {step}")
        return encode_state(self._component.state(), step)

    def do_load(self, data: bytes) -> int:
        """Takes a state, all or nothing, forgets the step in hand, and returns the state's step.

        Raises:
            MalformedError: no state, or not of this component.
        """
        tensors, step = decode_state(data)
        self._component.load(tensors, step)
        self._held = None
        self.step = step
        return step

    @property
    def _component(self) -> Component:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _follows(self, step: int) -> None:
        if step != self.step + 1:
            raise LocalError(f"{self.vnode} has the state of step {self.step}: no step {step} now")


def _component(
    vnode: str,
    type: str,
    config: Mapping[str, object],
    seed: int,
    optimizer: str,
    optimizer_config: Mapping[str, object],
) -> Component:
    from p2pnet.vnode.components import Component

    return Component(
        vnode, type, config, seed=seed, optimizer=optimizer, optimizer_config=optimizer_config
    )


def _tensor(array: Array) -> Tensor:
    import torch

    # torch has no read-only tensors; what came from `tensors.decode` is writable
    return torch.from_numpy(array if array.flags.writeable else array.copy())
