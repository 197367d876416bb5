"""What a forward pass's message says of itself, judged before a byte of its tensor is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pnet.errors import SpecError
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.edges import misfit
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.network import refusal
from p2pnet.vnode.stages import Stage

ID_BYTES_MAX = 64
BAD_REQUEST = common_pb2.REFUSAL_CODE_BAD_REQUEST


@dataclass(frozen=True, slots=True)
class Head:
    """An input of a stage: which of its inputs, and for a part of a session how many tokens."""

    stage: Stage
    place: int
    tokens: int  # 0: of no session
    bytes_max: int  # that its tensor may take


def head_of(
    graph: CompiledGraph, stages: Sequence[Stage], request: vnode_pb2.ForwardRequest
) -> Head | common_pb2.Refusal:
    """Where an input belongs among the stages here, or why it is not taken."""
    if max(len(request.request_id), len(request.session)) > ID_BYTES_MAX:
        return refusal(BAD_REQUEST, "an id has 16 bytes")
    found = _place_of(stages, request)
    if found is None:
        return refusal(
            BAD_REQUEST,
            f"{request.source} is not input {request.slot} of {request.vnode}, "
            "or both live on this host",
        )
    tokens = 0
    if request.session:
        shape = request.tensor.shape  # samples first, then tokens
        tokens = int(shape[1]) if len(shape) > 1 else 0
        try:
            graph = _at_length(graph, request.position, tokens)
        except SpecError as error:
            return refusal(BAD_REQUEST, str(error))
    if no := misfit(graph, request.source, request.vnode, request.tensor):
        return no
    bytes_max = graph.batch_max * graph.tensor(request.source).size_bytes
    return Head(*found, tokens, bytes_max)


def answering(graph: CompiledGraph, stages: Sequence[Stage]) -> bool:
    """Whether the network's output is made in one of these stages."""
    return any(graph.output in stage.nodes for stage in stages)


def wanted(graph: CompiledGraph, stage: Stage) -> tuple[str, ...]:
    """The nodes of a stage whose outputs somebody takes."""
    found = dict.fromkeys(edge.node for edge in stage.outputs)
    if graph.output in stage.nodes:
        found[graph.output] = None
    return tuple(found)


def _place_of(
    stages: Sequence[Stage], request: vnode_pb2.ForwardRequest
) -> tuple[Stage, int] | None:
    for stage in stages:
        for place, edge in enumerate(stage.inputs):
            if (edge.node, edge.slot, edge.source) == (request.vnode, request.slot, request.source):
                return stage, place
    return None


def _at_length(graph: CompiledGraph, position: int, tokens: int) -> CompiledGraph:
    """The graph for so many tokens; raises SpecError where the network cannot take them."""
    longest = max(spec.shape[0] if spec.shape else 0 for spec in graph.inputs.values())
    if not 0 < tokens <= longest - position:
        raise SpecError(
            f"network {graph.name} takes sequences of up to {longest} tokens, and this part has "
            f"{tokens} from {position} on"
        )
    return graph.at_length(tokens)
