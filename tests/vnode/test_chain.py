"""`chain` equals plain backpropagation in torch; a state saved mid-way goes on bit for bit.

Components are driven by step cores whose messages are shuffled and doubled.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from shuffled import Run, Shuffled
from torch import nn

from p2pnet.data.datasets import batches, open_data
from p2pnet.vnode.compiling import compile_graph
from p2pnet.vnode.components import init_seed
from p2pnet.vnode.draft import Draft, Settings, TensorSpec
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.hosted import Hosted
from p2pnet.vnode.messages import (
    ApplyDone,
    BackwardDone,
    Event,
    ForwardDone,
    RunApply,
    RunBackward,
    RunForward,
    RunSave,
)
from p2pnet.vnode.modules import Add
from p2pnet.vnode.state import decode_state, model_digest, weights_of
from p2pnet.vnode.tensors import Array, decode, encode

STEPS = 50
SEED = 11
Batch = tuple[Array, Array]
Node = tuple[str, dict[str, object], list[str]]  # type, config, inputs


@dataclass(frozen=True)
class Network:
    nodes: dict[str, Node]
    optimizer: str
    options: dict[str, object]
    data: Callable[[], list[Batch]]
    micro_batches: int = 1


def linear(n: int, m: int) -> dict[str, object]:
    return {"in_features": n, "out_features": m}


def digits() -> list[Batch]:
    x, y = open_data("digits:train")
    found = [*batches(x, y, 32, SEED, 0), *batches(x, y, 32, SEED, 1)]
    assert len(found[44][0]) < 32  # the ragged one is among them
    return found[:STEPS]


def noise(shape: tuple[int, ...], target: tuple[int, ...], sizes: int = 8) -> list[Batch]:
    rng = np.random.default_rng(SEED)
    return [
        (
            rng.standard_normal((sizes, *shape)).astype(np.float32),
            rng.standard_normal((sizes, *target)).astype(np.float32),
        )
        for _ in range(STEPS)
    ]


DIGITS: dict[str, Node] = {
    "fc1": ("Linear", linear(64, 128), ["x"]),
    "act1": ("ReLU", {}, ["fc1"]),
    "fc2": ("Linear", linear(128, 64), ["act1"]),
    "skip": ("Add", {}, ["fc2", "x"]),
    "out": ("Linear", linear(64, 10), ["skip"]),
    "loss": ("CrossEntropyLoss", {}, ["out", "y"]),
}
EVERYTHING: dict[str, Node] = {
    "flat": ("Flatten", {}, ["x"]),
    "norm": ("LayerNorm", {"normalized_shape": [12]}, ["flat"]),
    "a": ("Linear", linear(12, 10), ["norm"]),
    "gelu": ("GELU", {}, ["a"]),
    "tanh": ("Tanh", {}, ["a"]),
    "both": ("Add", {}, ["gelu", "tanh"]),
    "b": ("Linear", linear(10, 10), ["both"]),
    "sig": ("Sigmoid", {}, ["b"]),
    "soft": ("Softmax", {}, ["b"]),
    "all": ("Add", {}, ["sig", "soft", "both", "sig"]),  # one input twice
    "c": ("Linear", linear(10, 2) | {"bias": False}, ["all"]),
    "loss": ("MSELoss", {}, ["c", "y"]),
}
NETWORKS = {
    "digits, Adam": Network(DIGITS, "Adam", {"lr": 1e-3}, digits),
    "digits, SGD": Network(DIGITS, "SGD", {"lr": 0.05, "momentum": 0.9}, digits),
    "everything, SGD": Network(
        EVERYTHING,
        "SGD",
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        lambda: noise((3, 4), (2,)),
    ),
    "everything, Adam": Network(EVERYTHING, "Adam", {"lr": 1e-3}, lambda: noise((3, 4), (2,))),
    "micro-batches": Network(DIGITS, "SGD", {"lr": 0.05, "momentum": 0.9}, digits, 3),
}


@dataclass
class Compute:
    """The compute threads of all hosts: tensors cross as messages do."""

    hosts: dict[str, Hosted]
    saved: dict[str, bytes] = field(default_factory=dict)

    def __call__(self, host: str, run: Run) -> Event | None:
        hosted = self.hosts[host]
        match run:
            case RunForward(stage, step, part, inputs, samples):
                outputs, metrics = hosted.do_forward(stage, step, part, inputs, samples)  # type: ignore[arg-type]
                return ForwardDone(stage, step, part, outputs, metrics)
            case RunBackward(stage, step, part, gradients):
                found = hosted.do_backward(stage, step, part, gradients)  # type: ignore[arg-type]
                return BackwardDone(stage, step, part, found)
            case RunApply(step, norm):
                hosted.do_apply(step, norm)
                return ApplyDone(step)
            case RunSave(step):
                self.saved |= hosted.do_save(step)
                return None


def wired(payload: object) -> Array:
    assert isinstance(payload, np.ndarray)
    return decode(*encode(payload), bytes_max=1 << 30)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parts(batch: Batch, micro_batches: int) -> list[Batch]:
    x, y = (np.array_split(array, micro_batches) for array in batch)
    return list(zip(x, y, strict=True))


def graph_of(network: Network) -> CompiledGraph:
    data = network.data()[0]
    return compile_graph(
        name="net",
        inputs={"x": TensorSpec(data[0].shape[1:])},
        nodes=[
            Draft(node, type, config, tuple(inputs))
            for node, (type, config, inputs) in network.nodes.items()
            if node != "loss"
        ],
        loss=Draft("loss", network.nodes["loss"][0], {}, tuple(network.nodes["loss"][2][:1])),
        optimizer=network.optimizer,
        optimizer_config=network.options,
        settings=Settings(seed=SEED, micro_batches=network.micro_batches),
    )


def hosts_of(network: Network, count: int = 3) -> dict[str, Hosted]:
    """The VNodes in turn on so many hosts, made from the seed."""
    graph = graph_of(network)
    hosts = {}
    for index in range(count):
        vnodes = graph.vnodes()[index::count]
        hosted = hosts[f"h{index}"] = Hosted(graph, vnodes)
        for vnode in vnodes:
            hosted.do_make(vnode, None)
    return hosts


def swarm(
    network: Network, hosts: dict[str, Hosted], rng: random.Random, base_step: int = 0
) -> Shuffled:
    data = [parts(batch, network.micro_batches) for batch in network.data()]
    return Shuffled(
        graph_of(network),
        {host: hosted.vnodes for host, hosted in hosts.items()},
        Compute(hosts),
        lambda step, part, ref: data[step - 1][part]["xy".index(ref)],
        lambda step: sum(len(x) for x, _ in data[step - 1]),
        rng,
        base_step=base_step,
        seen=wired,
    )


def states_of(hosts: Mapping[str, Hosted], step: int) -> dict[str, bytes]:
    return {v: state for hosted in hosts.values() for v, state in hosted.do_save(step).items()}


def weights(hosts: Mapping[str, Hosted], step: int) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for vnode, state in states_of(hosts, step).items():
        found |= weights_of(vnode, decode_state(state)[0])
    return found


class Plain(nn.Module):
    """The same network as one torch module with one autograd graph."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.nodes = network.nodes
        for vnode, (type, config, _) in network.nodes.items():
            torch.manual_seed(init_seed(SEED, vnode))
            if type == "Softmax":
                config = {"dim": -1}
            self.add_module(vnode, Add() if type == "Add" else getattr(nn, type)(**config))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        known = {"x": x, "y": y}
        for vnode, (_, _, inputs) in self.nodes.items():
            known[vnode] = self.get_submodule(vnode)(*(known[ref] for ref in inputs))
        return known["loss"]


