"""The main job on one machine: a swarm trains a network and survives three kills.

Nothing is pretended: the nodes are processes of their own, talk over loopback
as they would over a network, and are ended with SIGKILL. What the swarm ends up
with is compared, bit for bit, with the same training in plain torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, Any, Protocol

from p2pnet.client import Client, Network
from p2pnet.client.session import Session
from p2pnet.data.datasets import batches, open_data
from p2pnet.datadir import DataDir
from p2pnet.errors import LocalError, P2PNetError
from p2pnet.keys import short
from p2pnet.v1 import control_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.state import model_digest

READY_TIMEOUT_S = 30.0
MEMBERS_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
EPOCHS = 12
BATCH_SIZE = 32
SEED = 0
ACCURACY_MIN = 0.95
BOOTSTRAP_DIES_AFTER = 2  # epochs
HOST_DIES_AFTER = 5
ORCHESTRATOR_DIES_AFTER = 8


class Reporter(Protocol):
    """Who is told how it goes."""

    def say(self, text: str) -> None:
        """Something happened."""
        ...

    def phase(self, name: str, seconds: float) -> None:
        """A phase is over."""
        ...

    def steps(self, done: int, of: int, loss: float) -> None:
        """Training goes on."""
        ...


@dataclass(slots=True)
class _Node:
    number: int
    data_dir: Path
    process: subprocess.Popen[str]
    log: IO[str]
    peer_id: str = ""
    addrs: tuple[str, ...] = ()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


@dataclass(slots=True)
class _Swarm:
    directory: Path
    nodes: list[_Node] = field(default_factory=list)

    def start(self, bootstrap: Path | None) -> _Node:
        """Starts a node; `wait_ready` follows."""
        number = len(self.nodes)
        data_dir = self.directory / f"node{number}"
        log = (self.directory / f"node{number}.log").open("w")
        command = [sys.executable, "-m", "p2pnet", "join", "--json", "--faults", "--until-eof"]
        command += ["--listen", "/ip4/127.0.0.1/tcp/0", "--data-dir", str(data_dir)]
        command += ["--device", "cpu"]  # plain torch, which it is compared with, computes there
        command += ["--bootstrap", str(bootstrap)] if bootstrap is not None else []
        environment = {k: v for k, v in os.environ.items() if k != "P2PNET_BOOTSTRAP"}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closed with us, however we end: the nodes then leave
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for us; we end them
        )
        node = _Node(number, data_dir, process, log)
        self.nodes.append(node)
        return node

    def wait_ready(self, node: _Node) -> None:
        """Reads a node's first line; raises LocalError if there is none in time."""
        assert node.process.stdout is not None
        watchdog = _after(READY_TIMEOUT_S, node.process.kill)
        with watchdog:
            line = node.process.stdout.readline()
        if not line:
            raise LocalError(f"node {node.number} did not start:\n{self.log_of(node)}")
        event = json.loads(line)
        node.peer_id, node.addrs = event["peer_id"], tuple(event["addrs"])

    def log_of(self, node: _Node) -> str:
        """The end of a node's log."""
        node.log.flush()
        lines = (self.directory / f"node{node.number}.log").read_text().splitlines()
        return "\n".join(lines[-10:])

    def by_peer(self, peer_id: str) -> _Node:
        """The node of that id."""
        return next(node for node in self.nodes if node.peer_id == peer_id)

    def kill(self, node: _Node) -> None:
        """SIGKILL: it has no time to say goodbye."""
        node.process.send_signal(signal.SIGKILL)
        node.process.wait()

    def close(self) -> None:
        """Ends every node that is left, by its process id."""
        for node in self.nodes:
            if node.alive:
                node.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for node in self.nodes:
            try:
                node.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()
            for pipe in (node.process.stdin, node.process.stdout, node.log):
                if pipe is not None:
                    pipe.close()


