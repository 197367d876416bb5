"""A network's log: what an entry has to be, and the history that they make. Pure (DESIGN D6).

Entry n exists at most once, wherever the log lives; here is what makes it count.
A claim takes the next epoch and needs the owner's grant; a commit counts only
under the last claim's epoch and by the last claim's orchestrator. A keeper refuses
what would not count. In a directory it may have been written all the same, and then
it stands there, void.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from google.protobuf.message import DecodeError

from p2pnet import keys
from p2pnet.dht.manifest import check_network_id, grants, network_id_of, open_manifest
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.keys import KeyPair, sha256
from p2pnet.v1 import common_pb2, log_pb2

ENTRY_BYTES_MAX = 4 << 20
KEEPERS_MAX = 9
STATES_MAX = 10_000
HOLDERS_MAX = 16
NUMBER_MAX = 2**53  # of epochs, steps and slots
REASON_CHARS_MAX = 200

# (network id, manifest, peer id) -> may that peer orchestrate that network?
# Raises MalformedError or ForgedError where the manifest does not hold.
Grants = Callable[[str, common_pb2.Signed, str], bool]


def manifest_grants(network_id: str, signed: common_pb2.Signed, peer_id: str) -> bool:
    """Whether a manifest is this network's, is its owner's, and lets a peer orchestrate.

    Raises:
        MalformedError: not a manifest.
        ForgedError: not signed by its owner, or another network's.
    """
    if network_id_of(signed) != network_id:
        raise ForgedError(f"a manifest is not that of network {network_id}")
    return grants(open_manifest(signed), peer_id)


class History:
    """The decided entries of one network, in order, and what follows from them."""

    def __init__(self, network_id: str, grants: Grants = manifest_grants) -> None:
        """Empty. Raises MalformedError where `network_id` is none."""
        check_network_id(network_id)
        self.network_id = network_id
        self.grants = grants
        self.entries: list[common_pb2.Signed] = []
        self.epoch = 0  # of the last claim that counts; 0: unclaimed
        self.orchestrator = ""  # its claimant's peer id
        self.manifest: common_pb2.Signed | None = None
        self.commit: log_pb2.Commit | None = None  # the last that counts
        self.keepers: tuple[str, ...] = ()  # of the next slot
        self.previous = b""  # SHA-256 of the last entry's payload
        self.size_bytes = 0  # of all entries

    @property
    def next_slot(self) -> int:
        """The first slot that is not decided, from 1."""
        return len(self.entries) + 1

    def entry(self, slot: int) -> common_pb2.Signed | None:
        """What was decided for a slot, or None."""
        return self.entries[slot - 1] if 1 <= slot <= len(self.entries) else None

    def add(self, signed: common_pb2.Signed) -> str:
        """Takes the decided entry of the next slot. Returns "" or why it does not count.

        Raises:
            MalformedError, ForgedError: it cannot be this log's next entry at all.
        """
        signer, entry = _open(signed, self)
        void = _void(signer, entry, self)
        self.entries.append(signed)
        self.size_bytes += signed.ByteSize()
        self.previous = sha256(signed.payload)
        if void:
            return void
        self.keepers = tuple(entry.keepers)
        if entry.WhichOneof("what") == "claim":
            self.epoch = entry.claim.epoch
            self.orchestrator = entry.claim.orchestrator
            self.manifest = entry.claim.manifest
        else:
            self.commit = entry.commit
        return ""

    def extend(self, entries: Sequence[common_pb2.Signed]) -> int:
        """Takes decided entries in order, known ones too; returns how many were new.

        Raises:
            MalformedError: entries that do not parse or leave a gap.
            ForgedError: an entry that does not hold, or another than the one known.
        """
        new = 0
        for signed in entries:
            slot = parse_entry(signed).slot
            known = self.entry(slot)
            if known is None:
                self.add(signed)
                new += 1
            elif known.payload != signed.payload:
                raise ForgedError(f"two entries are said to be decided for slot {slot}")
        return new


def check_entry(signed: common_pb2.Signed, history: History) -> log_pb2.LogEntry:
    """An entry that would count as the next of `history`.

    Raises:
        MalformedError: it can never be an entry.
        ForgedError: it is not signed, not granted, not next, or not under the last claim.
    """
    signer, entry = _open(signed, history)
    if void := _void(signer, entry, history):
        raise ForgedError(void)
    return entry


def parse_entry(signed: common_pb2.Signed) -> log_pb2.LogEntry:
    """The entry inside a signed one, with its limits checked but not its signature.

    Raises:
        MalformedError: too large, not an entry, or out of its limits.
    """
    if len(signed.payload) > ENTRY_BYTES_MAX:
        raise MalformedError(f"a log entry has at most {ENTRY_BYTES_MAX >> 20} MiB")
    try:
        entry = log_pb2.LogEntry.FromString(signed.payload)
    except DecodeError:
        raise MalformedError("a log entry does not parse") from None
    check_network_id(entry.network_id)
    if not 1 <= entry.slot <= NUMBER_MAX:
        raise MalformedError("a log entry has no slot")
    keepers = tuple(entry.keepers)
    if len(keepers) > KEEPERS_MAX or tuple(sorted(dict.fromkeys(keepers))) != keepers:
        raise MalformedError(f"a log entry names up to {KEEPERS_MAX} keepers, sorted, each once")
    for keeper in keepers:
        keys.public_key_of(keeper)
    what = entry.WhichOneof("what")
    if what == "claim":
        if not 1 <= entry.claim.epoch <= NUMBER_MAX or len(entry.claim.reason) > REASON_CHARS_MAX:
            raise MalformedError("a claim has no epoch or too long a reason")
    elif what == "commit":
        _check_commit(entry.commit)
    else:
        raise MalformedError("a log entry is neither a claim nor a commit")
    return entry


def new_claim(
    history: History,
    key: KeyPair,
    manifest: common_pb2.Signed,
    *,
    keepers: Sequence[str] = (),
    reason: str = "",
) -> common_pb2.Signed:
    """A claim of the next epoch by `key`, for the next slot."""
    claim = log_pb2.Claim(
        epoch=history.epoch + 1,
        orchestrator=key.peer_id,
        manifest=manifest,
        reason=reason[:REASON_CHARS_MAX],
    )
    return _sign(history, key, log_pb2.LogEntry(claim=claim, keepers=sorted(keepers)))


def new_commit(
    history: History,
    key: KeyPair,
    step: int,
    states: Mapping[str, common_pb2.BlobRef],
    *,
    keepers: Sequence[str] | None = None,
) -> common_pb2.Signed:
    """A commit of a cut under the last claim, for the next slot; by default the keepers stay."""
    commit = log_pb2.Commit(epoch=history.epoch, step=step, states=dict(sorted(states.items())))
    named = history.keepers if keepers is None else sorted(keepers)
    return _sign(history, key, log_pb2.LogEntry(commit=commit, keepers=named))


def _sign(history: History, key: KeyPair, entry: log_pb2.LogEntry) -> common_pb2.Signed:
    entry.network_id = history.network_id
    entry.slot = history.next_slot
    entry.previous = history.previous
    return key.sign(keys.LOG_ENTRY, entry.SerializeToString(deterministic=True))


def _open(signed: common_pb2.Signed, history: History) -> tuple[str, log_pb2.LogEntry]:
    """(signer, entry) of what is in the right place: this network, the next slot, the chain."""
    entry = parse_entry(signed)
    signer = keys.verify(keys.LOG_ENTRY, signed)
    if entry.network_id != history.network_id:
        raise ForgedError(f"a log entry is network {entry.network_id}'s, not this one's")
    if entry.slot != history.next_slot:
        raise MalformedError(f"a log entry is for slot {entry.slot}, not {history.next_slot}")
    if entry.previous != history.previous:
        raise ForgedError(f"the log entry for slot {entry.slot} does not follow the one before it")
    return signer, entry


def _void(signer: str, entry: log_pb2.LogEntry, history: History) -> str:
    """Why an entry in the right place does not count, or ""."""
    if history.keepers and not entry.keepers:
        return "a log entry names no keepers for the next"
    if entry.WhichOneof("what") == "claim":
        claim = entry.claim
        if claim.orchestrator != signer:
            return f"a claim for {claim.orchestrator} is signed by {signer}"
        if claim.epoch != history.epoch + 1:
            return f"a claim has epoch {claim.epoch}, but the next is {history.epoch + 1}"
        try:
            granted = history.grants(history.network_id, claim.manifest, signer)
        except (MalformedError, ForgedError) as error:
            return str(error)
        return "" if granted else f"the owner does not let {signer} orchestrate this network"
    commit = entry.commit
    if not history.epoch or commit.epoch != history.epoch:
        return f"a commit has epoch {commit.epoch}, but the last claim has {history.epoch}"
    if signer != history.orchestrator:
        return f"a commit is signed by {signer}, but {history.orchestrator} holds the claim"
    if history.commit is not None and commit.step <= history.commit.step:
        return f"a commit is of step {commit.step}, but step {history.commit.step} is committed"
    return ""


def _check_commit(commit: log_pb2.Commit) -> None:
    if not 1 <= commit.epoch <= NUMBER_MAX or commit.step > NUMBER_MAX:
        raise MalformedError("a commit has no epoch or no possible step")
    if not 1 <= len(commit.states) <= STATES_MAX:
        raise MalformedError(f"a commit names 1 to {STATES_MAX} states")
    for vnode in sorted(commit.states):
        blob = commit.states[vnode]
        if not 1 <= len(vnode) <= 64 or len(blob.digest) != 32 or len(blob.holders) > HOLDERS_MAX:
            raise MalformedError("a commit names a state that cannot be")
