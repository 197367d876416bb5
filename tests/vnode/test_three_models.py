"""`chain` equals plain torch for an MLP, a ResNet and a transformer, wherever the VNodes are.

The real graph, stages, step cores and components; messages are shuffled and doubled.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from shuffled import Run, Shuffled
from three_models import (
    MODELS,
    batches,
    graph_of,
    made,
    one_thread,
    parts,
    placements,
    plainly_trained,
    worst_error,
)

from p2pnet.client.models import states_of, torch_names
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
from p2pnet.vnode.state import decode_state, model_digest, weights_of
from p2pnet.vnode.tensors import Array, decode, encode

STEPS = 50
EXACT = 1e-6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@dataclass
class Compute:
    """The compute threads of all hosts."""

    hosts: Mapping[str, Hosted]
    arrays: int = field(default=0)

    def __call__(self, host: str, run: Run) -> Event | None:
        hosted = self.hosts[host]
        match run:
            case RunForward(stage, step, micro_batch, inputs, samples):
                outputs, metrics = hosted.do_forward(
                    stage, step, micro_batch, arrays(inputs), samples
                )
                return ForwardDone(stage, step, micro_batch, outputs, metrics)
            case RunBackward(stage, step, micro_batch, gradients):
                found = hosted.do_backward(stage, step, micro_batch, arrays(gradients))
                return BackwardDone(stage, step, micro_batch, found)
            case RunApply(step, norm):
                hosted.do_apply(step, norm)
                return ApplyDone(step)
            case RunSave():
                return None


def arrays(payloads: Sequence[object]) -> list[Array]:
    assert all(isinstance(payload, np.ndarray) for payload in payloads)
    return list(payloads)  # type: ignore[arg-type]


def wired(payload: object) -> Array:
    """A tensor as it is after its way from host to host."""
    assert isinstance(payload, np.ndarray)
    head, data = encode(payload)
    return decode(head, memoryview(data), bytes_max=payload.nbytes)


def trained(
    name: str,
    graph: CompiledGraph,
    placed: Mapping[str, Sequence[str]],
    rng: random.Random | None,
    steps: int = STEPS,
) -> tuple[dict[str, Array], list[float]]:
    """The state_dict and the losses, over those hosts."""
    states = states_of(made(name), graph)
    hosts = {host: Hosted(graph, vnodes) for host, vnodes in placed.items()}
    for host, vnodes in placed.items():
        for vnode in vnodes:
            hosts[host].do_make(vnode, states.get(vnode))
    data = batches(name, steps)
    split = [parts(batch, graph.micro_batches) for batch in data]
    net = Shuffled(
        graph,
        placed,
        Compute(hosts),
        lambda step, part, ref: split[step - 1][part]["xy".index(ref)],
        lambda step: len(data[step - 1][0]),
        rng,
        squares=(lambda host, step: hosts[host].do_squares(step)) if graph.clip_norm else None,
        seen=wired,
    )
    net.train(steps)
    found: dict[str, Array] = {}
    for host in hosts.values():
        for vnode, state in host.do_save(steps).items():
            found |= weights_of(vnode, decode_state(state)[0])
    return torch_names(graph, found), [net.metrics[step].loss for step in range(1, steps + 1)]


# Every model by every optimizer, whole batches and micro-batches, clipped and not.
CASES = [
    ("mlp", "SGD", 1, 0.0),
    ("mlp", "Adam", 4, 0.0),
    ("mlp", "AdamW", 4, 0.5),
    ("resnet", "SGD", 4, 1.0),
    ("resnet", "Adam", 1, 0.0),
    ("resnet", "AdamW", 4, 0.0),
    ("transformer", "SGD", 4, 0.0),
    ("transformer", "Adam", 4, 0.5),
    ("transformer", "AdamW", 1, 0.0),
]


@pytest.mark.parametrize(("name", "optimizer", "micro_batches", "clip_norm"), CASES)
def test_chain_equals_torch(
    name: str, optimizer: str, micro_batches: int, clip_norm: float
) -> None:
    graph = graph_of(name, optimizer, micro_batches=micro_batches, clip_norm=clip_norm)
    ours, losses = trained(name, graph, placements(graph.vnodes(), 3, seed=1), random.Random(1))
    plain, expected = plainly_trained(name, optimizer, STEPS, micro_batches, clip_norm)
    error, tensor = worst_error(ours, plain)
    assert error <= EXACT, f"{tensor}: {error:.1e}"
    assert np.allclose(losses, expected, rtol=1e-5)
    for key, first in made(name).state_dict().items():
        assert not np.array_equal(ours[key], first.numpy()), f"{key} has not moved"


@pytest.mark.parametrize("name", MODELS)
def test_where_the_vnodes_are_changes_no_bit(name: str) -> None:
    graph = graph_of(name, "Adam", micro_batches=3, clip_norm=0.5)
    alone, _ = trained(name, graph, {"host0": graph.vnodes()}, None, steps=6)
    for hosts in (2, 3, 4):
        for seed in range(2):
            placed = placements(graph.vnodes(), hosts, seed)
            ours, _ = trained(name, graph, placed, random.Random(seed), steps=6)
            assert model_digest(ours) == model_digest(alone), (hosts, seed)
