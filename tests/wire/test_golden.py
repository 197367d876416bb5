"""Bytes that v1 peers put on the wire and into the DHT, as they were when v1 began.

Whoever changes one of them breaks every peer, record, log and state that exists.
`python tests/wire/test_golden.py` prints the file anew, for a message that is added.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message import Message

sys.path.insert(0, str(Path(__file__).parent))
import breaking

from p2pnet import keys
from p2pnet.data.datasets import sample_order
from p2pnet.dht import wire as kad
from p2pnet.dht.keyspace import cid_of, network_key, vnode_key
from p2pnet.dht.manifest import network_id_of
from p2pnet.dht.records import ALLOCATION, make_record, open_record, serialise_set
from p2pnet.gossip.statements import build_advert, open_advert
from p2pnet.keys import KeyPair
from p2pnet.net.hop_frames import first_frame
from p2pnet.net.varint import frame
from p2pnet.v1 import common_pb2, log_pb2, orchestrator_pb2, records_pb2, session_pb2, vnode_pb2
from p2pnet.vnode.components import init_seed
from p2pnet.vnode.state import encode_state, model_digest
from p2pnet.vnode.tensors import INT8, RAW, encode

GOLDEN = Path(__file__).parent / "golden.json"
OWNER, HOST, CLAIMANT = (KeyPair.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
WALL_MS = 1_790_000_000_000


def manifest() -> common_pb2.Signed:
    payload = records_pb2.Manifest(
        owner=OWNER.public_key, name="digits", spec_digest=b"\5" * 32, any_orchestrator=True,
        created_at_ms=WALL_MS, nonce=b"\6" * 16, micro_batches=1, compute_threads=1,
    )  # fmt: skip
    return OWNER.sign(keys.MANIFEST, payload.SerializeToString(deterministic=True))


def allocation() -> common_pb2.Signed:
    """An allocation's record: countersigned by the host, signed by the claimant."""
    network_id = network_id_of(manifest())
    body = records_pb2.Allocation(
        network_id=network_id, vnode="fc1", host=HOST.peer_id, addrs=["/ip4/127.0.0.1/tcp/4001"],
        epoch=7, claimant=CLAIMANT.peer_id, role="primary", lease_s=60, manifest=manifest(),
    )  # fmt: skip
    accepted = HOST.sign(keys.ACCEPTANCE, body.SerializeToString(deterministic=True))
    return make_record(
        CLAIMANT, vnode_key(network_id, "fc1"), ALLOCATION, epoch=7, sequence=9, ttl_s=60,
        issued_at_ms=WALL_MS, body=accepted.SerializeToString(deterministic=True),
    )  # fmt: skip


def log_entry() -> common_pb2.Signed:
    commit = log_pb2.Commit(
        epoch=7, step=40, states={"fc1": common_pb2.BlobRef(digest=b"\7" * 32, size_bytes=99)}
    )
    entry = log_pb2.LogEntry(
        network_id=network_id_of(manifest()), slot=3, commit=commit, keepers=[HOST.peer_id],
        previous=b"\x08" * 32,
    )  # fmt: skip
    return CLAIMANT.sign(keys.LOG_ENTRY, entry.SerializeToString(deterministic=True))


def step_id() -> vnode_pb2.StepId:
    return vnode_pb2.StepId(network_id=network_id_of(manifest()), epoch=7, step=41)


def examples() -> dict[str, bytes | str]:
    """One of each thing that outlives a process or crosses the wire."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3) / 4
    network_id = network_id_of(manifest())
    tensor, payload = encode(array, RAW)
    train = vnode_pb2.TrainRequest(
        id=step_id(), vnode="fc2", direction=vnode_pb2.DIRECTION_BACKWARD, source="out",
        slot=0, tensor=tensor, decided_step=40, tensor_digest=b"\2" * 32,
    )  # fmt: skip
    hop = vnode_pb2.HopFrame(
        id=300, train=train, size_bytes=len(payload), timeout_ms=5000, hlc="1-2"
    )
    messages: dict[str, Message] = {
        "manifest": manifest(),
        "allocation": allocation(),
        "log entry": log_entry(),
        "advert": build_advert(HOST, incarnation=1, sequence=2).signed,
        "session proof": session_pb2.OpenRequest(
            proof=HOST.sign(
                keys.SESSION, session_pb2.SessionProof(nonce=b"\1" * 32).SerializeToString()
            )
        ),
        "train": train,
        "report": orchestrator_pb2.ReportRequest(
            id=step_id(), vnode="loss", held=orchestrator_pb2.Held(loss=0.5, correct=3, samples=8)
        ),
    }  # fmt: skip
    out: dict[str, bytes | str] = {
        name: message.SerializeToString(deterministic=True) for name, message in messages.items()
    }
    out["hop"] = first_frame(hop, memoryview(payload))
    out["hop, int8"] = bytes(encode(array, INT8)[1])
    record = open_record(allocation(), vnode_key(network_id, "fc1"), WALL_MS)
    out["record set"] = serialise_set([record])
    out["kad request"] = frame(
        kad.serialise(kad.Message(kad.Kind.FIND_NODE, keys.peer_id_bytes(HOST.peer_id)))
    )
    out["state"] = encode_state({"param.weight": array}, 40)
    out["network id"] = network_id
    out["network key"] = network_key(network_id)
    out["cid"] = cid_of(vnode_key(network_id, "fc1"))
    out["peer id"] = HOST.peer_id
    out["model digest"] = model_digest({"fc1.weight": array})
    out["init seed"] = str(init_seed(0, "fc1"))
    out["sample order"] = " ".join(map(str, sample_order(12, 0, 1)))
    return out


def text(value: bytes | str) -> str:
    return value.hex() if isinstance(value, bytes) else value


@pytest.mark.parametrize("name", sorted(examples()))
def test_the_bytes_are_those_of_v1(name: str) -> None:
    assert text(examples()[name]) == json.loads(GOLDEN.read_text())[name]


def test_every_golden_thing_is_still_made() -> None:
    assert sorted(examples()) == sorted(json.loads(GOLDEN.read_text()))


def test_what_was_written_then_is_read_now() -> None:
    golden = json.loads(GOLDEN.read_text())
    network_id = golden["network id"]
    record = common_pb2.Signed.FromString(bytes.fromhex(golden["allocation"]))
    opened = open_record(record, vnode_key(network_id, "fc1"), WALL_MS)
    assert isinstance(opened.content, records_pb2.Allocation)
    assert (opened.author, opened.content.host) == (CLAIMANT.peer_id, HOST.peer_id)
    advert = open_advert(common_pb2.Signed.FromString(bytes.fromhex(golden["advert"])))
    assert (advert.peer_id, advert.incarnation, advert.sequence) == (HOST.peer_id, 1, 2)


def test_a_changed_protocol_is_noticed() -> None:
    old = breaking.describe()
    assert breaking.changes(old, old) == []
    for name in ("p2pnet.v1.Tensor#4", "p2pnet.v1.VNode.Hops", "p2pnet.v1.Codec=1"):
        gone = {key: value for key, value in old.items() if key != name}
        assert breaking.changes(old, gone) == [f"{name} ({old[name]}) is gone"]
        assert breaking.changes(old, old | {name: "string payload"}) != []
    assert breaking.changes(old, old | {"p2pnet.v1.Tensor#99": "string extra"}) == []


if __name__ == "__main__":
    GOLDEN.write_text(
        json.dumps({name: text(value) for name, value in examples().items()}, indent=0) + "\n"
    )
