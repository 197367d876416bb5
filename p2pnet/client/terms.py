"""What an owner signs when a network is submitted. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pnet import keys
from p2pnet.dht.keyspace import name_key, peer_position, position
from p2pnet.dht.manifest import ORCHESTRATORS_MAX
from p2pnet.errors import MalformedError, UsageError
from p2pnet.keys import KeyPair
from p2pnet.v1 import common_pb2, records_pb2
from p2pnet.vnode.graph import CompiledGraph


@dataclass(frozen=True, slots=True)
class Terms:
    """What the owner holds orchestrators to; the default is nothing.

    Attributes:
        allow: the peers that may orchestrate; none: any peer.
        hosts_max, claims_max: of the network, over its life for claims; 0: no limit.
        expires_in_s: hosts take nothing new after it; 0: never.
    """

    allow: tuple[str, ...] = ()
    hosts_max: int = 0
    claims_max: int = 0
    expires_in_s: float = 0.0

    def check(self) -> None:
        """Raises UsageError for terms that cannot be."""
        if len(self.allow) > ORCHESTRATORS_MAX:
            raise UsageError(f"at most {ORCHESTRATORS_MAX} peers can be named as orchestrators")
        for peer_id in self.allow:
            try:
                keys.public_key_of(peer_id)
            except MalformedError as error:
                raise UsageError(
                    f"{error}: `p2pnet members` shows those of all who are here"
                ) from None
        for what, number in (("hosts", self.hosts_max), ("claims", self.claims_max)):
            if not 0 <= number < 2**32:
                raise UsageError(f"{number} is not a number of {what}")
        if not 0 <= self.expires_in_s <= 100 * 365 * 86400:
            raise UsageError("a network ends within 100 years, or never")

    def candidates(self, alive: Sequence[str], name: str, first: str) -> list[str]:
        """Who may be asked to orchestrate: `first` where it may, then those closest to the name.

        Raises:
            UsageError: nobody that is here may.
        """
        allowed = [peer for peer in alive if not self.allow or peer in self.allow]
        if not allowed:
            raise UsageError(
                "none of the peers that may orchestrate the network is here now: "
                f"{', '.join(self.allow)}"
            )
        target = position(name_key(name))
        return sorted(allowed, key=lambda peer: (peer != first, peer_position(peer) ^ target))


def new_manifest(
    owner: KeyPair,
    graph: CompiledGraph,
    terms: Terms,
    *,
    keepers: Sequence[str],
    state_url: str,
    now_ms: int,
    nonce: bytes,
) -> common_pb2.Signed:
    """The manifest of a new network: its log is on `keepers`, or where `state_url` says."""
    limits = records_pb2.Limits(
        hosts_max=terms.hosts_max,
        claims_max=terms.claims_max,
        expires_at_ms=now_ms + round(terms.expires_in_s * 1000) if terms.expires_in_s else 0,
    )
    manifest = records_pb2.Manifest(
        owner=owner.public_key,
        name=graph.name,
        spec_digest=graph.digest,
        any_orchestrator=not terms.allow,
        orchestrators=sorted(dict.fromkeys(terms.allow)),
        created_at_ms=now_ms,
        nonce=nonce,
        micro_batches=graph.micro_batches,
        compute_threads=1,
        keepers=() if state_url else sorted(keepers),
        state_url=state_url,
        limits=limits if limits.ByteSize() else None,
    )
    return owner.sign(keys.MANIFEST, manifest.SerializeToString(deterministic=True))
