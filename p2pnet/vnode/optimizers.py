"""SGD, Adam and AdamW: torch's own functions, with the state in plain sight.

Not its optimizer classes: the first one that is made, or makes a step, imports
torch's compiler, which a node never uses (measured: 2.4 s of CPU and 72 MiB).
The arithmetic is the same code, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from p2pnet.vnode.catalogue import find_optimizer
from p2pnet.vnode.config import fill


class Optimizer:
    """An optimizer for the parameters of one component.

    Attributes:
        state: what it keeps, by parameter and key, as torch names it; empty before
            the first step.

    Raises:
        SpecError: an unknown type, or a config that it does not take.
    """

    def __init__(self, type: str, config: Mapping[str, object]) -> None:
        self.type = type
        # numbers and booleans, as torch's signatures want them
        self._config: dict[str, Any] = dict(fill("optimizer", find_optimizer(type).keys, config))
        self.state: dict[str, dict[str, Tensor]] = {}

    def kept(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shapes of what it keeps for a parameter, from the first step on; all float32."""
        if self.type != "SGD":
            return {"exp_avg": tuple(shape), "exp_avg_sq": tuple(shape), "step": ()}
        return {"momentum_buffer": tuple(shape)} if self._config["momentum"] else {}

    @torch.no_grad()
    def step(self, params: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> None:
        """Changes the parameters in place. Gradients are in the order of the parameters."""
        for name, param in params.items():
            if name not in self.state:
                self.state[name] = self._begin(param)
        states = [self.state[name] for name in params]
        if self.type != "SGD":
            self._adam(list(params.values()), list(gradients), states)
        else:
            self._sgd(list(params.values()), list(gradients), states)

    def _begin(self, param: Tensor) -> dict[str, Tensor]:
        if self.type == "SGD":
            return {}  # the first gradient becomes the momentum
        return {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }

    def _adam(
        self, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]
    ) -> None:
        config = self._config
        function = adam if self.type == "Adam" else adamw
        function(
            params,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            amsgrad=False,
            maximize=False,
            beta1=config["betas"][0],
            beta2=config["betas"][1],
            lr=config["lr"],
            weight_decay=config["weight_decay"],
            eps=config["eps"],
        )

    def _sgd(
        self, params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]
    ) -> None:
        momenta = [state.get("momentum_buffer") for state in states]
        sgd(params, gradients, momenta, foreach=False, maximize=False, **self._config)
        for state, momentum in zip(states, momenta, strict=True):
            if momentum is not None:
                state["momentum_buffer"] = momentum
