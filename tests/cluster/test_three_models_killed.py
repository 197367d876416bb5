"""An MLP, a ResNet and a transformer over real processes: equal to torch, and the same if one dies.

`submit` takes the torch models as they are. In short: few steps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from swarm import Events, Figure, Node, Swarm
from three_models import MODELS, batches, made, options, plainly_trained, worst_error

import p2pnet

STEPS = 24
CUT_EVERY = 10
DIES_AFTER = 12  # between two cuts
EXACT = 1e-6
DECIDED_S = 60.0
OPTIMIZER = {"mlp": "Adam", "resnet": "SGD", "transformer": "AdamW"}
MICRO_BATCHES, CLIP_NORM = 2, 1.0


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with Swarm(tmp_path_factory.mktemp("three")) as swarm:
        swarm.grow(1, "--faults", "--memory", "1KiB")  # will orchestrate, and host nothing
        swarm.grow(3, "--faults")
        yield swarm


@pytest.fixture(scope="module")
def quiet(swarm: Swarm) -> dict[str, str]:
    """By model: the digest after a run in peace."""
    return {}


def submitted(swarm: Swarm, model: str, name: str, **settings: Any) -> p2pnet.Network:
    usual = {"micro_batches": MICRO_BATCHES, "clip_norm": CLIP_NORM, "cut_every": CUT_EVERY}
    chosen = options(model, OPTIMIZER[model], **usual, **settings)
    return swarm.nodes[0].client.submit(made(model), name=name, **chosen)


def trained(swarm: Swarm, quiet: dict[str, str], model: str) -> str:
    """The digest of a quiet run, which is made when it is first asked for."""
    if model not in quiet:
        network = submitted(swarm, model, f"{model}-quiet")
        for x, y in batches(model, STEPS):
            network.train_step(x, y)
        quiet[model] = network.digest()
    return quiet[model]


def train_through_a_death(swarm: Swarm, network: p2pnet.Network, model: str) -> list[int]:
    """Kills a host in the midst of its backward; returns the steps as they were decided.

    Another one takes its place before this returns.
    """
    events = swarm.nodes[0].events()
    fed = batches(model, STEPS)
    for x, y in fed[:DIES_AFTER]:
        network.train_step(x, y)
    victim, vnode = _a_host(swarm, network)

    def kill() -> None:
        victim.stop_at("backward", vnode)
        victim.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    for x, y in fed[DIES_AFTER:]:
        network.train_step(x, y)
    killer.join()
    network.finish()
    swarm.grow(1, "--faults")
    return _decided(events)


def _a_host(swarm: Swarm, network: p2pnet.Network) -> tuple[Node, str]:
    """One that hosts something with weights."""
    graph = network.graph  # to ask for the weights would be to commit them
    rows = [row for row in network.locate() if graph.node(row["vnode"]).param_shapes]
    return next(
        (node, row["vnode"])
        for row in rows
        for node in swarm.nodes
        if row["peer_id"] == node.peer_id and row.get("role") != "standby"
    )


def _decided(events: Events) -> list[int]:
    steps: list[int] = []
    while not steps or steps[-1] < STEPS:
        steps.append(events.next("decided", DECIDED_S)[1]["step"])
    return steps


@pytest.mark.parametrize("model", MODELS)
def test_processes_compute_what_torch_computes(
    swarm: Swarm, quiet: dict[str, str], model: str, figure: Figure
) -> None:
    digest = trained(swarm, quiet, model)
    network = swarm.nodes[1].client.network(f"{model}-quiet")
    assert network.digest() == digest
    hosts = {row["peer_id"] for row in network.locate()}
    assert len(hosts) >= 2
    plain, _ = plainly_trained(model, OPTIMIZER[model], STEPS, MICRO_BATCHES, CLIP_NORM)
    ours = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    error, tensor = worst_error(ours, plain)
    figure(f"{model} over {len(hosts)} hosts: largest relative error {error:.1e}, in {tensor}")
    assert error <= EXACT, tensor


@pytest.mark.parametrize("model", MODELS)
def test_a_death_changes_no_bit(swarm: Swarm, quiet: dict[str, str], model: str) -> None:
    digest = trained(swarm, quiet, model)
    network = submitted(swarm, model, f"{model}-storm")
    steps = train_through_a_death(swarm, network, model)
    assert network.digest() == digest
    assert len(steps) > STEPS, "it did not go back to the cut: was nobody killed?"


def test_with_a_standby_a_death_costs_no_step(swarm: Swarm, quiet: dict[str, str]) -> None:
    digest = trained(swarm, quiet, "mlp")
    network = submitted(swarm, "mlp", "mlp-standby", replicas=2)
    steps = train_through_a_death(swarm, network, "mlp")
    assert network.digest() == digest
    assert steps == list(range(1, STEPS + 1))  # each was decided once
    assert network.status().epoch > 1
