"""A network's weights: fetched from the last cut, named as torch names them, written to a file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.numpy

from p2pnet.client.session import NetworkInfo, Session
from p2pnet.errors import ForgedError, ResourceError
from p2pnet.v1 import common_pb2
from p2pnet.vnode.state import BUFFER, PARAM, decode_state
from p2pnet.vnode.tensors import Array


async def fetch_weights(
    session: Session, network: NetworkInfo, states: Mapping[str, common_pb2.BlobRef]
) -> dict[str, Array]:
    """Parameters and buffers of a cut, keys VNODE.PARAM.

    Raises:
        UnreachableError: nobody has one of the states.
        ForgedError: the states are not of one step.
    """
    vnodes = sorted(states)
    blobs = await asyncio.gather(
        *(session.fetch(states[vnode], network.state_url) for vnode in vnodes)
    )
    weights: dict[str, Array] = {}
    steps: list[int] = []
    for vnode, data in zip(vnodes, blobs, strict=True):
        tensors, step = decode_state(data)
        steps.append(step)
        for name, array in tensors.items():
            for kind in (PARAM, BUFFER):
                if name.startswith(kind):
                    weights[f"{vnode}.{name.removeprefix(kind)}"] = array
    if len(dict.fromkeys(steps)) > 1:
        raise ForgedError(f"the states of a cut are of several steps: {sorted(set(steps))}")
    return weights


def write_weights(path: Path, weights: Mapping[str, Array]) -> None:
    """Writes safetensors, all or nothing; raises ResourceError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(safetensors.numpy.save(dict(weights)))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{path} cannot be written: {error.strerror}") from error
