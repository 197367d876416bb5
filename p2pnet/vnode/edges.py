"""What travels over the edges of a network: a VNode's place among them, and what fits there.

A message is judged by its head, that is by what it says of its tensor, before a
byte of that is decoded.
"""

from __future__ import annotations

from p2pnet.errors import MalformedError
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.messages import (
    ActivationArrived,
    Arrival,
    Consumer,
    GradientArrived,
    InputSlot,
    Wiring,
)
from p2pnet.vnode.network import BATCH_SAMPLES, refusal
from p2pnet.vnode.tensors import Array, decode, dtype_name


def wiring_of(graph: CompiledGraph, vnode: str) -> Wiring:
    """A VNode's place in its network, as the step core wants it."""
    node = graph.node(vnode)
    known = set(graph.vnodes())
    return Wiring(
        vnode=vnode,
        inputs=tuple(InputSlot(ref, ref not in known) for ref in node.inputs),
        consumers=tuple(Consumer(consumer, slot) for consumer, slot in graph.consumers(vnode)),
        is_loss=vnode == graph.loss.id,
        micro_batches=graph.micro_batches,
    )


def head_of(request: vnode_pb2.TrainRequest) -> Arrival:
    """What a training message says, but for its tensor; raises MalformedError."""
    step = request.id
    kind: type[ActivationArrived] | type[GradientArrived]
    if request.direction == vnode_pb2.DIRECTION_FORWARD:
        kind = ActivationArrived
    elif request.direction == vnode_pb2.DIRECTION_BACKWARD:
        kind = GradientArrived
    else:
        raise MalformedError("a training message goes forward or backward")
    return kind(
        step.epoch, step.step, step.micro_batch, request.source, request.slot,
        None, request.tensor_digest, request.decided_step,
    )  # fmt: skip


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
    elif not 0 < samples <= BATCH_SAMPLES:
        detail = f"a batch has 1 to {BATCH_SAMPLES} samples, not {samples}"
    else:
        return None
    return refusal(common_pb2.REFUSAL_CODE_BAD_REQUEST, detail)


def tensor_of(graph: CompiledGraph, ref: str, tensor: common_pb2.Tensor) -> Array:
    """The tensor, which may take what the largest batch of `ref` takes; raises MalformedError."""
    return decode(tensor, bytes_max=BATCH_SAMPLES * graph.tensor(ref).size_bytes)
