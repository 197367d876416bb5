"""VNodes of a network in torch on one host: what is held, given on, saved and refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_network import batch, small_graph

from p2pnet.errors import LocalError, MalformedError, ResourceError
from p2pnet.vnode.components import Component
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.hosted import Hosted
from p2pnet.vnode.tensors import Array

GRAPH = small_graph()


def made(graph: CompiledGraph = GRAPH) -> Hosted:
    hosted = Hosted(graph, graph.vnodes())
    for vnode in graph.vnodes():
        hosted.do_make(vnode, None)
    return hosted


def inputs(hosted: Hosted, step: int) -> list[Array]:
    x, y = batch(step)
    return [y if edge.source == "y" else x for edge in hosted.stages[0].inputs]


def hold(hosted: Hosted, step: int) -> None:
    given = inputs(hosted, step)
    hosted.do_forward(0, step, 0, given, len(given[0]))
    hosted.do_backward(0, step, 0, [])


def test_steps_go_in_order_and_are_applied_once() -> None:
    hosted = made()
    with pytest.raises(LocalError, match="holds no gradients for step 1"):
        hosted.do_apply(1, 0.0)
    hold(hosted, 1)
    with pytest.raises(LocalError, match="states of step 0"):
        hosted.do_apply(2, 0.0)
    hosted.do_apply(1, 0.0)
    with pytest.raises(LocalError, match="states of step 1"):
        hosted.do_apply(1, 0.0)
    with pytest.raises(LocalError, match="at step 1 here, not 2"):
        hosted.do_save(2)


def test_a_forward_and_a_backward_change_no_state() -> None:
    hosted = made()
    before = hosted.do_save(0)
    hold(hosted, 1)
    assert hosted.do_save(0) == before
    hosted.do_apply(1, 0.0)
    assert hosted.do_save(1) != before


def test_what_is_given_on_has_the_decided_step_to_the_bit() -> None:
    whole, ahead, behind = made(), made(), made()
    for hosted in (whole, ahead, behind):
        hold(hosted, 1)
    whole.do_apply(1, 0.0)
    ahead.do_apply(1, 0.0)
    hold(ahead, 2)  # work that nobody decided
    expected = whole.do_save(1)
    for hosted in (ahead, behind):  # one that has applied it, and one that holds it
        after = Hosted(GRAPH, GRAPH.vnodes())
        for vnode in GRAPH.vnodes():
            after.do_adopt(vnode, hosted.do_give(vnode, 1, 0.0), 1)
        assert after.do_save(1) == expected
        hold(after, 2)
        after.do_apply(2, 0.0)


def test_what_is_not_there_is_not_given_on() -> None:
    hosted = made()
    given = inputs(hosted, 1)
    hosted.do_forward(0, 1, 0, given, len(given[0]))  # and no backward
    for step in (1, 2):
        with pytest.raises(LocalError, match=f"cannot go on from step {step}"):
            hosted.do_give("fc1", step, 0.0)
    with pytest.raises(LocalError, match="cannot go on"):
        made().do_give("nobody", 0, 0.0)


def test_a_step_that_was_applied_in_part_is_never_applied_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosted = made()
    hold(hosted, 1)
    real = Component.apply

    def fails_at_out(self: Component, *args: Any, **kwargs: Any) -> None:
        if self.vnode == "out":
            raise ResourceError("there is not enough memory for out")
        real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Component, "apply", fails_at_out)
        with pytest.raises(ResourceError):
            hosted.do_apply(1, 0.0)
    for vnode in ("fc1", "out"):
        with pytest.raises(LocalError, match="cannot go on from step 1"):
            hosted.do_give(vnode, 1, 0.0)


def test_a_standby_follows_to_the_bit() -> None:
    first, standby = made(), made()
    for step in (1, 2, 3):
        hold(first, step)
        for vnode in GRAPH.vnodes():
            standby.do_follow(vnode, first.do_pack(vnode, step), 0.0)
        first.do_apply(step, 0.0)
    for vnode, state in first.do_save(3).items():
        after = Hosted(GRAPH, [vnode])
        after.do_adopt(vnode, standby.do_take_out(vnode), 3)
        assert after.do_save(3)[vnode] == state


def test_another_vnodes_gradients_are_not_followed() -> None:
    first, standby = made(), made()
    hold(first, 1)
    with pytest.raises(MalformedError, match=r"shape|other gradients"):
        standby.do_follow("fc1", first.do_pack("fc2", 1), 0.0)


def test_read_only_inputs_are_taken_and_not_written_to() -> None:
    hosted = made()
    given = [
        np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
        for array in inputs(hosted, 1)
    ]
    kept = [array.copy() for array in given]
    hosted.do_forward(0, 1, 0, given, len(given[0]))
    hosted.do_backward(0, 1, 0, [])
    for array, before in zip(given, kept, strict=True):
        assert np.array_equal(array, before)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x: x[:2], "samples"),
        (
            lambda x: x * np.float32(np.nan) if x.dtype.kind == "f" else x,
            "NaN or infinity in step 1",
        ),
    ],
)
def test_inputs_that_cannot_be(change: Any, why: str) -> None:
    hosted = made()
    given = inputs(hosted, 1)
    with pytest.raises(MalformedError, match=why):
        hosted.do_forward(0, 1, 0, [change(given[0]), *given[1:]], len(given[0]))


def test_a_part_is_not_larger_than_the_whole() -> None:
    hosted = made()
    with pytest.raises(MalformedError, match="in a batch of 3"):
        hosted.do_forward(0, 1, 0, inputs(hosted, 1), 3)


def test_what_a_codec_cannot_carry_is_put_down_to_the_batch() -> None:
    hosted = made(small_graph(codec="fp16"))
    given = inputs(hosted, 1)
    given[0] = given[0] * np.float32(1e37)
    with pytest.raises(MalformedError, match=r"in step 1"):
        hosted.do_forward(0, 1, 0, given, len(given[0]))
