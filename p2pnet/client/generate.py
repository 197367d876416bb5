"""A shell: text from a language model, token by token.

The prompt goes through the network once; after it each token goes alone, and the
attention VNodes remember what came before (a session). A session that is lost, with a
host, to a new epoch or for want of room, begins again with all the tokens: slower once,
and the text is the same.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator

import numpy as np

from p2pnet.client.connection import Patience
from p2pnet.client.passes import REQUEST_ID_BYTES, Astray, Part, Passes
from p2pnet.client.sampling import pick
from p2pnet.data import text
from p2pnet.errors import RefusedError, SpecError, UsageError
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array

GIVE_UP_S = 60.0  # for one token
TOKENS_MAX = 1_000_000
BEGINNING = "\n"  # where there is no prompt


async def generate(
    passes: Passes,
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> AsyncGenerator[str, None]:
    """The text after a prompt, in pieces as it comes, for `tokens` bytes of UTF-8.

    What follows from the same weights, prompt and seed is the same. A text that is longer
    than the model's context goes on with the last half of that.

    Args:
        temperature: 0 takes the likeliest byte each time; 1: as the model says.
        top_k: take one of so many likeliest bytes; 0: any.

    Raises:
        UsageError: the network is no language model over bytes, or a number that cannot be.
        UnreachableError: the network does not answer for too long.
    """
    context = _context_of(passes.graph)
    if not 0 < tokens <= TOKENS_MAX:
        raise UsageError(f"how many tokens to generate is 1 to {TOKENS_MAX}, not {tokens}")
    if not 0.0 <= temperature <= 100.0 or top_k < 0:
        raise UsageError("the temperature is 0 to 100, and top-k 0 (all) or more")
    reader = _Reader(passes)
    rng = np.random.default_rng(seed)
    decoder = text.Decoder()
    window = text.encode(prompt or BEGINNING)
    for _ in range(tokens):
        if len(window) > context:
            window = window[-max(1, context // 2) :]
            reader.begin_anew()
        token = pick(await reader.read(window), rng, temperature, top_k)
        window = np.append(window, token)
        if piece := decoder.feed(token):
            yield piece
    if rest := decoder.finish():
        yield rest


class _Reader:
    """Reads a growing sequence, through sessions that may be lost."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._graph = passes.graph
        self._input = next(iter(passes.graph.inputs))
        self._part: Part | None = None  # that comes next
        self._sessions = os.urandom(1)[0]  # ... begun: the next one goes to other replicas

    def begin_anew(self) -> None:
        """The next sequence does not continue the one before."""
        self._part = None

    async def read(self, window: Array) -> Array:
        """The logits [256] of what follows the tokens so far."""
        patience = Patience(f"an answer of network {self._graph.name}", GIVE_UP_S)
        while True:
            part = self._part or self._begin()
            inputs = {self._input: window[None, part.position :]}
            try:
                output = await self._passes.once(inputs, part)
            except Astray as error:
                lost, self._part = self._part, None
                if lost is None:  # else the first thing to try is all of it, at once
                    await patience.wait(error)
            except RefusedError as error:
                raise UsageError(f"network {self._graph.name} cannot go on: {error}") from None
            else:
                self._part = Part(part.session, len(window))
                logits: Array = output[0, -1]
                return logits

    def _begin(self) -> Part:
        self._sessions = (self._sessions + 1) % 256
        return Part(os.urandom(REQUEST_ID_BYTES - 1) + bytes([self._sessions]), 0)


def _context_of(graph: CompiledGraph) -> int:
    """How many tokens a language model over bytes takes at once; raises UsageError."""
    specs = list(graph.inputs.values())
    output = graph.tensor(graph.output)
    reads = len(specs) == 1 and specs[0].dtype == "int64" and len(specs[0].shape) == 1
    if not reads or output.shape != (*specs[0].shape, text.TOKENS):
        raise UsageError(
            f"network {graph.name} is no language model over bytes: that takes one input of "
            f"tokens, int64[context], and gives logits, float32[context, {text.TOKENS}]"
        )
    try:
        graph.at_length(1)
    except SpecError as error:
        raise UsageError(f"{graph.name} cannot be fed token by token: {error}") from None
    return specs[0].shape[0]
