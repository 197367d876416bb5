"""A network whose log and states live in a bucket: nothing of it depends on any peer."""

from __future__ import annotations

from pathlib import Path

import pytest
from digits import DIGITS, STEPS, digits_batches
from s3_server import S3Server
from swarm import Figure, Swarm

BUCKET = "p2pnet"
URL = f"s3://{BUCKET}/shared"
DIES_AFTER = 25  # between two cuts


def test_a_run_with_its_state_in_a_bucket_outlives_orchestrator_and_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_digest: str, figure: Figure
) -> None:
    with S3Server(BUCKET).running() as s3:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "test")
        with Swarm(tmp_path) as swarm:
            swarm.grow(4, "--state", URL)
            client = swarm.nodes[0].client
            network = client.submit(
                {**DIGITS, "name": "bucket"}, orchestrator=swarm.nodes[1].peer_id
            )
            batches = digits_batches()
            for x, y in batches[:DIES_AFTER]:
                network.train_step(x, y)
            swarm.nodes[1].kill()  # the orchestrator, which hosts some of it, too
            for x, y in batches[DIES_AFTER:]:
                network.train_step(x, y)
            network.finish()
            assert network.digest() == quiet_digest
            assert network.status().committed_step == STEPS
            assert network.status().epoch > 1
            log = [key for key in s3.objects if key.startswith("shared/log/")]
            states = [key for key in s3.objects if key.startswith("shared/states/")]
            assert [key[-14:] for key in sorted(log)] == [
                f"{slot:08d}.entry" for slot in range(1, len(log) + 1)
            ]
            # Three VNodes have weights; states of equal content are one object.
            assert len(states) >= 3 * (STEPS // DIGITS["cut_every"])
            figure(f"{len(log)} entries, {len(states)} states, {len(s3.requests)} requests")

            s3.fault = lambda method, key: "503"
            refused = swarm.cli("submit", str(_spec(tmp_path)), node=swarm.nodes[2])
            assert "it answers 503" in refused.sentence()


def _spec(directory: Path) -> Path:
    path = directory / "small.yaml"
    path.write_text(
        "name: small\n"
        "inputs: {x: {shape: [4], dtype: float32}}\n"
        "nodes: [{id: fc, type: Linear, config: {in_features: 4, out_features: 2}}]\n"
        "loss: {id: loss, type: CrossEntropyLoss}\n"
        "optimizer: {type: SGD, lr: 0.1}\n"
    )
    return path
