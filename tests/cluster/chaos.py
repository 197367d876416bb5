"""A run of `digits` while processes are killed all the time; and what was seen of it.

Every few seconds a process dies (SIGKILL), drawn from all that run: the bootstrap peers,
the network's orchestrator and keepers among them. It comes back later, in its old data
dir and on its old ports. Only who feeds the batches lives on. The seed decides who dies
and for how long; what the machine does in between it does not.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from digits import DIGITS, SEED
from swarm import START_S, Node, Swarm

import p2pnet
from p2pnet.data.datasets import batches, open_data
from p2pnet.errors import P2PNetError
from p2pnet.keys import short
from p2pnet.log.checker import Decided, Heard, Recording, Violation, check
from p2pnet.log.history import placement_of
from p2pnet.v1 import common_pb2, log_pb2
from p2pnet.vnode.tensors import Array

NODES = 5
BOOTSTRAPS = 2  # of them
EVERY_S = 5.0
DOWN_S = (1.5, 6.0)  # between these: with EVERY_S at most two are down at a time
QUIET_STEPS = 5  # before the first kill
BATCH = 32
CUT_EVERY = 10
LOG_TIMEOUT_S = 10.0
FIND_S = 2.0


@dataclass(frozen=True)
class Kill:
    """A process that was killed. Times in seconds, on this process's monotonic clock."""

    at_s: float
    node: int
    down_s: float
    orchestrated: bool  # the network, as far as could be found out


