"""A network in the swarm, for async Python programs: `AsyncNetwork`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from p2pnet.client import generate as generating
from p2pnet.client import inference, weights
from p2pnet.client.batches import as_array, named
from p2pnet.client.describe import where_json
from p2pnet.client.epochs import Epoch, Given, in_flight
from p2pnet.client.inference import Chunk, Missing
from p2pnet.client.passes import Passes
from p2pnet.client.run import TrainingRun
from p2pnet.client.session import NetworkInfo, Session
from p2pnet.errors import RemoteError, UnreachableError
from p2pnet.keys import KeyPair
from p2pnet.v1 import orchestrator_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.state import model_digest
from p2pnet.vnode.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

CALL_TIMEOUT_S = 120.0
STEP_TIMEOUT_S = 3600.0  # a run gives up before, when nobody orchestrates the network

Batches = Iterable[tuple[Any, Any]] | AsyncIterable[tuple[Any, Any]]


class Connected(Protocol):
    """What a network is reached through: `AsyncClient`."""

    @property
    def session(self) -> Session:
        """The connection."""
        ...

    def owner(self) -> KeyPair:
        """The key that networks are cancelled with."""
        ...


class AsyncNetwork:
    """A network in the swarm. Made by `AsyncClient.submit` and `AsyncClient.network`."""

    def __init__(self, client: Connected, info: NetworkInfo) -> None:
        self.info = info
        self._client = client
        self._run: TrainingRun | None = None
        self._turn = asyncio.Lock()  # a run is begun, fed and finished by one at a time
        self._on_notice: Callable[[str], None] | None = None
        self._graph: CompiledGraph | None = None
        self._passes: Passes | None = None
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
        async with self._turn:
            run = self._run
            if run is None:
                run = self._run = TrainingRun(self._client.session, self.info, self._on_notice)
                self._graph = await limited(run.start(), STEP_TIMEOUT_S)
            target = as_array(y)
            result = await run.give(named(await self.graph(), x), target)
            return Given(len(target), result)

    async def finish(self) -> int:
        """Commits what was trained; returns the step. Done by itself before weights are read."""
        async with self._turn:
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
        passes = await self._open_passes()
        asked = inference.infer_all(passes, named(passes.graph, x))
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
        passes = await self._open_passes()
        items = inference.infer(passes, named(passes.graph, x))
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
        pieces = generating.generate(
            await self._open_passes(),
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

        from p2pnet.client.models import torch_names

        found = torch_names(await self.graph(), await self.weights())
        return {name: torch.from_numpy(array) for name, array in found.items()}

    async def digest(self) -> str:
        """`model_digest` of the weights, hex."""
        return model_digest(await self.weights())

    async def graph(self) -> CompiledGraph:
        """The compiled graph."""
        if self._graph is None:
            self._graph = CompiledGraph.from_json((await self.status()).graph)
        return self._graph

    async def _open_passes(self) -> Passes:
        if self._passes is None:
            self._passes = Passes(self._client.session, self.info, await self.graph())
        return self._passes


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
