"""What async Python programs use: `AsyncClient` and `AsyncNetwork`.

`Client` and `Network` (`p2pnet.client.api`) are the same for programs without async. Their
methods do what is said here, and take and return the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

from p2pnet.client.describe import member_json
from p2pnet.client.local import control_socket
from p2pnet.client.network import AsyncNetwork, limited
from p2pnet.client.session import Session
from p2pnet.client.terms import Terms
from p2pnet.datadir import DataDir, default_data_dir
from p2pnet.errors import LocalError, UsageError
from p2pnet.keys import KeyPair
from p2pnet.net import identity

if TYPE_CHECKING:
    from torch import nn

__all__ = ["AsyncClient", "AsyncNetwork"]

SUBMIT_TIMEOUT_S = 300.0  # several orchestrators may be tried


class ModelSettings(TypedDict, total=False):
    """How a `torch.nn.Module` is to be trained, as the keys of a spec (docs/models.md)."""

    micro_batches: int
    batch_max: int
    clip_norm: float
    staleness: int
    replicas: int
    codec: str
    learning: str
    head: str
    fuse: bool


class SubmitOptions(ModelSettings, total=False):
    """The keywords of `AsyncClient.submit`."""

    name: str | None
    loss: str | Mapping[str, Any]
    optimizer: Mapping[str, Any] | None
    input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None
    seed: int
    cut_every: int | None
    orchestrator: str
    allow: Sequence[str]
    hosts_max: int
    claims_max: int
    expires_in_s: float


class AsyncClient:
    """A way into a p2p network: through the node that runs here, or with `bootstrap`.

    For `async with`; everything then belongs to the running loop.

    Args:
        bootstrap: a file of multiaddrs, or multiaddrs; the client then needs no node.
        data_dir: of the local node; also holds the key that networks are submitted with.
        kad_protocol: with `bootstrap`, the protocol id of that swarm's DHT, where it is
            not the usual one.

    Raises:
        UsageError: when it is entered: no node runs here and no bootstrap is given.
    """

    def __init__(
        self,
        bootstrap: str | Path | Sequence[str] = (),
        *,
        data_dir: str | Path | None = None,
        kad_protocol: str | None = None,
    ) -> None:
        self._sources = (
            (str(bootstrap),) if isinstance(bootstrap, (str, Path)) else tuple(bootstrap)
        )
        self._data_dir = Path(data_dir) if data_dir is not None else default_data_dir()
        self._kad_protocol = kad_protocol
        self._stack = ExitStack()
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """The connection; raises LocalError before the client is entered."""
        if self._session is None:
            raise LocalError("this client is not open: use it in an `async with`")
        return self._session

    async def open(self) -> None:
        """Connects; done by `async with`."""
        socket = control_socket(self._data_dir, self._sources, self._kad_protocol)
        self._session = Session(await asyncio.to_thread(self._stack.enter_context, socket))

    async def close(self) -> None:
        """Ends every connection; done by `async with`."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        await asyncio.to_thread(self._stack.close)

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def members(self) -> list[dict[str, Any]]:
        """Who is here: a dict a member, as `p2pnet members --json` prints them."""
        rows = await limited(self.session.members())
        return [member_json(row) for row in rows]

    async def submit(
        self,
        model: str | Path | Mapping[str, Any] | nn.Module,
        *,
        name: str | None = None,
        loss: str | Mapping[str, Any] = "CrossEntropyLoss",
        optimizer: Mapping[str, Any] | None = None,
        input_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        seed: int = 0,
        cut_every: int | None = None,
        orchestrator: str = "",
        allow: Sequence[str] = (),
        hosts_max: int = 0,
        claims_max: int = 0,
        expires_in_s: float = 0.0,
        **settings: Unpack[ModelSettings],
    ) -> AsyncNetwork:
        """Submits a network and waits until it is placed.

        Args:
            model: a spec's path, a spec as a dict, or a `torch.nn.Module` that can be
                traced, whose weights are shipped. What follows up to `cut_every`, and
                `settings`, is for the last.
            loss: a type, or a mapping with its `type` and torch's settings of it.
            input_shape: of one sample, where the first layer does not tell; for several
                inputs one for each name of the forward's arguments.
            orchestrator: the peer id of who is to look after it at first.
            allow: the peer ids of all who may look after it; none: any peer.
            hosts_max: on how many hosts it may be placed at a time; 0: no limit.
            claims_max: how often it may be placed over its life, by anybody; 0: no limit.
            expires_in_s: hosts take nothing new of it after so long; 0: never.

        Raises:
            SpecError: the network cannot work; says where.
            UsageError: its name is taken, or the swarm is too small for it.
        """
        from p2pnet.orchestrator.spec import load_spec

        states: dict[str, bytes] = {}
        if isinstance(model, (str, Path, Mapping)):
            if settings:
                raise UsageError(
                    f"{next(iter(settings))} is for torch models: a spec has it itself"
                )
            graph = load_spec(Path(model) if isinstance(model, str) else model)
        else:
            from p2pnet.client import models  # torch

            spec = models.spec_of(
                model,
                name=name or type(model).__name__.lower(),
                loss=loss,
                optimizer=optimizer or {"type": "Adam", "lr": 1e-3},
                input_shape=input_shape,
                seed=seed,
                cut_every=cut_every,
                **settings,
            )
            graph = load_spec(spec)
            states = models.states_of(model, graph)
        terms = Terms(tuple(allow), hosts_max, claims_max, expires_in_s)
        submitting = self.session.submit(graph, self.owner(), states, orchestrator, terms)
        return AsyncNetwork(self, await limited(submitting, SUBMIT_TIMEOUT_S))

    async def network(self, name: str) -> AsyncNetwork:
        """A network that is there already, by name or id; raises NotFoundError."""
        return AsyncNetwork(self, await limited(self.session.find(name)))

    def owner(self) -> KeyPair:
        """The key that networks are submitted and cancelled with; it is made when first used."""
        data = DataDir(self._data_dir)
        data.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return identity.load_or_create(data.path / "owner")
