"""A granted orchestrator that breaks the rules: what hosts and keepers must refuse. Pure.

It signs honestly as itself, as any peer may that the owner lets orchestrate; everything
else it makes up: claims that nobody decided, epochs that are over or not yet due.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from p2pnet.keys import LOG_ENTRY, sha256
from p2pnet.log.history import History, new_claim, new_commit
from p2pnet.log.proof import majority, prove
from p2pnet.orchestrator.allocations import allocate_requests
from p2pnet.sim.calls import Calls
from p2pnet.sim.log_client import LogClient
from p2pnet.v1 import common_pb2, log_pb2
from p2pnet.vnode.graph import CompiledGraph

_TIMEOUT_S = 2.0
_LEASE_S = 60


class Villain:
    """Strikes when it is told to, with what it knows of the log."""

    def __init__(
        self,
        calls: Calls,
        log: Callable[[], LogClient],
        manifest: common_pb2.Signed,
        graph: CompiledGraph,
        rng: random.Random,
    ) -> None:
        self._calls = calls
        self._log = log
        self._manifest = manifest
        self._graph = graph
        self._rng = rng
        self._round = 0

    @property
    def able(self) -> bool:
        """Whether its machine runs."""
        return self._calls.machine.running

    def strike(self) -> str:
        """Reads the log, then does one bad thing."""
        what = self._rng.choice((self._host_undecided, self._commit_stale, self._claim_ahead))
        log = self._log()

        def read(entries: tuple[common_pb2.Signed, ...] | None, why: str) -> None:
            if log.history.epoch and log.history.closing is None:
                what(log.history)

        log.read(1, read)
        return what.__name__.strip("_").replace("_", " ")

    def _host_undecided(self, history: History) -> None:
        """Has VNodes hosted under a claim that is not in the log."""
        claim = new_claim(
            history, self._calls.machine.key, self._manifest, placement=history.placement
        )
        ahead = History(history.network_id)
        ahead.extend([*history.entries, claim])
        requests = allocate_requests(
            ahead,
            self._graph,
            claim,
            history.placement,
            history.standbys,
            lease_s=_LEASE_S,
            step=0,
            states={},
            state_url="",
        )
        for host, request in requests.items():
            self._call(host, "PNode/Allocate", request, lambda reply: None)

    def _commit_stale(self, history: History) -> None:
        """Commits under an epoch that is over, or that is another's."""
        ref = common_pb2.BlobRef(digest=sha256(b"made up"), size_bytes=1)
        states = dict.fromkeys(self._graph.vnodes(), ref)
        step = 1 + (int(history.commit.step) if history.commit is not None else 0)
        entry = log_pb2.LogEntry.FromString(
            new_commit(history, self._calls.machine.key, step, states).payload
        )
        if history.orchestrator == self._calls.machine.peer_id:
            entry.commit.epoch = max(1, entry.commit.epoch - 1)
        if entry.commit.epoch < history.epoch or history.orchestrator != self._me:
            self._propose(history, entry)

    def _claim_ahead(self, history: History) -> None:
        """Claims an epoch that is not the next."""
        claim = new_claim(
            history, self._calls.machine.key, self._manifest, placement=history.placement
        )
        entry = log_pb2.LogEntry.FromString(claim.payload)
        entry.claim.epoch += self._rng.choice((-1, 1, 7))
        self._propose(history, entry)

    @property
    def _me(self) -> str:
        return self._calls.machine.peer_id

    def _propose(self, history: History, entry: log_pb2.LogEntry) -> None:
        """Paxos without a look at what is proposed."""
        payload = entry.SerializeToString(deterministic=True)
        signed = self._calls.machine.key.sign(LOG_ENTRY, payload)
        self._round += 1
        ballot = log_pb2.Ballot(round=self._round + 3, proposer=self._me)
        ask = log_pb2.PrepareRequest(
            network_id=history.network_id, slot=history.next_slot, ballot=ballot
        )
        accept = log_pb2.AcceptRequest(
            network_id=history.network_id, slot=history.next_slot, ballot=ballot, entry=signed
        )
        keepers = history.keepers
        promised: dict[str, None] = {}
        votes: dict[str, bytes] = {}

        def answered(keeper: str, reply: Any) -> None:
            if reply is None or not reply.promised or reply.HasField("accepted"):
                return
            promised[keeper] = None
            if len(promised) == majority(keepers):
                for other in keepers:
                    self._call(other, "Keeper/Accept", accept, partial(accepted, other))

        def accepted(keeper: str, reply: Any) -> None:
            if reply is None or not reply.accepted:
                return
            votes[keeper] = reply.vote
            if len(votes) == majority(keepers):
                learn = log_pb2.LearnRequest(
                    network_id=history.network_id, entries=[signed], proofs=[prove(ballot, votes)]
                )
                for other in keepers:
                    self._call(other, "Keeper/Learn", learn, lambda reply: None)

        for keeper in keepers:
            self._call(keeper, "Keeper/Prepare", ask, partial(answered, keeper))

    def _call(self, peer: str, method: str, request: Any, done: Callable[[Any], None]) -> None:
        self._calls.call(peer, method, request, timeout_s=_TIMEOUT_S, done=done)
