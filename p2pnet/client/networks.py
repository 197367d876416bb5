"""A shell: finds networks, and asks whoever orchestrates them.

Orchestrators come and go: what is asked of one is asked of the next when it is gone, for a
while. Records in the DHT say who it was; the peers themselves say who it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from p2pnet.bounded import keep_latest
from p2pnet.client.connection import Connection, Patience
from p2pnet.client.link import LOOK_FURTHER
from p2pnet.clock import wall_ms
from p2pnet.dht.manifest import grants, open_manifest
from p2pnet.errors import (
    NotFoundError,
    P2PNetError,
    RefusedError,
    RemoteError,
    UnreachableError,
    UsageError,
)
from p2pnet.keys import KeyPair, short
from p2pnet.log.entry import REASON_CHARS_MAX
from p2pnet.log.history import new_cancellation
from p2pnet.v1 import common_pb2, control_pb2, orchestrator_pb2, records_pb2

logger = logging.getLogger(__name__)

ReplyT = TypeVar("ReplyT", bound=Message)

ASK_TIMEOUT_S = 10.0
ASK_LIMIT_S = 60.0  # for an answer, from whoever orchestrates the network by then
LEASE_TIMEOUT_S = 3.0
CANCEL_TIMEOUT_S = 45.0
HOSTS_ASKED = 8
NETWORKS_MAX = 256

_CLOSED = common_pb2.REFUSAL_CODE_CLOSED


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """A network as its newest record in the DHT says."""

    network_id: str
    name: str
    orchestrator: str
    vnodes: tuple[str, ...]
    epoch: int
    state_url: str
    keepers: tuple[str, ...] = ()
    manifest: common_pb2.Signed | None = None


class Networks(Connection):
    """Networks and their orchestrators, over a connection."""

    def __init__(self, socket: Path) -> None:
        super().__init__(socket)
        self._located: dict[str, NetworkInfo] = {}  # by network id, at most NETWORKS_MAX

    # Who orchestrates

    async def find(self, name: str) -> NetworkInfo:
        """The network of that name or id, with the newest epoch that a record names.

        Raises:
            NotFoundError: there is none.
            UsageError: there are several of that name.
        """
        found: dict[str, NetworkInfo] = {}
        for info in await self._records(name):
            known = found.get(info.network_id)
            if known is None or known.epoch < info.epoch:
                found[info.network_id] = info
        if not found:
            raise NotFoundError(
                f"there is no network {name!r} here that a peer looks after: submit one with "
                "`p2pnet submit SPEC`, or check the name"
            )
        if len(found) > 1:
            ids = ", ".join(sorted(found))
            raise UsageError(f"several networks are named {name!r}: say which by its id, {ids}")
        return next(iter(found.values()))

    def newest(self, network: NetworkInfo) -> NetworkInfo:
        """The same network as it was when it was last located, if that is newer."""
        located = self._located.get(network.network_id, network)
        return located if located.epoch > network.epoch else network

    async def locate(self, network: NetworkInfo) -> NetworkInfo:
        """The same network under whoever orchestrates it now.

        Those whom records name are asked, the keepers of its log, and whom these name in
        turn. Where nobody says that it does, the newest record stands.

        Raises:
            RefusedError: its owner has closed it (code CLOSED).
            RemoteError: nobody answers at all.
        """
        try:
            records = [network, *await self._records(network.network_id)]
        except P2PNetError as error:
            logger.info("no record of network %s: %s", network.name, error)
            records = [network]
        newest = max(records, key=lambda info: info.epoch)
        asked: dict[str, None] = {}
        names = [info.orchestrator for info in records] + [*newest.keepers, *network.keepers]
        if not newest.keepers:
            names += await self._some_hosts(newest)
        leases: list[tuple[int, str]] = []
        closed: list[RefusedError] = []
        for _ in range(2):  # the second time those whom the first have named
            peers = [peer for peer in dict.fromkeys(names) if peer not in asked]
            asked |= dict.fromkeys(peers)
            names = []
            for peer, lease in zip(
                peers,
                await asyncio.gather(*(self._lease(peer, newest) for peer in peers)),
                strict=True,
            ):
                if lease is None:
                    continue
                if not lease.HasField("refusal"):
                    leases.append((lease.epoch, peer))
                elif lease.refusal.code == _CLOSED:
                    closed.append(RefusedError(lease.refusal.detail, code=_CLOSED))
                elif lease.refusal.host:
                    names.append(lease.refusal.host)
        if leases:
            epoch, peer = max(leases)
            found = replace(newest, orchestrator=peer, epoch=epoch)
            keep_latest(self._located, network.network_id, found, NETWORKS_MAX)
            return found
        # One alone may lie, where there are others to ask.
        if len(closed) > 1 or (closed and len(asked) == 1):
            raise closed[0]
        return newest

    async def ask(
        self,
        network: NetworkInfo,
        method: str,
        request: Message,
        reply_type: type[ReplyT],
        *,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> ReplyT:
        """A call to whoever orchestrates the network, looked for while there is nobody.

        Raises:
            UsageError: its owner has closed it.
            RefusedError: the orchestrator says no.
            UnreachableError: there is none for too long.
        """
        patience = Patience(f"an orchestrator of {network.name}", ASK_LIMIT_S)
        network = self.newest(network)
        while True:
            problem: P2PNetError
            try:
                reply = await self.call(
                    network.orchestrator, method, request, reply_type, timeout_s=timeout_s
                )
                raise_refusal(reply)
                return reply
            except RefusedError as error:
                if error.code == _CLOSED:
                    raise UsageError(str(error)) from None
                if error.code not in LOOK_FURTHER:
                    raise
                problem = error
            except UnreachableError as error:
                problem = error
            await patience.wait(problem)
            try:
                network = await self.locate(network)
            except RefusedError as error:
                raise UsageError(str(error)) from None

    async def _records(self, name: str) -> list[NetworkInfo]:
        """Every author's record of the networks of that name or id."""
        reply = await self.control(
            "FindNetwork", control_pb2.FindNetworkRequest(name=name), control_pb2.FindNetworkReply
        )
        infos = []
        for signed in reply.records:
            record = records_pb2.Record.FromString(signed.payload)
            network = records_pb2.NetworkRecord.FromString(record.body)
            infos.append(
                NetworkInfo(
                    network.network_id,
                    network.name,
                    network.orchestrator,
                    tuple(network.vnodes),
                    network.epoch,
                    network.state_url,
                    tuple(network.keepers),
                    network.manifest,
                )
            )
        return infos

    async def _lease(
        self, peer_id: str, network: NetworkInfo
    ) -> orchestrator_pb2.LeaseReply | None:
        """What a peer says of its part in a network; None if it says nothing, or may not."""
        try:
            reply = await self.call(
                peer_id,
                "Orchestrator/Lease",
                orchestrator_pb2.LeaseRequest(network_id=network.network_id),
                orchestrator_pb2.LeaseReply,
                timeout_s=LEASE_TIMEOUT_S,
            )
            may = network.manifest is None or grants(open_manifest(network.manifest), peer_id)
        except RemoteError as error:
            logger.info("peer %s says nothing of %s: %s", short(peer_id), network.name, error)
            return None
        return reply if may or reply.HasField("refusal") else None

    async def _some_hosts(self, network: NetworkInfo) -> list[str]:
        try:
            rows = await self.where_is(network, network.vnodes[:HOSTS_ASKED])
        except P2PNetError:
            return []
        return [row.peer_id for row in rows]

    # What a network is

    async def where_is(
        self, network: NetworkInfo, vnodes: Sequence[str] = ()
    ) -> Sequence[control_pb2.WhereIsRow]:
        """Where VNodes live, as the DHT says; raises NotFoundError for an unknown one."""
        unknown = [vnode for vnode in vnodes if vnode not in network.vnodes]
        if unknown:
            raise NotFoundError(
                f"network {network.name} has no VNode {unknown[0]!r}: it has "
                f"{', '.join(network.vnodes)}"
            )
        request = control_pb2.WhereIsRequest(
            network_id=network.network_id, vnodes=vnodes or network.vnodes
        )
        reply = await self.control("WhereIs", request, control_pb2.WhereIsReply)
        return list(reply.rows)

    async def status(self, network: NetworkInfo) -> orchestrator_pb2.StatusReply:
        """What the network's orchestrator says of it; raises as `ask`."""
        request = orchestrator_pb2.StatusRequest(network_id=network.network_id)
        return await self.ask(network, "Orchestrator/Status", request, orchestrator_pb2.StatusReply)

    async def cancel(self, network: NetworkInfo, owner: KeyPair, reason: str = "") -> None:
        """Ends a network for good, by its owner's word.

        Raises:
            UsageError: `owner` is not its owner, it is closed already, or too long a reason.
            RemoteError: there is no orchestrator, or the log cannot be written.
        """
        if len(reason) > REASON_CHARS_MAX:
            raise UsageError(f"a reason has at most {REASON_CHARS_MAX} characters")
        manifest = network.manifest
        if manifest is not None and manifest.public_key != owner.public_key:
            raise UsageError(
                f"{network.name} was submitted with another key than the one in this data "
                "directory, and only its owner can cancel it: give the --data-dir that it was "
                "submitted from"
            )
        request = orchestrator_pb2.CancelRequest(
            cancellation=new_cancellation(owner, network.network_id, reason, wall_ms())
        )
        await self.ask(
            network,
            "Orchestrator/Cancel",
            request,
            orchestrator_pb2.CancelReply,
            timeout_s=CANCEL_TIMEOUT_S,
        )


def raise_refusal(reply: object) -> None:
    """Raises RefusedError if a reply carries a refusal."""
    refusal = getattr(reply, "refusal", None)
    if isinstance(reply, Message) and refusal is not None and reply.HasField("refusal"):
        raise RefusedError(
            refusal.detail, code=refusal.code, epoch=refusal.epoch, host=refusal.host
        )
