"""Logs made by hand: a manifest, the claims and commits of its network, and their proofs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memory_wire import keypair_of

from p2pnet import keys
from p2pnet.dht.manifest import network_id_of
from p2pnet.log.history import History, new_cancellation, new_claim, new_closing, new_commit
from p2pnet.log.proof import prove, vote
from p2pnet.v1 import common_pb2, log_pb2, records_pb2
from p2pnet.vnode.graph import CompiledGraph

OWNER = "owner"


def manifest_for(
    graph: CompiledGraph,
    granted: Sequence[str] | None = None,
    *,
    keepers: Sequence[str] = (),
    **fields: Any,
) -> common_pb2.Signed:
    """A manifest by `OWNER`; people and peers by name. Without `granted`, anybody may."""
    owner = keypair_of(OWNER)
    body = records_pb2.Manifest(
        owner=owner.public_key,
        name=graph.name,
        spec_digest=graph.digest,
        any_orchestrator=granted is None,
        orchestrators=[keypair_of(name).peer_id for name in granted or ()],
        keepers=sorted(keypair_of(name).peer_id for name in keepers),
        **fields,
    )
    return owner.sign(keys.MANIFEST, body.SerializeToString(deterministic=True))


class Log:
    """A network's log in one hand: whatever is added here is decided."""

    def __init__(
        self, graph: CompiledGraph, granted: Sequence[str] | None = None, **fields: Any
    ) -> None:
        self.graph = graph
        self.manifest = manifest_for(graph, granted, **fields)
        self.network_id = network_id_of(self.manifest)
        self.history = History(self.network_id)
        self._keepers = tuple(fields.get("keepers", ()))

    @classmethod
    def of(cls, graph: CompiledGraph, history: History, keepers: Sequence[str]) -> Log:
        """Of a network that others have begun, to go on with."""
        self = cls.__new__(cls)
        assert history.manifest is not None
        self.graph, self.manifest, self.history = graph, history.manifest, history
        self.network_id = history.network_id
        self._keepers = tuple(keepers)
        return self

    @property
    def entries(self) -> tuple[common_pb2.Signed, ...]:
        return tuple(self.history.entries)

    @property
    def proofs(self) -> list[log_pb2.Proof]:
        """One an entry; its keepers never change here."""
        ballot = log_pb2.Ballot(round=1, proposer=keypair_of(OWNER).peer_id)
        keepers = [keypair_of(name) for name in self._keepers]
        return [
            prove(ballot, {keeper.peer_id: vote(keeper, ballot, entry) for keeper in keepers})
            for entry in self.history.entries
        ]

    def proposal(
        self, by: str, placement: Mapping[str, str], *, reason: str = "a test"
    ) -> common_pb2.Signed:
        """A claim of the next epoch by somebody, not decided; VNode -> the host's name."""
        genesis = None if self.history.claims else log_pb2.Genesis(graph=self.graph.to_json())
        return new_claim(
            self.history,
            keypair_of(by),
            self.manifest,
            placement={vnode: keypair_of(name).peer_id for vnode, name in placement.items()},
            reason=reason,
            genesis=genesis,
        )

    def add(self, entry: common_pb2.Signed) -> common_pb2.Signed:
        assert self.history.add(entry) == ""
        return entry

    def claim(self, by: str, placement: Mapping[str, str]) -> common_pb2.Signed:
        """The next epoch is somebody's."""
        return self.add(self.proposal(by, placement))

    def claim_until(self, epoch: int, by: str, placement: Mapping[str, str]) -> common_pb2.Signed:
        """As many claims as it takes; returns the one of that epoch."""
        while self.history.epoch < epoch:
            entry = self.claim(by, placement)
        return entry

    def commit(self, by: str, step: int) -> common_pb2.Signed:
        states = {vnode: common_pb2.BlobRef(digest=bytes(32)) for vnode in self.graph.vnodes()}
        return self.add(new_commit(self.history, keypair_of(by), step, states))

    def close(self, by: str) -> common_pb2.Signed:
        """By the owner's word, which somebody writes down."""
        said = new_cancellation(keypair_of(OWNER), self.network_id, "enough", 1)
        return self.add(new_closing(self.history, keypair_of(by), said))
