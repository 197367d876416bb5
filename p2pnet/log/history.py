"""A network's log: which entries count, and the history that they make. Pure (DESIGN D6).

Entry n exists at most once, wherever the log lives; here is what makes it count.
A claim takes the next epoch and needs the owner's grant; a commit counts only
under the last claim's epoch and by the last claim's orchestrator; after the
owner's closing nothing counts. A keeper refuses what would not count. In a
directory or an object store it may have been written all the same, and then it
stands there, void.

The first claim carries what the network begins with, and each claim where it puts
everything, so that the log alone is enough for whoever goes on with the network.

Where the states of the last commit are lost, a claim may go back to the commit before
it (`from_step`): the last one is undone, and commits go on from there. Not further
back, since nobody keeps the states of older ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from p2pnet import keys
from p2pnet.dht.manifest import check_network_id, grants, network_id_of, open_manifest
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.keys import KeyPair, sha256
from p2pnet.log.entry import REASON_CHARS_MAX, open_cancellation
from p2pnet.log.entry import parse_entry as parse_entry
from p2pnet.v1 import common_pb2, log_pb2, records_pb2

# (network id, manifest, peer id) -> may that peer orchestrate that network?
# Raises MalformedError or ForgedError where the manifest does not hold.
Grants = Callable[[str, common_pb2.Signed, str], bool]


def manifest_grants(network_id: str, signed: common_pb2.Signed, peer_id: str) -> bool:
    """Whether a manifest is this network's, is its owner's, and lets a peer orchestrate.

    Raises:
        MalformedError: not a manifest.
        ForgedError: not signed by its owner, or another network's.
    """
    return grants(open_charter(network_id, signed), peer_id)


def open_charter(network_id: str, signed: common_pb2.Signed) -> records_pb2.Manifest:
    """The manifest of that network; raises as `manifest_grants`."""
    if network_id_of(signed) != network_id:
        raise ForgedError(f"a manifest is not that of network {network_id}")
    return open_manifest(signed)


class History:
    """The decided entries of one network, in order, and what follows from them."""

    def __init__(self, network_id: str, grants: Grants = manifest_grants) -> None:
        """Empty. Raises MalformedError where `network_id` is none."""
        check_network_id(network_id)
        self.network_id = network_id
        self.grants = grants
        self.entries: list[common_pb2.Signed] = []
        self.claims: list[tuple[int, log_pb2.Claim]] = []  # (slot, claim), those that count
        self.epoch = 0  # of the last claim that counts; 0: unclaimed
        self.orchestrator = ""  # its claimant's peer id
        self.manifest: common_pb2.Signed | None = None
        self._charter: records_pb2.Manifest | None = None
        self.commit: log_pb2.Commit | None = None  # the last that counts
        self.before: log_pb2.Commit | None = None  # the one before it, to go back to
        self.closing: log_pb2.Cancellation | None = None  # by which the owner has ended it
        self.keepers: tuple[str, ...] = ()  # of the next slot
        self.previous = b""  # SHA-256 of the last entry's payload
        self.size_bytes = 0  # of all entries

    @property
    def charter(self) -> records_pb2.Manifest | None:
        """What is in the manifest; None: unclaimed."""
        if self._charter is None and self.manifest is not None:
            self._charter = open_charter(self.network_id, self.manifest)  # it never changes
        return self._charter

    @property
    def placement(self) -> Mapping[str, str]:
        """VNode -> peer id, as the last claim says."""
        return placement_of(self.claims[-1][1]) if self.claims else {}

    @property
    def standbys(self) -> Mapping[str, tuple[str, ...]]:
        """VNode -> peer ids of those that follow it, as the last claim says."""
        return standbys_of(self.claims[-1][1]) if self.claims else {}

    @property
    def genesis(self) -> log_pb2.Genesis | None:
        """What the network began with."""
        return self.claims[0][1].genesis if self.claims else None

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
        if void and self.keepers:
            raise ForgedError(void)  # no keeper accepts it, so it cannot be decided
        self.entries.append(signed)
        self.size_bytes += signed.ByteSize()
        self.previous = sha256(signed.payload)
        if void:
            return void
        self.keepers = tuple(entry.keepers)
        what = entry.WhichOneof("what")
        if what == "claim":
            self.epoch = entry.claim.epoch
            self.orchestrator = entry.claim.orchestrator
            self.manifest = entry.claim.manifest
            self.claims.append((entry.slot, entry.claim))
            if entry.claim.from_step:
                self.commit, self.before = self.before, None
        elif what == "commit":
            self.commit, self.before = entry.commit, self.commit
        else:
            charter = self.charter
            assert charter is not None
            self.closing = open_cancellation(entry.closing.cancellation, self.network_id, charter)
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

    def copy(self) -> Self:
        """The same entries, to be gone on from by itself."""
        other = copy.copy(self)
        other.entries, other.claims = list(self.entries), list(self.claims)
        return other


def claims_left(history: History, limits: records_pb2.Limits) -> bool:
    """Whether the owner allows one more claim."""
    return not limits.claims_max or history.epoch < limits.claims_max


def placement_of(claim: log_pb2.Claim) -> dict[str, str]:
    """VNode -> peer id, in the order of the VNodes' names."""
    return {vnode: claim.hosts[claim.placement[vnode]] for vnode in sorted(claim.placement)}


