"""What a node computes on: how it is asked for, what torch says of it, and what is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import memory_swarm
import pytest
import trio
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from small_network import plain, submit, train
from virtual_time import InlineCompute, play

from p2pnet.errors import ResourceError, UsageError
from p2pnet.vnode import cuda_shell, hosted
from p2pnet.vnode.cuda_shell import inspect
from p2pnet.vnode.devices import Device, parse_device
from p2pnet.vnode.devices_shell import choose_device
from p2pnet.vnode.graph import CompiledGraph

SAYS = {"title": "cuda:0 NVIDIA A", "memory_bytes": 1 << 30, "gflops": 5000.0}


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_a_device_is_written_as_torch_does(text: str) -> None:
    assert parse_device(text) == text


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:-1", "cuda:1 ", "cuda:123", "CPU"])
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(UsageError, match="write auto, cpu, cuda or for example cuda:1"):
        parse_device(text)


def test_what_is_on_a_gpu_has_to_fit_into_its_memory() -> None:
    assert Device().lends(77) == 77
    gpu = Device("cuda:0", "cuda:0 NVIDIA A", memory_bytes=50)
    assert [gpu.lends(40), gpu.lends(77)] == [40, 50]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands in for the program that asks torch; it notes what it was asked for."""
    fake = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(fake))
    return fake


def stand_in(program: Path, body: str) -> None:
    asked = program.parent / "asked"
    program.write_text(f'#!/bin/sh\necho "$CUDA_DEVICE_ORDER $4" >> {asked}\n{body}\n')
    program.chmod(0o755)


def asked_for(program: Path) -> list[str]:
    asked = program.parent / "asked"
    return asked.read_text().splitlines() if asked.exists() else []


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("cpu", ("cpu", "cuda:0 NVIDIA A")), ("auto", ("cpu",)), ("cpu", ())],
)
def test_where_no_gpu_comes_into_question_torch_is_not_asked(
    program: Path, wanted: str, found: tuple[str, ...]
) -> None:
    stand_in(program, "exit 1")
    assert trio.run(choose_device, wanted, found) == Device()
    assert asked_for(program) == []


@pytest.mark.parametrize(
    ("wanted", "name"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
)
def test_a_gpu_that_torch_can_use(program: Path, wanted: str, name: str) -> None:
    stand_in(program, f"echo '{json.dumps(SAYS)}'")
    device = trio.run(choose_device, wanted, ("cpu", "cuda:0 NVIDIA A"))
    assert device == Device(name, "cuda:0 NVIDIA A", 1 << 30, 5000.0)
    assert asked_for(program) == [f"PCI_BUS_ID {name}"]


FAILURES = {
    "it says so": ("""echo '{"error": "this torch is built without CUDA"}'""", "without CUDA"),
    "it crashes": ("exit 139", "could not be asked"),
    "it says nothing": (":", "could not be asked"),
    "it says something else": ("""echo '{"title": 7}'""", "could not be asked"),
    "it hangs": ("read never < /dev/zero", "did not find out about cuda:0 in 0.3 s"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_gpu_that_cannot_be_used_ends_a_start_only_where_it_was_asked_for(
    program: Path, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    body, why = FAILURES[failure]
    stand_in(program, body)

    async def choose(wanted: str) -> Device:
        return await choose_device(wanted, ("cpu", "cuda:0 NVIDIA A"), timeout_s=0.3)

    with pytest.raises(ResourceError, match=f"^--device cuda: .*{why}"):
        trio.run(choose, "cuda")
    assert caplog.messages == []
    assert trio.run(choose, "auto") == Device()
    assert [why in message for message in caplog.messages] == [True]


class MadeUpTorch:
    """As much of torch as the program uses, with so many GPUs."""

    __version__ = "9.9"

    def __init__(self, gpus: int, *, built: bool = True, broken: str = "") -> None:
        self.version = SimpleNamespace(cuda="13.0" if built else None)
        self.cuda = self
        self._gpus = gpus
        self._broken = broken

    def is_available(self) -> bool:
        return self._gpus > 0

    def device_count(self) -> int:
        return self._gpus

    def get_device_name(self, index: int) -> str:
        return f"NVIDIA {index}"

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return (10 + index, 100)

    def full(self, shape: tuple[int, ...], value: float, *, device: str) -> str:
        if self._broken:
            raise RuntimeError(self._broken)
        return device

    def matmul(self, a: str, b: str) -> None:
        assert a == b

    def synchronize(self, name: str) -> None: ...


def test_what_torch_says_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_shell, "SECONDS", 0.0)
    said = inspect(MadeUpTorch(2), "cuda:1")
    assert said.pop("gflops") > 0
    assert said == {"title": "cuda:1 NVIDIA 1", "memory_bytes": 11}


@pytest.mark.parametrize(
    ("torch", "name", "error"),
    [
        (MadeUpTorch(0, built=False), "cuda:0", "this torch (9.9) is built without CUDA"),
        (MadeUpTorch(0), "cuda:0", "torch finds no GPU with a driver that it can use"),
        (MadeUpTorch(1), "cuda:1", "there is no cuda:1 here, only cuda:0"),
        (MadeUpTorch(3), "cuda:3", "there is no cuda:3 here, only cuda:0 to cuda:2"),
        (MadeUpTorch(1, broken="out of memory\nmore"), "cuda:0", "cannot be used: out of memory"),
    ],
    ids=["no CUDA", "no GPU", "one GPU", "three GPUs", "a full GPU"],
)
def test_why_torch_cannot_use_a_gpu(torch: Any, name: str, error: str) -> None:
    said = inspect(torch, name)
    assert list(said) == ["error"]
    assert said["error"].endswith(error)


def test_the_device_that_was_chosen_is_where_components_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = hosted.make_component, []

    def make_component(graph: CompiledGraph, vnode: str, device: str = "cpu") -> Any:
        made.append((vnode, device))
        return real(graph, vnode, "cpu")

    class OnAGpu(InlineCompute):
        def __init__(self) -> None:
            super().__init__(1, device="cuda:7")

    monkeypatch.setattr(hosted, "make_component", make_component)
    monkeypatch.setattr(memory_swarm, "InlineCompute", OnAGpu)

    async def main() -> None:
        async with MemorySwarm(tmp_path, "a") as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id)
            assert (await train(session, network, 2)).digest == plain(2)[0]
            assert sorted(made) == [(vnode, "cuda:7") for vnode in sorted(network.vnodes)]

    play(main())