class Chaos:
    """Kills and restarts the nodes of a swarm, on a thread of its own, from `start` on.

    Args:
        seed: of who dies when, and for how long.
        for_s: how long to go on; `over` is set then.
        orchestrator: says who it is at present, by peer id, or "". It is the first to die.
        spare_it: never kill it instead.
    """

    def __init__(
        self,
        swarm: Swarm,
        seed: int,
        *,
        for_s: float,
        every_s: float = EVERY_S,
        orchestrator: Callable[[], str],
        spare_it: bool = False,
    ) -> None:
        self.kills: list[Kill] = []
        self.over = threading.Event()
        self.begun = threading.Event()
        self._swarm = swarm
        self._rng = random.Random(seed)
        self._for_s = for_s
        self._every_s = every_s
        self._orchestrator = orchestrator
        self._spare_it = spare_it
        self._ports = [_ports(node) for node in swarm.nodes]
        self._back_at: dict[int, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begins."""
        self.begun.set()
        self._thread.start()

    def end(self) -> None:
        """Stops the killing, brings everybody back and waits until all see all."""
        self._stopped.set()
        if self.begun.is_set():
            self._thread.join(START_S)
        if self._error is not None:
            raise self._error
        for number in sorted(self._back_at):
            self._restart(number)
        self._back_at.clear()
        for kill in {kill.node: kill for kill in self.kills}.values():
            self._swarm.nodes[kill.node].process.next_event("ready")
        self._swarm.wait_until_all_see_all()
        for node in self._swarm.nodes:
            assert node.process.popen.poll() is None, node.process.describe()

    def _run(self) -> None:
        try:
            self._hunt()
        except BaseException as error:
            self._error = error
        finally:
            self.over.set()

    def _hunt(self) -> None:
        start = time.monotonic()
        next_kill = start
        while not self._stopped.is_set():
            now = time.monotonic()
            for number in [n for n, at in sorted(self._back_at.items()) if at <= now]:
                del self._back_at[number]
                self._restart(number)
            if next_kill >= start + self._for_s and now >= next_kill:
                return
            if now >= next_kill:
                number, orchestrates = self._choose()
                self._kill(number, orchestrates=orchestrates)
                next_kill += self._every_s
            wake = min([next_kill, *self._back_at.values()])
            self._stopped.wait(max(0.0, wake - time.monotonic()))

    def _choose(self) -> tuple[int, bool]:
        """Whom, and whether that is the network's orchestrator."""
        peers = [node.peer_id for node in self._swarm.nodes]
        now = self._orchestrator()
        it = peers.index(now) if now in peers else -1
        alive = [n for n in range(len(peers)) if n not in self._back_at]
        if self._spare_it:
            alive = [n for n in alive if n != it]
        # Drawn also where it is not used, so that the same seed draws the same afterwards.
        chosen = self._rng.choice(alive)
        if not self.kills and it in alive:
            chosen = it
        return chosen, chosen == it

    def _kill(self, number: int, *, orchestrates: bool) -> None:
        down_s = self._rng.uniform(*DOWN_S)
        node = self._swarm.nodes[number]
        node.hang_up()
        at = node.kill()
        self.kills.append(Kill(at, number, down_s, orchestrates))
        self._back_at[number] = at + down_s

    def _restart(self, number: int) -> None:
        node = self._swarm.nodes[number]
        node.process, _, _ = self._swarm.launch(node.data_dir, *self._ports[number])


def _ports(node: Node) -> tuple[str, ...]:
    """The options with which it comes back where it was."""
    listen = node.addr.partition("/p2p/")[0]
    return ("--listen", listen, "--grpc-port", node.ready["grpc"].rpartition(":")[2])


@dataclass
class Story:
    """A run that was disturbed, and all that was seen of it."""

    seed: int
    steps: int
    digest: str
    committed: int
    kills: list[Kill]
    recoveries: list[str]
    heard_at: list[float]  # of each step, in order
    recording: Recording
    quiet_digest: str
    quiet_states: Mapping[int, Mapping[str, bytes]]  # by step, where the quiet run cut
    quiet_losses: Mapping[int, float]  # by step

    def violations(self) -> list[Violation]:
        """What the history checker has to say."""
        return check(self.recording, golden=self.quiet_states.get, loss=self.quiet_losses.get)

    def pauses_s(self) -> list[float]:
        """After each kill, how long the feeder waited for a step at the longest.

        A wait in which several died counts for the first of them.
        """
        pauses = [0.0] * len(self.kills)
        for before, after in itertools.pairwise(self.heard_at):
            died = [n for n, kill in enumerate(self.kills) if kill.at_s < after]
            during = [n for n in died if self.kills[n].at_s > before]
            if died:
                blamed = during[0] if during else died[-1]
                pauses[blamed] = max(pauses[blamed], after - before)
        return pauses

    def claims(self) -> list[log_pb2.Claim]:
        """Of its log, in order."""
        entries = {}
        for seen in self.recording.seen:
            if isinstance(seen, Decided):
                entry = log_pb2.LogEntry.FromString(seen.entry.payload)
                entries[entry.slot] = entry
        return [entries[slot].claim for slot in sorted(entries) if entries[slot].HasField("claim")]

    def figures(self) -> Iterator[str]:
        """What a reader wants to know of it."""
        claims = self.claims()
        takeovers = sum(a.orchestrator != b.orchestrator for a, b in itertools.pairwise(claims))
        moved = sum(_moved(a, b) for a, b in itertools.pairwise(claims))
        pauses_s = self.pauses_s()
        takeovers_s = [
            pause_s for kill, pause_s in zip(self.kills, pauses_s, strict=True) if kill.orchestrated
        ]
        yield (
            f"seed {self.seed}: {len(self.kills)} kills, {self.steps} steps, {len(claims)} claims, "
            f"{takeovers} takeovers by another peer, {moved} VNodes relocated"
        )
        yield (
            f"  without a step for at most {max(takeovers_s, default=0):.1f} s after an "
            f"orchestrator was killed, {max(pauses_s, default=0):.1f} s after any"
        )
        for kill, pause_s in zip(self.kills, pauses_s, strict=True):
            what = ["orchestrator"] * kill.orchestrated + ["bootstrap"] * (kill.node < BOOTSTRAPS)
            yield (
                f"  {kill.at_s - self.kills[0].at_s:5.1f} s: node {kill.node} "
                f"({', '.join(what) or 'peer'}) down for {kill.down_s:.1f} s; the longest wait "
                f"for a step after it: {pause_s:.1f} s"
            )
        for claim in claims:
            yield f"  epoch {claim.epoch} by {short(claim.orchestrator)}: {claim.reason}"


def _moved(before: log_pb2.Claim, after: log_pb2.Claim) -> int:
    was = placement_of(before)
    return sum(was.get(vnode) != host for vnode, host in placement_of(after).items())


def live_through(swarm: Swarm, seed: int, *, for_s: float, orchestrators: bool = True) -> Story:
    """Grows a swarm, trains while it is torn at, and once more in peace.

    Args:
        for_s: how long processes are killed.
        orchestrators: whether the network's orchestrator may be killed, too; it is the first.
    """
    grow(swarm)
    everybody = [node.addr for node in swarm.nodes]
    with p2pnet.Client(everybody, data_dir=swarm.directory / "feeder") as client:
        network = client.submit({**DIGITS, "name": "chaos", "cut_every": CUT_EVERY})

        def orchestrator() -> str:
            try:
                found = client.run(client.session.locate(network.info), FIND_S)
            except (P2PNetError, TimeoutError):
                return ""  # it is being taken over just now
            return str(found.orchestrator)

        chaos = Chaos(
            swarm, seed, for_s=for_s, orchestrator=orchestrator, spare_it=not orchestrators
        )
        recording = Recording(network.info.network_id)
        heard_at: list[float] = []

        def on_step(step: int, loss: float) -> None:
            heard_at.append(time.monotonic())
            recording.note(Heard("the feeder", step, loss))
            if step == QUIET_STEPS:
                chaos.start()

        try:
            network.train(until_over(chaos), on_step=on_step)
        finally:
            chaos.end()
        steps = len(heard_at)
        story = Story(
            seed=seed,
            steps=steps,
            digest=network.digest(),
            committed=network.status().committed_step,
            kills=chaos.kills,
            recoveries=network.recoveries,
            heard_at=heard_at,
            recording=recording,
            quiet_digest="",
            quiet_states={},
            quiet_losses={},
        )
        for node in swarm.nodes:
            for entry in entries_at(client, node, network.info.network_id):
                recording.note(Decided(node.peer_id, entry))
        live_quietly(client, swarm, story)
    return story


def grow(swarm: Swarm) -> None:
    """NODES nodes; the first BOOTSTRAPS are in everybody's list."""
    swarm.grow(BOOTSTRAPS)
    swarm.bootstrap.write_text("".join(f"{node.addr}\n" for node in swarm.nodes))
    swarm.grow(NODES - BOOTSTRAPS)


def until_over(chaos: Chaos) -> Iterator[tuple[Array, Array]]:
    """Batches as long as processes are killed, and then for two cuts more."""
    last = 0
    for given, batch in enumerate(endless(), 1):
        yield batch
        if not last and chaos.over.is_set():
            last = given + 2 * CUT_EVERY
        if given == last:
            return


def endless() -> Iterator[tuple[Array, Array]]:
    """As `digits.digits_batches`, without end."""
    x, y = open_data("digits:train")
    for epoch in itertools.count(1):
        yield from batches(x, y, BATCH, SEED, epoch)


def live_quietly(client: p2pnet.Client, swarm: Swarm, story: Story) -> None:
    """The same steps in the same swarm, and nobody dies: what it has to have come to."""
    network = client.submit({**DIGITS, "name": "quiet", "cut_every": CUT_EVERY})
    losses: dict[int, float] = {}
    network.train(itertools.islice(endless(), story.steps), on_step=losses.__setitem__)
    states: dict[int, dict[str, bytes]] = {}
    for node in swarm.nodes:
        for signed in entries_at(client, node, network.info.network_id):
            commit = log_pb2.LogEntry.FromString(signed.payload).commit
            if commit.step:
                states[commit.step] = {v: ref.digest for v, ref in commit.states.items()}
    story.quiet_digest = network.digest()
    story.quiet_states, story.quiet_losses = states, losses


def entries_at(client: p2pnet.Client, node: Node, network_id: str) -> list[common_pb2.Signed]:
    """What a node holds to be decided in a network's log."""
    entries: list[common_pb2.Signed] = []
    while True:
        request = log_pb2.ReadLogRequest(network_id=network_id, from_slot=len(entries) + 1)
        call = client.session.call(
            node.peer_id, "Keeper/ReadLog", request, log_pb2.ReadLogReply, timeout_s=LOG_TIMEOUT_S
        )
        found = list(client.run(call).entries)
        if not found:
            return entries
        entries += found


def judge(story: Story, *, kills: int) -> None:
    """What has to hold of every such run."""
    assert len(story.kills) == kills
    assert any(kill.orchestrated for kill in story.kills)
    assert len({claim.orchestrator for claim in story.claims()}) > 1  # it was taken over
    heard = [seen.step for seen in story.recording.seen if isinstance(seen, Heard)]
    assert heard == list(range(1, story.steps + 1))
    assert story.committed == story.steps
    assert story.violations() == []
    assert story.digest == story.quiet_digest
