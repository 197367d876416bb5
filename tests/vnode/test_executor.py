"""The compute thread: order, results and errors, its queue and its end, and what it loads."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from p2pnet.errors import CancelledByUs, ResourceError
from p2pnet.vnode.executor import ComputeThread


@pytest.fixture
def compute() -> Iterator[ComputeThread]:
    thread = ComputeThread(threads=1, queue_max=3)
    yield thread
    thread.close()


def test_results_errors_and_order(compute: ComputeThread) -> None:
    async def main() -> None:
        seen: list[int] = []
        await asyncio.gather(*(compute.run(seen.append, number) for number in range(3)))
        assert seen == [0, 1, 2]
        assert await compute.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await compute.run(divmod, 1, 0)
        names = {await compute.run(lambda: threading.current_thread().name) for _ in range(3)}
        assert len(names) == 1
        assert names != {threading.current_thread().name}

    asyncio.run(main())


def test_torch_is_set_up_in_the_thread() -> None:
    def settings() -> tuple[int, bool]:
        import torch

        return torch.get_num_threads(), torch.is_grad_enabled()

    async def main() -> None:
        for threads in (1, 2):
            compute = ComputeThread(threads)
            await compute.warm()
            assert await compute.run(settings) == (threads, True)
            compute.close()

    asyncio.run(main())


def test_the_queue_is_bounded(compute: ComputeThread) -> None:
    async def main() -> None:
        gate = threading.Event()
        waiting = [asyncio.ensure_future(compute.run(gate.wait, 10)) for _ in range(3)]
        await asyncio.sleep(0)  # let them in
        with pytest.raises(ResourceError, match="try again later"):
            await compute.run(print)
        gate.set()
        assert await asyncio.gather(*waiting) == [True] * 3
        assert await compute.run(divmod, 7, 2) == (3, 1)  # there is room again

    asyncio.run(main())


def test_cancelled_work_that_waits_never_runs(compute: ComputeThread) -> None:
    async def main() -> None:
        gate, ran = threading.Event(), threading.Event()
        first = asyncio.ensure_future(compute.run(gate.wait, 10))
        second = asyncio.ensure_future(compute.run(ran.set))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.set()
        await first
        await compute.warm()
        assert not ran.is_set()

    asyncio.run(main())


def test_close_ends_what_waits() -> None:
    async def main() -> None:
        compute = ComputeThread()
        gate, begun, ran = threading.Event(), threading.Event(), threading.Event()

        def busy() -> str:
            begun.set()
            gate.wait(10)
            return "done"

        first = asyncio.ensure_future(compute.run(busy))
        second = asyncio.ensure_future(compute.run(ran.set))
        await asyncio.to_thread(begun.wait, 10)
        closing = asyncio.create_task(asyncio.to_thread(compute.close))
        with pytest.raises(CancelledByUs):
            await asyncio.wait_for(second, 10)
        gate.set()
        assert await asyncio.wait_for(first, 10) == "done"
        await asyncio.wait_for(closing, 10)
        assert not ran.is_set()
        with pytest.raises(CancelledByUs):
            await compute.run(print)

    asyncio.run(main())


def test_what_a_process_loads() -> None:
    """No torch before it is needed; and torch's compiler (2.4 s of CPU, 72 MiB) never."""
    code = """
import sys
import p2pnet.data.blobs, p2pnet.vnode.executor, p2pnet.vnode.hosted, p2pnet.vnode.step
assert "torch" not in sys.modules
import torch
from p2pnet.vnode.components import Component
config = {"in_features": 2, "out_features": 2}
component = Component("v", "Linear", config, seed=0, optimizer="Adam")
component.forward(0, [torch.ones(1, 2)])
component.apply(component.backward(0, [torch.ones(1, 2)])[1])
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
