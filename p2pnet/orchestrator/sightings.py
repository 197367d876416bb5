"""What a node knows of a network without looking after it: enough to take it over. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from p2pnet.dht.manifest import network_id_of, open_manifest
from p2pnet.errors import RemoteError
from p2pnet.log.history import History
from p2pnet.orchestrator.succession import Forget, Known, candidates_of
from p2pnet.v1 import common_pb2, log_pb2, records_pb2


@dataclass(frozen=True, slots=True)
class Sighting:
    """A network as its last claim says that this node has seen.

    `keepers`: of the log, as far as is known; `hosts`: those of the claim.
    """

    network_id: str
    manifest: common_pb2.Signed
    charter: records_pb2.Manifest
    epoch: int
    orchestrator: str
    keepers: tuple[str, ...]
    hosts: tuple[str, ...]
    closed: bool = False
    why: str = ""  # it is closed, as its owner says

    def known(self) -> Known | Forget:
        """What the succession is to be told."""
        if self.closed:
            return Forget(self.network_id)
        charter = self.charter
        granted = None if charter.any_orchestrator else list(charter.orchestrators)
        return Known(
            self.network_id,
            self.epoch,
            self.orchestrator,
            candidates_of(self.keepers, self.hosts, granted),
        )


class Keeping(Protocol):
    """What keeps logs."""

    def histories(self) -> Iterable[History]:
        """All that are kept here; not to be changed."""
        ...


class Hosting(Protocol):
    """What hosts VNodes."""

    def claims(self) -> Iterable[tuple[common_pb2.Signed, bool]]:
        """(the newest claim that was checked here, whether its network is closed), each network."""
        ...


def closed_by_owner(name: str, why: str) -> str:
    """The sentence for people."""
    return f"its owner has closed {name}" + (f": {why}" if why else "")


def sightings_of(keeper: Keeping, host: Hosting) -> list[Sighting]:
    """All networks that a node keeps or hosts; of one that it does both, both."""
    seen = [of_history(history) for history in keeper.histories()]
    seen += [of_claim(signed, closed=closed) for signed, closed in host.claims()]
    return [sighting for sighting in seen if sighting is not None]


def of_history(history: History) -> Sighting | None:
    """What a kept log says; None for one without a claim."""
    if history.manifest is None or history.charter is None:
        return None
    return Sighting(
        history.network_id,
        history.manifest,
        history.charter,
        history.epoch,
        history.orchestrator,
        history.keepers,
        tuple(sorted({*history.placement.values()})),
        history.closing is not None,
        "" if history.closing is None else history.closing.reason,
    )


def of_claim(signed: common_pb2.Signed, *, closed: bool = False) -> Sighting | None:
    """What a host was shown when it was given VNodes: a checked claim; None for what is none."""
    entry = log_pb2.LogEntry.FromString(signed.payload)
    claim = entry.claim
    return of_manifest(
        claim.manifest,
        claim.epoch,
        claim.orchestrator,
        tuple(entry.keepers),
        tuple(claim.hosts),
        closed=closed,
    )


def of_manifest(
    manifest: common_pb2.Signed,
    epoch: int,
    orchestrator: str,
    keepers: Sequence[str],
    hosts: Sequence[str] = (),
    *,
    closed: bool = False,
) -> Sighting | None:
    """What somebody says; None where the manifest does not hold."""
    try:
        charter = open_manifest(manifest)
    except RemoteError:
        return None
    return Sighting(
        network_id_of(manifest),
        manifest,
        charter,
        epoch,
        orchestrator,
        tuple(keepers),
        tuple(hosts),
        closed,
    )
