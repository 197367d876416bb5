"""The compiled graph: its facts for digits, its canonical JSON, and what a peer may not send."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import p2pnet
from p2pnet.errors import MalformedError, SpecError
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.compiling import compile_graph, from_json
from p2pnet.vnode.draft import Draft, Settings, TensorSpec
from p2pnet.vnode.graph import CompiledGraph

DIGITS_PATH = Path(p2pnet.__file__).parent / "data" / "digits.yaml"
DIGITS = load_spec(DIGITS_PATH)


def test_the_digits_graph() -> None:
    assert DIGITS.vnodes() == ("fc1", "act1", "fc2", "skip", "out", "loss")
    assert DIGITS.output == "out"
    assert (DIGITS.learning, DIGITS.seed, DIGITS.micro_batches, DIGITS.cut_every) == (
        "chain", 0, 1, 20,
    )  # fmt: skip
    assert dict(DIGITS.inputs) == {"x": TensorSpec((64,), "float32")}
    assert DIGITS.target == TensorSpec((), "int64")
    assert DIGITS.optimizer.config == {
        "lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0,
    }  # fmt: skip
    fc1 = DIGITS.node("fc1")
    assert fc1.config == {"in_features": 64, "out_features": 128, "bias": True}
    assert fc1.param_shapes == {"weight": (128, 64), "bias": (128,)}
    assert fc1.output == TensorSpec((128,))
    assert fc1.param_bytes == 4 * (128 * 64 + 128)
    # parameters, gradients, Adam's two moments and its two step counters
    assert fc1.state_bytes == 4 * fc1.param_bytes + 2 * 4
    assert fc1.activation_bytes == 2 * 4 * (64 + 128)
    assert (fc1.flops_forward, fc1.flops_backward) == (128 * (2 * 64 + 1), 2 * 128 * 129)
    assert sum(node.param_bytes for node in DIGITS.nodes) == 4 * 17_226
    # One digest, one graph: it changes only with the format version.
    assert DIGITS.digest.hex().startswith("90a64584ccfb8d5e")


def test_the_digest_of_a_graph_without_groups_is_as_it_ever_was() -> None:
    """A network's manifest names it, and there are networks."""
    assert DIGITS.digest.hex() == (
        "90a64584ccfb8d5e24e422fc83dc5524f0188107c36b36f0fc24729ef3925735"
    )
    assert b"group" not in DIGITS.to_json()


def test_a_group_travels_with_the_graph() -> None:
    wide = {"in_features": 8, "out_features": 8}
    graph = compile_graph(
        name="grouped",
        inputs={"x": TensorSpec((8,))},
        nodes=[Draft("a", "Linear", wide, ("x",), "g"), Draft("b", "Linear", wide, ("a",))],
        loss=Draft("loss", "MSELoss", {}, ("b",), "g"),
        optimizer="SGD",
        optimizer_config={},
    )
    assert [graph.node(vnode).group for vnode in graph.vnodes()] == ["g", "", "g"]
    assert from_json(graph.to_json()) == graph
    top = json.loads(graph.to_json())
    for wrong in ("", 7, None, "no such/name"):
        top["nodes"][0]["group"] = wrong
        with pytest.raises(MalformedError):
            from_json(json.dumps(top, sort_keys=True, separators=(",", ":")).encode())


def test_who_consumes_what() -> None:
    assert DIGITS.consumers("x") == (("fc1", 0), ("skip", 1))
    assert DIGITS.consumers("fc2") == (("skip", 0),)
    assert DIGITS.consumers("out") == (("loss", 0),)
    assert DIGITS.consumers("y") == (("loss", 1),)
    assert DIGITS.consumers("loss") == ()
    assert DIGITS.tensor("y") == DIGITS.target
    assert DIGITS.tensor("skip").shape == (64,)