def run_demo(nodes: int, kill: bool, report: Reporter) -> dict[str, Any]:
    """Runs it; returns what `p2pnet demo --json` prints last.

    Raises:
        P2PNetError: something did not work; says what.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="p2pnet-demo-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        swarm = _Swarm(directory)
        stack.callback(swarm.close)
        demo = _Demo(swarm, report, kill)
        try:
            result = demo.run(nodes, stack)
        except P2PNetError as error:
            logs = "\n".join(
                f"--- node {node.number} ({'alive' if node.alive else 'gone'})\n"
                f"{swarm.log_of(node)}"
                for node in swarm.nodes
            )
            raise LocalError(f"the demo failed while {demo.doing}: {error}\n{logs}") from error
        report.say("stopping the nodes")
    return {**result, "seconds": round(time.monotonic() - started, 1)}


class _Demo:
    def __init__(self, swarm: _Swarm, report: Reporter, kill: bool) -> None:
        self.doing = "starting"
        self._swarm = swarm
        self._report = report
        self._kill = kill
        self._killed: list[dict[str, Any]] = []
        self._killed_at = 0.0

    def run(self, nodes: int, stack: ExitStack) -> dict[str, Any]:
        with self._phase(f"starting {nodes} nodes"):
            bootstrap = self._start(nodes)
        # We ask the last node, the second looks after the network; all others may die.
        client = stack.enter_context(Client(data_dir=self._swarm.nodes[-1].data_dir))
        with self._phase("finding each other"):
            self._wait_for_members(client, nodes)
        with self._phase("placing the network"):
            network = self._submit(client)
        x, y = open_data("digits:train")
        with self._phase("training"):
            self._train(client, network, x, y)
        with self._phase("testing"):
            accuracy = self._test(network)
            digest = network.digest()
            rows = network.locate()
        with self._phase("the same in plain torch"):
            exact = plain_torch_digest(network.graph, x, y) == digest
        status = network.status()
        moves = [
            {
                "vnode": move.vnode,
                "from": move.from_host,
                "to": move.to_host,
                "seconds": round(move.seconds, 2),
                "reason": move.reason,
            }
            for move in status.relocations
        ]
        self._check(accuracy, exact, moves, rows)
        assert bootstrap.exists()
        return {
            "nodes": nodes,
            "killed": self._killed,
            "relocations": moves,
            "accuracy": accuracy,
            "vnodes": rows,
            "steps": int(status.committed_step),
            "model_digest": digest,
            "equals_torch": exact,
        }

    def _start(self, nodes: int) -> Path:
        first = self._swarm.start(None)
        self._swarm.wait_ready(first)
        bootstrap = self._swarm.directory / "bootstrap_peers.txt"
        bootstrap.write_text(f"{first.addrs[0]}  # node 0\n")
        others = [self._swarm.start(bootstrap) for _ in range(nodes - 1)]
        for node in others:
            self._swarm.wait_ready(node)
        return bootstrap

    def _wait_for_members(self, client: Client, nodes: int) -> None:
        deadline = time.monotonic() + MEMBERS_TIMEOUT_S
        while True:
            alive = [row for row in client.members() if row["state"] == "alive"]
            if len(alive) == nodes and all(
                row["capabilities"]["matmul_gflops"] > 0 for row in alive
            ):
                return
            if time.monotonic() > deadline:
                raise LocalError(f"after {MEMBERS_TIMEOUT_S:g} s only {len(alive)} are here")
            time.sleep(0.1)

    def _submit(self, client: Client) -> Network:
        spec = resources.files("p2pnet").joinpath("data/digits.yaml")
        with resources.as_file(spec) as path:
            network = client.submit(path, orchestrator=self._orchestrator.peer_id)
        hosts = {row["peer_id"] for row in network.locate()}
        if len(hosts) < 3:
            raise LocalError(f"the network was placed on {len(hosts)} hosts only")
        self._report.say(f"{len(network.info.vnodes)} VNodes on {len(hosts)} hosts")
        return network

    def _train(self, client: Client, network: Network, x: Any, y: Any) -> None:
        total = -(-len(x) // BATCH_SIZE) * EPOCHS

        def on_step(step: int, loss: float) -> None:
            self._note_recovery()
            self._report.steps(step, total, loss)

        def on_epoch(row: dict[str, Any]) -> None:
            self._report.say(
                f"epoch {row['epoch']}: loss {row['loss']:.4f}, accuracy {row['accuracy']:.4f}, "
                f"{row['samples_per_s']:.0f} samples/s"
            )
            if self._kill and row["epoch"] == BOOTSTRAP_DIES_AFTER:
                self._kill_bootstrap()
            if self._kill and row["epoch"] == HOST_DIES_AFTER:
                self._kill_in_backward(client, network)
            if self._kill and row["epoch"] == ORCHESTRATOR_DIES_AFTER:
                self._kill_orchestrator()

        network.train(
            lambda epoch: batches(x, y, BATCH_SIZE, SEED, epoch),
            epochs=EPOCHS,
            on_step=on_step,
            on_epoch=on_epoch,
        )

    def _kill_bootstrap(self) -> None:
        node = self._swarm.nodes[0]
        self._killed_now(node, "bootstrap peer")
        self._report.say(f"SIGKILL to the bootstrap peer {short(node.peer_id)}")

    def _kill_orchestrator(self) -> None:
        self._killed_now(self._orchestrator, "orchestrator")
        self._report.say(f"SIGKILL to the orchestrator {short(self._orchestrator.peer_id)}")

    @property
    def _orchestrator(self) -> _Node:
        return self._swarm.nodes[1]

    def _killed_now(self, node: _Node, what: str) -> None:
        self._swarm.kill(node)
        self._killed.append({"peer_id": node.peer_id, "what": what})
        self._killed_at = time.monotonic()

    def _note_recovery(self) -> None:
        """A step is decided: how long after the last kill that is, if it is the first."""
        if self._killed and "seconds" not in self._killed[-1]:
            seconds = round(time.monotonic() - self._killed_at, 2)
            self._killed[-1]["seconds"] = seconds
            self._report.say(f"the next step was decided {seconds:.1f} s after the kill")

    def _kill_in_backward(self, client: Client, network: Network) -> None:
        """Has the host of a Linear stop inside its next backward pass, and ends it there."""
        spared = (self._orchestrator.peer_id, self._swarm.nodes[-1].peer_id)
        place = {row["vnode"]: row["peer_id"] for row in network.locate()}
        linears_first = sorted(network.graph.nodes, key=lambda node: node.type != "Linear")
        vnode = next(node.id for node in linears_first if place[node.id] not in spared)
        node = self._swarm.by_peer(place[vnode])

        async def stop_and_kill() -> None:
            session = Session(DataDir(node.data_dir).socket())
            try:
                reached = await session.control(
                    "Break",
                    control_pb2.BreakRequest(point="backward", vnode=vnode, step=0),
                    control_pb2.BreakReply,
                    timeout_s=60.0,
                )
            finally:
                await session.close()
            what = f"host of {vnode}, inside the backward pass of step {reached.step}"
            self._killed_now(node, what)
            shutil.rmtree(node.data_dir)
            self._report.say(
                f"SIGKILL to {short(node.peer_id)} inside the backward pass of {vnode}, "
                f"step {reached.step}; its disk is gone too"
            )

        client.start(stop_and_kill())

    def _test(self, network: Network) -> float:
        x, y = open_data("digits:test")
        return float((network(x).argmax(axis=1) == y).mean())

    def _check(
        self, accuracy: float, exact: bool, moves: list[dict[str, Any]], rows: list[dict[str, Any]]
    ) -> None:
        self.doing = "checking the result"
        dead = {kill["peer_id"] for kill in self._killed}
        if self._kill and len(dead) != 3:
            raise LocalError(f"{len(dead)} of 3 peers were killed")
        if self._kill and not moves:
            raise LocalError("nothing was relocated")
        if any(row["peer_id"] in dead for row in rows):
            raise LocalError("the DHT says that a dead peer hosts a VNode")
        if accuracy < ACCURACY_MIN:
            raise LocalError(f"the test accuracy is {accuracy:.4f}, under {ACCURACY_MIN}")
        if not exact:
            raise LocalError("the weights are not those of the same training in plain torch")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.doing = name
        started = time.monotonic()
        yield
        self._report.phase(name, time.monotonic() - started)


def plain_torch_digest(graph: CompiledGraph, x: Any, y: Any) -> str:
    """`model_digest` of the same training in one process, by torch's own autograd and optimizer."""
    import torch
    from torch import nn

    from p2pnet.vnode.components import init_seed
    from p2pnet.vnode.modules import Add

    torch.set_num_threads(1)
    layers: dict[str, nn.Module] = {}
    for node in graph.nodes:
        torch.manual_seed(init_seed(graph.seed, node.id))
        kind = Add if node.type == "Add" else getattr(nn, node.type)
        layers[node.id] = kind(**node.config)
    ours = ("class_dim",)  # 1, as in torch, which has no such key
    options = {key: value for key, value in graph.loss.config.items() if key not in ours}
    loss_of = getattr(nn, graph.loss.type)(**options)
    params = [param for layer in layers.values() for param in layer.parameters()]
    optimizer = getattr(torch.optim, graph.optimizer.type)(params, **graph.optimizer.config)
    for epoch in range(1, EPOCHS + 1):
        for x_batch, y_batch in batches(x, y, BATCH_SIZE, SEED, epoch):
            values = {"x": torch.from_numpy(x_batch)}
            for node in graph.nodes:
                values[node.id] = layers[node.id](*(values[ref] for ref in node.inputs))
            loss = loss_of(values[graph.output], torch.from_numpy(y_batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weights = {
        f"{vnode}.{name}": tensor.detach().numpy()
        for vnode, layer in layers.items()
        for name, tensor in layer.state_dict().items()
    }
    return model_digest(weights)


@contextmanager
def _after(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Does something if the block takes longer."""
    import threading

    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
