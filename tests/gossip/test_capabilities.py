"""What a machine says that it lends: overrides, devices, and a speed measured once."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from p2pnet.errors import MalformedError
from p2pnet.gossip import capabilities_shell
from p2pnet.gossip.capabilities import Capabilities, read_capabilities, write_capabilities
from p2pnet.gossip.capabilities_shell import (
    CACHE_NAME,
    find_devices,
    local_capabilities,
    measure_matmul_gflops,
)
from p2pnet.v1 import gossip_pb2


def test_what_is_found_and_what_is_told_instead() -> None:
    found = local_capabilities()
    assert found.cpus == len(os.sched_getaffinity(0))
    assert found.memory_bytes > 1 << 20
    assert found.arch == platform.machine()
    assert found.devices[0] == "cpu"
    assert found.matmul_gflops == 0.0
    told = local_capabilities(cpus=1.5, memory_bytes=77, hosting=False, matmul_gflops=3.0)
    assert (told.cpus, told.memory_bytes, told.hosting, told.matmul_gflops) == (1.5, 77, False, 3.0)


def test_an_advert_says_what_there_is_and_what_is_used() -> None:
    lent = Capabilities(
        cpus=2.0, devices=("cpu", "cuda:0 NVIDIA A"), device="cuda:0 NVIDIA A", threads=2
    )
    said = write_capabilities(lent)
    assert read_capabilities(said) == lent
    older = gossip_pb2.Capabilities(cpus=2.0, devices=["cpu"])
    assert read_capabilities(older) == Capabilities(cpus=2.0, devices=("cpu",))
    for device in ("d" * 129, "\x1b[31mred"):
        with pytest.raises(MalformedError, match="device"):
            read_capabilities(gossip_pb2.Capabilities(device=device))


def test_nvidia_devices_are_named_by_the_driver(tmp_path: Path) -> None:
    for bus, name in (("0000:01:00.0", "NVIDIA A"), ("0000:02:00.0", "NVIDIA B")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {name}\nIRQ: 1\n")
    assert find_devices(tmp_path) == ("cpu", "cuda:0 NVIDIA A", "cuda:1 NVIDIA B")


def test_nvidia_devices_are_named_by_the_tool_where_the_driver_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert find_devices(tmp_path / "absent") == ("cpu", "cuda:0 NVIDIA H200")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert find_devices(tmp_path / "absent") == ("cpu",)


def test_the_speed_is_measured_once_and_kept_for_this_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gflops = trio.run(measure_matmul_gflops, tmp_path)
    assert gflops > 0
    held = json.loads((tmp_path / CACHE_NAME).read_text())
    assert held["matmul_gflops"] == gflops
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert trio.run(measure_matmul_gflops, tmp_path) == gflops
    (tmp_path / CACHE_NAME).write_text(json.dumps({**held, "cpu_model": "another"}))
    assert trio.run(measure_matmul_gflops, tmp_path) == 0.0


def test_the_speed_of_two_threads_is_measured_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho '{\"gflops\": '$OMP_NUM_THREADS.5'}'\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    for threads in (1, 2, 1):

        async def main(threads: int = threads) -> float:
            return await measure_matmul_gflops(tmp_path, threads=threads)

        assert trio.run(main) == threads + 0.5


@pytest.mark.parametrize("program", ["import sys; sys.exit(3)", "print('no json')", "print('{}')"])
def test_a_failed_measurement_is_0_and_logged(
    program: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c "{program}"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    assert trio.run(measure_matmul_gflops, tmp_path) == 0.0
    assert any("could not be measured" in message for message in caplog.messages)
    assert not (tmp_path / CACHE_NAME).exists()


def test_a_measurement_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nread never < /dev/zero\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))

    async def main() -> float:
        return await measure_matmul_gflops(tmp_path, timeout_s=0.1)

    assert trio.run(main) == 0.0
    assert any("took more than" in message for message in caplog.messages)


def test_measuring_loads_neither_numpy_nor_torch_into_the_node() -> None:
    program = (
        "import sys, p2pnet.gossip.capabilities_shell, p2pnet.gossip.shell;"
        "sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert capabilities_shell.Capabilities().matmul_gflops == 0.0
