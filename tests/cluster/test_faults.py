"""Kills in the midst of training: the run goes on, and ends as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from digits import DIGITS, STEPS, digits_batches
from swarm import Events, Figure, Node, Swarm

import p2pnet
from p2pnet.v1 import control_pb2

# On an idle machine a kill costs at most 5 s and a stop at most 15 s; here others compute too.
RECOVERED_S = 60.0
LINEARS = ("fc1", "fc2", "out")
BOOTSTRAP_DIES_AFTER = 7
HOST_DIES_AFTER = 23  # between two cuts
FROZEN_AFTER = 15
THAWED_AFTER = 30


@dataclass
class Story:
    """A run in which first the bootstrap peer dies, then the host of a Linear."""

    swarm: Swarm
    network: p2pnet.Network
    orchestrator: Node
    victim: Node
    vnode: str
    stopped_at_step: int = 0
    recovered_after_s: dict[str, float] = field(default_factory=dict)


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with Swarm(tmp_path_factory.mktemp("storm")) as swarm:
        swarm.grow(1, "--faults")
        swarm.grow(1, "--faults", "--memory", "1KiB")  # will orchestrate, and host nothing
        swarm.grow(3, "--faults")
        yield _live_through(swarm)


def _live_through(swarm: Swarm) -> Story:
    bootstrap, orchestrator = swarm.nodes[:2]
    network = orchestrator.client.submit({**DIGITS, "name": "storm"})
    events = orchestrator.events()
    batches = digits_batches()

    for x, y in batches[:BOOTSTRAP_DIES_AFTER]:
        network.train_step(x, y)
    assert bootstrap.peer_id in [row["peer_id"] for row in network.locate()]
    killed_at = bootstrap.kill()
    for x, y in batches[BOOTSTRAP_DIES_AFTER:HOST_DIES_AFTER]:
        network.train_step(x, y)
    bootstrap_s = _seconds_to_recover(killed_at, events)

    vnode, victim = next(
        (row["vnode"], node)
        for row in network.locate()
        for node in swarm.nodes
        if row["vnode"] in LINEARS and row["peer_id"] == node.peer_id
    )
    story = Story(swarm, network, orchestrator, victim, vnode)
    died_at: list[float] = []

    def kill_in_its_backward() -> None:
        story.stopped_at_step = victim.stop_at("backward", vnode)
        died_at.append(victim.kill())
        shutil.rmtree(victim.data_dir)

    killer = threading.Thread(target=kill_in_its_backward)
    killer.start()
    for x, y in batches[HOST_DIES_AFTER:]:
        network.train_step(x, y)
    killer.join()
    network.finish()
    host_s = _seconds_to_recover(died_at[0], events)
    story.recovered_after_s = {"bootstrap peer": bootstrap_s, "host of a Linear": host_s}
    return story


def _seconds_to_recover(since: float, events: Events) -> float:
    """From a fault to the first step decided under the placement that came after it."""
    while events.next("placed", RECOVERED_S)[0] <= since:
        pass
    return events.next("decided", RECOVERED_S)[0] - since


def test_a_run_with_kills_ends_as_a_quiet_one(
    storm: Story, quiet_digest: str, figure: Figure
) -> None:
    assert HOST_DIES_AFTER < storm.stopped_at_step < STEPS  # there, in the middle of a backward
    assert storm.network.digest() == quiet_digest
    assert storm.network.status().committed_step == STEPS
    for what, seconds in storm.recovered_after_s.items():
        figure(f"SIGKILL of the {what} to the first step decided after it: {seconds:.2f} s")
        assert seconds <= RECOVERED_S


def test_what_the_dead_hosted_lives_elsewhere_as_the_dht_says(storm: Story) -> None:
    alive = storm.orchestrator.alive()
    rows = storm.network.locate()
    assert [row["vnode"] for row in rows] == list(storm.network.info.vnodes)
    for row in rows:
        assert row["peer_id"] in alive, row
    assert storm.victim.peer_id not in alive
    moved = {move.vnode: move for move in storm.network.status().relocations}
    assert moved[storm.vnode].from_host == storm.victim.peer_id
    assert moved[storm.vnode].to_host in alive


def test_with_every_cache_emptied_neighbours_find_a_moved_vnode(storm: Story) -> None:
    epoch = storm.network.status().epoch
    for node in storm.swarm.nodes:
        if node.process.popen.poll() is None:
            node.stop_at("forget-locations", "")
    x, y = digits_batches(1)[0]
    storm.network.train_step(x, y)
    storm.network.finish()
    # without the DHT a lost neighbour would be a failure, and that a new epoch
    assert storm.network.status().epoch == epoch


def test_a_frozen_host_is_given_up_and_does_no_harm_when_it_thaws(
    calm: Swarm, quiet: p2pnet.Network, quiet_digest: str, figure: Figure
) -> None:
    orchestrator = calm.nodes[1]
    network = orchestrator.client.submit({**DIGITS, "name": "frost"})
    host = next(
        node
        for node in calm.nodes
        if node is not orchestrator and node.peer_id in [row["peer_id"] for row in network.locate()]
    )
    events = orchestrator.events()
    batches = digits_batches()
    for x, y in batches[:FROZEN_AFTER]:
        network.train_step(x, y)
    frozen_at = host.kill(signal.SIGSTOP)
    for x, y in batches[FROZEN_AFTER:THAWED_AFTER]:
        network.train_step(x, y)
    seconds = _seconds_to_recover(frozen_at, events)
    figure(f"SIGSTOP to the first step decided after it: {seconds:.2f} s")
    assert seconds <= RECOVERED_S
    host.kill(signal.SIGCONT)
    for x, y in batches[THAWED_AFTER:]:
        network.train_step(x, y)
    network.finish()
    assert network.digest() == quiet_digest
    assert host.peer_id not in [row["peer_id"] for row in network.locate()]
    calm.wait_until_all_see_all()  # and it is back


def test_faults_are_injected_only_where_they_are_let(calm: Swarm) -> None:
    node = calm.join()
    request = control_pb2.BreakRequest(point="backward", vnode="fc1")
    call = node.client.session.control("Break", request, control_pb2.BreakReply)
    with pytest.raises(p2pnet.errors.UsageError, match="started with --faults"):
        node.client.run(call)
    node.leave()
