"""What VNodes can be computed on, and how that is written. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from p2pnet.errors import UsageError

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
# GPUs are numbered as `nvidia-smi` does, not by their speed.
CUDA_ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
_CUDA = re.compile(r"cuda(:\d{1,2})?")


@dataclass(frozen=True, slots=True)
class Device:
    """What VNodes are computed on.

    `name` is torch's ("cpu", "cuda:0"), `title` for people. For a GPU also: the
    memory that is free on it, in bytes, and its speed in fp32, in GFLOP/s.
    """

    name: str = CPU
    title: str = CPU
    memory_bytes: int = 0
    gflops: float = 0.0

    def lends(self, memory_bytes: int) -> int:
        """How much of what is to be lent can be: what is on a GPU is in its memory too."""
        return memory_bytes if self.name == CPU else min(memory_bytes, self.memory_bytes)


def parse_device(text: str) -> str:
    """What `join --device` takes: auto, cpu, cuda or cuda:N.

    Raises:
        UsageError: anything else.
    """
    if text not in (AUTO, CPU) and not _CUDA.fullmatch(text):
        raise UsageError(f"{text!r} is not a device: write auto, cpu, cuda or for example cuda:1")
    return text
