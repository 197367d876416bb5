"""Which token comes next: sampling from a language model's logits. Pure."""

from __future__ import annotations

import numpy as np

from p2pnet.vnode.tensors import Array


def pick(logits: Array, rng: np.random.Generator, temperature: float, top_k: int) -> int:
    """A token by the softmax of its logits [tokens] over the temperature.

    With temperature 0 it is the likeliest one. `top_k`: only among so many likeliest ones
    (Fan et al., ACL 2018); 0: among all.
    """
    if temperature == 0.0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    scaled = logits[order].astype(np.float64) / temperature
    shares = np.cumsum(np.exp(scaled - scaled.max()))
    return int(order[np.searchsorted(shares, rng.random() * shares[-1], side="right")])
