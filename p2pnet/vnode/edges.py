"""What travels over the edges of a network in training: messages and events, to and fro.

A message is judged by its head, that is by what it says of its tensor, before a
byte of that is decoded.
"""

from __future__ import annotations

from dataclasses import replace

from p2pnet.errors import MalformedError
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import (
    ActivationArrived,
    Arrival,
    GradientArrived,
    Pace,
    SendActivations,
    SendGradients,
)
from p2pnet.vnode.network import HostedNetwork, refusal
from p2pnet.vnode.stages import InputEdge, OutputEdge
from p2pnet.vnode.tensors import Array, Buffer, decode, digest_of, dtype_name

FORWARD, BACKWARD = vnode_pb2.DIRECTION_FORWARD, vnode_pb2.DIRECTION_BACKWARD


def pace_of(graph: CompiledGraph) -> Pace:
    """How the steps of a network follow each other."""
    local = graph.learning == "local"
    return Pace(
        micro_batches=graph.micro_batches,
        staleness=graph.staleness,
        ahead=graph.window if local else 0,
        snapshot_every=graph.cut_every if local else 0,
        clips=graph.clip_norm > 0,
    )


def head_of(request: vnode_pb2.TrainRequest) -> Arrival:
    """What a training message says, but for its tensor; raises MalformedError."""
    step, norms = request.id, tuple(request.norms)
    if request.direction == FORWARD:
        return ActivationArrived(
            step.epoch, step.step, step.micro_batch, request.vnode, request.source, request.slot,
            None, request.tensor_digest, request.decided_step, request.batch_samples, norms,
        )  # fmt: skip
    if request.direction == BACKWARD:
        return GradientArrived(
            step.epoch, step.step, step.micro_batch, request.vnode, request.source, request.slot,
            None, request.tensor_digest, request.decided_step, request.batch_samples, norms,
        )  # fmt: skip
    raise MalformedError("a training message goes forward or backward")


def arrival_of(
    graph: CompiledGraph, head: Arrival, request: vnode_pb2.TrainRequest, payload: Buffer | None
) -> Arrival | common_pb2.Refusal:
    """The event with its tensor, or why that is not taken.

    Raises:
        MalformedError: bytes that are no tensor, or not the one that its digest names.
    """
    ref = tensor_ref(request)
    if no := misfit(graph, ref, request.vnode, request.tensor):
        return no
    tensor = decode(request.tensor, payload, bytes_max=bytes_max(graph, ref))
    if request.tensor_digest and request.tensor_digest != digest_of(tensor):
        raise MalformedError("the tensor is not the one that its digest names")
    return replace(head, payload=tensor)


def tensor_ref(request: vnode_pb2.TrainRequest) -> str:
    """The node or network input whose output a message carries, or whose output's gradient."""
    return request.vnode if request.direction == BACKWARD else request.source


def bytes_max(graph: CompiledGraph, ref: str) -> int:
    """What the largest batch of a node's or an input's tensor takes."""
    return graph.batch_max * graph.tensor(ref).size_bytes


def activation_to(
    net: HostedNetwork, edge: OutputEdge, effect: SendActivations, output: object
) -> tuple[ActivationArrived, vnode_pb2.TrainRequest]:
    """The activation that goes over an edge: as an event, and as a message without its tensor."""
    event = ActivationArrived(
        net.epoch, effect.step, effect.micro_batch, edge.consumer, edge.node, edge.slot,
        output, b"", effect.decided_step, effect.batch_samples, effect.norms,
    )  # fmt: skip
    return event, _request(net, effect, edge.consumer, FORWARD, edge.node, edge.slot)


def gradient_to(
    net: HostedNetwork, edge: InputEdge, effect: SendGradients, gradient: object
) -> tuple[GradientArrived, vnode_pb2.TrainRequest]:
    """The gradient that goes back over an edge, likewise."""
    event = GradientArrived(
        net.epoch, effect.step, effect.micro_batch, edge.source, edge.node, edge.slot,
        gradient, b"", effect.decided_step, effect.batch_samples, effect.norms,
    )  # fmt: skip
    return event, _request(net, effect, edge.source, BACKWARD, edge.node, edge.slot)


def _request(
    net: HostedNetwork,
    effect: SendActivations | SendGradients,
    to: str,
    direction: vnode_pb2.Direction,
    source: str,
    slot: int,
) -> vnode_pb2.TrainRequest:
    return vnode_pb2.TrainRequest(
        id=vnode_pb2.StepId(
            network_id=net.network_id,
            epoch=net.epoch,
            step=effect.step,
            micro_batch=effect.micro_batch,
        ),
        vnode=to,
        direction=direction,
        source=source,
        slot=slot,
        decided_step=effect.decided_step,
        batch_samples=effect.batch_samples,
        norms=effect.norms,
    )


def misfit(
    graph: CompiledGraph, ref: str, vnode: str, tensor: common_pb2.Tensor
) -> common_pb2.Refusal | None:
    """Refuses a tensor that does not say of itself what the graph says of `ref`.

    `ref` is the node or network input whose output it is, or whose output's gradient.
    """
    expected = graph.tensor(ref)
    samples, sample = sum(tensor.shape[:1]), list(tensor.shape[1:])
    dtype = dtype_name(tensor)
    if not tensor.shape or sample != list(expected.shape) or dtype != expected.dtype:
        detail = (
            f"{vnode} takes {expected.dtype}{list(expected.shape)} a sample of {ref}, "
            f"not {dtype}{sample[:16]}"
        )
    elif samples < 1:
        detail = f"a batch of {ref} has 1 to {graph.batch_max} samples, not {samples}"
    elif samples > graph.batch_max:
        size = samples * expected.size_bytes
        detail = (
            f"{vnode} takes batches of at most {graph.batch_max} samples "
            f"({bytes_max(graph, ref)} bytes of {ref}), and this one has {samples} ({size} bytes)"
        )
        return refusal(common_pb2.REFUSAL_CODE_TOO_LARGE, detail)
    else:
        return None
    return refusal(common_pb2.REFUSAL_CODE_BAD_REQUEST, detail)


def array_of(payload: object) -> Array:
    """A tensor again, of what the step core carries without looking."""
    return payload  # type: ignore[return-value]
