"""Both ends of a stream of hops: what goes in comes out, in turns, within bounds."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnet.errors import MalformedError
from p2pnet.net.hop_frames import DATA_BYTES_MAX, Request, first_frame, later_frame, read_frame
from p2pnet.v1 import common_pb2, vnode_pb2
from p2pnet.vnode.hops import Asker, Replied
from p2pnet.vnode.hops_answerer import ARRIVE_S_MAX, UNKNOWN_BYTES_MAX, Answerer, Asked, GivenUp
from p2pnet.vnode.hops_flow import (
    EXCHANGES_MAX,
    PARTS_FREE,
    PAYLOAD_BYTES_MAX,
    ROOM_BYTES_MAX,
    WAITING_MAX,
    Outbox,
    Room,
)
from p2pnet.vnode.hops_server_shell import ALL_BYTES_MAX, ALL_EXCHANGES_MAX, ALL_STRANGE_BYTES_MAX

CHUNK = 1000


def train(vnode: str = "fc1") -> vnode_pb2.TrainRequest:
    return vnode_pb2.TrainRequest(vnode=vnode, slot=3)


def forward() -> vnode_pb2.ForwardRequest:
    return vnode_pb2.ForwardRequest(vnode="fc1", request_id=b"r" * 16)


def a_room(exchanges_max: int = EXCHANGES_MAX, bytes_max: int = ROOM_BYTES_MAX) -> Room:
    return Room(exchanges_max, bytes_max)


def taking(bytes_max: int | None = 1 << 20, room: Room | None = None) -> Answerer:
    room = room or a_room()
    return Answerer(lambda request: bytes_max, room, room, chunk_bytes=CHUNK)


class Pair:
    """An asker and an answerer with a wire between them."""

    def __init__(self, answerer: Answerer | None = None) -> None:
        self.asker = Asker(chunk_bytes=CHUNK)
        self.answerer = answerer or taking()
        self.now = 0.0

    def ask(self, request: Request, payload: bytes | None = None, **more: int) -> int:
        data = None if payload is None else memoryview(payload)
        limit = more.get("reply_bytes_max", 1 << 20)
        return self.asker.ask(request, data, self.now, 5.0, "1-0", reply_bytes_max=limit)

    def there(self) -> list[Asked | GivenUp]:
        heard = [self.answerer.heard(raw, self.now) for raw in frames(self.asker.outbox)]
        return [event for event in heard if event is not None]

    def back(self) -> list[Replied]:
        heard = [self.asker.heard(raw) for raw in frames(self.answerer.outbox)]
        return [event for event in heard if event is not None]


def view(payload: bytes | None) -> memoryview | None:
    """As it arrives: what is empty is as if it were not there."""
    return memoryview(payload) if payload else None


def hear(core: Asker | Answerer, raws: Iterable[bytes]) -> None:
    for raw in raws:
        if isinstance(core, Asker):
            core.heard(raw)
        else:
            core.heard(raw, 0.0)


def frames(outbox: Outbox) -> list[bytes]:
    out = []
    while (frame := outbox.take()) is not None:
        out.append(frame)
    return out


@pytest.mark.parametrize("size", [None, 0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK, 5_000_000])
def test_a_hop_there_and_back(size: int | None) -> None:
    pair = Pair(taking(8 << 20))
    payload = None if size is None else random.Random(size).randbytes(size)
    id = pair.ask(forward(), payload, reply_bytes_max=8 << 20)
    (asked,) = pair.there()
    assert asked == Asked(id, forward(), view(payload), 4.5, "1-0")
    reply = vnode_pb2.HopReply(tensor=common_pb2.Tensor(shape=[1]))
    pair.answerer.answer(id, reply, None if payload is None else memoryview(payload), "2-0")
    assert pair.back() == [Replied(id, reply, view(payload), "2-0")]
    assert pair.asker.open == 0
    assert pair.asker.outbox.unsent_bytes == pair.answerer.outbox.unsent_bytes == 0


@pytest.mark.parametrize(
    "request_",
    [
        train(),
        forward(),
        vnode_pb2.CollectRequest(vnode="a"),
        vnode_pb2.FollowRequest(vnode="a"),
        vnode_pb2.DecidedRequest(step=7, norms=[1.5]),
    ],
    ids=lambda request: type(request).__name__,
)
def test_every_kind_of_request_travels(request_: Request) -> None:
    pair = Pair()
    pair.ask(request_)
    (asked,) = pair.there()
    assert isinstance(asked, Asked)
    assert asked.request == request_


def test_a_small_message_waits_for_one_frame_of_a_large_one() -> None:
    pair = Pair()
    large, small = pair.ask(train(), bytes(100 * CHUNK)), pair.ask(train(), b"small")
    order = [read_frame(raw)[0].id for raw in frames(pair.asker.outbox)]
    assert order[:3] == [large, small, large]
    assert len(order) == 100  # the last two go together, as nobody waits


def test_payloads_are_not_copied_on_the_way_out_or_in() -> None:
    outbox = Outbox()
    payload = bytearray(64 << 20)
    tracemalloc.start()
    try:
        outbox.put(vnode_pb2.HopFrame(id=1), memoryview(payload))
        frame = outbox.take()
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert frame is not None
    data = read_frame(frame)[1]
    assert data.obj is frame


def test_what_is_given_up_is_not_sent_on() -> None:
    pair = Pair()
    first, second = pair.ask(train(), bytes(50 * CHUNK)), pair.ask(train(), b"2")
    raw = [pair.asker.outbox.take() for _ in range(3)]
    pair.asker.give_up(first)
    third = pair.ask(train(), bytes(50 * CHUNK))
    pair.asker.give_up(third)  # nothing of it has been sent: nothing is said of it
    raw += frames(pair.asker.outbox)
    assert len(raw) == 4
    events = [pair.answerer.heard(frame, 0.0) for frame in raw if frame is not None]
    assert [(type(event), event.id) for event in events if event] == [(Asked, second)]
    assert pair.asker.outbox.unsent_bytes == 0


def test_a_late_reply_is_dropped() -> None:
    pair = Pair()
    id = pair.ask(forward(), b"x")
    pair.there()
    pair.answerer.answer(id, vnode_pb2.HopReply(), memoryview(bytes(5 * CHUNK)), "")
    first = pair.answerer.outbox.take()
    assert first is not None
    assert pair.asker.heard(first) is None
    pair.asker.give_up(id)
    assert pair.there() == []  # it has been answered
    assert pair.back() == []
    assert pair.ask(forward()) == id + 1


def test_an_answer_to_what_was_given_up_is_not_sent() -> None:
    room = a_room()
    pair = Pair(taking(room=room))
    id = pair.ask(train(), b"x")
    pair.there()
    held = (1, room.held_bytes)
    assert room.held_bytes > 1
    pair.asker.give_up(id)
    assert pair.there() == [GivenUp(id)]
    assert (room.exchanges, room.held_bytes) == held  # as long as its handler runs
    pair.answerer.answer(id, vnode_pb2.HopReply(), None, "")
    assert pair.back() == []
    assert (room.exchanges, room.held_bytes) == (0, 0)


def test_what_is_too_large_is_refused_with_both_sizes() -> None:
    pair = Pair(taking(5000))
    pair.ask(train(), bytes(5001))
    small = pair.ask(train(), b"x")
    events = pair.there()  # and the rest of it is read over
    assert [event.id for event in events] == [small]
    (refused,) = pair.back()
    assert refused.reply.refusal.code == common_pb2.REFUSAL_CODE_TOO_LARGE
    assert "5001" in refused.reply.refusal.detail
    assert "5000" in refused.reply.refusal.detail


def test_nothing_is_allocated_for_what_is_announced() -> None:
    answerer = taking(PAYLOAD_BYTES_MAX)
    head = vnode_pb2.HopFrame(id=1, train=train(), size_bytes=PAYLOAD_BYTES_MAX + 1)
    tracemalloc.start()
    try:
        assert answerer.heard(first_frame(head, memoryview(b"x")), 0.0) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_peer_has_so_much_room_over_all_its_streams() -> None:
    room = Room(exchanges_max=3, bytes_max=1000)
    one, other = Pair(taking(room=room)), Pair(taking(room=room))
    ids = [one.ask(train(), bytes(400)), one.ask(train(), bytes(400))]
    assert len(one.there()) == 2
    other.ask(train(), bytes(400))
    assert other.there() == []
    assert other.back()[0].reply.refusal.code == common_pb2.REFUSAL_CODE_BUSY
    other.ask(train(), bytes(100))
    assert len(other.there()) == 1
    other.ask(train())
    assert other.there() == []  # three exchanges
    one.answerer.answer(ids[0], vnode_pb2.HopReply(), None, "")
    other.ask(train(), bytes(400))
    assert len(other.there()) == 1
    one.answerer.close()
    other.answerer.close()
    assert (room.exchanges, room.held_bytes) == (0, 0)


def test_all_peers_together_have_so_much_room() -> None:
    node = Room(100, 1000)
    one, other = Room(100, 800, node), Room(100, 800, node)
    assert not one.take(1, 801)
    assert one.take(1, 600)
    assert not other.take(1, 600)
    assert other.take(1, 400)
    one.give_back(1, 600)
    assert other.take(1, 400)
    other.give_back(2, 800)
    assert (node.exchanges, node.held_bytes, one.exchanges, other.exchanges) == (0, 0, 0, 0)


def announce(answerer: Answerer, id: int, size: int, timeout_ms: int = 5000) -> None:
    frame = vnode_pb2.HopFrame(id=id, forward=forward(), size_bytes=size, timeout_ms=timeout_ms)
    assert answerer.heard(first_frame(frame, memoryview(b"")), 0.0) is None


def test_announcements_take_no_room_of_others() -> None:
    """Two strangers announce all that there is, and send nothing."""
    node = Room(ALL_EXCHANGES_MAX, ALL_BYTES_MAX)
    for _ in range(2):
        stranger = taking(PAYLOAD_BYTES_MAX, Room(EXCHANGES_MAX, ROOM_BYTES_MAX, node))
        for id in range(1, 9):
            announce(stranger, id, ROOM_BYTES_MAX // 8)
        assert not stranger.outbox  # nothing is refused
    honest = Pair(taking(room=Room(EXCHANGES_MAX, ROOM_BYTES_MAX, node)))
    honest.ask(train(), bytes(10 * CHUNK))
    assert [type(event) for event in honest.there()] == [Asked]
    assert node.held_bytes < 20 * CHUNK


def test_a_callers_share_is_well_below_half_of_all() -> None:
    assert PAYLOAD_BYTES_MAX < ROOM_BYTES_MAX < ALL_BYTES_MAX / 3
    assert ALL_STRANGE_BYTES_MAX < ALL_BYTES_MAX / 5


@pytest.mark.parametrize("timeout_s", [2.0, 4_000_000.0])
def test_what_does_not_come_in_time_is_not_waited_for(timeout_s: float) -> None:
    pair = Pair(taking(room=(room := a_room())))
    id = pair.asker.ask(
        train(), memoryview(bytes(5 * CHUNK)), 0.0, timeout_s, "", reply_bytes_max=0
    )
    first = pair.asker.outbox.take()
    assert first is not None
    pair.answerer.heard(first, 0.0)
    due = min(timeout_s, ARRIVE_S_MAX)
    assert pair.answerer.until == due
    assert pair.answerer.late(due - 0.1) == []
    assert room.exchanges == 1
    assert pair.answerer.late(due) == []
    assert (room.exchanges, room.held_bytes, pair.answerer.until) == (0, 0, math.inf)
    (refused,) = pair.back()
    assert (refused.id, refused.reply.refusal.code) == (id, common_pb2.REFUSAL_CODE_BUSY)
    assert pair.there() == []  # the rest is not sent
    assert pair.ask(train()) == pair.there()[0].id


def test_who_is_not_answered_in_time_hears_so() -> None:
    pair = Pair(taking(room=(room := a_room())))
    id = pair.ask(train(), b"x")
    (asked,) = pair.there()
    assert pair.answerer.until == 4.5
    assert pair.answerer.late(4.5) == [GivenUp(id)]
    assert pair.back()[0].reply.refusal.code == common_pb2.REFUSAL_CODE_BUSY
    assert room.exchanges == 1  # its handler still runs
    pair.answerer.end(asked.id)
    assert room.exchanges == 0
    assert pair.asker.late(100.0) == []


def test_a_caller_gives_up_what_has_no_reply_in_time() -> None:
    pair = Pair()
    first = pair.ask(train(), b"x")
    pair.now = 1.0
    second = pair.ask(train(), b"x")
    assert len(pair.there()) == 2
    assert pair.asker.until == 5.0
    assert pair.asker.late(5.5) == [first]
    assert (pair.asker.until, pair.asker.open) == (6.0, 1)
    assert pair.there() == [GivenUp(first)]
    assert pair.asker.late(6.0) == [second]


def test_room_that_runs_out_while_a_payload_comes() -> None:
    room = a_room(bytes_max=5 * CHUNK)
    pair = Pair(taking(room=room))
    large, small = pair.ask(train(), bytes(20 * CHUNK)), pair.ask(train(), b"x")
    assert [event.id for event in pair.there()] == [small]
    pair.answerer.answer(small, vnode_pb2.HopReply(), None, "")
    replies = {it.id: it.reply.refusal.code for it in pair.back()}
    assert replies == {large: common_pb2.REFUSAL_CODE_BUSY, small: 0}
    assert (room.exchanges, room.held_bytes) == (0, 0)


def test_a_network_that_is_not_known_has_little_room() -> None:
    room = a_room()
    strange = Room(EXCHANGES_MAX, 5 * CHUNK, room)
    answerer = Answerer(lambda request: None, room, strange, chunk_bytes=CHUNK)
    pair = Pair(answerer)
    pair.ask(train(), bytes(UNKNOWN_BYTES_MAX + 1))
    pair.ask(train(), bytes(3 * CHUNK))
    pair.ask(train(), bytes(3 * CHUNK))
    assert [type(event) for event in pair.there()] == [Asked]
    codes = sorted(it.reply.refusal.code for it in pair.back())
    assert codes == sorted([common_pb2.REFUSAL_CODE_TOO_LARGE, common_pb2.REFUSAL_CODE_BUSY])
    assert strange.held_bytes == room.held_bytes < 5 * CHUNK


def test_heads_take_room_too() -> None:
    pair = Pair(taking(room=a_room(bytes_max=10_000)))
    for _ in range(3):
        pair.ask(vnode_pb2.DecidedRequest(norms=[1.0] * 500))
    assert len(pair.there()) == 2
    assert pair.back()[0].reply.refusal.code == common_pb2.REFUSAL_CODE_BUSY


def test_refusals_that_nobody_reads_are_bounded() -> None:
    answerer = taking(10, a_room(exchanges_max=0))
    for id in range(1, WAITING_MAX + 2):
        assert not answerer.outbox.is_full
        hear(answerer, [head(id, 0)])
    assert answerer.outbox.is_full


def head(id: int = 1, size: int = 10, data: bytes = b"", **fields: object) -> bytes:
    frame = vnode_pb2.HopFrame(id=id, size_bytes=size, **(fields or {"train": train()}))  # type: ignore[arg-type]
    return first_frame(frame, memoryview(data))


REPLY: Any = {"reply": vnode_pb2.HopReply()}
TO_A_HOST = {
    "id 0": [head(0)],
    "an id twice": [head(1), head(1)],
    "an id from before": [head(2), head(1)],
    "an id that is too large": [head((1 << 64) - 1)],
    "data of an unknown id": [later_frame(1, memoryview(b"x"))],
    "more than was announced": [head(size=3, data=b"1234")],
    "more in a second frame": [head(size=3, data=b"12"), later_frame(1, memoryview(b"34"))],
    "data after the end": [head(size=2, data=b"12"), later_frame(1, memoryview(b"3"))],
    "data where there is none": [head(size=0, data=b"1")],
    "a reply": [head(**REPLY)],
    "an unknown id is given up": [later_frame(7, memoryview(b""))],
    "refused and more of it": [head(size=5000, data=bytes(5001))],
    "a frame too large": [head(size=1 << 21, data=bytes(DATA_BYTES_MAX + 1))],
    "parts too small": [head(size=500), *[later_frame(1, memoryview(b"x"))] * (PARTS_FREE + 1)],
    "no frame": [b"\xff" * 20],
    "empty": [b""],
    "data before the head": [b"\x7a\x01x" + head()],
    "cut short": [head(data=b"12345")[:-2]],
}


@pytest.mark.parametrize("name", TO_A_HOST)
def test_who_breaks_the_rules_loses_the_stream(name: str) -> None:
    room = a_room()
    answerer = taking(4000, room)
    with pytest.raises(MalformedError):
        hear(answerer, TO_A_HOST[name])
    answerer.close()
    assert (room.exchanges, room.held_bytes) == (0, 0)


TO_A_CALLER = {
    "never asked": [head(9, **REPLY)],
    "a request": [head(1)],
    "larger than is taken": [head(1, 4001, **REPLY)],
    "a payload alone": [later_frame(1, memoryview(b"x"))],
    "nothing": [later_frame(1, memoryview(b""))],
    "twice": [head(1, 10, b"1", **REPLY), head(1, 10, b"1", **REPLY)],
    "more than announced": [head(1, 1, b"12", **REPLY)],
}


@pytest.mark.parametrize("name", TO_A_CALLER)
def test_a_host_that_breaks_the_rules(name: str) -> None:
    pair = Pair()
    pair.ask(forward(), reply_bytes_max=4000)
    with pytest.raises(MalformedError):
        hear(pair.asker, TO_A_CALLER[name])


def test_refused_payloads_are_not_sent_without_end() -> None:
    answerer = taking(10)
    with pytest.raises(MalformedError):
        hear(answerer, [head(id, 100, b"1") for id in range(1, EXCHANGES_MAX + 2)])


def test_payloads_that_are_late_are_not_begun_without_end() -> None:
    answerer = taking(1000)
    for id in range(1, EXCHANGES_MAX + 1):
        announce(answerer, id, 1000, timeout_ms=1)
    assert answerer.late(1.0) == []
    with pytest.raises(MalformedError):
        announce(answerer, EXCHANGES_MAX + 1, 1000)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_any_order_of_events(seed: int) -> None:
    """Hops, replies and givings up in any order: whatever is answered is right, or given up."""
    rng = random.Random(seed)
    room = Room(exchanges_max=8, bytes_max=20 * CHUNK)
    pair = Pair(taking(6 * CHUNK, room))
    payloads: dict[int, bytes] = {}
    waiting: list[Asked] = []
    done: dict[int, Replied] = {}
    given_up: list[int] = []

    def to_host(count: int) -> None:
        for _ in range(count):
            raw = pair.asker.outbox.take()
            event = None if raw is None else pair.answerer.heard(raw, 0.0)
            if isinstance(event, Asked):
                assert (event.payload or b"") == payloads[event.id]
                waiting.append(event)
            elif isinstance(event, GivenUp):
                waiting[:] = [asked for asked in waiting if asked.id != event.id]
                pair.answerer.end(event.id)

    def to_caller(count: int) -> None:
        for _ in range(count):
            raw = pair.answerer.outbox.take()
            event = None if raw is None else pair.asker.heard(raw)
            if event is not None:
                assert event.id not in done
                assert event.id not in given_up
                done[event.id] = event

    for _ in range(rng.randrange(200)):
        match rng.randrange(5):
            case 0:
                payload = rng.randbytes(rng.choice([0, 1, 5, CHUNK, 3 * CHUNK, 7 * CHUNK]))
                payloads[pair.ask(forward(), payload)] = payload
            case 1:
                to_host(rng.randrange(5))
            case 2 if waiting:
                asked = waiting.pop(rng.randrange(len(waiting)))
                data = memoryview(payloads[asked.id][::-1])
                pair.answerer.answer(asked.id, vnode_pb2.HopReply(), data, "")
            case 3:
                to_caller(rng.randrange(5))
            case 4 if payloads:
                id = rng.choice(list(payloads))
                if id not in done and id not in given_up:
                    given_up.append(id)
                    pair.asker.give_up(id)
    to_host(10_000)
    for asked in waiting:
        data = memoryview(payloads[asked.id][::-1])
        pair.answerer.answer(asked.id, vnode_pb2.HopReply(), data, "")
    to_caller(10_000)
    assert sorted([*done, *given_up]) == sorted(payloads)
    for id, replied in done.items():
        if not replied.reply.HasField("refusal"):
            assert (replied.payload or b"") == payloads[id][::-1]
    assert pair.asker.open == 0
    assert (room.exchanges, room.held_bytes) == (0, 0)
    assert pair.asker.outbox.unsent_bytes == pair.answerer.outbox.unsent_bytes == 0
    assert not pair.asker.outbox._heads
    assert not pair.answerer.outbox._heads


def test_any_protobuf_writer_is_read() -> None:
    """Frames that protobuf itself has written, and fields of a later version."""
    frame = vnode_pb2.HopFrame(id=300, train=train(), size_bytes=5, hlc="x", data=b"12345")
    parsed, data = read_frame(frame.SerializeToString())
    assert bytes(data) == b"12345"
    frame.ClearField("data")
    assert parsed == frame
    extra = b"\xf8\x07\x05" + b"\xf9\x07" + bytes(8) + b"\xfd\x07" + bytes(4)
    parsed, data = read_frame(extra + frame.SerializeToString())
    assert (parsed.id, bytes(data)) == (300, b"")
