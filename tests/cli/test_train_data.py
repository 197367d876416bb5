"""What `p2pnet train --data` takes for which network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_network import small_graph

from p2pnet.cli.networks import _Data, _steps
from p2pnet.data.datasets import batches
from p2pnet.errors import UsageError
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.graph import CompiledGraph


def reader(length: int) -> CompiledGraph:
    """A network that reads so many tokens at a time."""
    return load_spec(
        {
            "name": "reader",
            "inputs": {"x": {"shape": [length], "dtype": "int64"}},
            "nodes": [
                {
                    "id": "emb",
                    "type": "Embedding",
                    "config": {"num_embeddings": 256, "embedding_dim": 256},
                }
            ],
            "loss": {"id": "loss", "type": "CrossEntropyLoss", "config": {"class_dim": -1}},
            "optimizer": {"type": "SGD", "lr": 0.1},
        }
    )


def test_a_text_is_cut_to_the_networks_length(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(100)))
    graph = reader(8)
    x, y = _Data(f"text:{path}").samples(graph)
    assert x.shape == (12, *graph.inputs["x"].shape)
    assert y.shape == (12, *graph.target.shape)
    assert np.array_equal(y, x + 1)


def test_other_networks_take_no_text_and_other_data_are_as_they_are() -> None:
    with pytest.raises(UsageError, match="small is no language model"):
        _Data("python-reference:test").samples(small_graph())
    assert len(_Data("digits:test").samples(small_graph())[0]) == 360


@pytest.mark.parametrize("ref", ["text:/not/there", "python-reference:", "file:///not/there.npz"])
def test_what_is_not_there_is_said_before_anybody_is_asked(ref: str) -> None:
    with pytest.raises(UsageError):
        _Data(ref)


@pytest.mark.parametrize("smallest", [1, 2, 4, 5])
@pytest.mark.parametrize("samples", [3, 8, 10, 11])
def test_the_progress_bar_ends_with_the_last_batch(samples: int, smallest: int) -> None:
    x = np.zeros((samples, 1))
    fed = list(batches(x, x, 4, 0, 1, smallest=smallest))
    assert _steps(samples, 4, smallest) == len(fed)
