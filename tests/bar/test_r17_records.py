"""R17: forged, expired, rolled-back, ungranted, non-canonical records are never taken.

As written: 100,000 bad records of 48 kinds, each put to a holder and each given as the
answer to a read (rig S, the shipped core), and 4,000 over the shell (rig M): 0 accepted.
Short form: 2,000 and 200. Among them are good ones, all of which must be accepted, so
that what refuses everything does not pass. Each mutant lacks one check, and the same
judge must fail it.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from bad_records import (
    CLAIMANT,
    KINDS,
    NEWEST,
    TTL_S,
    WALL_MS,
    Case,
    bad,
    good,
    in_set,
    key_of,
    keypair,
    make,
)
from google.protobuf.message import Message as Protobuf

from p2pnet import keys
from p2pnet.core import Tick
from p2pnet.dht import events as ev
from p2pnet.dht import manifest, records, wire
from p2pnet.dht.core import Kademlia
from p2pnet.dht.rates import SenderRates
from p2pnet.dht.records import OpenRecord, open_record
from p2pnet.dht.shell import Dht
from p2pnet.dht.store import RecordStore
from p2pnet.dht.wire import KAD_PROTOCOL, RECORD_PROTOCOL, Kind, Message
from p2pnet.errors import MalformedError, UnreachableError
from p2pnet.net.memory import MemoryFabric

if TYPE_CHECKING:
    from conftest import Scale  # of this directory; others have a module of that name

AS_WRITTEN, SHORT = 100_000, 2_000
AS_WRITTEN_M, SHORT_M = 4_000, 200
GOOD_EVERY = 20
SEED = 17
Taken = Counter[str]


class Core:
    """A holder that is also a reader: the shipped core, to whom the only other peer lies."""

    def __init__(self) -> None:
        self.core = Kademlia(keypair(100).peer_id, random.Random(0))
        self.liar = keypair(101).peer_id
        self.now = 0.0
        self._last_id = 0
        for vnode in ("held", "gone"):
            signed = make(vnode, epoch=NEWEST[0], sequence=NEWEST[1])
            opened = open_record(signed, key_of(vnode), WALL_MS)
            if vnode == "held":  # for as long as the test takes
                opened = dataclasses.replace(opened, ttl_s=10**9)
            assert self.core.local.store.put(opened, 0.0)
        self.now = TTL_S + 1.0
        self.core.handle(Tick(), self.now)
        assert self.core.local.store.get(key_of("gone"), self.now) == []
        assert self.core.local.store.get(key_of("held"), self.now) != []

    def handle(self, event: ev.Event) -> list[ev.Effect]:
        """One event, a moment later."""
        self.now += 0.0001
        return list(self.core.handle(event, self.now))

    def put(self, case: Case) -> bool:
        """Whether a bad record is taken when it is put."""
        self._ask(Kind.PUT_VALUE, case.key, case.value)
        answer = self._ask(Kind.GET_VALUE, case.key)
        assert answer is not None
        return _has(answer.value, case)

    def get(self, case: Case) -> bool:
        """Whether a bad record is given to who reads, when a holder answers with it."""
        self._meet_the_liar()
        self._last_id += 1
        todo = self.handle(ev.Get(self._last_id, case.key, 10.0))
        found: list[OpenRecord] = []
        while todo:
            effect = todo.pop()
            if isinstance(effect, ev.SendRequest):
                todo += self._answer(effect, case.value)
            elif isinstance(effect, ev.OperationDone) and isinstance(effect.result, ev.Records):
                found += effect.result.records
        held = self.core.local.store.get(case.key, self.now)
        return any(_is(record.signed, case) for record in [*found, *held])

    def _ask(self, kind: Kind, key: bytes, value: bytes | None = None) -> Message | None:
        self._last_id += 1
        sender = keypair(200 + self._last_id // 500).peer_id  # none too fast
        addr = f"/dns4/{sender}/tcp/1"  # of an IP group of its own
        message = Message(kind, key, value)
        request = ev.RequestArrived(self._last_id, sender, message, WALL_MS, addr)
        for effect in self.handle(request):
            if isinstance(effect, ev.SendReply):
                return effect.message
        return None

    def _meet_the_liar(self) -> None:
        if self.core.local.table.get(self.liar) is None:
            todo = self.handle(ev.PeerSeen(self.liar, ("/ip4/192.0.2.9/tcp/1",), True, True))
            for effect in todo:
                if isinstance(effect, ev.SendRequest):
                    self._answer(effect, None)
            assert self.core.local.table.get(self.liar) is not None

    def _answer(self, request: ev.SendRequest, value: bytes | None) -> list[ev.Effect]:
        kind, key = request.message.kind, request.message.key
        asked = kind is Kind.GET_VALUE
        echo = request.message.value if kind is Kind.PUT_VALUE else None
        reply = Message(kind, key, value if asked else echo)
        return self.handle(ev.ReplyArrived(request.rpc_id, reply, True, WALL_MS))


def _is(signed: object, case: Case) -> bool:
    return signed == case.signed


def _has(value: bytes | None, case: Case) -> bool:
    if value is None:
        return False
    try:
        return any(_is(signed, case) for signed, _ in records.parse_set(value))
    except MalformedError:
        return False


def judge_core(count: int, only: tuple[str, ...] = ()) -> Taken:
    """How many of each kind were accepted, at put or at get: none should be."""
    taken: Taken = Counter()
    by_put, by_get = Core(), Core()
    names = [kind.__name__ for kind in KINDS]
    for n in range(count):
        if only and names[n % len(KINDS)] not in only:
            continue
        case = bad(n, SEED)
        taken[f"{case.kind}, put"] += by_put.put(case)
        taken[f"{case.kind}, get"] += by_get.get(case)
        if n % GOOD_EVERY == 0 and not only:
            fine = good(random.Random(n))
            assert by_put.put(fine), "a good record was refused at put"
            assert by_get.get(fine), "a good record was refused at get"
    return +taken


def test_r17_bad_records_are_never_taken_by_the_core(
    scale: Scale, figure: Callable[[str], None]
) -> None:
    count = AS_WRITTEN if scale.as_written else SHORT
    taken = judge_core(count)
    figure(
        f"S: {count} bad records of {len(KINDS)} kinds, at put and at get: accepted {dict(taken)}"
    )
    assert not taken


def test_r17_bad_records_are_never_taken_over_the_shell(
    scale: Scale, figure: Callable[[str], None]
) -> None:
    count = AS_WRITTEN_M if scale.as_written else SHORT_M
    taken = judge_shell(count)
    figure(f"M: {count} bad records, at put and at get: accepted {dict(taken)}")
    assert not taken


def judge_shell(count: int) -> Taken:
    """As `judge_core`, through shells and messages: a liar puts, and answers what is read."""
    taken: Taken = Counter()

    async def main() -> None:
        fabric = MemoryFabric()
        addr, lairs = "/ip4/127.0.0.1/tcp/4000", "/ip4/127.0.0.1/tcp/4001"
        network = fabric.network(keypair(100), addr)
        dht = Dht(network, rng=random.Random(0), now=trio.current_time, wall_ms=lambda: WALL_MS)
        liar = fabric.network(keypair(101), lairs)
        lie = b""

        async def answer(peer_id: str, data: bytes) -> bytes | None:
            request = wire.parse(data)
            value = lie if request.kind is Kind.GET_VALUE else request.value
            return wire.serialise(Message(request.kind, request.key, value))

        async def answer_batch(peer_id: str, data: bytes) -> bytes | None:
            return wire.join_batch(
                [await answer(peer_id, one) or b"" for one in wire.parse_batch(data)]
            )

        liar.serve(KAD_PROTOCOL, answer)
        liar.serve(RECORD_PROTOCOL, answer_batch)

        async def put(case: Case) -> bool:
            request = wire.serialise(Message(Kind.PUT_VALUE, case.key, case.value))
            await liar.connect(keypair(100).peer_id, [addr], timeout_s=1)
            try:
                await liar.request(keypair(100).peer_id, KAD_PROTOCOL, request, timeout_s=1)
            except UnreachableError:
                pass  # it was refused
            return await get(case, b"")

        async def get(case: Case, answered: bytes) -> bool:
            nonlocal lie
            lie = answered
            await dht.meet(keypair(101).peer_id, [lairs])
            try:
                return any(_is(r.signed, case) for r in await dht.get(case.key))
            except UnreachableError:
                return False

        async with trio.open_nursery() as nursery:
            await nursery.start(dht.run)
            for n in range(count):
                if n % 500 == 0:
                    await trio.sleep(10)  # a flood is refused for that alone
                case = bad(n, SEED + 1)
                if case.kind.startswith(("rolled_back", "replayed")):
                    continue  # this holder has had none of them: see rig S
                taken[f"{case.kind}, put"] += await put(case)
                case = bad(n, SEED + 2)
                taken[f"{case.kind}, get"] += await get(case, case.value)
                if n % GOOD_EVERY == 0:
                    fine = good(random.Random(n))
                    assert await put(fine), "a good record was refused at put"
                    fine = good(random.Random(-n - 1))
                    assert await get(fine, fine.value), "a good record was refused at get"
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return +taken


# Each lacks one check: what it lacks, how it is taken out, and what then comes through


def _no_signatures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(keys, "_holds", lambda public_key, signature, message: True)


def _no_countersignature(patch: pytest.MonkeyPatch) -> None:
    verify = keys.verify

    def lax(domain: bytes, signed: object) -> str:
        try:
            return verify(domain, signed)  # type: ignore[arg-type]
        except Exception:
            if domain != keys.ACCEPTANCE:
                raise
            return keys.peer_id_of(signed.public_key)  # type: ignore[attr-defined]

    patch.setattr(keys, "verify", lax)


def _no_grant(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(records, "grants", lambda manifest, peer_id: True)


def _no_key_check(patch: pytest.MonkeyPatch) -> None:
    original = records.open_record

    def lax(signed: object, key: bytes, wall_ms: int) -> OpenRecord:
        own = records.records_pb2.Record.FromString(signed.payload).key  # type: ignore[attr-defined]
        opened = original(signed, own, wall_ms)  # type: ignore[arg-type]
        return dataclasses.replace(opened, key=key)

    patch.setattr(records, "open_record", lax)


def _no_canonical_form(patch: pytest.MonkeyPatch) -> None:
    def lax(kind: type[Protobuf], data: bytes, size_bytes_max: int) -> Protobuf:
        try:
            return kind.FromString(data)
        except Exception as error:
            raise MalformedError("no such message") from error

    patch.setattr(records, "parse_canonical", lax)
    patch.setattr(manifest, "parse_canonical", lax)


def _no_bound_on_replay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(records, "REPLAY_MS", 10**15)


def _no_marks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RecordStore, "sift", lambda self, found, now, source="": list(found))


def _no_fences(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RecordStore, "_is_over", lambda self, record: False)
    patch.setattr(records, "in_date", list)


def _no_order(patch: pytest.MonkeyPatch) -> None:
    _no_marks(patch)
    by_chance = property(lambda self: (0, 0, keys.sha256(self.signed.payload)))
    patch.setattr(OpenRecord, "rank", by_chance)


def _no_ages(patch: pytest.MonkeyPatch) -> None:
    parse_set = records.parse_set
    patch.setattr(records, "parse_set", lambda data: [(s, 0.0) for s, _ in parse_set(data)])


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "signatures": (
        _no_signatures,
        ("anothers_signature", "bit_of_signature"),
    ),
    "countersignatures": (_no_countersignature, ("hosts_word_forged",)),
    "grants": (_no_grant, ("granted_to_another", "network_not_granted")),
    "keys": (_no_key_check, ("anothers_key",)),
    "canonical form": (_no_canonical_form, ("unknown_field", "long_varint", "other_order")),
    "replay bound": (_no_bound_on_replay, ("from_long_ago", "from_the_future")),
    "marks": (_no_marks, ("replayed_after_expiry",)),
    "fences": (_no_fences, ("rolled_back_by_another", "replayed_claim_of_another")),
    "order": (_no_order, ("rolled_back",)),
    "ages": (_no_ages, ("expired", "age_below_zero")),
}


@pytest.mark.parametrize("without", list(MUTANTS))
def test_r17_mutant_without_one_check_fails_the_same_judge(
    without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_out, expected = MUTANTS[without]
    take_out(monkeypatch)
    taken = judge_core(10 * len(KINDS), only=expected)
    for kind in expected:
        assert any(name.startswith(kind) for name in taken), (kind, taken)


def test_r17_mutant_without_rates_lets_a_flood_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def flood() -> int:
        core = Kademlia(keypair(100).peer_id, random.Random(0))
        taken = 0
        cases = [good(random.Random(n)) for n in range(40)]
        for n in range(2600):
            case = cases[n % len(cases)]
            request = Message(Kind.PUT_VALUE, case.key, case.value)
            (effect,) = core.handle(
                ev.RequestArrived(n, CLAIMANT.peer_id, request, WALL_MS), n * 1e-4
            )
            assert isinstance(effect, ev.SendReply)
            assert effect.message is not None
            taken += effect.message.value is not None
        return taken

    assert flood() < 2200
    monkeypatch.setattr(SenderRates, "take", lambda self, sender, cost, now: True)
    assert flood() == 2600


def test_r17_the_cases_are_what_they_say() -> None:
    """The good ones are good, and each bad one has a name and a statement of its own."""
    fine = good(random.Random(1))
    assert open_record(fine.signed, fine.key, WALL_MS).key == fine.key
    assert in_set(fine.signed)
    names = {bad(n, SEED).kind for n in range(len(KINDS))}
    assert len(names) == len(KINDS) == 48
