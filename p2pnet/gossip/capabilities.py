"""What a volunteer lends: how it is said, and how it is written in an advert. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2pnet.errors import MalformedError
from p2pnet.v1 import gossip_pb2 as pb

DEVICES_MAX = 16
DEVICE_CHARS_MAX = 128
ARCH_CHARS_MAX = 32


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a PNode has. `memory_bytes` is what it lends, `memory_used_bytes` what VNodes use.

    `devices` are there, `device` is what it computes on, with `threads` of torch in one
    operation ("" and 0: it does not say). `matmul_gflops` is measured so, in fp32; 0.0
    while it is not known.
    """

    cpus: float = 0.0
    memory_bytes: int = 0
    memory_used_bytes: int = 0
    arch: str = ""
    devices: tuple[str, ...] = ()
    matmul_gflops: float = 0.0
    vnodes: int = 0
    hosting: bool = False
    device: str = ""
    threads: int = 0


def write_capabilities(capabilities: Capabilities) -> pb.Capabilities:
    """As an advert carries them."""
    return pb.Capabilities(
        cpus=capabilities.cpus,
        memory_bytes=capabilities.memory_bytes,
        memory_used_bytes=capabilities.memory_used_bytes,
        arch=capabilities.arch,
        devices=capabilities.devices,
        matmul_gflops=capabilities.matmul_gflops,
        vnodes=capabilities.vnodes,
        hosting=capabilities.hosting,
        device=capabilities.device,
        threads=capabilities.threads,
    )


def read_capabilities(message: pb.Capabilities) -> Capabilities:
    """From an advert.

    Raises:
        MalformedError: a number that is negative or not finite, or text that is
            too long or not printable.
    """
    for name, number in (("cpus", message.cpus), ("matmul_gflops", message.matmul_gflops)):
        if not math.isfinite(number) or number < 0:
            raise MalformedError(f"an advert's {name} is {number}")
    if len(message.devices) > DEVICES_MAX:
        raise MalformedError(f"an advert names {len(message.devices)} devices")
    check_text("arch", message.arch, ARCH_CHARS_MAX)
    for device in (message.device, *message.devices):
        check_text("device", device, DEVICE_CHARS_MAX)
    return Capabilities(
        cpus=message.cpus,
        memory_bytes=message.memory_bytes,
        memory_used_bytes=message.memory_used_bytes,
        arch=message.arch,
        devices=tuple(message.devices),
        matmul_gflops=message.matmul_gflops,
        vnodes=message.vnodes,
        hosting=message.hosting,
        device=message.device,
        threads=message.threads,
    )


def check_text(name: str, text: str, chars_max: int) -> None:
    """Raises MalformedError: too long, or not printable (it may end up on a terminal)."""
    if len(text) > chars_max or not text.isprintable():
        raise MalformedError(f"an advert's {name} is longer than {chars_max} or not printable")
