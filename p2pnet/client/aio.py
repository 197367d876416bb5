"""What async Python programs use: `AsyncClient` and `AsyncNetwork`.

`Client` and `Network` (`p2pnet.client.api`) are the same for programs without async. Their
methods do what is said here, and take and return the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack, aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar, Unpack

from p2pnet.client import generate as generating
from p2pnet.client import inference, weights
from p2pnet.client.batches import as_array, named
from p2pnet.client.describe import member_json, where_json
from p2pnet.client.epochs import Epoch, Given, in_flight
from p2pnet.client.inference import Chunk, Missing
from p2pnet.client.local import control_socket
from p2pnet.client.run import TrainingRun
from p2pnet.client.session import NetworkInfo, Session
from p2pnet.client.terms import Terms
from p2pnet.datadir import DataDir, default_data_dir
from p2pnet.errors import LocalError, RemoteError, UnreachableError, UsageError
from p2pnet.keys import KeyPair
from p2pnet.net import identity
from p2pnet.v1 import orchestrator_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.state import model_digest
from p2pnet.vnode.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

CALL_TIMEOUT_S = 120.0
SUBMIT_TIMEOUT_S = 300.0  # several orchestrators may be tried
STEP_TIMEOUT_S = 3600.0  # a run gives up before, when nobody orchestrates the network

Batches = Iterable[tuple[Any, Any]] | AsyncIterable[tuple[Any, Any]]


class ModelSettings(TypedDict, total=False):
    """How a `torch.nn.Module` is to be trained, as the keys of a spec (docs/models.md)."""

    micro_batches: int
    batch_max: int
    clip_norm: float
    staleness: int
    replicas: int
    codec: str
    learning: str
    head: Any
    fuse: bool


class SubmitOptions(ModelSettings, total=False):
    """The keywords of `AsyncClient.submit`."""

    name: str | None
    loss: str
    optimizer: Mapping[str, Any] | None
    input_shape: Sequence[int] | None
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
        loss: str = "CrossEntropyLoss",
        optimizer: Mapping[str, Any] | None = None,
        input_shape: Sequence[int] | None = None,
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
            input_shape: of one sample, where the first layer does not tell.
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


class AsyncNetwork:
    """A network in the swarm. Made by `AsyncClient.submit` and `AsyncClient.network`."""

    def __init__(self, client: AsyncClient, info: NetworkInfo) -> None:
        self.info = info
        self._client = client
        self._run: TrainingRun | None = None
        self._on_notice: Callable[[str], None] | None = None
        self._graph: CompiledGraph | None = None
        self.recoveries: list[str] = []
        """Why the network had to be placed anew while this object trained it."""

    @property
    def name(self) -> str:
        """As submitted."""
        return self.info.name

    async def train(
        self,
        batches: Batches | Callable[[int], Batches],
        *,
        epochs: int = 1,
        on_step: Callable[[int, float], object] | None = None,
        on_epoch: Callable[[dict[str, Any]], object] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Trains; returns a dict an epoch: epoch, loss, accuracy (or None), samples_per_s.

        As many batches are on their way at a time as the network can use; the results
        come in order all the same.

        Args:
            batches: of (x, y), arrays or tensors, and for several inputs a dict or tuple
                of them in the place of x. Gone through once an epoch, with `async for`
                where they can; or, where it is callable, called with the epoch (from 1).
            on_step: told (step, loss) of each decided step. The loss is NaN in the rare
                case that the step counts and its result was lost with an orchestrator.
            on_epoch: told the dict of each epoch. These two may be coroutine functions.
            on_notice: told what is worth knowing meanwhile, a sentence at a time: that
                the orchestrator is gone, say. By default it is logged as a warning.

        Raises:
            UsageError: a batch does not fit, or there are none.
            RolledBackError: the states of the last commit are lost; its `step` is the
                first that has to be fed again.
            RemoteError: there is no orchestrator for too long.
        """
        self._on_notice = on_notice
        history = []
        try:
            for number in range(1, epochs + 1):
                epoch = Epoch(number)
                given = batches(number) if callable(batches) else batches
                async with aclosing(in_flight(self, given)) as results:
                    async for samples, result in results:
                        epoch.add(samples, result)
                        if on_step is not None:
                            await _told(on_step(result.step, result.loss))
                row = epoch.row(await self.graph())
                history.append(row)
                if on_epoch is not None:
                    await _told(on_epoch(row))
        except BaseException:
            await self.abandon()
            raise
        await self.finish()
        return history

    async def train_step(self, x: Any, y: Any) -> float:
        """One step; returns its loss. It is committed at the next cut, or by `finish`."""
        try:
            given = await self.give(x, y)
            return float((await limited(given.result, STEP_TIMEOUT_S)).loss)
        except BaseException:
            await self.abandon()  # the next step begins a run of its own
            raise

    async def give(self, x: Any, y: Any) -> Given:
        """Hands in a batch and waits for there being room, not for the step to be decided."""
        if self._run is None:
            self._run = TrainingRun(self._client.session, self.info, self._on_notice)
        run = self._run
        self._graph = graph = await limited(run.start(), STEP_TIMEOUT_S)
        target = as_array(y)
        result = await limited(run.give(named(graph, x), target), STEP_TIMEOUT_S)
        return Given(len(target), result)

    async def finish(self) -> int:
        """Commits what was trained; returns the step. Done by itself before weights are read."""
        if self._run is None:
            return 0
        run, self._run = self._run, None
        try:
            done = await limited(run.finish(), STEP_TIMEOUT_S)
        finally:
            self.recoveries += run.recoveries
            await run.close()
        return int(done.step)

    async def abandon(self) -> None:
        """Ends a training run as it is; what was decided is still committed."""
        if self._run is not None:
            run, self._run = self._run, None
            self.recoveries += run.recoveries
            await run.close()

    async def __call__(self, x: Any) -> Any:
        """The network's output: a Tensor for a Tensor, else an array. Samples first.

        Raises:
            UsageError: x does not fit.
            RemoteError: the outputs of some samples cannot be had; says which.
        """
        await self.finish()
        graph = await self.graph()
        asked = inference.infer_all(self._client.session, self.info, graph, named(graph, x))
        outcome = await limited(asked, STEP_TIMEOUT_S)
        if outcome.missing:
            first = outcome.missing[0]
            raise RemoteError(
                f"the outputs of samples {first.first} to {first.last} cannot be had: "
                f"{first.reason}"
            )
        return _like(x, outcome.output)

    async def infer(self, x: Any) -> AsyncGenerator[Chunk | Missing, None]:
        """The outputs for any number of samples, in parts and in order, as they come.

        What cannot be had is `Missing` and says why; the others come all the same.
        """
        await self.finish()
        graph = await self.graph()
        items = inference.infer(self._client.session, self.info, graph, named(graph, x))
        async with aclosing(items):
            async for item in items:
                yield item

    async def generate(
        self,
        prompt: str,
        *,
        tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> AsyncGenerator[str, None]:
        """The text after a prompt, in pieces as it comes, for `tokens` bytes of UTF-8.

        What follows from the same weights, prompt and seed is the same.

        Args:
            temperature: 0 takes the likeliest byte each time; 1: as the model says.
            top_k: take one of so many likeliest bytes; 0: any.

        Raises:
            UsageError: the network is no language model over bytes.
        """
        await self.finish()
        session, graph = self._client.session, await self.graph()
        pieces = generating.generate(
            session,
            self.info,
            graph,
            prompt,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def locate(self, vnode: str | None = None) -> list[dict[str, Any]]:
        """Where VNodes live, as the DHT says: all, or one; rows as of `p2pnet whereis --json`."""
        vnodes = () if vnode is None else (vnode,)
        rows = await limited(self._client.session.where_is(self.info, vnodes))
        return [where_json(row) for row in rows]

    async def status(self) -> orchestrator_pb2.StatusReply:
        """What the orchestrator says of the network."""
        return await limited(self._client.session.status(self.info))

    async def cancel(self, reason: str = "") -> None:
        """Ends the network for good: nobody hosts, trains or asks it any more.

        Raises:
            UsageError: somebody else submitted it, it is closed already, or the reason
                has over 200 characters.
        """
        await self.abandon()
        await limited(self._client.session.cancel(self.info, self._client.owner(), reason))

    async def weights(self) -> dict[str, Array]:
        """Parameters and buffers of the last cut as numpy arrays, keys VNODE.PARAM."""
        await self.finish()
        session = self._client.session
        states = await limited(session.cut(self.info))
        return await limited(weights.fetch_weights(session, self.info, states), STEP_TIMEOUT_S)

    async def state_dict(self) -> dict[str, Tensor]:
        """The weights under torch's own names, as `load_state_dict` takes them."""
        import torch

        return {name: torch.from_numpy(array) for name, array in (await self.weights()).items()}

    async def digest(self) -> str:
        """`model_digest` of the weights, hex."""
        return model_digest(await self.weights())

    async def graph(self) -> CompiledGraph:
        """The compiled graph."""
        if self._graph is None:
            self._graph = CompiledGraph.from_json((await self.status()).graph)
        return self._graph


async def limited(work: Awaitable[T], timeout_s: float = CALL_TIMEOUT_S) -> T:
    """The same within a time.

    Raises:
        UnreachableError: it takes longer; it is cancelled.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise UnreachableError(f"there was no answer for {timeout_s:g} s") from None


async def _told(answer: object) -> None:
    if isinstance(answer, Awaitable):
        await answer


def _like(given: Any, output: Array) -> Any:
    if isinstance(given, Mapping):
        given = next(iter(given.values()), None)
    if isinstance(given, tuple):
        given = next(iter(given), None)
    if hasattr(given, "detach"):
        import torch

        return torch.from_numpy(output)
    return output