def standbys_of(claim: log_pb2.Claim) -> dict[str, tuple[str, ...]]:
    """VNode -> peer ids of those that follow it, of the VNodes that somebody follows."""
    return {
        vnode: tuple(claim.hosts[index] for index in claim.standbys[vnode].hosts)
        for vnode in sorted(claim.standbys)
    }


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


def keepers_of_next(history: History, signed: common_pb2.Signed) -> tuple[str, ...]:
    """Who decides `signed`, the next entry: whom the entry before names, or the manifest.

    None for a log in a store. Raises MalformedError or ForgedError.
    """
    if history.entries:
        return history.keepers
    return tuple(open_charter(history.network_id, parse_entry(signed).claim.manifest).keepers)


def deciders_of_last(history: History) -> tuple[str, ...]:
    """Who has decided the last entry of a log on peers."""
    if len(history.entries) > 1:
        return tuple(parse_entry(history.entries[-2]).keepers)
    return () if history.charter is None else tuple(history.charter.keepers)


def new_claim(
    history: History,
    key: KeyPair,
    manifest: common_pb2.Signed,
    *,
    placement: Mapping[str, str],
    standbys: Mapping[str, Sequence[str]] | None = None,
    keepers: Sequence[str] = (),
    reason: str = "",
    genesis: log_pb2.Genesis | None = None,
    from_step: int = 0,
) -> common_pb2.Signed:
    """A claim of the next epoch by `key`, for the next slot; by default the keepers stay.

    Args:
        placement: VNode -> peer id.
        standbys: VNode -> peer ids of those that are to follow it.
        keepers: of the slot after it.
        genesis: in a network's first claim, and only there.
        from_step: of the commit before the last, to go back to it; 0: go on from the last.
    """
    followed = {vnode: peers for vnode, peers in (standbys or {}).items() if peers}
    following = (peer for peers in followed.values() for peer in peers)
    hosts = sorted(dict.fromkeys((*placement.values(), *following)))
    index = {host: number for number, host in enumerate(hosts)}
    claim = log_pb2.Claim(
        epoch=history.epoch + 1,
        orchestrator=key.peer_id,
        manifest=manifest,
        reason=reason[:REASON_CHARS_MAX],
        hosts=hosts,
        placement={vnode: index[placement[vnode]] for vnode in sorted(placement)},
        genesis=genesis,
        standbys={
            vnode: log_pb2.Standbys(hosts=[index[peer] for peer in followed[vnode]])
            for vnode in sorted(followed)
        },
        from_step=from_step,
    )
    named = sorted(keepers) or history.keepers or open_manifest(manifest).keepers
    return _sign(history, key, log_pb2.LogEntry(claim=claim, keepers=named))


def new_commit(
    history: History,
    key: KeyPair,
    step: int,
    states: Mapping[str, common_pb2.BlobRef],
    *,
    result: tuple[float, int, int] | None = None,
    keepers: Sequence[str] | None = None,
) -> common_pb2.Signed:
    """A commit of a cut under the last claim, for the next slot; by default the keepers stay.

    Args:
        result: loss, correct and samples of the cut's last step.
    """
    loss, correct, samples = result or (0.0, 0, 0)
    commit = log_pb2.Commit(
        epoch=history.epoch,
        step=step,
        states=dict(sorted(states.items())),
        loss=loss,
        correct=correct,
        samples=samples,
    )
    named = history.keepers if keepers is None else sorted(keepers)
    return _sign(history, key, log_pb2.LogEntry(commit=commit, keepers=named))


