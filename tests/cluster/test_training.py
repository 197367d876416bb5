"""Training over five processes: equal to torch, its traffic, and who may train when."""

from __future__ import annotations

import signal

import numpy as np
from digits import DIGITS, STEPS, digits_batches, plainly_trained
from swarm import Figure, Swarm

import p2pnet
from p2pnet.vnode.state import model_digest

STEPS_TO_MEASURE = 5


def test_a_chain_over_five_processes_equals_torch(quiet: p2pnet.Network, figure: Figure) -> None:
    ours, plain = quiet.weights(), plainly_trained()
    assert sorted(ours) == sorted(plain)
    for name, expected in plain.items():
        error = np.linalg.norm(ours[name] - expected) / np.linalg.norm(expected)
        figure(f"{name}: relative error {error:.1e} after {STEPS} steps")
        assert error <= 1e-6, name
    hosts = {row["peer_id"] for row in quiet.locate()}
    figure(f"{len(hosts)} hosts")
    assert len(hosts) >= 3


def test_what_is_exported_is_what_was_trained(
    calm: Swarm, quiet: p2pnet.Network, quiet_digest: str
) -> None:
    output = calm.directory / "quiet.safetensors"
    done = calm.cli("export", "quiet", "--output", str(output), "--json", node=calm.nodes[3])
    assert (done.rc, done.err) == (0, "")
    assert done.json == {"tensors": 6, "model_digest": quiet_digest}
    assert model_digest(quiet.weights()) == quiet_digest


def test_activations_do_not_pass_through_the_orchestrator(
    calm: Swarm, quiet: p2pnet.Network, figure: Figure
) -> None:
    # One network, so that as many hosts report in both cases.
    network = calm.nodes[1].client.submit({**DIGITS, "name": "traffic"})
    bytes_a_step: dict[int, float] = {}
    before = 0
    for number, batch_size in enumerate((8, 256), start=1):
        for x, y in digits_batches(STEPS_TO_MEASURE, batch_size):
            network.train_step(x, y)
        network.finish()
        status = calm.cli("status", "traffic", "--json", node=calm.nodes[2]).json
        steps = number * STEPS_TO_MEASURE
        assert status["steps_decided"] == status["committed_step"] == steps
        bytes_a_step[batch_size] = (status["orchestrator_bytes"] - before) / STEPS_TO_MEASURE
        before = status["orchestrator_bytes"]
    figure(f"bytes through the orchestrator a step, by batch size: {bytes_a_step}")
    # 248 more samples are 63 KB of input alone; a count of samples takes a byte more
    assert 0 < bytes_a_step[256] <= bytes_a_step[8] + 16


def test_one_trains_at_a_time_and_ctrl_c_leaves_a_network_that_works(
    calm: Swarm, quiet: p2pnet.Network
) -> None:
    first, second = calm.nodes[1], calm.nodes[2]
    network = first.client.submit({**DIGITS, "name": "busy"})
    events = first.events()
    train = ("train", "busy", "--data", "digits:train", "--json")
    training = calm.process(*train, "--epochs", "1000", "--data-dir", str(first.data_dir))
    events.next("decided")

    refused = calm.cli(*train, node=second).sentence()
    assert "is being trained by somebody else" in refused

    training.signal(signal.SIGINT)
    assert training.wait() == 130
    assert training.err.strip() == "p2pnet: interrupted"
    before = network.status().committed_step
    assert before > 0  # what was decided is kept
    x, y = digits_batches(1)[0]
    assert np.isfinite(network.train_step(x, y))
    assert network.finish() == before + 1


def test_a_trained_network_answers_from_any_node(calm: Swarm, quiet: p2pnet.Network) -> None:
    x, y = digits_batches(1, 256)[0]
    source, output = calm.directory / "x.npy", calm.directory / "out.npy"
    np.save(source, x)
    done = calm.cli(
        "infer", "quiet", "--input", str(source), "--output", str(output), "--json",
        node=calm.nodes[4],
    )  # fmt: skip
    assert (done.rc, done.err) == (0, "")
    assert done.json["shape"] == [256, 10]
    assert (np.load(output).argmax(axis=1) == y).mean() > 0.5  # 0.1 is a guess
