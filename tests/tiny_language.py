"""A language model over bytes, so small that a pass takes no time, and the same in plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array

CONTEXT = 16
WIDTH = 8
HEADS = 2
TOKENS = 256


def _block(name: str, before: str) -> list[dict[str, Any]]:
    def node(part: str, type: str, inputs: list[str], **config: Any) -> dict[str, Any]:
        return {"id": f"{name}.{part}", "type": type, "inputs": inputs, "config": config}

    at = {part: f"{name}.{part}" for part in ("n1", "att", "mid", "n2", "up", "act", "down")}
    return [
        node("n1", "LayerNorm", [before], normalized_shape=[WIDTH]),
        node(
            "att", "MultiheadAttention", [at["n1"]], embed_dim=WIDTH, num_heads=HEADS, causal=True
        ),
        node("mid", "Add", [before, at["att"]]),
        node("n2", "LayerNorm", [at["mid"]], normalized_shape=[WIDTH]),
        node("up", "Linear", [at["n2"]], in_features=WIDTH, out_features=2 * WIDTH),
        node("act", "GELU", [at["up"]]),
        node("down", "Linear", [at["act"]], in_features=2 * WIDTH, out_features=WIDTH),
        node("end", "Add", [at["mid"], at["down"]]),
    ]


SPEC: dict[str, Any] = {
    "name": "tiny-language",
    "inputs": {"tokens": {"shape": [CONTEXT], "dtype": "int64"}},
    "nodes": [
        {
            "id": "embed", "type": "Embedding", "inputs": ["tokens"],
            "config": {"num_embeddings": TOKENS, "embedding_dim": WIDTH},
        },
        {
            "id": "place", "type": "PositionalEmbedding", "inputs": ["embed"],
            "config": {"num_embeddings": CONTEXT, "embedding_dim": WIDTH},
        },
        *_block("one", "place"),
        *_block("two", "one.end"),
        {
            "id": "out", "type": "Linear", "inputs": ["two.end"],
            "config": {"in_features": WIDTH, "out_features": TOKENS},
        },
    ],
    "loss": {"id": "loss", "type": "CrossEntropyLoss", "config": {"class_dim": -1}},
    "optimizer": {"type": "AdamW", "lr": 0.01},
    "learning": "chain",
    "seed": 3,
}  # fmt: skip


def language_graph(**changes: Any) -> CompiledGraph:
    """The compiled graph, with top-level keys of the spec changed."""
    return load_spec({**SPEC, **changes})


def plain_logits(window: Array) -> Array:
    """What plain torch says after each of the tokens [n]: [n, 256], all computed anew."""
    import torch
    from torch import nn
    from torch.nn import functional

    from p2pnet.vnode.components import init_seed

    def made(name: str, make: Any, *args: Any, **config: Any) -> Any:
        torch.manual_seed(init_seed(SPEC["seed"], name))
        return make(*args, **config)

    with torch.no_grad():
        x = made("embed", nn.Embedding, TOKENS, WIDTH)(torch.from_numpy(window))
        x = x + made("place", nn.Embedding, CONTEXT, WIDTH)(torch.arange(len(window)))
        mask = torch.full((len(window), len(window)), float("-inf")).triu(1)
        for name in ("one", "two"):
            attention = made(f"{name}.att", nn.MultiheadAttention, WIDTH, HEADS, batch_first=True)
            h = functional.layer_norm(x, [WIDTH])
            x = x + attention(h, h, h, attn_mask=mask, need_weights=False)[0]
            up = made(f"{name}.up", nn.Linear, WIDTH, 2 * WIDTH)
            down = made(f"{name}.down", nn.Linear, 2 * WIDTH, WIDTH)
            x = x + down(functional.gelu(up(functional.layer_norm(x, [WIDTH]))))
        logits: Array = made("out", nn.Linear, WIDTH, TOKENS)(x).numpy()
        return logits


def plain_greedy(prompt: Array, tokens: int) -> list[int]:
    """The likeliest tokens, one after the other; a full context goes on with its last half."""
    window, found = prompt, []
    for _ in range(tokens):
        if len(window) > CONTEXT:
            window = window[-(CONTEXT // 2) :]
        found.append(int(plain_logits(window)[-1].argmax()))
        window = np.append(window, found[-1])
    return found
