"""Measures what this machine has to lend. Loads neither torch nor numpy into the node."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import trio

from p2pnet.gossip.capabilities import (
    ARCH_CHARS_MAX,
    DEVICE_CHARS_MAX,
    DEVICES_MAX,
    Capabilities,
)

CACHE_NAME = "capabilities.json"
_NVIDIA_PROC = Path("/proc/driver/nvidia/gpus")

log = logging.getLogger(__name__)


def local_capabilities(
    *,
    cpus: float | None = None,
    memory_bytes: int | None = None,
    hosting: bool = True,
    matmul_gflops: float = 0.0,
) -> Capabilities:
    """What this machine lends: all CPUs that we may run on and half of the free memory.

    Blocks for up to 3 s where an NVIDIA tool has to be asked; `cpus` and
    `memory_bytes` override what is found.
    """
    return Capabilities(
        cpus=float(_cpu_count() if cpus is None else cpus),
        memory_bytes=psutil.virtual_memory().available // 2
        if memory_bytes is None
        else memory_bytes,
        arch=platform.machine()[:ARCH_CHARS_MAX],
        devices=find_devices(),
        matmul_gflops=matmul_gflops,
        hosting=hosting,
    )


def find_devices(proc: Path = _NVIDIA_PROC, *, timeout_s: float = 3.0) -> tuple[str, ...]:
    """ "cpu", then "cuda:0 NVIDIA ..." as the driver or nvidia-smi names them."""
    names = _devices_by_proc(proc) or _devices_by_tool(timeout_s)
    devices = [f"cuda:{index} {name}" for index, name in enumerate(names)]
    printable = ["".join(c for c in d if c.isprintable())[:DEVICE_CHARS_MAX] for d in devices]
    return ("cpu", *printable[: DEVICES_MAX - 1])


async def measure_matmul_gflops(
    data_dir: Path, *, threads: int = 1, timeout_s: float = 20.0
) -> float:
    """fp32 GFLOP/s of so many threads, from the data dir or measured in a process of its own.

    0.0 where it cannot be measured in time; the log says why.
    """
    cache = data_dir / CACHE_NAME
    model = _cpu_model() + (f", {threads} threads" if threads > 1 else "")
    known = _read_cache(cache, model)
    if known is not None:
        return known
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    try:
        with trio.fail_after(timeout_s):
            done = await trio.run_process(
                # -P: nothing that lies in the directory where the user happens to be.
                [sys.executable, "-P", "-m", "p2pnet.gossip.matmul_shell"],
                capture_stdout=True,
                capture_stderr=True,
                env={**os.environ, **dict.fromkeys(names, str(threads))},
            )
        gflops = _checked(json.loads(done.stdout)["gflops"])
        _write_cache(cache, model, gflops)
    except trio.TooSlowError:
        log.warning("measuring this machine took more than %g s: its speed stays 0", timeout_s)
        return 0.0
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        log.warning("this machine's speed could not be measured: %s", error)
        return 0.0
    return gflops


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _devices_by_proc(proc: Path) -> list[str]:
    names = []
    try:
        for gpu in sorted(proc.iterdir()):
            for line in (gpu / "information").read_text().splitlines():
                if line.startswith("Model:"):
                    names.append(line.partition(":")[2].strip())
    except OSError:
        return []
    return names


def _devices_by_tool(timeout_s: float) -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=timeout_s, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # no tool, no driver, or one that hangs: no device that we could use
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [line.partition(": ")[2].partition(" (UUID")[0] for line in lines]


def _checked(gflops: object) -> float:
    if not isinstance(gflops, float) or not math.isfinite(gflops) or gflops < 0:
        raise ValueError(f"{gflops!r} is not a speed")
    return gflops


def _read_cache(cache: Path, model: str) -> float | None:
    try:
        held = json.loads(cache.read_text())
        return _checked(held["matmul_gflops"]) if held["cpu_model"] == model else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none yet, or not ours: it is measured anew


def _write_cache(cache: Path, model: str, gflops: float) -> None:
    part = cache.with_suffix(".part")
    part.write_text(json.dumps({"cpu_model": model, "matmul_gflops": gflops}) + "\n")
    os.replace(part, cache)
