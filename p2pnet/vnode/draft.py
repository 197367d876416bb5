"""What a spec says of a network before it is compiled: names, references, order."""

from __future__ import annotations

import difflib
import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from p2pnet.errors import SpecError
from p2pnet.vnode.catalogue import LOCAL_HEAD, Shape, show
from p2pnet.vnode.config import DIMS_MAX, LENGTH_MAX

NODES_MAX = 10_000
INPUTS_MAX = 64
NODE_BYTES_MAX = 1 << 50
CUT_EVERY = 20  # steps
CUT_EVERY_MAX = 10_000
SEED_MAX = 2**63 - 1
MICRO_BATCHES_MAX = 64
BATCH_MAX = 1024  # samples
STALENESS_MAX = 8  # steps
REPLICAS_MAX = 3
CHAIN, LOCAL = "chain", "local"
CODECS = ("auto", "raw", "zstd", "fp16", "int8")
# How many steps may be under way at a time: one is applied while the next is fed.
CHAIN_WINDOW, LOCAL_WINDOW = 2, 32
TARGET = "y"  # the name of the loss's second input
DTYPE = "float32"  # of everything but tokens and a classification's target
WHOLE_DTYPE = "int64"  # of those
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
    tied: str = ""  # the Embedding whose weight it takes for its own
    codec: str = ""  # of what it gives, on the wire; "": the network's


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a network is trained, beside what it is.

    Attributes:
        learning: "chain", by the gradients of the one loss, or "local", every block by
            a head of its own (`vnode.local`).
        micro_batches: how many parts a batch is fed in, 1 to 64.
        cut_every: steps between two commits.
        batch_max: the largest batch, in samples; hosts lend memory for as much.
        clip_norm: the gradients' global norm is clipped to it; 0: it is not.
        staleness: how many steps older than the newest the weights of a forward may be.
        replicas: how many hosts follow a VNode's training, the one that does it included.
        codec: of tensors on the wire.
    """

    learning: str = CHAIN
    seed: int = 0
    micro_batches: int = 1
    cut_every: int = CUT_EVERY
    batch_max: int = BATCH_MAX
    clip_norm: float = 0.0
    staleness: int = 0
    replicas: int = 1
    codec: str = CODECS[0]

    @property
    def window(self) -> int:
        """How many steps the feeder may have under way at a time."""
        if self.learning == LOCAL:
            return min(LOCAL_WINDOW, self.cut_every)  # hosts keep the states of two cuts
        return CHAIN_WINDOW + self.staleness

    def check(self) -> None:
        """Raises SpecError, one sentence, if a setting is out of its range or at odds."""
        if self.learning not in (CHAIN, LOCAL):
            raise SpecError(f"learning is chain or local, not {self.learning[:64]!r}")
        for name, low, high, unit in _RANGES:
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise SpecError(f"{name} is {unit}, {low} to {high}, not {value!r}")
        if type(self.clip_norm) is not float or not 0 <= self.clip_norm < math.inf:
            raise SpecError(f"clip_norm is a number of at least 0, not {self.clip_norm!r}")
        if self.codec not in CODECS:
            raise SpecError(f"codec is {', '.join(CODECS)}, not {self.codec[:64]!r}")
        if self.batch_max < self.micro_batches:
            raise SpecError(
                f"batch_max={self.batch_max} samples cannot be split into "
                f"micro_batches={self.micro_batches}"
            )
        for name in ("clip_norm", "staleness"):
            if self.learning != CHAIN and getattr(self, name):
                raise SpecError(
                    f"{name} needs learning: chain, as local learning has no global step"
                )
        if self.learning != CHAIN and self.replicas > 1:
            raise SpecError("replicas above 1 need learning: chain")
        if self.staleness and self.replicas > 1:
            raise SpecError("replicas above 1 need a staleness of 0")


_RANGES = (
    ("seed", 0, SEED_MAX, "a whole number"),
    ("micro_batches", 1, MICRO_BATCHES_MAX, "a whole number"),
    ("cut_every", 1, CUT_EVERY_MAX, "a number of steps"),
    ("batch_max", 1, BATCH_MAX, "a number of samples"),
    ("staleness", 0, STALENESS_MAX, "a number of steps"),
    ("replicas", 1, REPLICAS_MAX, "a number of hosts"),
)


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
            elif ref not in inputs and not (ref == TARGET and draft.type == LOCAL_HEAD):
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


def check_names(
    name: str, inputs: Mapping[str, TensorSpec], nodes: Sequence[Draft], loss: Draft
) -> None:
    """Ids, groups, codecs and what is tied: each is there once, and of the right form."""
    _check_id("name", name)
    if not 1 <= len(inputs) <= INPUTS_MAX:
        raise SpecError(f"a network has 1 to {INPUTS_MAX} inputs, not {len(inputs)}")
    if not 1 <= len(nodes) <= NODES_MAX:
        raise SpecError(f"a network has 1 to {NODES_MAX} nodes, not {len(nodes)}")
    taken: dict[str, str] = {}
    for what, id in (
        *(("an input", id) for id in inputs),
        *(("a node", draft.id) for draft in nodes),
        ("the loss", loss.id),
    ):
        _check_id(f"the id of {what}", id)
        if id == TARGET:
            raise SpecError(f"{what} is called y, but y is the loss's target: rename it")
        if id in taken:
            who = "two nodes" if what == taken[id] == "a node" else f"{taken[id]} and {what}"
            raise SpecError(f"{who} have the same id {id}")
        taken[id] = what
    for draft in (*nodes, loss):
        if draft.group:
            _check_id(f"the group of {draft.id}", draft.group)
        if draft.codec and draft.codec not in CODECS:
            raise SpecError(f"the codec of {draft.id} is {', '.join(CODECS)}, not {draft.codec!r}")


def _check_id(what: str, name: str) -> None:
    if not _ID.fullmatch(name):
        raise SpecError(
            f"{what} is 1 to 64 letters, digits, dashes, underscores and dots, the first no dot: "
            f"not {name[:80]!r}"
        )


def check_tensor(where: str, spec: TensorSpec) -> None:
    """What a network takes, or a node gives, has a dtype and a size that hosts can hold."""
    if spec.dtype not in DTYPE_BYTES:
        raise SpecError(f"{where}: dtype is {' or '.join(DTYPE_BYTES)}, not {spec.dtype[:64]!r}")
    if len(spec.shape) > DIMS_MAX:
        raise SpecError(f"{where}: a sample has at most {DIMS_MAX} dimensions")
    for length in spec.shape:
        if type(length) is not int or not 1 <= length <= LENGTH_MAX:
            raise SpecError(f"{where}: a shape is whole numbers above 0, not {length!r}")
    if spec.size_bytes > NODE_BYTES_MAX:
        raise SpecError(f"{where}: a sample of {show(spec.shape)} is larger than any host")
