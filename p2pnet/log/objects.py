"""Shell: a network's log in an object store (DESIGN D6).

Entry n is the object `log/<network id>/<n as 8 digits>.entry`, a serialized Signed,
created on condition that there is none: that is the compare-and-set. Methods
block: call them in a worker thread.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from p2pnet.data.objects import Bucket
from p2pnet.dht.manifest import check_network_id, is_network_id
from p2pnet.errors import LocalError, ResourceError
from p2pnet.log.entry import parse_entry
from p2pnet.log.stored import SLOT_MAX, STORED_BYTES_MAX, name_of, open_stored
from p2pnet.v1 import common_pb2

TRIES = 3
_READ_AT_ONCE = 8


class ObjectLog:
    """The logs of any number of networks in one bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def append(self, signed: common_pb2.Signed, slot: int) -> common_pb2.Signed:
        """Puts an entry into its slot; returns the entry that is there now, ours or another's.

        Whether it counts is `History`'s to say.

        Raises:
            MalformedError: not an entry.
            LocalError: the slot before is empty, or the winner's object is damaged.
            ResourceError: the store cannot be used. The entry may be there all the same.
        """
        entry = parse_entry(signed)
        if entry.slot != slot or slot > SLOT_MAX:
            raise LocalError(f"a log entry for slot {entry.slot} was to be put into slot {slot}")
        if slot > 1 and self._bucket.size(self._key(entry.network_id, slot - 1)) is None:
            where = f"{self._bucket.url}/log/{entry.network_id}"
            raise LocalError(f"slot {slot} of the log in {where} comes after an empty one")
        key = self._key(entry.network_id, slot)
        for _ in range(TRIES):
            if self._bucket.create(key, signed.SerializeToString(deterministic=True)):
                return signed
            data = self._bucket.get(key, STORED_BYTES_MAX)
            if data is not None:  # ours too, where an answer was lost and the request repeated
                return open_stored(data, entry.network_id, slot, f"{self._bucket.url}/{key}")
            # Two that write at once may both be told of a conflict, and nothing is there yet.
        raise ResourceError(f"the object store cannot decide what {self._bucket.url}/{key} is")

    def networks(self) -> list[str]:
        """The networks that have a log here; raises ResourceError."""
        return [name for name in self._bucket.folders("log") if is_network_id(name)]

    def read(self, network_id: str, from_slot: int = 1) -> list[common_pb2.Signed]:
        """The entries from a slot on, in order; empty where there are none.

        Raises:
            MalformedError: not a network id.
            LocalError: an object is missing or damaged, and which.
            ResourceError: the store cannot be read.
        """
        check_network_id(network_id)
        first = max(1, from_slot)
        after = self._key(network_id, first - 1) if first > 1 else ""
        names = self._bucket.list(f"log/{network_id}", after)
        for slot, name in enumerate(names, start=first):
            if name != self._key(network_id, slot):
                expected = self._key(network_id, slot)
                raise LocalError(f"the log is damaged: {self._bucket.url}/{expected} is missing")

        def load(slot: int) -> common_pb2.Signed:
            key = self._key(network_id, slot)
            where = f"{self._bucket.url}/{key}"
            data = self._bucket.get(key, STORED_BYTES_MAX)
            if data is None:
                raise LocalError(f"the log is damaged: {where} is missing")
            return open_stored(data, network_id, slot, where)

        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            return list(pool.map(load, range(first, first + len(names))))

    def _key(self, network_id: str, slot: int) -> str:
        return f"log/{network_id}/{name_of(slot)}"