def test_one_node_may_take_the_same_input_twice() -> None:
    graph = compile_graph(
        name="twice",
        inputs={"x": TensorSpec((3,))},
        nodes=[Draft("double", "Add", {}, ("x", "x"))],
        loss=Draft("loss", "MSELoss", {}, ("double",)),
        optimizer="SGD",
        optimizer_config={"lr": 1},
    )
    assert graph.consumers("x") == (("double", 0), ("double", 1))
    assert from_json(graph.to_json()) == graph


def language(settings: Settings | None = None, **changes: Any) -> CompiledGraph:
    """Tokens, an embedding that the head shares, and a layer between."""
    fields: dict[str, Any] = {
        "name": "language",
        "inputs": {"x": TensorSpec((6,), "int64")},
        "nodes": [
            Draft("emb", "Embedding", {"num_embeddings": 9, "embedding_dim": 4}, ("x",), "e"),
            Draft("fc", "Linear", {"in_features": 4, "out_features": 4}, ("emb",), codec="fp16"),
            Draft("skip", "Add", {}, ("emb", "fc")),
            Draft("head", "TiedLinear", {}, ("skip",), "e", tied="emb"),
        ],
        "loss": Draft("loss", "CrossEntropyLoss", {"class_dim": -1}, ("head",)),
        "optimizer": "AdamW",
        "optimizer_config": {},
    }
    return compile_graph(**(fields | changes), settings=settings or Settings())


def test_tied_nodes_are_entries_of_one_vnode() -> None:
    graph = language()
    assert graph.vnodes() == ("emb", "fc", "skip", "loss")
    assert [graph.home(node) for node in ("emb", "head", "fc", "loss")] == [
        "emb", "emb", "fc", "loss",
    ]  # fmt: skip
    assert graph.entries("emb") == ("emb", "head")
    assert graph.entries("fc") == ("fc",)
    assert graph.node("head").param_shapes == {}
    assert graph.tensor("head").shape == (6, 9)
    assert graph.target == TensorSpec((6,), "int64")
    assert graph.consumers("emb") == (("fc", 0), ("skip", 0))
    assert from_json(graph.to_json()) == graph


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (Draft("head", "TiedLinear", {}, ("skip",), "e"), "needs tied: the id of an Embedding"),
        (Draft("head", "TiedLinear", {}, ("skip",), tied="fc"), "needs tied: the id of an"),
        (Draft("head", "TiedLinear", {}, ("skip",), tied="emb"), "shares the weight of emb, and"),
        (Draft("head", "Tanh", {}, ("skip",), tied="emb"), "head: Tanh has no weight to tie to"),
        (Draft("head", "TiedLinear", {}, ("x",), "e", tied="emb"), "takes float32, but x gives"),
        (Draft("head", "Tanh", {}, ("skip",), codec="lzma"), "the codec of head is auto, raw"),
    ],
)
def test_what_cannot_be_tied(node: Draft, words: str) -> None:
    nodes = [
        Draft("emb", "Embedding", {"num_embeddings": 9, "embedding_dim": 4}, ("x",), "e"),
        Draft("fc", "Linear", {"in_features": 4, "out_features": 4}, ("emb",)),
        Draft("skip", "Add", {}, ("emb", "fc")),
        node,
    ]
    with pytest.raises(SpecError) as error:
        language(nodes=nodes)
    assert words in str(error.value)


def test_a_sequence_of_another_length() -> None:
    graph = language()
    assert graph.at_length(6) == graph
    longer = graph.at_length(11)
    assert longer.tensor("head").shape == (11, 9)
    assert longer is graph.at_length(11)
    assert longer.node("emb").param_shapes == graph.node("emb").param_shapes
    for length in (0, -1):
        with pytest.raises(SpecError, match="whole numbers above 0"):
            graph.at_length(length)
    with pytest.raises(SpecError, match="in_features=64"):
        DIGITS.at_length(65)
    for length in range(1, 80):
        assert graph.at_length(length).tensor("fc").shape == (length, 4)


