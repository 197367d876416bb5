"""Requests through a stage at once, and sequences in parts: what each would get alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_network import plain_output, small_graph
from tiny_language import CONTEXT, language_graph, plain_logits

from p2pnet.vnode.gathering import Part
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.hosted import Hosted
from p2pnet.vnode.sessions import Session
from p2pnet.vnode.stages import Stage, inference_stages_of
from p2pnet.vnode.tensors import Array
from p2pnet.vnode.together import No, do_continue, do_run


def hosted_all(graph: CompiledGraph) -> tuple[Hosted, Stage]:
    """A whole network on one host, which then is one stage."""
    hosted = Hosted(graph, graph.vnodes())
    for vnode in hosted.vnodes:
        hosted.do_make(vnode, None)
    (stage,) = inference_stages_of(graph, graph.vnodes())
    return hosted, stage


def part(stage: Stage, *arrays: Array) -> Part:
    given = arrays if len(arrays) == len(stage.inputs) else arrays * len(stage.inputs)
    return Part(b"id", len(arrays[0]), given, None, b"")


def rows(count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)


def test_each_request_gets_its_own_rows() -> None:
    hosted, stage = hosted_all(small_graph())
    given = [rows(count, seed=count) for count in (1, 4, 2)]
    results = do_run(hosted, stage, ("out",), [part(stage, x) for x in given])
    for x, result in zip(given, results, strict=True):
        assert not isinstance(result, No)
        np.testing.assert_allclose(result["out"], plain_output(0, x), rtol=1e-5, atol=1e-6)


def test_requests_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted, stage = hosted_all(small_graph())
    calls: list[int] = []
    real = hosted.do_infer

    def counted(nodes: Any, inputs: Any, *rest: Any) -> Any:
        calls.append(len(next(iter(inputs.values()))))
        return real(nodes, inputs, *rest)

    monkeypatch.setattr(hosted, "do_infer", counted)
    do_run(hosted, stage, ("out",), [part(stage, rows(2)) for _ in range(8)])
    assert calls == [16]


def test_a_bad_input_costs_nobody_else() -> None:
    hosted, stage = hosted_all(small_graph())
    bad = rows(2)
    bad[1, 3] = np.nan
    good, refused, other = do_run(
        hosted, stage, ("out",), [part(stage, x) for x in (rows(1), bad, rows(3))]
    )
    assert isinstance(refused, No)
    assert refused.bad_input
    assert "fc1" in refused.reason  # the first VNode that gives it
    for x, result in ((rows(1), good), (rows(3), other)):
        assert not isinstance(result, No)
        np.testing.assert_allclose(result["out"], plain_output(0, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuts", [(5,), (1, 1, 1, 1, 1, 1), (3, 1, 7, 1, 1), (CONTEXT,)])
def test_a_sequence_in_parts_is_the_whole_sequence(cuts: tuple[int, ...]) -> None:
    hosted, stage = hosted_all(language_graph())
    tokens = np.random.default_rng(7).integers(0, 256, sum(cuts))
    session, found, at = Session(), [], 0
    for cut in cuts:
        piece = part(stage, tokens[None, at : at + cut])
        (result,) = do_continue(hosted, stage, ("out",), (piece,), session)
        assert not isinstance(result, No), result
        found.append(result["out"][0])
        at += cut
        assert session.size_bytes == 2 * 2 * at * 8 * 4, "keys and values of two attentions"
    np.testing.assert_allclose(np.concatenate(found), plain_logits(tokens), rtol=1e-4, atol=1e-5)