def new_closing(
    history: History,
    key: KeyPair,
    cancellation: common_pb2.Signed,
    *,
    keepers: Sequence[str] | None = None,
) -> common_pb2.Signed:
    """The end of a network by its owner's word, for the next slot; by default the keepers stay."""
    closing = log_pb2.Closing(cancellation=cancellation)
    named = history.keepers if keepers is None else sorted(keepers)
    return _sign(history, key, log_pb2.LogEntry(closing=closing, keepers=named))


def new_cancellation(
    owner: KeyPair, network_id: str, reason: str, issued_at_ms: int
) -> common_pb2.Signed:
    """What an owner signs to end a network."""
    body = log_pb2.Cancellation(
        network_id=network_id, reason=reason[:REASON_CHARS_MAX], issued_at_ms=issued_at_ms
    )
    return owner.sign(keys.CANCELLATION, body.SerializeToString(deterministic=True))


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
    if history.closing is not None:
        return "the network's owner has closed it: nothing counts any more"
    if history.keepers and not entry.keepers:
        return "a log entry names no keepers for the next"
    what = entry.WhichOneof("what")
    if what == "claim":
        return _void_claim(signer, entry, history)
    if what == "commit":
        return _void_commit(signer, entry.commit, history)
    charter = history.charter
    if charter is None or history.manifest is None:
        return "a network that nobody has claimed cannot be closed"
    try:
        open_cancellation(entry.closing.cancellation, history.network_id, charter)
        granted = history.grants(history.network_id, history.manifest, signer)
    except (MalformedError, ForgedError) as error:
        return str(error)
    return "" if granted else f"the owner does not let {signer} write this log"


def _void_claim(signer: str, entry: log_pb2.LogEntry, history: History) -> str:
    claim = entry.claim
    if claim.orchestrator != signer:
        return f"a claim for {claim.orchestrator} is signed by {signer}"
    if claim.epoch != history.epoch + 1:
        return f"a claim has epoch {claim.epoch}, but the next is {history.epoch + 1}"
    try:
        charter = open_charter(history.network_id, claim.manifest)
        granted = history.grants(history.network_id, claim.manifest, signer)
    except (MalformedError, ForgedError) as error:
        return str(error)
    if not granted:
        return f"the owner does not let {signer} orchestrate this network"
    limits = charter.limits
    if limits.hosts_max and len(claim.hosts) > limits.hosts_max:
        return f"a claim names {len(claim.hosts)} hosts; the owner allows {limits.hosts_max}"
    if not claims_left(history, limits):
        return f"the owner allows {limits.claims_max} claims, and all are used"
    before = 0 if history.before is None else history.before.step
    if claim.from_step and claim.from_step != before:
        there = f"the commit before the last is of step {before}" if before else "none is before it"
        return f"a claim goes back from the last commit to step {claim.from_step}, but {there}"
    if bool(charter.keepers) != bool(entry.keepers):
        return "a log is kept by peers, or in a store, as its manifest says"
    if history.epoch:
        return "only a network's first claim says how it begins" if _begins(claim) else ""
    if not _begins(claim) or sha256(claim.genesis.graph) != charter.spec_digest:
        return "a network's first claim does not hold the graph that its manifest names"
    return ""


def _begins(claim: log_pb2.Claim) -> bool:
    return bool(claim.HasField("genesis"))


def _void_commit(signer: str, commit: log_pb2.Commit, history: History) -> str:
    if not history.epoch or commit.epoch != history.epoch:
        return f"a commit has epoch {commit.epoch}, but the last claim has {history.epoch}"
    if signer != history.orchestrator:
        return f"a commit is signed by {signer}, but {history.orchestrator} holds the claim"
    if history.commit is not None and commit.step <= history.commit.step:
        return f"a commit is of step {commit.step}, but step {history.commit.step} is committed"
    return ""
