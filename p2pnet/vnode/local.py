"""Local learning: blocks that each learn by a head of their own. Without torch.

Greedy, decoupled learning (Belilovsky et al., "Decoupled Greedy Learning of CNNs",
ICML 2020): a network is cut into blocks, and each is trained by an auxiliary head with
the network's own kind of loss, so that no gradient leaves a block and none waits for
those behind it. A block is what stands in one group; it lives on one host.

The heads are nodes of the compiled graph like any other, which take the end of their
block and "y" and give a loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from p2pnet.errors import SpecError
from p2pnet.vnode.catalogue import LOCAL_HEAD
from p2pnet.vnode.compiling import compile_graph
from p2pnet.vnode.draft import TARGET, Draft, TensorSpec
from p2pnet.vnode.graph import CompiledGraph, Node
from p2pnet.vnode.rules import HEAD_POOL

# The kinds of head, each after a LayerNorm and, of pictures, a pooling to 2 by 2: one layer,
# or two. docs/local_learning.md has what was measured of them and of others.
HEADS = ("linear", "mlp")
MLP_HIDDEN = 128


def with_heads(
    inputs: Mapping[str, TensorSpec],
    nodes: Sequence[Draft],
    loss: Draft,
    *,
    head: str = HEADS[0],
) -> tuple[list[Draft], Draft]:
    """The nodes in blocks, each block with the heads that it learns by, and the loss.

    A node without a group is a block of its own; one without parameters joins the block
    of what it takes. Where something leaves a block, a head is put.

    Raises:
        SpecError: the network does not fit together, or some block can have no head.
    """
    if head not in HEADS:
        raise SpecError(f"head is {' or '.join(HEADS)}, not {head[:64]!r}")
    graph = compile_graph(
        name="local",
        inputs=inputs,
        nodes=nodes,
        loss=loss,
        optimizer="SGD",
        optimizer_config={},
    )
    blocks = _blocks_of(graph)
    ends = _ends_of(graph, blocks)
    drafts: list[Draft] = []
    by_id = {draft.id: draft for draft in nodes}
    for node in graph.nodes:
        drafts.append(dataclasses.replace(by_id[node.id], group=blocks[node.id]))
        if node.id in ends:
            drafts.append(_head(graph, node, blocks[node.id], head))
    return drafts, dataclasses.replace(loss, group=blocks[loss.id])


def _blocks_of(graph: CompiledGraph) -> dict[str, str]:
    """The name of each node's block, the loss's included."""
    taken = dict.fromkeys(node.group for node in graph.nodes)
    place = {node.id: number for number, node in enumerate(graph.nodes)}
    blocks: dict[str, str] = {}
    for node in graph.nodes:
        feeders = [ref for ref in node.inputs if ref in place]
        if node.group:
            blocks[node.id] = node.group
        elif node.param_shapes or not feeders:
            blocks[node.id] = f"{node.id}.block" if node.id in taken else node.id
        else:
            blocks[node.id] = blocks[max(feeders, key=place.__getitem__)]
    last = blocks[graph.output]
    if graph.loss.group not in ("", last):
        raise SpecError(f"{graph.loss.id} belongs to the block of {graph.output}: {last}")
    blocks[graph.loss.id] = last
    return blocks


def _ends_of(graph: CompiledGraph, blocks: Mapping[str, str]) -> dict[str, None]:
    """Where a block ends that has something to learn, and no node of it learns by the end."""
    learns: dict[str, bool] = {}  # has parameters at or before it, in its block
    ends: dict[str, None] = {}
    for node in graph.nodes:
        block = blocks[node.id]
        before = (learns[ref] for ref in node.inputs if blocks.get(ref) == block)
        learns[node.id] = bool(node.param_shapes) or any(list(before))
        inside = any(blocks[end] == block for end, _ in graph.consumers(node.id))
        if learns[node.id] and not inside:
            ends[node.id] = None
    return ends


def _head(graph: CompiledGraph, node: Node, block: str, head: str) -> Draft:
    given, prediction = node.output.shape, graph.tensor(graph.output).shape
    loss = graph.loss
    config: dict[str, object] = {"loss": loss.type}
    for key in ("label_smoothing", "class_dim"):
        if key in loss.config:
            config[key] = loss.config[key]
    if not given:
        raise SpecError(f"{node.id} ends a block, but gives a single number: a head needs more")
    classes_last = loss.type != "CrossEntropyLoss" or config["class_dim"] == -1
    if given[:-1] == prediction[:-1] and (classes_last or len(prediction) == 1):
        over, features, outputs = "last", given[-1], prediction[-1]
    elif loss.type == "CrossEntropyLoss" and len(prediction) > 1:
        raise SpecError(
            f"{node.id} ends a block and gives {list(given)}, from which no head tells the "
            f"classes of {list(prediction)}: put it in one group with the node after it"
        )
    elif len(given) == 3:
        height, width = (min(HEAD_POOL, side) for side in given[1:])
        over, features, outputs = "picture", given[0] * height * width, math.prod(prediction)
    else:
        over, features, outputs = "all", math.prod(given), math.prod(prediction)
    config |= {"over": over, "in_features": features, "out_features": outputs}
    if head == "mlp":
        config["hidden"] = MLP_HIDDEN
    return Draft(f"{node.id}.head", LOCAL_HEAD, config, (node.id, TARGET), block)
