"""The verbs infer and generate: what they print and write, over a network that is made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from p2pnet.cli import generate, infer
from p2pnet.client.inference import Chunk, Missing
from p2pnet.errors import UnreachableError, UsageError


class FakeNetwork:
    """Twice its input, and nothing for the rows from 3 to 4; writes in three pieces."""

    def __init__(self) -> None:
        spec = SimpleNamespace(shape=(2,), dtype="float32")
        self.graph = SimpleNamespace(output="out", inputs={"x": spec}, tensor=lambda ref: spec)
        self.lose = True
        self.asked: Any = None

    def infer(self, x: Any) -> Iterator[Chunk | Missing]:
        self.asked = x
        x = x["x"] if isinstance(x, dict) else x
        yield Chunk(0, 2 * x[:3])
        if self.lose:
            yield Missing(3, 4, "the dog ate it", "fc1", "12D3Koo")
            yield Chunk(5, 2 * x[5:])
        else:
            yield Chunk(3, 2 * x[3:])

    def generate(self, prompt: str, **settings: Any) -> Iterator[str]:
        self.asked = (prompt, settings)
        yield from ("ovo", " usque", " ad mala")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    made = FakeNetwork()

    @contextmanager
    def connect(*where: Any) -> Iterator[Any]:
        yield SimpleNamespace(network=lambda name: made)

    for verb in ("infer", "generate"):  # p2pnet.cli has the commands under the modules' names
        monkeypatch.setattr(import_module(f"p2pnet.cli.{verb}"), "connect", connect)
    return made


def write(path: Path) -> np.ndarray[Any, Any]:
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(path, x)
    return x


def run(verb: Any, *arguments: str) -> Any:
    return CliRunner().invoke(verb, arguments)


def test_what_could_be_had_is_written_and_the_rest_listed(
    network: FakeNetwork, tmp_path: Path
) -> None:
    x = write(tmp_path / "x.npy")
    given = ["net", "--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")]
    done = run(infer, *given, "--json")
    assert isinstance(done.exception, UnreachableError)
    assert str(done.exception).startswith("2 of 6 samples have no output")
    said = json.loads(done.stdout)
    assert said["shape"] == [6, 2]
    assert said["missing"] == [
        {"first": 3, "last": 4, "reason": "the dog ate it", "vnode": "fc1", "host": "12D3Koo"}
    ]
    y = np.load(tmp_path / "y.npy")
    assert np.isnan(y[3:5]).all()
    np.testing.assert_array_equal(y[[0, 1, 2, 5]], 2 * x[[0, 1, 2, 5]])
    shown = run(infer, *given)
    assert "samples 3 to 4 are missing: the dog ate it" in shown.stderr
    assert "4 samples in" in shown.stdout


def test_nothing_missing_is_nothing_to_say(network: FakeNetwork, tmp_path: Path) -> None:
    network.lose = False
    x = write(tmp_path / "x.npy")
    files = ["--output", str(tmp_path / "y.npy"), "--input", f"x={tmp_path / 'x.npy'}"]
    done = run(infer, "net", *files, "--json")
    assert done.exit_code == 0, done.exception
    assert sorted(json.loads(done.stdout)) == ["missing", "seconds", "shape"]
    np.testing.assert_array_equal(network.asked["x"], x)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), 2 * x)


def test_several_inputs_need_their_names(network: FakeNetwork, tmp_path: Path) -> None:
    write(tmp_path / "x.npy")
    file = str(tmp_path / "x.npy")
    done = run(infer, "net", "--input", file, "--input", file, "--output", f"{tmp_path}/y.npy")
    assert isinstance(done.exception, UsageError)
    assert "NAME=FILE.npy" in str(done.exception)


def test_text_is_printed_as_it_comes(network: FakeNetwork) -> None:
    done = run(generate, "net", "--prompt", "Ab ", "--top-k", "5", "--seed", "7")
    assert done.exit_code == 0, done.exception
    assert done.stdout == "Ab ovo usque ad mala\n"
    prompt, settings = network.asked
    assert (prompt, settings["top_k"], settings["seed"]) == ("Ab ", 5, 7)
    said = json.loads(run(generate, "net", "--prompt", "Ab ", "--json").stdout)
    assert said["text"] == "ovo usque ad mala"
    assert sorted(said) == ["prompt", "seconds", "text", "tokens"]


@pytest.mark.parametrize("wrong", [["--tokens", "0"], ["--temperature", "-1"], ["--top-k", "x"]])
def test_wrong_numbers_are_wrong_usage(network: FakeNetwork, wrong: list[str]) -> None:
    assert run(generate, "net", "--prompt", "x", *wrong).exit_code == 2
