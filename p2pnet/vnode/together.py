"""Several requests through a stage at once. All of it runs in the compute thread.

Requests are concatenated along dimension 0, the samples, and what comes out is cut apart
again. That changes bits (a matrix product of another height may add in another order), so
that it is done for inference only, never for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from p2pnet.errors import MalformedError
from p2pnet.vnode.gathering import Part
from p2pnet.vnode.sessions import Session
from p2pnet.vnode.stages import Stage
from p2pnet.vnode.tensors import Array

if TYPE_CHECKING:
    from p2pnet.vnode.hosted import Hosted


@dataclass(frozen=True, slots=True)
class No:
    """Why a request has no output; `bad_input`: it can never have one."""

    reason: str
    bad_input: bool = False


Result = dict[str, Array] | No  # outputs by node


def do_run(
    hosted: Hosted,
    stage: Stage,
    wanted: Sequence[str],
    parts: Sequence[Part],
    caches: Mapping[str, Any] | None = None,
) -> list[Result]:
    """What each request has of the `wanted` nodes; raises ResourceError."""
    inputs = {
        (edge.node, edge.slot): _joined([part.tensors[place] for part in parts])
        for place, edge in enumerate(stage.inputs)
    }
    try:
        found = hosted.do_infer(stage.nodes, inputs, wanted, caches)
    except MalformedError as error:
        if len(parts) == 1:
            return [No(str(error), bad_input=True)]
        # Whose input it is has to know, and the others shall not have to pay for it.
        return [do_run(hosted, stage, wanted, (part,))[0] for part in parts]
    results: list[Result] = []
    start = 0
    for part in parts:
        end = start + part.samples
        results.append({node: out[start:end] for node, out in zip(wanted, found, strict=True)})
        start = end
    return results


def do_continue(
    hosted: Hosted, stage: Stage, wanted: Sequence[str], parts: Sequence[Part], session: Session
) -> list[Result]:
    """The same for the next part of a sequence, which its session remembers."""
    caches: Mapping[str, Any] = session.caches or hosted.do_cache(stage.nodes)
    results = do_run(hosted, stage, wanted, parts, caches)
    session.caches = caches
    session.size_bytes = sum(cache.size_bytes for cache in caches.values())
    return results


def _joined(arrays: Sequence[Any]) -> Array:
    joined: Array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return joined