def test_codecs() -> None:
    graph = language(Settings(codec="zstd"))
    assert [graph.codec_of(ref) for ref in ("x", "emb", "fc")] == ["zstd", "zstd", "fp16"]
    assert DIGITS.codec_of("fc1") == "auto"


def test_memory_is_of_all_that_is_in_flight() -> None:
    fc1 = DIGITS.node("fc1")
    assert DIGITS.memory_bytes("fc1") == (
        fc1.state_bytes + 1024 * fc1.activation_bytes + (256 << 10)
    )
    split = language(Settings(micro_batches=4, batch_max=30))
    emb, head = split.node("emb"), split.node("head")
    assert emb.activation_bytes == 8 * 6 + 2 * 4 * 6 * 4
    assert split.memory_bytes("emb") == (
        emb.state_bytes + 8 * 4 * (emb.activation_bytes + head.activation_bytes) + (256 << 10)
    )
    stale = language(Settings(micro_batches=4, batch_max=30, staleness=2))
    assert stale.memory_bytes("emb") == (
        emb.state_bytes
        + 2 * emb.param_bytes
        + 8 * 8 * (emb.activation_bytes + head.activation_bytes)
        + (256 << 10)
    )


def test_settings_travel_with_the_graph_where_they_say_something() -> None:
    settings = Settings(
        micro_batches=3, batch_max=64, clip_norm=0.5, staleness=2, codec="int8", seed=4
    )
    graph = language(settings)
    assert from_json(graph.to_json()) == graph
    assert (graph.batch_max, graph.clip_norm, graph.staleness, graph.codec) == (64, 0.5, 2, "int8")
    assert graph.window == 4
    assert (DIGITS.window, language(Settings(replicas=2)).window) == (2, 2)
    for key in ("batch_max", "clip_norm", "staleness", "replicas", "codec", "tied", "buffers"):
        assert key.encode() not in DIGITS.to_json()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(learning="magic"), "learning is chain or local, not 'magic'"),
        (Settings(micro_batches=65), "micro_batches is a whole number, 1 to 64, not 65"),
        (Settings(batch_max=0), "batch_max is a number of samples, 1 to 1024, not 0"),
        (Settings(batch_max=2, micro_batches=3), "batch_max=2 samples cannot be split into"),
        (Settings(staleness=9), "staleness is a number of steps, 0 to 8, not 9"),
        (Settings(replicas=4), "replicas is a number of hosts, 1 to 3, not 4"),
        (Settings(replicas=2, staleness=1), "replicas above 1 need a staleness of 0"),
        (Settings(replicas=2, learning="local"), "replicas above 1 need learning: chain"),
        (Settings(clip_norm=1.0, learning="local"), "clip_norm needs learning: chain"),
        (Settings(staleness=1, learning="local"), "staleness needs learning: chain"),
        (Settings(clip_norm=-1.0), "clip_norm is a number of at least 0"),
        (Settings(clip_norm=float("inf")), "clip_norm is a number of at least 0"),
        (Settings(codec="gzip"), "codec is auto, raw, zstd, fp16, int8, not 'gzip'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: Settings, words: str) -> None:
    with pytest.raises(SpecError) as error:
        language(settings)
    assert words in str(error.value)


def test_buffers_are_in_the_graph() -> None:
    norm = {"num_features": 3}
    graph = language(
        inputs={"x": TensorSpec((3, 4, 4))},
        nodes=[Draft("bn", "BatchNorm2d", norm, ("x",)), Draft("flat", "Flatten", {}, ("bn",))],
        loss=Draft("loss", "MSELoss", {}, ("flat",)),
    )
    bn = graph.node("bn")
    assert bn.buffers == {
        "running_mean": TensorSpec((3,)),
        "running_var": TensorSpec((3,)),
        "num_batches_tracked": TensorSpec((), "int64"),
    }
    assert bn.state_bytes == 4 * (4 * 6 + 2) + 2 * (2 * 12 + 8)
    assert from_json(graph.to_json()) == graph


def test_json_there_and_back() -> None:
    data = DIGITS.to_json()
    again = CompiledGraph.from_json(data)
    assert again == DIGITS
    assert (again.to_json(), again.digest) == (data, DIGITS.digest)
    assert list(again.node("fc1").param_shapes) == ["weight", "bias"]  # torch's order
    assert b" " not in data


def changed(**changes: Any) -> bytes:
    graph = json.loads(DIGITS.to_json()) | changes
    return json.dumps(graph, sort_keys=True, separators=(",", ":")).encode()


def first_node(**changes: Any) -> bytes:
    graph = json.loads(DIGITS.to_json())
    graph["nodes"][0] |= changes
    return json.dumps(graph, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no format_version"),
        (changed(format_version=2), "has format 2, and this node reads 1"),
        (changed(format_version=True), "no format_version"),
        (changed(nodes=None), "no nodes"),
        (changed(nodes=[1]), "no inputs of the right type"),
        (changed(inputs={"x": {"shape": [2.5], "dtype": "float32"}}), "does not fit together"),
        (changed(inputs={"x": {"shape": [[]], "dtype": "float32"}}), "does not fit together"),
        (changed(seed=1e400), "no seed"),
        (changed(extra=1), "not in its canonical form"),
        (changed(nodes=[]), "a network has 1 to 10000 nodes, not 0"),
        (first_node(flops_forward=1), "not in its canonical form"),
        (first_node(state_bytes=0), "not in its canonical form"),
        (first_node(type="Conv9d"), "unknown type 'Conv9d'"),
        (first_node(inputs=["fc2"]), "a cycle"),
        (first_node(inputs=[["x"]]), "inputs are not names"),
        (first_node(id="../../etc"), "the id of a node"),
        (first_node(tied="fc2"), "Linear has no weight to tie"),
        (first_node(tied=3), "no tied of the right type"),
        (first_node(codec="rot13"), "does not fit together"),
        (first_node(buffers={}), "not in its canonical form"),
        (changed(clip_norm=0.0), "not in its canonical form"),
        (changed(clip_norm=1), "no clip_norm of the right type"),
        (changed(batch_max=1024), "not in its canonical form"),
        (changed(inputs={"x": {"shape": [64], "dtype": "int64"}}), "takes float32, but x gives"),
        (first_node(config={"in_features": 2**70, "out_features": 1}), "does not fit together"),
        (DIGITS.to_json() + b" ", "not in its canonical form"),
        (DIGITS.to_json().replace(b'"seed":0', b'"seed":0,"seed":0'), "not in its canonical form"),
        (DIGITS.to_json().replace(b'"lr":0.001', b'"lr":1e-3'), "not in its canonical form"),
        (DIGITS.to_json().replace(b'"lr":0.001', b'"lr":NaN'), "does not fit together"),
        (b" " * ((4 << 20) + 1), "at most 4 MiB"),
    ],
)
def test_what_no_honest_peer_sends(data: bytes, words: str) -> None:
    with pytest.raises(MalformedError) as error:
        from_json(data)
    assert words in str(error.value)


LOCAL = load_spec(DIGITS_PATH.read_text().replace("learning: chain", "learning: local"))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_a_damaged_graph_raises_nothing_else(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from([DIGITS, language(), LOCAL])).to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        graph = from_json(bytes(raw))
    except MalformedError:
        return
    assert graph.to_json() == bytes(raw)


def test_a_later_orchestrator_needs_neither_torch_nor_a_clock() -> None:
    code = (
        "import sys; before = set(sys.modules); import p2pnet.vnode.graph, "
        "p2pnet.orchestrator.placement; print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = result.stdout.split()
    assert "p2pnet.vnode.graph" in loaded
    for name in ("torch", "numpy", "trio", "asyncio", "grpc", "libp2p", "yaml", "pydantic"):
        assert name not in loaded
