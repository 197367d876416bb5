"""A shell: which device this node computes on. torch is asked, in a process of its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

import trio

from p2pnet.errors import ResourceError
from p2pnet.vnode.devices import AUTO, CPU, CUDA, CUDA_ENVIRONMENT, Device

ASK_TIMEOUT_S = 60.0  # a cold disk, a driver that wakes up

log = logging.getLogger(__name__)


async def choose_device(
    wanted: str, found: Sequence[str], *, timeout_s: float = ASK_TIMEOUT_S
) -> Device:
    """The device that `wanted` (see `parse_device`) means on this machine.

    `auto` is a GPU where the machine has one (`found`, as `find_devices` says) that
    torch can use, and else the CPU. Where no GPU comes into question, torch is not asked.

    Raises:
        ResourceError: the GPU that is asked for by name cannot be used.
    """
    if wanted == CPU or (wanted == AUTO and not any(name.startswith(CUDA) for name in found)):
        return Device()
    try:
        return await _ask(f"{CUDA}:0" if wanted in (AUTO, CUDA) else wanted, timeout_s)
    except ResourceError as error:
        if wanted != AUTO:
            raise ResourceError(f"--device {wanted}: {error}") from error
        log.warning("this node computes on the CPU: %s", error)
        return Device()


async def _ask(name: str, timeout_s: float) -> Device:
    try:
        with trio.fail_after(timeout_s):
            done = await trio.run_process(
                # -P: nothing that lies in the directory where the user happens to be.
                [sys.executable, "-P", "-m", "p2pnet.vnode.cuda_shell", name],
                capture_stdout=True,
                capture_stderr=True,
                env={**os.environ, **CUDA_ENVIRONMENT},
            )
        said = json.loads(done.stdout)
        if "error" in said:
            raise ResourceError(str(said["error"]))
        return Device(name, str(said["title"]), int(said["memory_bytes"]), float(said["gflops"]))
    except trio.TooSlowError:
        raise ResourceError(f"torch did not find out about {name} in {timeout_s:g} s") from None
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        raise ResourceError(f"torch could not be asked for {name}: {error}") from error
