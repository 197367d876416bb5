"""A node from its start to its end: how fast, how big, how it goes, and how it comes back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from digits import DIGITS
from swarm import COMMAND, START_S, Figure, Swarm, environment, run

MIB = 1 << 20
# Measured on an idle machine: ready after 1.8 s, 100 MiB, `--help` in 0.2 s. A busy one is slower.
READY_S = 20.0
IDLE_RSS_BYTES_MAX = 120 * MIB
HELP_S = 3.0


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Swarm]:
    """A swarm of what a test starts itself."""
    with Swarm(tmp_path) as swarm:
        yield swarm


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "leave", "end of the parent"])
def test_a_node_starts_lightly_and_leaves_in_good_order(
    alone: Swarm, how: str, figure: Figure
) -> None:
    node = alone.join()
    figure(f"ready after {node.ready_after_s:.2f} s, {node.rss_bytes() / MIB:.0f} MiB")
    assert node.ready["new_network"]
    assert node.ready_after_s < READY_S
    assert node.rss_bytes() < IDLE_RSS_BYTES_MAX
    assert "libtorch" not in node.libraries()
    if how == "leave":
        left = alone.cli("leave", node=node)
        assert (left.rc, left.err) == (0, "")
    elif how == "end of the parent":
        assert node.process.popen.stdin is not None
        node.process.popen.stdin.close()
    else:
        node.process.signal(signal.Signals[how])
    node.process.next_event("left")
    assert node.process.wait() == 0
    assert node.process.next_line() is None
    assert node.process.err == ""
    assert not (node.data_dir / "control.path").exists()
    assert "no node is running" in alone.cli("members", node=node).sentence()


def test_a_killed_node_comes_back_as_itself(calm: Swarm) -> None:
    before = calm.join()
    calm.wait_until_all_see_all()
    before.kill()
    after = calm.join(data_dir=before.data_dir)
    assert after.peer_id == before.peer_id
    assert after.addr != before.addr
    calm.wait_until_all_see_all()
    rows = calm.cli("members", "--json", node=calm.nodes[3]).json
    assert [row["addrs"] for row in rows if row["peer_id"] == after.peer_id] == [
        [after.addr.rpartition("/p2p/")[0]]
    ]
    after.leave()


def test_a_node_that_is_back_needs_no_bootstrap(calm: Swarm) -> None:
    before = calm.join()
    calm.wait_until_all_see_all()
    before.leave()  # which remembers who was there
    nobody = calm.directory / "nobody.txt"
    nobody.write_text("")
    after = calm.join("--bootstrap", str(nobody), data_dir=before.data_dir)
    assert not after.ready["new_network"]
    calm.wait_until_all_see_all()
    after.leave()


def test_every_node_shows_the_same_members(calm: Swarm) -> None:
    calm.wait_until_all_see_all()
    expected = sorted(node.peer_id for node in calm.nodes if node.process.popen.poll() is None)
    shown = [calm.cli("members", "--json", node=node) for node in calm.nodes[:2]]
    shown.append(calm.cli("members", "--json", "--bootstrap", str(calm.bootstrap)))
    for asked in shown:
        assert (asked.rc, asked.err) == (0, "")
        alive = [row["peer_id"] for row in asked.json if row["state"] == "alive"]
        assert sorted(alive) == expected
        for row in asked.json:
            assert row["capabilities"]["memory_bytes"] > 0
    people = calm.cli("members", node=calm.nodes[0])
    for peer_id in expected:
        assert peer_id in people.out  # in full, to be copied


@pytest.mark.parametrize("memory", ["1MiB", "8GiB"])
def test_who_lends_little_memory_hosts_little(calm: Swarm, memory: str, figure: Figure) -> None:
    node = calm.join("--memory", memory, "--cpus", "64")
    calm.wait_until_all_see_all()
    wide = {"type": "Linear", "config": {"in_features": 512, "out_features": 512}}
    spec = {
        **DIGITS,
        "name": f"wide-{memory.lower()}",
        "inputs": {"x": {"shape": [512], "dtype": "float32"}},
        "nodes": [{"id": f"fc{i}", **wide} for i in range(12)],
    }
    network = calm.nodes[1].client.submit(spec)
    hosted = [row["vnode"] for row in network.locate() if row["peer_id"] == node.peer_id]
    figure(f"with {memory}: {hosted}")
    assert bool(hosted) == (memory == "8GiB")
    node.leave()  # which moves what it hosts
    assert node.peer_id not in [row["peer_id"] for row in network.locate()]


def test_help_is_instant_and_loads_nothing_heavy(tmp_path: Path, figure: Figure) -> None:
    env = environment(tmp_path)
    started = time.monotonic()
    done = run([*COMMAND, "--help"], env)
    seconds = time.monotonic() - started
    figure(f"p2pnet --help: {seconds:.2f} s")
    assert done.rc == 0
    assert "p2pnet join" in done.out
    assert seconds < HELP_S
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", *COMMAND[1:], "--help"],
        env=env, capture_output=True, text=True, timeout=START_S, check=True,
    ).stderr  # fmt: skip
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in loaded.splitlines()}
    assert "click" in modules
    heavy = {"torch", "grpc", "libp2p", "trio", "numpy", "sklearn", "pydantic", "rich"}
    assert not modules & heavy


def test_members_and_whereis_need_no_torch(calm: Swarm) -> None:
    code = (
        "import sys; from p2pnet.cli import cli; "
        "cli.main(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    )
    for verb in (["members"], ["whereis", "quiet"]):
        data_dir = str(calm.nodes[0].data_dir)
        done = run([sys.executable, "-c", code, *verb, "--data-dir", data_dir], calm.env)
        assert (done.rc, done.err) == (0, "")
