"""What a component is given, before torch sees it.

torch broadcasts, takes a sample for a batch, ignores some targets, and on a GPU looks past
the end of an embedding. Here the catalogue's rules decide what fits, for any length of a
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pnet.errors import MalformedError
from p2pnet.vnode.catalogue import LOCAL_HEAD, LOSSES, TIED, find_component
from p2pnet.vnode.config import Config
from p2pnet.vnode.rules import DoesNotFit, Shapes, as_int
from p2pnet.vnode.state import Expected


class Inputs:
    """What fits one component; `vnode` is whom a refusal names."""

    def __init__(self, vnode: str, type: str, config: Config) -> None:
        self.vnode = vnode
        self.type = type
        self._config = config
        self._kind = None if type in LOSSES else find_component(vnode, type)

    def check(self, inputs: Sequence[Tensor], *, entry: int = 0, before: int = 0) -> None:
        """Raises MalformedError for what does not fit the component, or its tied entry.

        `before`: the tokens of the sequence that there were already.
        """
        first = inputs[0]
        alike = all(tensor.ndim and len(tensor) == len(first) for tensor in inputs)
        if not alike or not len(first):
            raise self.misfit(inputs)
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in inputs)
        try:
            expected = self._dtypes(shapes, entry)
        except DoesNotFit:
            raise self.misfit(inputs) from None
        if [tensor.dtype for tensor in inputs] != expected:
            raise self.misfit(inputs)
        config = self._config
        if self.type == "Embedding" and not entry:
            self._check_range(first, as_int(config["num_embeddings"]), "tokens")
        elif self.type == LOCAL_HEAD and expected[1] == torch.int64:
            self._check_range(inputs[1], as_int(config["out_features"]), "classes")
        elif self.type == "CrossEntropyLoss":
            self._check_range(inputs[1], first.shape[as_int(config["class_dim"])], "classes")
        elif self.type == "PositionalEmbedding":
            places, tokens = as_int(config["num_embeddings"]), before + first.shape[1]
            if tokens > places:
                raise MalformedError(
                    f"{self.vnode} knows {places} places, and the sequence has now {tokens} tokens"
                )

    def check_learnable(self, inputs: Sequence[Tensor]) -> None:
        """Raises MalformedError for what fits, but has nothing to learn from."""
        first = inputs[0]
        if self.type.startswith("BatchNorm") and first.numel() == first.shape[1]:
            raise MalformedError(
                f"{self.vnode} ({self.type}) got one value a channel, which has no variance: "
                "train with larger batches or fewer micro_batches, and leave out a last batch "
                "of so few samples"
            )

    def misfit(self, inputs: Sequence[Tensor]) -> MalformedError:
        """That it cannot take these."""
        given = " and ".join(str(form_of(tensor)) for tensor in inputs[:8])
        return MalformedError(f"{self.vnode} ({self.type}) cannot take {given}")

    def _dtypes(self, shapes: Shapes, entry: int) -> list[torch.dtype]:
        """Of inputs of these shapes; raises DoesNotFit where there are none such."""
        if self._kind is None:
            shape, dtype = LOSSES[self.type].target(self._config, shapes[0])
            if shapes[1:] != (shape,):
                raise DoesNotFit("another target")
            return [torch.float32, getattr(torch, dtype)]
        kind = TIED if entry else self._kind
        if not kind.inputs_min <= len(shapes) <= kind.inputs_max:
            raise DoesNotFit("another number of inputs")
        kind.shape(self._config, shapes)
        if self.type == LOCAL_HEAD:
            classes = self._config["loss"] == "CrossEntropyLoss"
            return [torch.float32, torch.int64 if classes else torch.float32]
        return [torch.int64 if kind.whole else torch.float32] * len(shapes)

    def _check_range(self, numbers: Tensor, count: int, what: str) -> None:
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= count:
            raise MalformedError(
                f"{self.vnode} got {what} {low} to {high}, and there are {count} {what}: "
                f"they have to be 0 to {count - 1}"
            )


def form_of(tensor: Tensor) -> Expected:
    """Its dtype and shape, as a state has them."""
    return Expected(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
