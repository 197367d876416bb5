"""What the tests of the log share: keys, a manifest, and entries made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from p2pnet import keys
from p2pnet.keys import KeyPair, sha256
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import History, keepers_of_next, new_claim, new_commit
from p2pnet.log.proof import majority, prove, vote
from p2pnet.v1 import common_pb2, log_pb2, records_pb2


def key(number: int) -> KeyPair:
    return KeyPair.from_seed(bytes([number]) * 32)


OWNER = key(200)
GRAPH = b'{"a": "graph"}'
GENESIS = log_pb2.Genesis(graph=GRAPH)
HOME = "file:///nowhere"


def keys_of(pairs: Sequence[KeyPair]) -> list[str]:
    return sorted(pair.peer_id for pair in pairs)


def manifest(
    *granted: KeyPair,
    anybody: bool = False,
    keepers: Sequence[str] = (),
    url: str = HOME,
    spec_digest: bytes = sha256(GRAPH),
    **fields: Any,
) -> common_pb2.Signed:
    """On `keepers`, or else in a store."""
    body = records_pb2.Manifest(
        owner=OWNER.public_key,
        name="digits",
        spec_digest=spec_digest,
        any_orchestrator=anybody,
        orchestrators=[pair.peer_id for pair in granted],
        keepers=sorted(keepers),
        state_url="" if keepers else url,
        **fields,
    )
    return OWNER.sign(keys.MANIFEST, body.SerializeToString(deterministic=True))


def network_of(signed: common_pb2.Signed) -> str:
    return sha256(signed.payload)[:16].hex()


OPEN = manifest(anybody=True)
NETWORK = network_of(OPEN)


def states(text: str = "state") -> dict[str, common_pb2.BlobRef]:
    return {"fc1": common_pb2.BlobRef(digest=sha256(text.encode()), size_bytes=5)}


def claim(history: History, pair: KeyPair, signed: common_pb2.Signed = OPEN, **more: Any) -> Any:
    """The next claim by `pair`, on itself; with the genesis where it is the first."""
    given: dict[str, Any] = {"placement": {"fc1": pair.peer_id}} | more
    if not history.epoch:
        given.setdefault("genesis", GENESIS)
    return new_claim(history, pair, signed, **given)


def claimed(pair: KeyPair, signed: common_pb2.Signed = OPEN, *, commits: int = 0) -> History:
    """A history of one claim by `pair` and some commits at steps 20, 40, ..."""
    history = History(network_of(signed))
    assert history.add(claim(history, pair, signed)) == ""
    for number in range(1, commits + 1):
        assert history.add(new_commit(history, pair, 20 * number, states(str(number)))) == ""
    return history


def proof_of(
    history: History, signed: common_pb2.Signed, pairs: Mapping[str, KeyPair], round_: int = 1
) -> log_pb2.Proof:
    """The proof that the first majority of the keepers of the history's next slot gives."""
    keepers = keepers_of_next(history, signed)
    ballot = log_pb2.Ballot(round=round_, proposer=keepers[0])
    voters = keepers[: majority(keepers)]
    return prove(ballot, {name: vote(pairs[name], ballot, signed) for name in voters})


def proofs_of(history: History, pairs: Mapping[str, KeyPair]) -> dict[int, log_pb2.Proof]:
    """A proof for each entry, by slot."""
    so_far = History(history.network_id)
    proofs: dict[int, log_pb2.Proof] = {}
    for slot, signed in enumerate(history.entries, start=1):
        proofs[slot] = proof_of(so_far, signed, pairs)
        so_far.add(signed)
    return proofs


def resign(
    pair: KeyPair, signed: common_pb2.Signed, **changes: object
) -> tuple[common_pb2.Signed, log_pb2.LogEntry]:
    """The entry with fields changed, of the entry or of its claim, signed anew."""
    entry = log_pb2.LogEntry.FromString(signed.payload)
    for name, value in changes.items():
        part: Any = entry if name in log_pb2.LogEntry.DESCRIPTOR.fields_by_name else entry.claim
        if name in ("keepers", "hosts"):
            del getattr(part, name)[:]
            getattr(part, name).extend(value)
        elif name == "placement":
            part.placement.clear()
            part.placement.update(value)  # type: ignore[arg-type]
        else:
            setattr(part, name, value)
    return pair.sign(keys.LOG_ENTRY, entry.SerializeToString(deterministic=True)), entry


def slot_of(signed: common_pb2.Signed) -> int:
    return int(parse_entry(signed).slot)
