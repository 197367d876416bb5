"""A spec into a graph, and everything that can be wrong with one, each in one sentence."""

# ruff: noqa: E501 (a table)
from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

import p2pnet
from p2pnet.errors import SpecError
from p2pnet.orchestrator.spec import SPEC_BYTES_MAX, load_spec

DIGITS = Path(p2pnet.__file__).parent / "data" / "digits.yaml"
DIGITS_TEXT = DIGITS.read_text()


def digits(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load(DIGITS_TEXT)
    return spec | changes


def nodes(*changes: tuple[int, dict[str, Any]]) -> dict[str, Any]:
    """The digits spec with some nodes changed; None takes a key away."""
    spec = digits()
    for index, change in changes:
        node = spec["nodes"][index] | change
        spec["nodes"][index] = {key: value for key, value in node.items() if value is not None}
    return spec


def test_a_path_a_mapping_and_a_text_give_the_same_graph() -> None:
    graph = load_spec(DIGITS)
    assert load_spec(str(DIGITS)) == graph
    assert load_spec(DIGITS_TEXT) == graph
    assert load_spec(digits()) == graph


def test_a_node_without_inputs_takes_the_one_before_it() -> None:
    graph = load_spec(DIGITS)
    assert [(node.id, node.inputs) for node in (*graph.nodes, graph.loss)] == [
        ("fc1", ("x",)),
        ("act1", ("fc1",)),
        ("fc2", ("act1",)),
        ("skip", ("fc2", "x")),
        ("out", ("skip",)),
        ("loss", ("out", "y")),
    ]


def test_nodes_and_the_loss_may_be_in_groups() -> None:
    spec = nodes((0, {"group": "front"}), (1, {"group": "front"}))
    spec["loss"] |= {"group": "front"}
    graph = load_spec(spec)
    assert [graph.node(vnode).group for vnode in graph.vnodes()] == [
        "front", "front", "", "", "", "front",
    ]  # fmt: skip


def test_settings_are_read() -> None:
    graph = load_spec(digits(micro_batches=4, batch_max=64, clip_norm=1, staleness=2, codec="zstd"))
    assert (graph.micro_batches, graph.batch_max, graph.clip_norm, graph.staleness) == (
        4,
        64,
        1.0,
        2,
    )
    assert (graph.codec, graph.replicas, load_spec(digits(replicas=3)).replicas) == ("zstd", 1, 3)


def test_the_documented_specs_fit_together() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    resnet, transformer = (part.partition("```")[0] for part in text.split("```yaml\n")[1:])
    rest = "name: n\noptimizer: {type: SGD, lr: 0.1}\n"
    picture = "inputs: {x: {shape: [16, 8, 8]}}\nloss: {id: loss, type: MSELoss}\n"
    assert load_spec(rest + picture + resnet).tensor("relu2").shape == (32, 4, 4)
    graph = load_spec(rest + transformer)
    assert graph.tensor("head").shape == (64, 96)
    assert graph.home("head") == "tokens"


def test_local_learning_adds_heads() -> None:
    graph = load_spec(digits(learning="local"))
    assert [node.id for node in graph.nodes] == [
        "fc1", "act1", "act1.head", "fc2", "skip", "skip.head", "out",
    ]  # fmt: skip
    assert "hidden" not in load_spec(digits(learning="local")).node("skip.head").param_shapes
    assert (
        "hidden.weight"
        in load_spec(digits(learning="local", head="mlp")).node("skip.head").param_shapes
    )


def test_loading_does_not_change_what_was_given() -> None:
    spec = digits()
    before = copy.deepcopy(spec)
    load_spec(spec)
    assert spec == before


def test_numbers_are_read_as_in_yaml_1_2() -> None:
    graph = load_spec(DIGITS_TEXT.replace("lr: 0.001", "lr: 1e-3"))
    assert graph == load_spec(DIGITS)


def test_nodes_may_stand_in_any_order() -> None:
    spec = digits()
    spec["nodes"] = [
        {"id": "b", "type": "Tanh", "inputs": ["a"]},
        {"id": "c", "type": "Add", "inputs": ["b", "a"]},
        {"id": "a", "type": "ReLU", "inputs": ["x"]},
    ]
    spec["loss"] = {"id": "loss", "type": "MSELoss", "inputs": ["c"]}
    assert load_spec(spec).vnodes() == ("a", "b", "c", "loss")


A, B = {"id": "a", "type": "Tanh"}, {"id": "b", "type": "Tanh"}

WRONG: list[tuple[str, Any, str]] = [
    (
        "shape",
        nodes((2, {"config": {"in_features": 100, "out_features": 64}})),
        "fc2: Linear expects in_features=100 values a sample, but act1 gives [128]",
    ),
    (
        "add",
        nodes((2, {"config": {"in_features": 128, "out_features": 32}})),
        "skip: Add expects inputs of the same shape, but fc2 gives [32] and x gives [64]",
    ),
    ("type", nodes((0, {"type": "Linaer"})), "fc1 has the unknown type 'Linaer': did you mean Linear"),
    ("far type", nodes((0, {"type": "Zyx9"})), "fc1 has the unknown type 'Zyx9': docs/models.md lists the 3"),
    ("loss type", digits(loss={"id": "l", "type": "HingeLoss"}), "l has the unknown loss type"),
    ("optimizer", digits(optimizer={"type": "adam"}), "unknown type 'adam': did you mean Adam?"),
    (
        "cycle",
        digits(nodes=[A | {"inputs": ["b"]}, B | {"inputs": ["a"]}]),
        "the nodes form a cycle: b -> a -> b",
    ),
    ("self", digits(nodes=[A | {"inputs": ["a"]}]), "the nodes form a cycle: a -> a"),
    (
        "cycle behind",
        digits(nodes=[{"id": "c", "type": "Tanh", "inputs": ["b"]}, A | {"inputs": ["b"]},
                      B | {"inputs": ["a"]}]),
        "a -> b -> a",
    ),
    ("reference", nodes((3, {"inputs": ["fc22", "x"]})), "skip takes 'fc22', which is no node and no "
     "input: did you mean fc2?"),
    ("target as input", nodes((3, {"inputs": ["fc2", "y"]})), "skip takes 'y', which is no node"),
    ("duplicate", nodes((1, {"id": "fc1"})), "two nodes have the same id fc1"),
    ("clash", nodes((1, {"id": "x"})), "an input and a node have the same id x"),
    ("loss clash", digits(loss={"id": "fc1", "type": "MSELoss"}), "a node and the loss have the same"),
    ("y", nodes((1, {"id": "y"})), "a node is called y, but y is the loss's target"),
    ("id", nodes((1, {"id": "a/b"})), "the id of a node is 1 to 64 letters"),
    ("dots", nodes((1, {"id": ".."})), "the first no dot"),
    ("name", digits(name="my net"), "name is 1 to 64 letters"),
    ("missing", {k: v for k, v in digits().items() if k != "loss"}, "the spec has no loss"),
    ("no type", nodes((1, {"type": None})), "node act1 has no type"),
    ("no id", nodes((1, {"id": None})), "node number 2 has no id"),
    ("unknown key", digits(layers=[]), "the spec has the unknown key 'layers': it takes name, inputs"),
    ("node key", nodes((0, {"cfg": {}})), "node fc1 has the unknown key 'cfg': it takes id, type"),
    ("config key", nodes((0, {"config": {"in_features": 64, "outs": 2}})), "fc1 has the unknown config"),
    ("config", nodes((0, {"config": {"in_features": 64, "out_features": 0}})), "fc1 expects out_features "
     "to be a whole number of 1 to 2147483647, not 0"),
    ("config list", nodes((0, {"config": [1]})), "node fc1.config: expected a mapping, not [1]"),
    ("id number", nodes((0, {"id": 7})), "node number 1.id: expected text, not 7"),
    ("seed", digits(seed="one"), "seed: expected a whole number, not 'one'"),
    ("seed range", digits(seed=-1), "seed is a whole number, 0 to"),
    ("rule", digits(learning="magic"), "learning is chain or local, not 'magic'"),
    ("head", digits(head="linear"), "head is for learning: local"),
    ("head kind", digits(learning="local", head="deep"), "head is linear or mlp, not 'deep'"),
    ("clip in local", digits(learning="local", clip_norm=1), "clip_norm needs learning: chain"),
    ("micro-batches", digits(micro_batches=65), "micro_batches is a whole number, 1 to 64, not 65"),
    ("clip", digits(clip_norm="big"), "clip_norm: expected a number, not 'big'"),
    ("empty tied", nodes((1, {"tied": ""})), "act1 has an empty tied: name it"),
    ("node codec", nodes((1, {"codec": "zip"})), "the codec of act1 is auto, raw, zstd, fp16, int8, not 'zip'"),
    ("cut", digits(cut_every=0), "cut_every is a number of steps"),
    ("no nodes", digits(nodes=[]), "nodes: must not be empty"),
    ("no inputs", digits(inputs={}), "inputs: must not be empty"),
    ("dtype", digits(inputs={"x": {"shape": [64], "dtype": "int8"}}), "input x: dtype is float32"),
    ("shape zero", digits(inputs={"x": {"shape": [0]}}), "input x: a shape is whole numbers above 0"),
    ("shape text", digits(inputs={"x": {"shape": "64"}}), "inputs.x.shape: expected a list, not '64'"),
    ("input key", digits(inputs={"x": {"size": [6]}}), "inputs.x"),
    ("lr", digits(optimizer={"type": "Adam", "lr": "fast"}), "optimizer expects lr to be a number"),
    ("opt key", digits(optimizer={"type": "Adam", "rate": 1}), "optimizer has the unknown config key"),
    ("nesterov", digits(optimizer={"type": "SGD", "nesterov": True}), "nesterov=true needs a momentum"),
    ("arity", nodes((0, {"inputs": ["x", "x"]})), "fc1: Linear takes 1 input, not 2"),
    ("add one", nodes((3, {"inputs": ["fc2"]})), "skip: Add takes 2 to 64 inputs, not 1"),
    ("group", nodes((0, {"group": "a b"})), "the group of fc1 is 1 to 64 letters"),
    ("no group", nodes((0, {"group": ""})), "fc1 has an empty group: name it, or leave the key out"),
    ("group number", nodes((0, {"group": 3})), "node fc1.group: expected text, not 3"),
    ("dead end", nodes((4, {"inputs": ["x"]})), "skip leads nowhere: no node takes its output"),
    ("unused", digits(inputs={"x": {"shape": [64]}, "z": {"shape": [1]}}), "no node takes the input z"),
    ("loss input", digits(loss={"id": "l", "type": "MSELoss", "inputs": ["x"]}), "which is no node"),
    ("huge", nodes((0, {"config": {"in_features": 64, "out_features": 2**31 - 1}}),
                   (1, {"type": "Linear", "config": {"in_features": 2**31 - 1,
                                                     "out_features": 2**31 - 1}})),
     "act1: Linear has more parameters than any host could hold"),
    ("number key", digits() | {5: 6}, "5: a key has to be text"),
    ("a list", "- 1\n- 2\n", "a spec is a mapping with name, inputs"),
    ("empty", "\n", "a spec is a mapping"),
    ("not YAML", "name: [\nx", "is not YAML: "),
    ("alias", "a: &a [1]\nb: *a\n", "YAML aliases (*a) are not taken in a spec"),
    ("deep", "\n" + "[" * 100 + "]" * 100, "nested deeper than 16 levels"),
    ("twice", "name: a\nname: b\n", "a key stands twice in the mapping that begins in line 1"),
    ("unhashable", "? [a]\n: 1\n", "is not YAML: found unhashable key"),
    ("tag", "a: !!python/object:os.system x\n", "is not YAML: could not determine a constructor"),
    ("bad date", "a: 2024-99-99\n", "is not YAML: "),
    ("large", "\n" + "#" * SPEC_BYTES_MAX, "at most 1 MiB"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "words"), [pytest.param(source, words, id=name) for name, source, words in WRONG]
)
def test_what_is_wrong_is_said_in_one_sentence(source: Any, words: str) -> None:
    with pytest.raises(SpecError) as error:
        load_spec(source)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.yaml"
    for content, words in [
        (DIGITS_TEXT.replace("ReLU", "RELU").encode(), "act1 has the unknown type 'RELU'"),
        (b"\xff\xfe", "is not YAML: it is not UTF-8 text"),
        (b"\x00\x01", "is not YAML"),
        (bytes(SPEC_BYTES_MAX + 1), "at most 1 MiB"),
    ]:
        path.write_bytes(content)
        with pytest.raises(SpecError) as error:
            load_spec(path)
        assert str(error.value).startswith(f"{path}: ")
        assert words in str(error.value)
    with pytest.raises(SpecError, match=r"nowhere\.yaml: there is no such file"):
        load_spec("nowhere.yaml")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load_spec(tmp_path)
