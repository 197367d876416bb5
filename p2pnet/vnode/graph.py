"""The compiled graph of a network: all that a host or a later orchestrator needs. Without torch.

`p2pnet.vnode.compiling` makes it, from what a spec says or from its JSON. As JSON the
graph is canonical, so that one digest (the manifest's `spec_digest`) stands for one graph.
A change to any formula therefore needs a new FORMAT_VERSION; a new key that is left out
where it says nothing (as a node's `group`) does not, as the graphs of before keep their
bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from p2pnet.keys import sha256
from p2pnet.vnode.catalogue import LOCAL_HEAD, Shape
from p2pnet.vnode.config import Config
from p2pnet.vnode.draft import CHAIN, LOCAL, TARGET, Settings, TensorSpec

FORMAT_VERSION = 1

# What a hosted VNode costs beside its tensors: its objects, queues and buffers.
VNODE_OVERHEAD_BYTES = 256 << 10
# The most micro-batches of which a VNode keeps what their backward needs (1F1B's bound).
IN_FLIGHT_MAX = 8
_LENGTHS_KEPT = 32
_USUAL = Settings()


@dataclass(frozen=True, slots=True)
class Node:
    """A component, the loss included. Sizes in bytes; activations and FLOPs are for one sample."""

    id: str
    type: str
    config: Config  # every key, defaults filled in
    inputs: tuple[str, ...]  # by slot: ids of nodes, names of network inputs, "y"
    output: TensorSpec
    param_shapes: Mapping[str, Shape]  # by torch's names, in torch's order
    param_bytes: int
    state_bytes: int  # parameters, gradients, buffers and what the optimizer keeps
    activation_bytes: int  # inputs, output and what is in between, with the gradients
    flops_forward: int
    flops_backward: int
    group: str = ""  # all VNodes of one group live on one host
    tied: str = ""  # the Embedding whose weight it shares: then it is no VNode of its own
    codec: str = ""  # of its output on the wire; "": the network's
    buffers: Mapping[str, TensorSpec] = field(default_factory=dict)  # by torch's names, whole


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One and the same for every VNode; each has its own state of it."""

    type: str
    config: Config


