"""What peers say of a network's log, of a service and of an allocation, as targets.

Entries, proofs and requests go to the shipped cores: a keeper that is asked, a reader and
a proposer that are answered, a host's admission. As in `fuzz.parsers`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from fuzz.mutations import mutated, scrambled
from fuzz.parsers import Parser, Read, disk_frame, signed_of, stateless, written
from google.protobuf.message import DecodeError, Message
from log import log_helpers as given

from p2pnet import keys
from p2pnet.causality import Causality
from p2pnet.core import Tick
from p2pnet.dht import service
from p2pnet.errors import ForgedError, LocalError, MalformedError, RefusedError
from p2pnet.hlc import AHEAD_MS_MAX
from p2pnet.keys import KeyPair, sha256
from p2pnet.log import proposer as writing
from p2pnet.log import reader as reading
from p2pnet.log.history import History, new_cancellation, new_closing, new_commit
from p2pnet.log.keeper import Accept, Event, Keeper, Learn, Prepare, Reply
from p2pnet.log.keeper import Read as ReadLog
from p2pnet.log.proof import check_decided
from p2pnet.log.stored import open_stored
from p2pnet.orchestrator.spec import load_spec
from p2pnet.v1 import common_pb2, kept_pb2, log_pb2, pnode_pb2, records_pb2
from p2pnet.vnode.admission import Limits, claim_in, examine
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.standing import Standing, unseal_standing

M = TypeVar("M", bound=Message)
REMOTE = (MalformedError, ForgedError)

# A log of every kind of entry

WRITER, HOST = given.key(1), given.key(2)
KEEPERS = [given.key(number) for number in (11, 12, 13)]
PAIRS = {pair.peer_id: pair for pair in KEEPERS}
GRAPH = load_spec(
    {
        "name": "small",
        "inputs": {"x": {"shape": [4], "dtype": "float32"}},
        "nodes": [
            {"id": "fc", "type": "Linear", "config": {"in_features": 4, "out_features": 2}},
            {"id": "act", "type": "ReLU"},
        ],
        "loss": {"id": "loss", "type": "CrossEntropyLoss"},
        "optimizer": {"type": "SGD", "lr": 0.1},
    }
)
MANIFEST = given.manifest(anybody=True, keepers=given.keys_of(KEEPERS), spec_digest=GRAPH.digest)
NETWORK = given.network_of(MANIFEST)
STATES = {
    name: common_pb2.BlobRef(digest=sha256(name.encode()), size_bytes=9, holders=[HOST.peer_id])
    for name in GRAPH.vnodes()
}
PLACEMENT = dict.fromkeys(GRAPH.vnodes(), HOST.peer_id)
GENESIS = log_pb2.Genesis(graph=GRAPH.to_json(), states=STATES)


def made_log() -> History:
    """A claim with its genesis, a commit, a takeover, and the end."""
    history = History(NETWORK)
    history.add(given.claim(history, WRITER, MANIFEST, placement=PLACEMENT, genesis=GENESIS))
    history.add(new_commit(history, WRITER, 10, STATES, result=(0.5, 3, 4)))
    history.add(given.claim(history, HOST, MANIFEST, placement=PLACEMENT, reason="gone"))
    end = new_cancellation(given.OWNER, NETWORK, "done", 1)
    history.add(new_closing(history, WRITER, end))
    return history


LOG = made_log()
PROOFS = given.proofs_of(LOG, PAIRS)
ENTRIES = tuple(LOG.entries)
PAYLOADS = tuple(log_pb2.LogEntry.FromString(signed.payload) for signed in ENTRIES)
SIGNERS = (WRITER, WRITER, HOST, WRITER)


def up_to(slot: int) -> History:
    """The log before a slot."""
    history = History(NETWORK)
    history.extend(ENTRIES[: slot - 1])
    return history


BEFORE = tuple(up_to(slot) for slot in range(1, len(ENTRIES) + 1))


def wrong_entry(rng: Random, slot: int) -> common_pb2.Signed:
    """An entry for that slot with something wrong inside, signed by who should sign it."""
    good = PAYLOADS[slot - 1]
    if rng.random() < 0.7:
        payload = written(scrambled(rng, good))
    else:
        payload = mutated(rng, (written(good),))
    return SIGNERS[slot - 1].sign(keys.LOG_ENTRY, payload)


def entry_frame(rng: Random) -> bytes:
    """A signed log entry."""
    if rng.random() < 0.3:
        return mutated(rng, tuple(map(written, ENTRIES)))
    return written(wrong_entry(rng, rng.randrange(len(ENTRIES)) + 1))


def read_entry(data: bytes) -> None:
    """As whoever reads the log takes it, in the slot that it fits best."""
    signed = signed_of(data)
    try:
        slot = log_pb2.LogEntry.FromString(signed.payload).slot
    except DecodeError:
        slot = 1
    before = BEFORE[min(max(slot, 1), len(BEFORE)) - 1]
    history = History(NETWORK)
    history.extend(before.entries)
    history.add(signed)


def proven(rng: Random) -> tuple[int, common_pb2.Signed, log_pb2.Proof]:
    """(slot, entry, proof) of which one may be wrong; the votes may be made for it."""
    slot = rng.randrange(len(ENTRIES)) + 1
    signed, proof = ENTRIES[slot - 1], PROOFS[slot]
    roll = rng.random()
    if roll < 0.6:
        proof = scrambled(rng, proof)
    elif roll < 0.7:
        proof = PROOFS[rng.randrange(len(ENTRIES)) + 1]
    else:
        signed = wrong_entry(rng, slot)
        try:
            proof = given.proof_of(BEFORE[slot - 1], signed, PAIRS)
        except REMOTE:
            pass
    return slot, signed, proof


DECIDED = tuple(
    written(log_pb2.PrepareReply(decided=True, entry=signed, proof=PROOFS[slot]))
    for slot, signed in enumerate(ENTRIES, start=1)
)


def proof_frame(rng: Random) -> bytes:
    """What a keeper answers to a proposer that comes too late: an entry and its proof."""
    _, signed, proof = proven(rng)
    reply = log_pb2.PrepareReply(decided=True, entry=signed, proof=proof)
    return mutated(rng, (written(reply),)) if rng.random() < 0.3 else written(reply)


def read_proof(data: bytes) -> None:
    """An entry with the votes for it."""
    reply = parsed(log_pb2.PrepareReply, data)
    slot = 1
    try:
        slot = log_pb2.LogEntry.FromString(reply.entry.payload).slot
    except DecodeError:
        pass
    check_decided(reply.entry, reply.proof, BEFORE[min(max(slot, 1), len(BEFORE)) - 1])


def parsed(kind: type[M], data: bytes) -> M:
    """As gRPC does before a handler sees it."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise MalformedError("the call does not parse") from None


