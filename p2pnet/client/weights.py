"""A network's weights: fetched from the last cut, named as torch names them, written to a file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from p2pnet.client.session import NetworkInfo, Session
from p2pnet.datadir import write_whole
from p2pnet.errors import ForgedError
from p2pnet.v1 import common_pb2
from p2pnet.vnode.state import decode_state, encode_export, weights_of
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
        weights |= weights_of(vnode, tensors)
    if len(dict.fromkeys(steps)) > 1:
        raise ForgedError(f"the states of a cut are of several steps: {sorted(set(steps))}")
    return weights


def write_weights(path: Path, weights: Mapping[str, Array]) -> None:
    """Writes safetensors, all or nothing; raises ResourceError."""
    write_whole(path, encode_export(weights))
