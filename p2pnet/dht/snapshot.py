"""What a store holds, as bytes for the disk, and back (DESIGN D5). Pure.

What comes back is a hint: every record is verified again, and is as old as it was
plus the time that has passed since by the wall clock. A clock that went backwards
makes nothing younger, and one that went forwards makes things expire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from p2pnet.dht.hints import HINTS_MAX, PROVIDER_LIFE_S, Hint
from p2pnet.dht.records import OpenRecord, open_record
from p2pnet.dht.store import MARKS_MAX, RECORDS_MAX, TOTAL_BYTES_MAX, Mark
from p2pnet.dht.wire import KEY_BYTES_MAX
from p2pnet.errors import MalformedError, RemoteError
from p2pnet.keys import PEER_ID_CHARS_MAX, peer_id_bytes
from p2pnet.net.network import PeerInfo
from p2pnet.sealed import seal, unseal_message
from p2pnet.v1 import kept_pb2 as pb

KIND = b"dht"
VERSION = 1
FILE_BYTES_MAX = TOTAL_BYTES_MAX + (16 << 20)
HINT_BYTES_MAX = 8 << 20
_ADDRS_MAX = 4  # of a hint: the rest is learned anew
_ADDR_CHARS_MAX = 256
_SOURCE_CHARS_MAX = 64
_COUNTER_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Held:
    """What a store held at one time: records and marks, and hints of providers.

    Each record with the source that it is charged to; the nearest to us first.
    """

    records: Sequence[tuple[OpenRecord, str]] = ()
    marks: Sequence[Mark] = ()
    hints: Sequence[Hint] = ()
    dropped: Counter[str] = field(default_factory=Counter)  # what was not taken back, by reason


def serialise(held: Held, wall_ms: int, *, records_bytes_max: int = TOTAL_BYTES_MAX) -> bytes:
    """A file of what was held at that time. What is beyond the bounds is left out."""
    out = pb.KeptStore(saved_at_ms=wall_ms)
    room_bytes = records_bytes_max
    for record, source in held.records[:RECORDS_MAX]:
        room_bytes -= record.size_bytes
        if room_bytes < 0:
            break
        kept = out.records.add(key=record.key, age_ms=_up_ms(record.age_s), source=source)
        kept.record.CopyFrom(record.signed)
    for mark in held.marks[-MARKS_MAX:]:
        out.marks.add(
            key=mark.key,
            author=mark.author,
            epoch=mark.epoch,
            sequence=mark.sequence,
            age_ms=_up_ms(mark.age_s),
            source=mark.source,
            subject=mark.subject,
        )
    room_bytes = HINT_BYTES_MAX
    for hint in reversed(held.hints[-HINTS_MAX:]):  # the latest before all
        addrs = [a for a in hint.provider.addrs if len(a) <= _ADDR_CHARS_MAX][:_ADDRS_MAX]
        room_bytes -= 256 + sum(map(len, addrs))
        if room_bytes < 0:
            break
        out.hints.add(
            key=hint.key,
            provider=hint.provider.peer_id,
            addrs=addrs,
            age_ms=_up_ms(hint.age_s),
            source=hint.source,
        )
    return seal(KIND, VERSION, out.SerializeToString())


def parse(
    data: bytes, wall_ms: Callable[[], int], *, records_at_once: int = RECORDS_MAX
) -> Iterator[Held]:
    """What a file holds that holds now, in parts: to verify a record takes about a millisecond.

    The first part has all marks and hints. `dropped` counts what was left out of a part,
    by reason. `wall_ms` is asked for each part: between two of them time passes.

    Raises:
        LocalError: another kind of file, or a damaged one; says which.
    """
    kept = unseal_message(pb.KeptStore, KIND, VERSION, data, FILE_BYTES_MAX)
    return _parts(kept, wall_ms, records_at_once)


def _parts(kept: pb.KeptStore, wall_ms: Callable[[], int], at_once: int) -> Iterator[Held]:
    down_s = max(0, wall_ms() - kept.saved_at_ms) / 1000
    marks = [mark for mark in (_mark(m, down_s) for m in kept.marks[:MARKS_MAX]) if mark]
    hints = [hint for hint in (_hint(h, down_s) for h in kept.hints[:HINTS_MAX]) if hint]
    dropped = Counter(
        {
            "a bad mark": len(kept.marks) - len(marks),
            "a bad or an old hint": len(kept.hints) - len(hints),
            "a record beyond the limit": max(0, len(kept.records) - RECORDS_MAX),
        }
    )
    room_bytes = TOTAL_BYTES_MAX
    for start in range(0, max(1, min(len(kept.records), RECORDS_MAX)), at_once):
        records: list[tuple[OpenRecord, str]] = []
        now_ms = wall_ms()
        down_s = max(down_s, (now_ms - kept.saved_at_ms) / 1000)
        for entry in kept.records[start : min(start + at_once, RECORDS_MAX)]:
            room_bytes -= len(entry.record.payload)
            if room_bytes < 0:
                dropped["a record beyond the limit"] += 1
                continue
            try:
                record = open_record(entry.record, entry.key, now_ms)
                source = _source(entry.source)
            except RemoteError:
                dropped["a record that is forged or from long ago"] += 1
                continue
            record = replace(record, age_s=entry.age_ms / 1000 + down_s)
            if record.expires_in_s > 0:
                records.append((record, source))
            else:
                dropped["a record that has expired"] += 1
                marks.append(
                    Mark(record.key, record.author, record.epoch, record.sequence, record.age_s,
                         source, record.subject)
                )  # fmt: skip
        yield Held(records, marks, hints[::-1], +dropped)
        marks, hints, dropped = [], [], Counter()


def _mark(kept: pb.KeptMark, down_s: float) -> Mark | None:
    try:
        _check(kept.key, kept.author)
        source = _source(kept.source)
    except MalformedError:
        return None
    if max(kept.epoch, kept.sequence) > _COUNTER_MAX:
        return None
    age_s = kept.age_ms / 1000 + down_s
    subject = kept.subject[:_SOURCE_CHARS_MAX] if kept.HasField("subject") else None
    return Mark(kept.key, kept.author, kept.epoch, kept.sequence, age_s, source, subject)


def _hint(kept: pb.KeptHint, down_s: float) -> Hint | None:
    age_s = kept.age_ms / 1000 + down_s
    try:
        _check(kept.key, kept.provider)
        source = _source(kept.source)
    except MalformedError:
        return None
    if age_s >= PROVIDER_LIFE_S or any(len(addr) > _ADDR_CHARS_MAX for addr in kept.addrs):
        return None
    return Hint(kept.key, PeerInfo(kept.provider, tuple(kept.addrs[:_ADDRS_MAX])), age_s, source)


def _check(key: bytes, peer_id: str) -> None:
    peer_id_bytes(peer_id)
    if not 0 < len(key) <= KEY_BYTES_MAX:
        raise MalformedError("a DHT key of no length or of too much")


def _source(text: str) -> str:
    if len(text) > max(_SOURCE_CHARS_MAX, PEER_ID_CHARS_MAX):
        raise MalformedError("too long a source")
    return text


def _up_ms(age_s: float) -> int:
    # Upwards: what is written and read back again and again shall not grow younger.
    return max(0, -int(-age_s * 1000 // 1))