# A keeper that is asked


def ballot(round_: int) -> log_pb2.Ballot:
    return log_pb2.Ballot(round=round_, proposer=WRITER.peer_id)


REQUESTS: tuple[Message, ...] = (
    log_pb2.PrepareRequest(network_id=NETWORK, slot=1, ballot=ballot(1), manifest=MANIFEST),
    log_pb2.AcceptRequest(network_id=NETWORK, slot=1, ballot=ballot(1), entry=ENTRIES[0]),
    log_pb2.LearnRequest(
        network_id=NETWORK, entries=ENTRIES[:2], proofs=[PROOFS[slot] for slot in (1, 2)]
    ),
    log_pb2.ReadLogRequest(network_id=NETWORK, from_slot=1),
)
EVENTS: tuple[Callable[[str, Any], Event], ...] = (
    Prepare, Accept, Learn, lambda caller, request: ReadLog(request)
)  # fmt: skip


CALLS = tuple(bytes([kind]) + written(request) for kind, request in enumerate(REQUESTS))


def keeper_frame(rng: Random) -> bytes:
    """A byte that says which call it is, and the call."""
    kind = rng.randrange(len(REQUESTS))
    good = REQUESTS[kind]
    if rng.random() < 0.3:
        return bytes([kind]) + mutated(rng, (written(good),))
    wrong = scrambled(rng, good)
    if isinstance(wrong, log_pb2.AcceptRequest) and rng.random() < 0.5:
        wrong.slot = rng.randrange(len(ENTRIES)) + 1
        wrong.entry.CopyFrom(wrong_entry(rng, wrong.slot))
    elif isinstance(wrong, log_pb2.LearnRequest) and rng.random() < 0.5:
        _, signed, proof = proven(rng)
        wrong.entries.add().CopyFrom(signed)
        wrong.proofs.add().CopyFrom(proof)
    elif isinstance(wrong, log_pb2.PrepareRequest) and rng.random() < 0.3:
        wrong.slot = rng.randrange(5)
        wrong.ballot.CopyFrom(ballot(rng.choice((1, 2, 1 << 40, 1 << 62))))
    return bytes([kind]) + written(wrong)