@dataclass(frozen=True, kw_only=True)  # no slots: the cached properties live in __dict__
class CompiledGraph(Settings):
    """A network that fits together. `nodes` are in topological order and without the loss.

    A *node* computes; a *VNode* is what is hosted, by a node's id. They are the same but for
    a tied node, which is a second entry of the VNode whose weight it shares (its `home`).
    """

    name: str
    inputs: Mapping[str, TensorSpec]
    nodes: tuple[Node, ...]
    loss: Node  # inputs: the output node's id and "y"
    target: TensorSpec  # "y"
    optimizer: Optimizer
    format_version: int = FORMAT_VERSION

    @property
    def output(self) -> str:
        """The id of the node whose output is the network's."""
        return self.loss.inputs[0]

    def vnodes(self) -> tuple[str, ...]:
        """The ids of all that is hosted, in topological order, then the loss."""
        return (*(node.id for node in self.nodes if not node.tied), self.loss.id)

    def node(self, node_id: str) -> Node:
        """The node of that id, the loss included; KeyError if there is none."""
        return self._by_id[node_id]

    def home(self, node_id: str) -> str:
        """The VNode that the node belongs to; KeyError if there is no such node."""
        return self._by_id[node_id].tied or node_id

    def entries(self, vnode: str) -> tuple[str, ...]:
        """The nodes of a VNode: the one it is named by, then those tied to it, in order."""
        return self._entries[vnode]

    def consumers(self, ref: str) -> tuple[tuple[str, int], ...]:
        """Who takes the output of a node, a network input or "y": (node, slot).

        In topological order, the loss last, so that the reverse is the order in which
        torch's autograd engine comes to them.
        """
        return self._consumers.get(ref, ())

    def takes_target(self, node_id: str) -> bool:
        """Whether a backward begins at the node: the loss, or a block's head."""
        return node_id == self.loss.id or self._by_id[node_id].type == LOCAL_HEAD

    def block(self, node_id: str) -> str:
        """The name of the node's block: in `local`, no gradient leaves it."""
        node = self._by_id[node_id]
        return node.group or node.tied or node.id

    def gradient_flows(self, node_id: str, slot: int) -> bool:
        """Whether the node sends a gradient back to what it takes at that slot."""
        ref = self._by_id[node_id].inputs[slot]
        if ref not in self._by_id:
            return False  # a network input, or "y"
        if self.learning == CHAIN:
            return True
        return self.block(ref) == self.block(node_id) and node_id in self.taught

    def codec_of(self, ref: str) -> str:
        """The codec of what a node gives, and of its gradient; of inputs: the network's."""
        return (self._by_id[ref].codec if ref in self._by_id else "") or self.codec

    def tensor(self, ref: str) -> TensorSpec:
        """What a node, a network input or "y" gives; KeyError if there is no such thing."""
        if ref in self._by_id:
            return self._by_id[ref].output
        return self.target if ref == TARGET else self.inputs[ref]

    def memory_bytes(self, vnode: str) -> int:
        """What a host needs for a VNode while the network trains with its largest batches.

        Its state; the activations, each with its gradient, of the micro-batches that may
        be between their forward and their backward; as many more copies of the weights as
        forwards may be behind (`staleness`); and, in `local`, the outputs that wait for a
        slower block.
        """
        home = self._by_id[vnode]
        samples = -(-self.batch_max // self.micro_batches)
        in_flight = min(self.micro_batches * (1 + self.staleness), IN_FLIGHT_MAX)
        activations = sum(self._by_id[entry].activation_bytes for entry in self.entries(vnode))
        stashed = home.param_bytes * self.staleness
        waiting = self._given_away_bytes(vnode) * self.window if self.learning == LOCAL else 0
        flying = (activations * in_flight + waiting) * samples
        return home.state_bytes + stashed + flying + VNODE_OVERHEAD_BYTES

    def _given_away_bytes(self, vnode: str) -> int:
        """Of a sample: what of a VNode's outputs another block takes."""
        return sum(
            self._by_id[entry].output.size_bytes
            for entry in self.entries(vnode)
            if any(self.block(end) != self.block(entry) for end, _ in self.consumers(entry))
        )

    def at_length(self, length: int) -> CompiledGraph:
        """The same network, with the same weights, for sequences of `length` tokens.

        Every input's first dimension (after the batch's) becomes `length`.

        Raises:
            SpecError: there is none, or it would not fit the network.
        """
        from p2pnet.vnode.compiling import at_length

        if length not in self._lengths:
            while len(self._lengths) >= _LENGTHS_KEPT:
                del self._lengths[next(iter(self._lengths))]
            self._lengths[length] = at_length(self, length)
        return self._lengths[length]

    def to_json(self) -> bytes:
        """The canonical form: sorted keys, no spaces, ASCII."""
        return self._json

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form: a manifest's `spec_digest`."""
        return sha256(self._json)

    @staticmethod
    def from_json(data: bytes) -> CompiledGraph:
        """As `p2pnet.vnode.compiling.from_json`."""
        from p2pnet.vnode.compiling import from_json

        return from_json(data)

    @cached_property
    def _by_id(self) -> dict[str, Node]:
        return {node.id: node for node in (*self.nodes, self.loss)}

    @cached_property
    def _entries(self) -> dict[str, tuple[str, ...]]:
        entries = {vnode: [vnode] for vnode in self.vnodes()}
        for node in self.nodes:
            if node.tied:
                entries[node.tied].append(node.id)
        return {vnode: tuple(nodes) for vnode, nodes in entries.items()}

    @cached_property
    def _consumers(self) -> dict[str, tuple[tuple[str, int], ...]]:
        edges: dict[str, list[tuple[str, int]]] = {}
        for node in (*self.nodes, self.loss):
            for slot, ref in enumerate(node.inputs):
                edges.setdefault(ref, []).append((node.id, slot))
        return {ref: tuple(ends) for ref, ends in edges.items()}

    @cached_property
    def taught(self) -> dict[str, None]:
        """The nodes that a gradient of their own block comes to, in `local`."""
        taught: dict[str, None] = {}
        for node in (self.loss, *reversed(self.nodes)):
            ends = (end for end, _ in self.consumers(node.id) if end in taught)
            if self.takes_target(node.id) or self.block(node.id) in map(self.block, ends):
                taught[node.id] = None
        return taught

    @cached_property
    def _lengths(self) -> dict[int, CompiledGraph]:
        return {}

    @cached_property
    def _json(self) -> bytes:
        # Mappings are plain dicts and tuples become lists. What came after the first
        # networks is left out where it says nothing, so that their bytes stay as they are.
        top = dataclasses.asdict(self)
        for key in LATER_SETTINGS:
            if top[key] == getattr(_USUAL, key):
                del top[key]
        for node in (*top["nodes"], top["loss"]):
            for key in _LATER_KEYS:
                if not node[key]:
                    del node[key]
            for key, usual in _LATER_CONFIG.items():
                if node["config"].get(key) == usual:
                    del node["config"][key]
        return json.dumps(top, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


LATER_SETTINGS = ("batch_max", "clip_norm", "staleness", "replicas", "codec")
_LATER_KEYS = ("group", "tied", "codec", "buffers")
_LATER_CONFIG = {"class_dim": 1}
