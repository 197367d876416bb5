"""What computing may take: its share of the CPUs, its threads, and never the network's turn."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hosting
import memory_swarm
import pytest
from memory_swarm import MemorySwarm
from small_network import small_graph

from p2pnet.errors import ResourceError
from p2pnet.v1 import pnode_pb2, vnode_pb2
from p2pnet.vnode.executor import ComputeThread

DEADLINE_S = 30.0  # that only a bug meets


class Machine:
    """A clock and CPU time that go by what is computed, and by resting."""

    def __init__(self, threads: int, cpus: float | None) -> None:
        self.time_s = self.used_s = 0.0
        self.rests: list[float] = []
        self.compute = ComputeThread(
            threads, cpus=cpus, now=lambda: self.time_s, used=lambda: self.used_s
        )
        self.compute.rest = self.rest  # type: ignore[method-assign]

    def work(self, takes_s: float, of_that_s: float | None = None) -> None:
        """Takes so long, of which the thread computes a part and else waits for its turn."""
        self.time_s += takes_s
        self.used_s += takes_s if of_that_s is None else of_that_s

    def fail(self, takes_s: float) -> None:
        self.work(takes_s)
        raise ZeroDivisionError

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.time_s += seconds


@pytest.mark.parametrize(
    ("threads", "cpus", "rests"),
    [
        (1, 0.5, [2.0, 0.0, 4.0]),
        (1, 0.1, [18.0, 2.0, 36.0]),
        (2, 1.0, [2.0, 0.0, 4.0]),  # both threads were at work, as far as one can know
        (1, 1.0, []),
        (1, 8.0, []),
        (2, 2.0, []),
        (1, None, []),
        (4, None, []),
    ],
)
def test_computing_takes_no_more_than_its_share(
    threads: int, cpus: float | None, rests: list[float]
) -> None:
    async def main() -> None:
        machine = Machine(threads, cpus)
        await machine.compute.run(machine.work, 2.0)
        await machine.compute.run(machine.work, 2.0, 0.4 if cpus == 0.1 else 1.0)
        with pytest.raises(ZeroDivisionError):  # what failed was work as well
            await machine.compute.run(machine.fail, 4.0)
        await asyncio.to_thread(machine.compute.close)  # and so the last rest is over
        assert machine.rests == pytest.approx([rest for rest in rests if rest])
        assert machine.used_s * threads <= (cpus or threads) * machine.time_s + 1e-9

    asyncio.run(main())


def test_who_waits_for_a_result_does_not_wait_for_the_rest_after_it() -> None:
    async def main() -> None:
        machine = Machine(1, 0.5)
        resting, rested = threading.Event(), threading.Event()

        def rest(seconds: float) -> None:
            resting.set()
            assert rested.wait(DEADLINE_S)
            machine.rest(seconds)

        machine.compute.rest = rest  # type: ignore[method-assign]
        await asyncio.wait_for(machine.compute.run(machine.work, 1.0), DEADLINE_S)
        assert await asyncio.to_thread(resting.wait, DEADLINE_S)
        ran: list[str] = []
        given_up = asyncio.ensure_future(machine.compute.run(ran.append, "given up"))
        wanted = asyncio.ensure_future(machine.compute.run(ran.append, "wanted"))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert ran == []
        rested.set()
        await asyncio.wait_for(wanted, DEADLINE_S)
        assert ran == ["wanted"]
        await asyncio.to_thread(machine.compute.close)

    asyncio.run(main())


def test_a_rest_ends_with_the_node() -> None:
    async def main() -> None:
        used = iter([0.0, 1e6])
        compute = ComputeThread(1, cpus=0.5, used=lambda: next(used))
        await compute.run(int)
        await asyncio.wait_for(asyncio.to_thread(compute.close), DEADLINE_S)

    asyncio.run(main())


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_has_no_more_threads_than_it_was_given(threads: int) -> None:
    """A large product and its backward pass, in a process where nothing else is going on."""
    code = f"""
import asyncio, psutil
from p2pnet.vnode.executor import ComputeThread

def work():
    import torch
    x = torch.ones(512, 512, requires_grad=True)
    (torch.softmax(x @ x, 1) * x).sum().backward()

async def main():
    compute = ComputeThread({threads}, cpus={threads})
    await compute.warm()
    before = psutil.Process().num_threads()
    await compute.run(work)
    print(psutil.Process().num_threads() - before)
    compute.close()

asyncio.run(main())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert int(done.stdout) == threads - 1


# The network's turn


@contextmanager
def occupied(compute: ComputeThread) -> Iterator[threading.Event]:
    """The thread computes something that takes until this is left; yields "has it ended?"."""
    begun, end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert end.wait(2 * DEADLINE_S)
        ended.set()

    task = asyncio.ensure_future(compute.run(work))
    try:
        yield ended
    finally:
        end.set()
        task.add_done_callback(lambda done: done.result())


def test_a_node_answers_while_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: what is asked of it here is answered before it has ended."""
    compute = ComputeThread(1)
    monkeypatch.setattr(memory_swarm, "InlineCompute", lambda: compute)
    graph = small_graph()
    beat = pnode_pb2.HeartbeatRequest(network_id=hosting.network_of(graph), epoch=1, lease_s=60)
    health = vnode_pb2.HealthRequest(network_id=hosting.network_of(graph))

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm, asyncio.timeout(DEADLINE_S):
            await hosting.place(swarm, graph, dict.fromkeys(hosting.ORDER, "a"))
            with occupied(compute) as ended:
                for _ in range(3):
                    renewed = await swarm.ask(
                        "a", "PNode/Heartbeat", beat, pnode_pb2.HeartbeatReply, by=hosting.BOSS
                    )
                    assert not renewed.HasField("refusal"), renewed.refusal
                    seen = await swarm.ask("a", "VNode/Health", health, vnode_pb2.HealthReply)
                    assert len(seen.vnodes) == len(hosting.ORDER)
                    described = await swarm.ask(
                        "a", "PNode/Describe", pnode_pb2.DescribeRequest(), pnode_pb2.DescribeReply
                    )
                    assert len(described.vnodes) == len(hosting.ORDER)
                assert not ended.is_set()
        await asyncio.to_thread(compute.close)

    asyncio.run(main())


def test_a_node_whose_computing_is_full_says_so_and_goes_on() -> None:
    async def main() -> None:
        compute = ComputeThread(1, queue_max=2)
        with occupied(compute) as ended:
            waits = asyncio.ensure_future(compute.run(int))
            await asyncio.sleep(0)
            with pytest.raises(ResourceError, match="try again later"):
                await compute.run(int)
            assert not ended.is_set()
        assert await waits == 0
        assert await compute.run(int) == 0
        await asyncio.to_thread(compute.close)

    asyncio.run(main())
