"""What a spec says of a network before it is compiled: names, references, order."""

from __future__ import annotations

import difflib
import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pnet.errors import SpecError
from p2pnet.vnode.catalogue import Shape, show
from p2pnet.vnode.config import DIMS_MAX, LENGTH_MAX

NODES_MAX = 10_000
INPUTS_MAX = 64
NODE_BYTES_MAX = 1 << 50
CUT_EVERY = 20  # steps
CUT_EVERY_MAX = 10_000
SEED_MAX = 2**63 - 1
TARGET = "y"  # the name of the loss's second input
DTYPE = "float32"  # of everything but a classification's target
DTYPE_BYTES = {"float32": 4, "int64": 8}

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")  # never "." or ".."


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's dtype and its shape for one sample (without the batch dimension)."""

    shape: Shape
    dtype: str = DTYPE

    @property
    def size_bytes(self) -> int:
        """Of one sample."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Draft:
    """A node as a spec gives it: its config as written, its inputs all named."""

    id: str
    type: str
    config: Mapping[str, object]
    inputs: tuple[str, ...]
    group: str = ""  # nodes of one group live on one host; "": wherever


def in_order(inputs: Mapping[str, TensorSpec], nodes: Sequence[Draft]) -> list[Draft]:
    """Topological order; of several, the one nearest to the spec's own."""
    place = {draft.id: position for position, draft in enumerate(nodes)}
    after: dict[str, list[int]] = {}
    waiting = [0] * len(nodes)
    for position, draft in enumerate(nodes):
        for ref in draft.inputs:
            if ref in place:
                after.setdefault(ref, []).append(position)
                waiting[position] += 1
            elif ref not in inputs:
                near = difflib.get_close_matches(ref[:64], [*place, *inputs], n=1)
                hint = f": did you mean {near[0]}?" if near else ""
                raise SpecError(f"{draft.id} takes {ref!r}, which is no node and no input{hint}")
    ready = [position for position, count in enumerate(waiting) if not count]
    order: list[Draft] = []
    while ready:
        draft = nodes[heapq.heappop(ready)]
        order.append(draft)
        for position in after.get(draft.id, ()):
            waiting[position] -= 1
            if not waiting[position]:
                heapq.heappush(ready, position)
    if len(order) < len(nodes):
        raise SpecError(f"the nodes form a cycle: {_cycle(nodes, place, waiting)}")
    return order


def _cycle(nodes: Sequence[Draft], place: Mapping[str, int], waiting: Sequence[int]) -> str:
    """A cycle for people, "a -> b -> a" where a feeds b."""
    # What still waits has an input that still waits, so going back ends in a cycle.
    position = next(position for position, count in enumerate(waiting) if count)
    path: dict[str, None] = {}
    while nodes[position].id not in path:
        path[nodes[position].id] = None
        position = next(
            place[ref] for ref in nodes[position].inputs if ref in place and waiting[place[ref]]
        )
    ids = list(path)
    ring = ids[ids.index(nodes[position].id) :][::-1]
    ring = [*ring, ring[0]]
    return " -> ".join(ring if len(ring) <= 10 else [*ring[:5], "...", *ring[-4:]])


def check_settings(name: str, learning: str, seed: int, micro_batches: int, cut_every: int) -> None:
    _check_id("name", name)
    if learning == "local":
        raise SpecError("learning: local is not there yet, write learning: chain")
    if learning != "chain":
        raise SpecError(f"learning is chain, not {learning[:64]!r}")
    if not 0 <= seed <= SEED_MAX:
        raise SpecError(f"seed is a whole number of 0 to {SEED_MAX}")
    if micro_batches != 1:
        raise SpecError(f"micro_batches is 1 for now, not {micro_batches}")
    if not 1 <= cut_every <= CUT_EVERY_MAX:
        raise SpecError(f"cut_every is a number of steps, 1 to {CUT_EVERY_MAX}, not {cut_every}")


def check_names(inputs: Mapping[str, TensorSpec], nodes: Sequence[Draft], loss: Draft) -> None:
    if not 1 <= len(inputs) <= INPUTS_MAX:
        raise SpecError(f"a network has 1 to {INPUTS_MAX} inputs, not {len(inputs)}")
    if not 1 <= len(nodes) <= NODES_MAX:
        raise SpecError(f"a network has 1 to {NODES_MAX} nodes, not {len(nodes)}")
    taken: dict[str, str] = {}
    for what, name in (
        *(("an input", name) for name in inputs),
        *(("a node", draft.id) for draft in nodes),
        ("the loss", loss.id),
    ):
        _check_id(f"the id of {what}", name)
        if name == TARGET:
            raise SpecError(f"{what} is called y, but y is the loss's target: rename it")
        if name in taken:
            who = "two nodes" if what == taken[name] == "a node" else f"{taken[name]} and {what}"
            raise SpecError(f"{who} have the same id {name}")
        taken[name] = what
    for draft in (*nodes, loss):
        if draft.group:
            _check_id(f"the group of {draft.id}", draft.group)


def _check_id(what: str, name: str) -> None:
    if not _ID.fullmatch(name):
        raise SpecError(
            f"{what} is 1 to 64 letters, digits, dashes, underscores and dots, the first no dot: "
            f"not {name[:80]!r}"
        )


def check_tensor(where: str, spec: TensorSpec) -> None:
    if spec.dtype != DTYPE:
        raise SpecError(f"{where}: dtype is {DTYPE}, not {spec.dtype[:64]!r}")
    if len(spec.shape) > DIMS_MAX:
        raise SpecError(f"{where}: a sample has at most {DIMS_MAX} dimensions")
    for length in spec.shape:
        if type(length) is not int or not 1 <= length <= LENGTH_MAX:
            raise SpecError(f"{where}: a shape is whole numbers above 0, not {length!r}")
    if spec.size_bytes > NODE_BYTES_MAX:
        raise SpecError(f"{where}: a sample of {show(spec.shape)} is larger than any host")
