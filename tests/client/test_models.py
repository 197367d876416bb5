"""A torch model as a network: its layers, its own names, its own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from memory_wire import keypair_of
from small_network import Trained, batch, train
from torch import nn
from virtual_time import play

from p2pnet.client.inference import infer_all
from p2pnet.client.models import spec_of, states_of
from p2pnet.client.passes import Passes
from p2pnet.client.session import NetworkInfo
from p2pnet.client.weights import fetch_weights
from p2pnet.errors import SpecError
from p2pnet.orchestrator.spec import load_spec
from p2pnet.vnode.state import decode_state, model_digest


def spec(model: nn.Sequential, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": "model",
        "loss": "CrossEntropyLoss",
        "optimizer": {"type": "Adam", "lr": 0.01},
        "input_shape": None,
        "seed": 0,
        "cut_every": 3,
    }
    return spec_of(model, **(fields | changes))


def mlp(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.Sequential(nn.LayerNorm(8), nn.GELU(approximate="tanh")),
        nn.Linear(8, 8, bias=False),
        nn.Softmax(dim=-1),
        nn.Linear(8, 3),
    )


def test_layers_keep_their_names_and_settings() -> None:
    nodes = spec(mlp())["nodes"]
    assert [(node["id"], node["type"]) for node in nodes] == [
        ("0", "Linear"),
        ("1.0", "LayerNorm"),
        ("1.1", "GELU"),
        ("2", "Linear"),
        ("3", "Softmax"),
        ("4", "Linear"),
    ]
    graph = load_spec(spec(mlp()))
    assert graph.node("2").config["bias"] is False
    assert graph.node("0").config["bias"] is True
    assert graph.node("1.1").config["approximate"] == "tanh"
    assert graph.node("1.0").config["normalized_shape"] == (8,)
    assert graph.cut_every == 3
    assert graph.tensor("x").shape == (6,)


def test_a_layer_that_stands_twice_is_there_twice() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 3))
    assert [node["id"] for node in spec(model)["nodes"]] == ["0", "1", "2", "3", "4"]


def test_shared_weights_are_not_taken_for_separate_ones() -> None:
    shared = nn.Linear(6, 6)
    with pytest.raises(SpecError, match="layer 2 "):
        spec(nn.Sequential(shared, nn.ReLU(), shared))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(), "no layers"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 3)), "give input_shape="),
        (nn.Sequential(nn.Linear(6, 8), nn.Conv1d(1, 1, 1)), "layer 1"),
        (nn.Sequential(nn.Linear(6, 8), nn.Bilinear(1, 1, 1)), "layer 1"),
    ],
)
def test_what_cannot_be_a_network(model: nn.Sequential, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        spec(model)


def test_the_shape_of_a_sample_is_told_or_given() -> None:
    assert spec(nn.Sequential(nn.LayerNorm((2, 3))))["inputs"]["x"]["shape"] == [2, 3]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    given = spec(flat, input_shape=(2, 3))
    assert given["inputs"]["x"]["shape"] == [2, 3]
    assert load_spec(given).node("1").output.shape == (3,)


def test_first_states_are_the_models_own_weights() -> None:
    model = mlp()
    graph = load_spec(spec(model))
    states = states_of(model, graph)
    assert sorted(states) == ["0", "1.0", "2", "4"]
    found: dict[str, Any] = {}
    for vnode, data in states.items():
        tensors, step = decode_state(data)
        assert step == 0
        for name, array in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "param":
                found[f"{vnode}.{rest}"] = array
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert np.array_equal(found[name], array)


def test_a_model_of_another_precision_is_refused_here() -> None:
    model = mlp().double()
    with pytest.raises(SpecError, match="float64"):
        states_of(model, load_spec(spec(model)))


async def submitted(swarm: MemorySwarm, model: nn.Sequential) -> tuple[MemorySession, NetworkInfo]:
    session = MemorySession(swarm)
    graph = load_spec(spec(model))
    network = await session.submit(
        graph, keypair_of("owner"), states_of(model, graph), swarm["a"].peer_id
    )
    return session, network


def plainly(model: nn.Sequential, steps: int) -> str:
    """The same training in torch; the weights' digest."""
    torch.set_num_threads(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return digest_of(model)


def digest_of(model: nn.Sequential) -> str:
    return model_digest({name: tensor.numpy() for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("kill", [False, True])
def test_a_submitted_model_goes_on_from_its_own_weights(tmp_path: Path, kill: bool) -> None:
    async def main() -> None:
        async with MemorySwarm(tmp_path, "abcd") as swarm:
            session, network = await submitted(swarm, mlp())
            graph_of = (await session.status(network)).graph
            assert b'"1.0"' in graph_of
            # its weights are in the log's first entry, so that they outlast their hosts
            genesis = (await swarm.log_of(network.network_id)).genesis
            assert genesis is not None
            assert sorted(genesis.states) == sorted(states_of(mlp(), load_spec(spec(mlp()))))
            weights = await fetch_weights(session, network, await session.cut(network))
            assert model_digest(weights) == digest_of(mlp())
            if kill:
                hosts = {it.host for it in (await session.status(network)).locations}
                swarm.kill(sorted(hosts - {swarm["a"].peer_id})[0])
            trained: Trained = await train(session, network, 5)
            expected = mlp()
            assert trained.digest == plainly(expected, 5)
            x, _ = batch(9)
            passes = Passes(session, network, load_spec(spec(mlp())))
            output = (await infer_all(passes, {"x": x})).output
            with torch.no_grad():
                wanted = expected(torch.from_numpy(x)).numpy()
            np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-6)

    play(main())