def start_keeper(rng: Random) -> Read:
    """What is refused changes nothing; what is not is answered once."""
    keeper = Keeper(KEEPERS[0])

    def read(data: bytes) -> None:
        kind = data[0] % len(REQUESTS) if data else 0
        request = parsed(type(REQUESTS[kind]), data[1:])
        before = keeper.dump() if rng.random() < 0.02 else None
        try:
            effects = keeper.handle(EVENTS[kind](WRITER.peer_id, request), 0.0)
        except (MalformedError, ForgedError, RefusedError):
            assert before is None or before == keeper.dump()
            raise
        assert [isinstance(effect, Reply) for effect in effects].count(True) == 1
        keeper.check()

    return read


# Who reads or writes, and is answered


TOLD = log_pb2.ReadLogReply(entries=ENTRIES, proofs=[PROOFS[slot] for slot in sorted(PROOFS)])


def read_reply_frame(rng: Random) -> bytes:
    """A ReadLogReply."""
    reply = log_pb2.ReadLogReply()
    reply.CopyFrom(TOLD)
    roll = rng.random()
    if roll < 0.3:
        return mutated(rng, (written(reply),))
    if roll < 0.6:
        slot, signed, proof = proven(rng)
        reply.entries[slot - 1].CopyFrom(signed)
        reply.proofs[slot - 1].CopyFrom(proof)
        return written(reply)
    if roll < 0.7:
        return written(scrambled(rng, log_pb2.ReadLogReply(keepers=given.keys_of(KEEPERS))))
    return written(scrambled(rng, reply))


def start_reader(rng: Random) -> Read:
    """Whatever its keepers answer, a read comes to an end, and nothing comes out."""

    def read(data: bytes) -> None:
        reply = parsed(log_pb2.ReadLogReply, data)
        core = reading.LogReader(History(NETWORK), first=given.keys_of(KEEPERS), rounds_max=1)
        now, effects = 0.0, list(core.handle(reading.Begin(), 0.0))
        for _ in range(60):
            core.check()
            if core.deadline() is None:
                return
            if effects:
                effect = effects.pop(0)
                if isinstance(effect, reading.Ask):
                    effects += core.handle(reading.Answered(effect.keeper, reply), now)
            else:
                now = core.deadline() or now
                effects += core.handle(Tick(), now)
        raise AssertionError("a read without an end")

    return read


def write_reply_frame(rng: Random) -> bytes:
    """A PrepareReply or an AcceptReply."""
    roll = rng.random()
    if roll < 0.3:
        return b"\x00" + proof_frame(rng)
    if roll < 0.7:
        promise = log_pb2.PrepareReply(promised=True, ballot=ballot(1), next_slot=1)
        if rng.random() < 0.5:
            promise.accepted.CopyFrom(ballot(1))
            promise.entry.CopyFrom(wrong_entry(rng, 2) if rng.random() < 0.7 else ENTRIES[1])
        return b"\x00" + written(scrambled(rng, promise))
    accepted = log_pb2.AcceptReply(accepted=True, ballot=ballot(1), vote=bytes(64))
    return b"\x01" + written(scrambled(rng, accepted))


def start_proposer(rng: Random) -> Read:
    """Whatever its keepers answer, nothing is taken for decided without their votes."""
    history = BEFORE[1]
    entry = new_commit(history, WRITER, 20, STATES)
    core: list[writing.Proposer] = []

    def read(data: bytes) -> None:
        if not core or core[0].deadline() is None:
            core[:] = [
                writing.Proposer(
                    WRITER.peer_id, history, entry, rng=Random(1), proofs=PROOFS, rounds_max=2
                )
            ]
            core[0].handle(writing.Begin(), 0.0)
        prepares = data[:1] == b"\x00"
        slot = history.next_slot
        for keeper in given.keys_of(KEEPERS):
            event: writing.Event
            if prepares:
                event = writing.Answered(
                    keeper,
                    log_pb2.PrepareRequest(network_id=NETWORK, slot=slot, ballot=ballot(1)),
                    parsed(log_pb2.PrepareReply, data[1:]),
                )
            else:
                event = writing.Answered(
                    keeper,
                    log_pb2.AcceptRequest(network_id=NETWORK, slot=slot, ballot=ballot(1)),
                    parsed(log_pb2.AcceptReply, data[1:]),
                )
            for effect in core[0].handle(event, 0.0):
                if isinstance(effect, writing.Decided):
                    check_decided(effect.entry, effect.proof, history)
        core[0].check()

    return read


# Allocations


def allocation_request() -> pnode_pb2.AllocateRequest:
    return pnode_pb2.AllocateRequest(
        network_id=NETWORK,
        epoch=1,
        manifest=MANIFEST,
        graph=GRAPH.to_json(),
        vnodes=sorted(PLACEMENT),
        lease_s=10,
        states=STATES,
        claim=ENTRIES[0],
    )


ALLOCATE = allocation_request()
LIMITS = Limits(me=HOST.peer_id, memory_bytes=1 << 30)


