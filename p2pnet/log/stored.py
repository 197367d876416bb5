"""An entry of a log in a store, as it was read back. Pure."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from p2pnet import keys
from p2pnet.errors import LocalError, RemoteError
from p2pnet.log.entry import ENTRY_BYTES_MAX, parse_entry
from p2pnet.v1 import common_pb2

SLOT_MAX = 99_999_999
STORED_BYTES_MAX = ENTRY_BYTES_MAX + 1024


def name_of(slot: int) -> str:
    """The file or object of a slot: names sort as slots do."""
    return f"{slot:08d}.entry"


def open_stored(data: bytes, network_id: str, slot: int, where: str) -> common_pb2.Signed:
    """The entry of that slot; raises LocalError where it is damaged, and says `where`."""
    try:
        signed = common_pb2.Signed.FromString(data)
        keys.verify(keys.LOG_ENTRY, signed)
        entry = parse_entry(signed)
    except (DecodeError, RemoteError) as error:
        raise LocalError(f"the log is damaged: {where} is not an entry ({error})") from None
    if (entry.network_id, entry.slot) != (network_id, slot):
        raise LocalError(f"the log is damaged: {where} holds another entry than its name says")
    return signed
