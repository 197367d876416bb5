"""How far a host has followed a network's log: enough to go on from there. Pure (DESIGN D6).

A host keeps no entries. It keeps where the verified log ended, and what the newest
claim says; entries that it reads later are checked by the log's own rules from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pnet import sealed
from p2pnet.dht.manifest import check_network_id
from p2pnet.errors import LocalError, MalformedError
from p2pnet.keys import sha256
from p2pnet.log.entry import parse_entry
from p2pnet.log.history import History
from p2pnet.v1 import common_pb2, kept_pb2, log_pb2

_KIND, _VERSION = b"host", 1
NEWEST_BYTES_MAX = 256 << 10
RECORD_BYTES_MAX = NEWEST_BYTES_MAX + (16 << 10)


@dataclass(frozen=True, slots=True)
class Standing:
    """A verified log, in short. Slot 0: nothing of it is known.

    `epoch`, `claimant` (peer id) and `claim` (SHA-256 of its payload) are of the newest
    claim that counts; `keepers` are those of the slot after `slot`, whose payload has
    the SHA-256 `previous`.
    """

    network_id: str
    slot: int = 0
    previous: bytes = b""
    keepers: tuple[str, ...] = ()
    epoch: int = 0
    claimant: str = ""
    claim: bytes = b""
    committed_step: int = 0
    before_step: int = 0  # of the commit before that
    closed: bool = False

    def seal(self, newest: common_pb2.Signed | None = None) -> bytes:
        """As it is kept on disk, with the newest claim's entry if it is at hand."""
        if newest is not None and newest.ByteSize() > NEWEST_BYTES_MAX:
            newest = None
        kept = kept_pb2.KeptStanding(
            network_id=self.network_id,
            slot=self.slot,
            previous=self.previous,
            keepers=self.keepers,
            epoch=self.epoch,
            claimant=self.claimant,
            claim=self.claim,
            committed_step=self.committed_step,
            before_step=self.before_step,
            closed=self.closed,
            newest=newest,
        )
        return sealed.seal(_KIND, _VERSION, kept.SerializeToString(deterministic=True))


def unseal_standing(
    network_id: str, data: bytes
) -> tuple[Standing, tuple[common_pb2.Signed, log_pb2.Claim] | None]:
    """What was kept of a network, and the newest claim: its entry, and what that says.

    Raises:
        LocalError: it is damaged, and how.
    """
    kept = sealed.unseal_message(kept_pb2.KeptStanding, _KIND, _VERSION, data, RECORD_BYTES_MAX)
    try:
        check_network_id(network_id)
    except MalformedError as error:
        raise LocalError(str(error)) from None
    if kept.network_id != network_id:
        raise LocalError("it is about another network than its name says")
    standing = Standing(
        network_id=network_id,
        slot=kept.slot,
        previous=kept.previous,
        keepers=tuple(kept.keepers),
        epoch=kept.epoch,
        claimant=kept.claimant,
        claim=kept.claim,
        committed_step=kept.committed_step,
        before_step=kept.before_step,
        closed=kept.closed,
    )
    if not kept.HasField("newest"):
        return standing, None
    try:
        claim = parse_entry(kept.newest).claim
    except MalformedError as error:
        raise LocalError(str(error)) from None
    if sha256(kept.newest.payload) != standing.claim:
        raise LocalError("its claim is not the one that it says")
    return standing, (kept.newest, claim)


class _Tail(History):
    """A history whose entries up to a standing are not at hand."""

    def __init__(self, standing: Standing, manifest: common_pb2.Signed) -> None:
        super().__init__(standing.network_id)
        self._before = standing.slot
        self.previous = standing.previous
        self.keepers = standing.keepers
        if standing.epoch:
            self.epoch = standing.epoch
            self.orchestrator = standing.claimant
            self.manifest = manifest
        if standing.committed_step:
            self.commit = log_pb2.Commit(epoch=standing.epoch, step=standing.committed_step)
        if standing.before_step:
            self.before = log_pb2.Commit(epoch=standing.epoch, step=standing.before_step)
        if standing.closed:
            self.closing = log_pb2.Cancellation(network_id=standing.network_id)

    @property
    def next_slot(self) -> int:
        return self._before + len(self.entries) + 1

    def entry(self, slot: int) -> common_pb2.Signed | None:
        return super().entry(slot - self._before)


def follow(
    standing: Standing, manifest: common_pb2.Signed, entries: Sequence[common_pb2.Signed]
) -> tuple[Standing, common_pb2.Signed | None]:
    """The standing after the log's next decided entries, and the newest claim among them.

    Entries up to `standing.slot` may be among them and say nothing new.

    Raises:
        MalformedError, ForgedError: these are not the log's next entries.
    """
    tail = _Tail(standing, manifest)
    newest: common_pb2.Signed | None = None
    claim = standing.claim
    for signed in entries:
        entry = parse_entry(signed)
        if entry.slot <= standing.slot or tail.add(signed):
            continue
        if entry.HasField("claim"):
            newest, claim = signed, sha256(signed.payload)
    after = Standing(
        network_id=standing.network_id,
        slot=tail.next_slot - 1,
        previous=tail.previous,
        keepers=tail.keepers,
        epoch=tail.epoch,
        claimant=tail.orchestrator,
        claim=claim,
        committed_step=tail.commit.step if tail.commit else 0,
        before_step=tail.before.step if tail.before else 0,
        closed=tail.closing is not None,
    )
    return after, newest
