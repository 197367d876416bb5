"""What Python programs without async use: `Client` and `Network`.

They do what `AsyncClient` and `AsyncNetwork` do (`p2pnet.client.aio`, `network`), on a loop
in a thread of their own, and block until it is done.
"""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from p2pnet.client.aio import AsyncClient, SubmitOptions
from p2pnet.client.inference import Chunk, Missing
from p2pnet.client.network import CALL_TIMEOUT_S, AsyncNetwork
from p2pnet.client.portal import Portal
from p2pnet.client.session import NetworkInfo, Session
from p2pnet.errors import UnreachableError
from p2pnet.keys import KeyPair
from p2pnet.net.bridge import AsyncioThread
from p2pnet.v1 import orchestrator_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

Batches = Iterable[tuple[Any, Any]]

_END: Any = object()


class Client:
    """A way into a p2p network, as `AsyncClient`; it connects when it is made.

    A client, with its networks, is for one thread.
    """

    def __init__(
        self,
        bootstrap: str | Path | Sequence[str] = (),
        *,
        data_dir: str | Path | None = None,
        kad_protocol: str | None = None,
    ) -> None:
        self._stack = ExitStack()
        try:
            self.thread = self._stack.enter_context(AsyncioThread("p2pnet-client-grpc"))
            self.twin = AsyncClient(bootstrap, data_dir=data_dir, kad_protocol=kad_protocol)
            self._stack.callback(lambda: self.run(self.twin.close()))
            self.run(self.twin.open())
        except BaseException:
            self._stack.close()
            raise

    @property
    def session(self) -> Session:
        """The connection, for `run`."""
        return self.twin.session

    def close(self) -> None:
        """Ends every connection."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def members(self) -> list[dict[str, Any]]:
        """Who is here: a dict a member, as `p2pnet members --json` prints them."""
        return self.wait(self.twin.members())

    def submit(
        self,
        model: str | Path | Mapping[str, Any] | nn.Module,
        **options: Unpack[SubmitOptions],
    ) -> Network:
        """Submits a network and waits until it is placed; see `AsyncClient.submit`."""
        return Network(self, self.wait(self.twin.submit(model, **options)))

    def network(self, name: str) -> Network:
        """A network that is there already, by name or id; raises NotFoundError."""
        return Network(self, self.wait(self.twin.network(name)))

    def owner(self) -> KeyPair:
        """The key that networks are submitted and cancelled with; it is made when first used."""
        return self.twin.owner()

    def run(self, coro: Coroutine[Any, Any, T], timeout_s: float = CALL_TIMEOUT_S) -> T:
        """Runs a coroutine of the session's and waits for it.

        Raises:
            UnreachableError: it takes longer than `timeout_s`; it is cancelled.
        """
        try:
            return self.thread.run(coro, timeout_s)
        except TimeoutError:
            raise UnreachableError(f"there was no answer for {timeout_s:g} s") from None

    def wait(self, coro: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine that has limits of its own."""
        return self.thread.run(coro, None)

    def start(self, coro: Coroutine[Any, Any, None]) -> None:
        """Begins a coroutine on the session's loop and does not wait."""

        async def begin() -> None:
            await coro

        self.thread.submit(begin)


class Network:
    """A network in the swarm, as `AsyncNetwork`. Made by `Client.submit` and `Client.network`."""

    def __init__(self, client: Client, twin: AsyncNetwork) -> None:
        self._client = client
        self._twin = twin

    @property
    def info(self) -> NetworkInfo:
        """What its record in the DHT said."""
        return self._twin.info

    @property
    def name(self) -> str:
        """As submitted."""
        return self._twin.name

    @property
    def recoveries(self) -> list[str]:
        """Why the network had to be placed anew while this object trained it."""
        return self._twin.recoveries

    @property
    def graph(self) -> CompiledGraph:
        """The compiled graph."""
        return self._client.wait(self._twin.graph())

    def train(
        self,
        batches: Batches | Callable[[int], Batches],
        *,
        epochs: int = 1,
        on_step: Callable[[int, float], object] | None = None,
        on_epoch: Callable[[dict[str, Any]], object] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Trains; returns a dict an epoch: epoch, loss, accuracy (or None), samples_per_s.

        As `AsyncNetwork.train`. Batches are made, and `on_step` and `on_epoch` called, in
        this thread; `on_notice` in another.
        """
        portal = Portal(self._client.thread)

        def here(epoch: int) -> AsyncIterator[tuple[Any, Any]]:
            return portal.iterate(lambda: batches(epoch) if callable(batches) else batches)

        def told(callback: Callable[..., object] | None) -> Callable[..., object] | None:
            return callback and (lambda *what: portal.call(callback, *what))

        async def train() -> list[dict[str, Any]]:
            return await self._twin.train(
                here,
                epochs=epochs,
                on_step=told(on_step),
                on_epoch=told(on_epoch),
                on_notice=on_notice,
            )

        return portal.run(train)

    def train_step(self, x: Any, y: Any) -> float:
        """One step; returns its loss. It is committed at the next cut, or by `finish`."""
        return self._client.wait(self._twin.train_step(x, y))

    def finish(self) -> int:
        """Commits what was trained; returns the step. Done by itself before weights are read."""
        return self._client.wait(self._twin.finish())

    def abandon(self) -> None:
        """Ends a training run as it is; what was decided is still committed."""
        self._client.wait(self._twin.abandon())

    def __call__(self, x: Any) -> Any:
        """The network's output: a Tensor for a Tensor, else an array. Samples first."""
        return self._client.wait(self._twin(x))

    def infer(self, x: Any) -> Generator[Chunk | Missing, None, None]:
        """The outputs for any number of samples, in parts and in order, as they come."""
        return self._each(self._twin.infer(x))

    def generate(
        self,
        prompt: str,
        *,
        tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Generator[str, None, None]:
        """The text after a prompt, in pieces as it comes; see `AsyncNetwork.generate`."""
        return self._each(
            self._twin.generate(
                prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed
            )
        )

    def locate(self, vnode: str | None = None) -> list[dict[str, Any]]:
        """Where VNodes live, as the DHT says: all, or one; rows as of `p2pnet whereis --json`."""
        return self._client.wait(self._twin.locate(vnode))

    def status(self) -> orchestrator_pb2.StatusReply:
        """What the orchestrator says of the network."""
        return self._client.wait(self._twin.status())

    def cancel(self, reason: str = "") -> None:
        """Ends the network for good: nobody hosts, trains or asks it any more.

        Raises:
            UsageError: somebody else submitted it, it is closed already, or the reason
                has over 200 characters.
        """
        self._client.wait(self._twin.cancel(reason))

    def weights(self) -> dict[str, Array]:
        """Parameters and buffers of the last cut as numpy arrays, keys VNODE.PARAM."""
        return self._client.wait(self._twin.weights())

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under torch's own names, as `load_state_dict` takes them."""
        return self._client.wait(self._twin.state_dict())

    def digest(self) -> str:
        """`model_digest` of the weights, hex."""
        return self._client.wait(self._twin.digest())

    def _each(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        async def following() -> T:
            return await anext(items, _END)

        try:
            while (item := self._client.wait(following())) is not _END:
                yield item
        finally:
            self._client.wait(_close(items))


async def _close(items: AsyncGenerator[Any, None]) -> None:
    await items.aclose()
