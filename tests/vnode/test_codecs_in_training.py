"""Training under each codec: what is computed does not depend on what lives where."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_client import MemorySession
from memory_swarm import MemorySwarm
from small_network import plain, submit, train
from virtual_time import play

from p2pnet.v1 import common_pb2

STEPS = 3


def trained(directory: Path, nodes: str, codec: str) -> tuple[str, list[int]]:
    """The weights' digest, and the codecs that crossed the wire, over that many nodes."""
    seen: list[int] = []

    async def main() -> str:
        async with MemorySwarm(directory, nodes) as swarm:
            session = MemorySession(swarm)
            network = await submit(session, swarm["a"].peer_id, codec=codec)
            result = await train(session, network, STEPS)
            for letter in swarm.letters:
                if letter.method == "VNode/Train" and letter.source in swarm.nodes:
                    tensor = letter.request.tensor
                    seen.extend([tensor.codec] * (tensor.dtype == common_pb2.DTYPE_FLOAT32))
            return result.digest

    return play(main()), seen


@pytest.mark.parametrize("codec", ["raw", "auto", "zstd"])
def test_lossless_codecs_change_nothing(tmp_path: Path, codec: str) -> None:
    digest, seen = trained(tmp_path, "abcd", codec)
    assert digest == plain(STEPS)[0]
    assert seen


@pytest.mark.parametrize(
    ("codec", "number"), [("fp16", common_pb2.CODEC_FP16), ("int8", common_pb2.CODEC_INT8)]
)
def test_lossy_codecs_act_the_same_within_a_host(tmp_path: Path, codec: str, number: int) -> None:
    spread, seen = trained(tmp_path / "many", "abcd", codec)
    assert seen
    assert set(seen) == {number}
    alone, none = trained(tmp_path / "one", "a", codec)
    assert none == []
    assert spread == alone
    assert spread != plain(STEPS)[0]