def allocate_frame(rng: Random) -> bytes:
    """An AllocateRequest."""
    roll = rng.random()
    if roll < 0.3:
        return mutated(rng, (written(ALLOCATE),))
    if roll < 0.7:
        return written(scrambled(rng, ALLOCATE))
    wrong = pnode_pb2.AllocateRequest()
    wrong.CopyFrom(ALLOCATE)
    wrong.claim.CopyFrom(wrong_entry(rng, 1))
    return written(wrong)


def read_allocation(data: bytes) -> None:
    """A host's own look at it, before it asks the log: an offer or a refusal, never an error."""
    request = parsed(pnode_pb2.AllocateRequest, data)
    found = examine(request, WRITER.peer_id, LIMITS, 1)
    if isinstance(found, common_pb2.Refusal):
        assert found.code
        raise MalformedError(found.detail)


def graph_frame(rng: Random) -> bytes:
    """A compiled graph, which is JSON."""
    return mutated(rng, (GRAPH.to_json(),))


# Services

GOVERNORS = tuple(KeyPair.from_seed(bytes([number]) * 32) for number in (90, 91, 92))
SERVICE = records_pb2.ServiceManifest.FromString(
    service.make_payload(
        "weather", 2, sorted(pair.public_key for pair in GOVERNORS), version=3,
        networks=[NETWORK], owners=[given.OWNER.public_key],
    )
)  # fmt: skip


def signed_service(payload: bytes, signers: int = 2) -> bytes:
    """Signed by so many of the governors."""
    signatures = sorted(
        (service.sign(payload, pair) for pair in GOVERNORS[:signers]),
        key=lambda signature: signature.public_key,
    )
    return written(records_pb2.SignedService(payload=payload, signatures=signatures))


GOOD_SERVICE = signed_service(written(SERVICE))


def service_frame(rng: Random) -> bytes:
    """A service's manifest, wrong inside and signed, or damaged."""
    roll = rng.random()
    if roll < 0.4:
        return mutated(rng, (GOOD_SERVICE,))
    if roll < 0.5:
        return signed_service(written(SERVICE), rng.randrange(2))
    wrong = written(scrambled(rng, SERVICE)) if roll < 0.8 else mutated(rng, (written(SERVICE),))
    return signed_service(wrong)


# The clock's header, and our own disk


def timestamp_frame(rng: Random) -> bytes:
    """The header that every call carries."""
    return mutated(rng, (b"019ab5dd7e33-0002", b"ffffffffffff-ffff", b"000000000000-0000"))


def start_clock(rng: Random) -> Read:
    wall_ms = 1_800_000_000_000
    clock = Causality(lambda: wall_ms)

    def read(data: bytes) -> None:
        """It is followed or not, and never takes us far from our own clock; nothing comes out."""
        clock.incoming(data.decode(errors="replace"), WRITER.peer_id)
        assert clock.stamp()[0].wall_ms <= wall_ms + AHEAD_MS_MAX

    return read


STANDING = Standing(
    NETWORK, 3, bytes(32), tuple(given.keys_of(KEEPERS)), 2, WRITER.peer_id, bytes(32), 10
).seal()


LOG_PARSERS = (
    Parser("log entry", 3_000, entry_frame, stateless(read_entry), REMOTE),
    Parser("proof of an entry", 2_000, proof_frame, stateless(read_proof), REMOTE),
    Parser("keeper", 3_000, keeper_frame, start_keeper, (*REMOTE, RefusedError)),
    Parser("answer to a reader", 1_500, read_reply_frame, start_reader),
    Parser("answer to a proposer", 1_500, write_reply_frame, start_proposer),
    Parser("claim that is shown", 1_500, entry_frame,
           stateless(lambda data: claim_in(signed_of(data), NETWORK, WRITER.peer_id)), REMOTE),
    Parser("allocation", 2_000, allocate_frame, stateless(read_allocation)),
    Parser("compiled graph", 2_000, graph_frame, stateless(CompiledGraph.from_json)),
    Parser("service", 2_000, service_frame,
           stateless(lambda data: service.open_service(service.parse_signed(data))), REMOTE),
    Parser("timestamp", 2_000, timestamp_frame, start_clock, errors=()),
    Parser("entry in a store", 1_000, entry_frame,
           stateless(lambda data: open_stored(data, NETWORK, 1, "1.entry")), (LocalError,)),
    Parser("standing on disk", 1_000, disk_frame(b"host", STANDING, kept_pb2.KeptStanding),
           stateless(lambda data: unseal_standing(NETWORK, data)), (LocalError,)),
)  # fmt: skip
