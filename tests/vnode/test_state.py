"""States at rest: the same bytes for the same state, and nothing a peer sends is believed."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

from p2pnet.errors import MalformedError
from p2pnet.vnode.state import (
    Expected,
    check_state,
    decode_state,
    encode_export,
    encode_state,
    model_digest,
    weights_of,
)


def some_state() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "param.weight": rng.standard_normal((4, 3)).astype(np.float32),
        "param.bias": rng.standard_normal(4).astype(np.float32),
        "opt.weight.step": np.array(7, np.float32),
        "opt.weight.exp_avg": rng.standard_normal((3, 4)).astype(np.float32).T,
        "buffer.seen": np.array([1, 2], np.int64),
    }


def test_round_trip() -> None:
    state = some_state()
    back, step = decode_state(encode_state(state, 12))
    assert step == 12
    assert sorted(back) == sorted(state)
    for name, array in state.items():
        assert np.array_equal(back[name], array)
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].flags.writeable


def test_the_same_state_has_the_same_bytes() -> None:
    state = some_state()
    backwards = {name: np.asfortranarray(state[name]) for name in sorted(state, reverse=True)}
    backwards["opt.weight.step"] = np.array(7, np.float32)
    assert encode_state(state, 1) == encode_state(backwards, 1)
    assert encode_state(state, 1) != encode_state(state, 2)


def test_the_bytes_are_pinned() -> None:
    """A digest written into a log long ago still names the same state."""
    state = {"param.b": np.array([1.5], np.float32), "param.a": np.array(2, np.int64)}
    text = (
        b'{"__metadata__":{"step":"3"},'
        b'"param.a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        b'"param.b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}'
    ).ljust(152)
    payload = bytes.fromhex("0200000000000000" + "0000c03f")
    assert encode_state(state, 3) == len(text).to_bytes(8, "little") + text + payload


def header(fields: object, payload: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + payload


GOOD = encode_state({"param.a": np.zeros(2, np.float32)}, 1)
BAD = {
    "empty": b"",
    "short": GOOD[:5],
    "cut": GOOD[:-1],
    "longer": GOOD + b"x",
    "header beyond the end": (2**40).to_bytes(8, "little") + GOOD[8:],
    "no json": header(b"{"),
    "a list": header([]),
    "deep": header(b"[" * 100_000),
    "no metadata": safetensors.numpy.save({"a": np.zeros(1)}),
    "no step": safetensors.numpy.save({"a": np.zeros(1)}, {"x": "1"}),
    "step of words": safetensors.numpy.save({"a": np.zeros(1)}, {"step": "one"}),
    "negative step": safetensors.numpy.save({"a": np.zeros(1)}, {"step": "-1"}),
    "huge step": safetensors.numpy.save({"a": np.zeros(1)}, {"step": "9" * 40}),
    "a step of other digits": safetensors.numpy.save({"a": np.zeros(1)}, {"step": "٣"}),
    "a dtype that numpy lacks": header(
        {
            "__metadata__": {"step": "1"},
            "a": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]},
        },
        b"\0",
    ),
    "shape and bytes differ": header(
        {
            "__metadata__": {"step": "1"},
            "a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]},
        },
        b"\0" * 4,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_states_are_refused(name: str) -> None:
    with pytest.raises(MalformedError):
        decode_state(BAD[name])


def test_a_state_has_to_fit() -> None:
    expected = {"param.a": Expected("float32", (2, 3))}
    check_state({"param.a": np.zeros((2, 3), np.float32)}, expected)
    for tensors, says in (
        ({}, "lacks the tensor param.a"),
        ({"param.a": np.zeros((3, 2), np.float32)}, r"float32\[3,2\], not float32\[2,3\]"),
        ({"param.a": np.zeros((2, 3))}, "float64"),
        ({"param.a": np.zeros((2, 3), np.float32), "x": np.zeros(1)}, "does not belong"),
    ):
        with pytest.raises(MalformedError, match=says):
            check_state(tensors, expected)


def test_exports_carry_weights_alone() -> None:
    weights = weights_of("fc1", some_state())
    assert sorted(weights) == ["fc1.bias", "fc1.seen", "fc1.weight"]
    back = safetensors.numpy.load(encode_export(weights))
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


def test_model_digest_as_the_design_says() -> None:
    tensors = {
        "fc.weight": np.array([[1, 2]], np.float32),
        "fc.bias": np.array([3], np.float32),
        "n.count": np.array(4, np.int64),
    }
    by_hand = (
        b"fc.bias\0float32\x001\0" + bytes.fromhex("00004040")
        + b"fc.weight\0float32\x001,2\0" + bytes.fromhex("0000803f00000040")
        + b"n.count\0int64\0\0" + bytes.fromhex("0400000000000000")
    )  # fmt: skip
    assert model_digest(tensors) == hashlib.sha256(by_hand).hexdigest()
    assert model_digest(dict(reversed(tensors.items()))) == model_digest(tensors)
    assert model_digest({**tensors, "fc.bias": np.array([4], np.float32)}) != model_digest(tensors)
