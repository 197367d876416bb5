"""What the tests of the log share: keys, a manifest, and entries made by hand."""

from __future__ import annotations

from p2pnet import keys
from p2pnet.keys import KeyPair, sha256
from p2pnet.log.history import History, new_claim, new_commit
from p2pnet.v1 import common_pb2, log_pb2, records_pb2


def key(number: int) -> KeyPair:
    return KeyPair.from_seed(bytes([number]) * 32)


OWNER = key(200)


def manifest(*granted: KeyPair, anybody: bool = False) -> common_pb2.Signed:
    body = records_pb2.Manifest(
        owner=OWNER.public_key,
        name="digits",
        spec_digest=bytes(32),
        any_orchestrator=anybody,
        orchestrators=[pair.peer_id for pair in granted],
    )
    return OWNER.sign(keys.MANIFEST, body.SerializeToString(deterministic=True))


def network_of(signed: common_pb2.Signed) -> str:
    return sha256(signed.payload)[:16].hex()


OPEN = manifest(anybody=True)
NETWORK = network_of(OPEN)


def states(text: str = "state") -> dict[str, common_pb2.BlobRef]:
    return {"fc1": common_pb2.BlobRef(digest=sha256(text.encode()), size_bytes=5)}


def claimed(pair: KeyPair, *, keepers: tuple[str, ...] = (), commits: int = 0) -> History:
    """A history of one claim by `pair` and some commits at steps 20, 40, ..."""
    history = History(NETWORK)
    assert history.add(new_claim(history, pair, OPEN, keepers=keepers)) == ""
    for number in range(1, commits + 1):
        assert history.add(new_commit(history, pair, 20 * number, states(str(number)))) == ""
    return history


def resign(
    pair: KeyPair, signed: common_pb2.Signed, **changes: object
) -> tuple[common_pb2.Signed, log_pb2.LogEntry]:
    """The entry with top-level fields changed, signed anew."""
    entry = log_pb2.LogEntry.FromString(signed.payload)
    for name, value in changes.items():
        if name == "keepers":
            del entry.keepers[:]
            entry.keepers.extend(value)  # type: ignore[arg-type]
        else:
            setattr(entry, name, value)
    return pair.sign(keys.LOG_ENTRY, entry.SerializeToString(deterministic=True)), entry