def plainly_trained(network: Network) -> tuple[dict[str, Array], list[float]]:
    model = Plain(network)
    optimizer = getattr(torch.optim, network.optimizer)(model.parameters(), **network.options)
    losses = []
    for batch in network.data():
        optimizer.zero_grad()
        total = 0.0
        for x, y in parts(batch, network.micro_batches):
            loss = model(torch.from_numpy(x), torch.from_numpy(y)) * (len(x) / len(batch[0]))
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize("name", NETWORKS)
def test_chain_equals_backpropagation(name: str) -> None:
    network = NETWORKS[name]
    hosts = hosts_of(network)
    net = swarm(network, hosts, random.Random(1))
    net.train(STEPS)
    ours = weights(hosts, STEPS)
    plain, losses = plainly_trained(network)
    assert sorted(ours) == sorted(plain)
    for tensor, expected in plain.items():
        error = np.linalg.norm(ours[tensor] - expected) / np.linalg.norm(expected)
        assert error <= 1e-6, f"{tensor}: {error:.1e}"
    assert np.allclose([net.metrics[step].loss for step in range(1, STEPS + 1)], losses, rtol=1e-5)
    if network.nodes is DIGITS:
        assert net.metrics[STEPS].loss < 0.7 * net.metrics[1].loss  # it does learn
        assert net.metrics[45].samples == 1437 % 32


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    network = NETWORKS["digits, Adam"]
    whole = hosts_of(network)
    swarm(network, whole, random.Random(2)).train(30)

    before = hosts_of(network)
    swarm(network, before, random.Random(3)).train(18)
    cut = states_of(before, 18)
    swarm(network, before, random.Random(4), base_step=18).train(5)  # work that is lost
    after = hosts_of(network, 2)  # elsewhere, and in other stages
    for hosted in after.values():
        for vnode in hosted.vnodes:
            assert hosted.do_make(vnode, cut[vnode]) == 18
    swarm(network, after, random.Random(5), base_step=18).train(12)

    assert states_of(after, 30) == states_of(whole, 30)
    assert model_digest(weights(after, 30)) == model_digest(weights(whole, 30))


def test_the_order_of_arrival_does_not_change_a_bit() -> None:
    network = NETWORKS["everything, Adam"]
    digests = set()
    for seed in range(3):
        hosts = hosts_of(network, 1 + seed)
        swarm(network, hosts, random.Random(seed)).train(10)
        digests.add(model_digest(weights(hosts, 10)))
    assert len(digests) == 1
