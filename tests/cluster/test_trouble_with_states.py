"""Full disks, spoiled files, numbers that are none: said aloud, and training goes on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from digits import DIGITS, digits_batches, plainly_trained
from swarm import COMMAND, LOOPBACK, Node, Swarm, until

import p2pnet
from p2pnet.errors import RolledBackError, UsageError
from p2pnet.vnode.state import model_digest
from p2pnet.vnode.tensors import Array

CUT_EVERY = 3
STEPS = 12
SPEC = {**DIGITS, "cut_every": CUT_EVERY}
DISK_BYTES = 4 << 20
LEFT_BYTES = 20 << 10  # less than the state of a VNode of the digits takes

# As root of a user namespace of its own: mounts a disk of so many bytes, leaves so many.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$1 small "$0" && head -c $2 /dev/zero > "$0/filler" && shift 2 && exec "$@"
"""


def plain_digest(steps: int) -> str:
    return model_digest(plainly_trained(steps))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Swarm]:
    with Swarm(tmp_path) as swarm:
        yield swarm


def may_mount() -> bool:
    unshare = shutil.which("unshare")
    if sys.platform != "linux" or unshare is None:
        return False
    probe = [unshare, "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def join_on_a_small_disk(swarm: Swarm) -> Node:
    """A node whose states have next to no room."""
    data_dir = swarm.directory / f"n{len(swarm.nodes)}"
    (data_dir / "blobs").mkdir(parents=True, mode=0o700)
    data_dir.chmod(0o700)
    sizes = (str(DISK_BYTES), str(DISK_BYTES - LEFT_BYTES))
    start = ["--bootstrap", str(swarm.bootstrap)] if swarm.nodes else []
    command = (
        *("unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, str(data_dir / "blobs"), *sizes),
        *(*COMMAND, "join", "--data-dir", str(data_dir), "--until-eof", "--json"),
        *("--listen", LOOPBACK, "--device", "cpu", *start),
    )
    node = swarm.up(swarm.start(command), data_dir, 0.0)
    if not swarm.bootstrap.exists():
        swarm.bootstrap.write_text(f"{node.addr}\n")
    return node


def make_room(node: Node) -> None:
    Path(f"/proc/{node.process.pid}/root{node.data_dir}/blobs/filler").unlink()


@pytest.mark.skipif(not may_mount(), reason="this user may not mount a small disk")
def test_on_full_disks_steps_go_on_and_count_when_there_is_room(alone: Swarm) -> None:
    nodes = [join_on_a_small_disk(alone) for _ in range(3)]
    alone.wait_until_all_see_all()
    network = nodes[0].client.submit({**SPEC, "name": "crowded"})
    batches = digits_batches(STEPS)
    _train(network, batches[: 2 * CUT_EVERY + 1])
    status = until(
        lambda: next(iter([s for s in [network.status()] if s.state == "uncommitted"]), None),
        60,
        "the cut failed, and the orchestrator says so",
    )
    assert status.step == 2 * CUT_EVERY + 1
    assert status.committed_step == 0
    assert "would be lost with a host" in status.detail
    assert "No space left on device" in status.detail
    for node in nodes:
        make_room(node)
    _train(network, batches[2 * CUT_EVERY + 1 :])
    network.finish()
    assert network.status().committed_step == STEPS
    assert network.status().state == "ready"
    assert network.digest() == plain_digest(STEPS)


@pytest.mark.parametrize("where", ["a directory", "peers"])
def test_a_committed_state_that_is_cut_off_everywhere_takes_the_network_one_commit_back(
    alone: Swarm, where: str
) -> None:
    shared = alone.directory / "shared"
    options = ("--state", f"file://{shared}") if where == "a directory" else ()
    nodes = alone.grow(4, *options)
    submitted = nodes[0].client.submit({**SPEC, "name": "spoiled"})
    victim = _host_of(alone, submitted, "fc1")
    witness = next(node for node in nodes if node is not victim)
    network = witness.client.network("spoiled")
    batches = digits_batches(STEPS)
    last, before = 2 * CUT_EVERY, CUT_EVERY
    _train(network, batches[: last + 1])
    until(lambda: network.status().committed_step == last, 60, "the last cut is committed")

    files = _files_of(alone, shared, network, "fc1")
    assert (len(files) == 1) if where == "a directory" else (len(files) >= 3)  # and two copies
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    victim.kill()
    with pytest.raises(RolledBackError, match=f"feed it again from batch {before + 1}") as gone:
        _train(network, batches[last + 1 :])
    assert gone.value.step == before + 1
    said = "".join(node.process.err for node in nodes)
    assert "was spoiled on disk and is deleted" in said
    _train(network, batches[before:])
    network.finish()
    assert network.status().committed_step == STEPS
    assert network.digest() == plain_digest(STEPS)


def _train(network: p2pnet.Network, batches: list[tuple[Array, Array]]) -> None:
    for x, y in batches:
        network.train_step(x, y)


def _host_of(swarm: Swarm, network: p2pnet.Network, vnode: str) -> Node:
    peer_id = next(row["peer_id"] for row in network.locate(vnode))
    return next(node for node in swarm.nodes if node.peer_id == peer_id)


def _files_of(swarm: Swarm, shared: Path, network: p2pnet.Network, vnode: str) -> list[Path]:
    """Where the state of a VNode in the last commit lies."""
    node = swarm.nodes[0]
    told = swarm.cli("explain", f"{network.name}/{vnode}", "--json", node=node).json
    digest = told["now"]["state_digest"]
    places = [shared, *(node.data_dir / "blobs" for node in swarm.nodes)]
    return [place / digest for place in places if (place / digest).exists()]


def test_numbers_that_are_none_are_refused_by_name_in_a_real_swarm(calm: Swarm) -> None:
    network = calm.nodes[0].client.submit({**DIGITS, "name": "numbers"})
    batches = digits_batches(5)
    _train(network, batches[:2])
    x, y = batches[2]
    bad = x.copy()
    bad[3, 7] = np.nan
    with pytest.raises(
        UsageError,
        match=r"network numbers: the input x of (fc1|skip) has NaN or infinity in step 3",
    ):
        network.train_step(bad, y)
    _train(network, batches[2:])
    network.finish()
    assert network.digest() == plain_digest(5)
