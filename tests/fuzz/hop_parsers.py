"""What goes from VNode to VNode, as targets: frames of a stream, at both ends, and tensors."""

from __future__ import annotations

from random import Random

import numpy as np
from fuzz.mutations import mutated, scrambled
from fuzz.parsers import Parser, Read, stateless, written

from p2pnet.net.hop_frames import first_frame, later_frame
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.hops import Asker
from p2pnet.vnode.hops_answerer import Answerer, Asked
from p2pnet.vnode.hops_flow import Room
from p2pnet.vnode.tensors import FP16, INT8, RAW, ZSTD, decode, encode

BYTES_MAX = 1 << 16
ROOM_BYTES = 1 << 18
ASKED = 40

ARRAY = np.linspace(-3, 3, 600, dtype=np.float32).reshape(3, 200)
TENSORS = tuple(encode(ARRAY, codec) for codec in (RAW, ZSTD, FP16, INT8))
TRAIN = vnode_pb2.TrainRequest(
    id=vnode_pb2.StepId(network_id="ab" * 16, epoch=2, step=7), vnode="fc1", source="x",
    direction=vnode_pb2.DIRECTION_FORWARD, tensor=TENSORS[0][0], norms=[1.5],
)  # fmt: skip
HEADS = (
    vnode_pb2.HopFrame(id=1, train=TRAIN, size_bytes=8, timeout_ms=5000, hlc="019ab5dd7e33-0002"),
    vnode_pb2.HopFrame(id=2, forward=vnode_pb2.ForwardRequest(vnode="fc1"), size_bytes=3000),
    vnode_pb2.HopFrame(id=3, decided=vnode_pb2.DecidedRequest(step=7)),
)
REPLY = vnode_pb2.HopFrame(
    id=1, reply=vnode_pb2.HopReply(tensor=TENSORS[0][0]), size_bytes=3000, hlc="019ab5dd7e33-0002"
)
TO_A_HOST = (
    first_frame(HEADS[0], memoryview(b"12345678")),
    first_frame(HEADS[1], memoryview(bytes(1000))),
    later_frame(2, memoryview(bytes(2000))),
    first_frame(HEADS[2], memoryview(b"")),
    later_frame(2, memoryview(b"")),
)
TO_A_CALLER = (
    first_frame(REPLY, memoryview(bytes(1000))),
    later_frame(1, memoryview(bytes(2000))),
)
PACKED = tuple(
    written(common_pb2.Tensor(dtype=head.dtype, shape=head.shape, codec=head.codec, payload=data))
    for head, data in ((head, bytes(payload)) for head, payload in TENSORS)
)


def host_frame(rng: Random) -> bytes:
    """A frame to a host, of an id that may be new."""
    roll = rng.random()
    if roll < 0.5:
        return mutated(rng, TO_A_HOST)
    head = scrambled(rng, rng.choice(HEADS)) if roll < 0.8 else rng.choice(HEADS)
    frame = vnode_pb2.HopFrame()
    frame.CopyFrom(head)
    frame.id = rng.randrange(1, 300) if roll < 0.9 else frame.id
    return first_frame(frame, memoryview(bytes(rng.choice((0, 3, 8, 3000)))))


def start_host(rng: Random) -> Read:
    """A host's side of a stream, which goes on after what should end it."""
    room = Room(16, ROOM_BYTES)
    answerer = Answerer(lambda request: BYTES_MAX, room, room)

    def read(data: bytes) -> None:
        try:
            event = answerer.heard(data, 0.0)
            if isinstance(event, Asked) and rng.random() < 0.8:
                answerer.answer(event.id, vnode_pb2.HopReply(), event.payload, event.hlc)
        finally:
            while rng.random() < 0.9 and answerer.outbox.take() is not None:
                pass
            assert 0 <= room.exchanges <= 16
            assert 0 <= room.held_bytes <= ROOM_BYTES

    return read


def caller_frame(rng: Random) -> bytes:
    """A frame to a caller who has asked ids 1 to ASKED."""
    roll = rng.random()
    if roll < 0.5:
        return mutated(rng, TO_A_CALLER)
    frame = scrambled(rng, REPLY) if roll < 0.7 else vnode_pb2.HopFrame.FromString(written(REPLY))
    frame.id = rng.randrange(1, ASKED + 1) if roll < 0.9 else frame.id
    return first_frame(frame, memoryview(bytes(rng.choice((0, 3, 3000)))))


def start_caller(rng: Random) -> Read:
    """A caller's side of a stream."""
    asker = Asker()
    for _ in range(ASKED):
        asker.ask(HEADS[1].forward, None, 0.0, 5.0, "", reply_bytes_max=BYTES_MAX)

    def read(data: bytes) -> None:
        replied = asker.heard(data)
        assert replied is None or len(replied.payload or b"") <= BYTES_MAX

    return read


def tensor_frame(rng: Random) -> bytes:
    """A tensor with its payload inside, only to have both in one frame."""
    if rng.random() < 0.6:
        return mutated(rng, PACKED)
    return written(scrambled(rng, common_pb2.Tensor.FromString(rng.choice(PACKED))))


def read_tensor(data: bytes) -> None:
    """What a host does with a tensor."""
    try:
        tensor = common_pb2.Tensor.FromString(data)
    except Exception:  # protobuf's, of the frame that is none; not what is judged here
        return
    payload = tensor.payload
    tensor.ClearField("payload")
    assert decode(tensor, payload, bytes_max=BYTES_MAX).nbytes <= BYTES_MAX


HOP_PARSERS = (
    Parser("hop at a host", 6_000, host_frame, start_host),
    Parser("hop at a caller", 4_000, caller_frame, start_caller),
    Parser("tensor", 6_000, tensor_frame, stateless(read_tensor)),
)
