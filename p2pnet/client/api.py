"""What Python programs use: `Client` and `Network`, without async."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from p2pnet.client import inference, models, weights
from p2pnet.client.describe import member_json, where_json
from p2pnet.client.local import control_socket
from p2pnet.client.run import TrainingRun
from p2pnet.client.session import NetworkInfo, Session
from p2pnet.client.terms import Terms
from p2pnet.datadir import DataDir, default_data_dir
from p2pnet.errors import UnreachableError, UsageError
from p2pnet.keys import KeyPair
from p2pnet.net import identity
from p2pnet.net.bridge import AsyncioThread
from p2pnet.v1 import orchestrator_pb2
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.state import model_digest
from p2pnet.vnode.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

CALL_TIMEOUT_S = 120.0
SUBMIT_TIMEOUT_S = 300.0  # several orchestrators may be tried
STEP_TIMEOUT_S = 3600.0  # a run gives up before, when nobody orchestrates the network


class Client:
    """A way into a p2p network: through the node that runs here, or with `bootstrap`.

    Args:
        bootstrap: a file of multiaddrs, or multiaddrs; the client then needs no node.
        data_dir: of the local node; also holds the key that networks are submitted with.
        kad_protocol: with `bootstrap`, the protocol id of that swarm's DHT, where it is
            not the usual one.

    Raises:
        UsageError: no node runs here and no bootstrap is given.
    """

    def __init__(
        self,
        bootstrap: str | Path | Sequence[str] = (),
        *,
        data_dir: str | Path | None = None,
        kad_protocol: str | None = None,
    ) -> None:
        sources = (str(bootstrap),) if isinstance(bootstrap, (str, Path)) else tuple(bootstrap)
        self._data_dir = Path(data_dir) if data_dir is not None else default_data_dir()
        self._stack = ExitStack()
        try:
            socket = self._stack.enter_context(
                control_socket(self._data_dir, sources, kad_protocol)
            )
            self._thread = self._stack.enter_context(AsyncioThread("p2pnet-client-grpc"))
            self.session = self.run(self._connect(socket))
            self._stack.callback(lambda: self.run(self.session.close()))
        except BaseException:
            self._stack.close()
            raise

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
        return [member_json(row) for row in self.run(self.session.members())]

    def submit(
        self,
        model: str | Path | Mapping[str, Any] | nn.Sequential,
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
    ) -> Network:
        """Submits a network and waits until it is placed.

        Args:
            model: a spec's path, a spec as a dict, or a `torch.nn.Sequential`, whose
                weights are shipped. What follows up to `cut_every` is for the last.
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
        if isinstance(model, (str, Path)):
            graph = load_spec(Path(model))
        elif isinstance(model, Mapping):
            graph = load_spec(model)
        else:
            spec = models.spec_of(
                model,
                name=name or type(model).__name__.lower(),
                loss=loss,
                optimizer=optimizer or {"type": "Adam", "lr": 1e-3},
                input_shape=input_shape,
                seed=seed,
                cut_every=cut_every,
            )
            graph = load_spec(spec)
            states = models.states_of(model, graph)
        terms = Terms(tuple(allow), hosts_max, claims_max, expires_in_s)
        submitting = self.session.submit(graph, self.owner(), states, orchestrator, terms)
        return Network(self, self.run(submitting, SUBMIT_TIMEOUT_S))

    def network(self, name: str) -> Network:
        """A network that is there already, by name or id; raises NotFoundError."""
        return Network(self, self.run(self.session.find(name)))

    def run(self, coro: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Runs a coroutine of the session's and waits for it.

        Raises:
            UnreachableError: it takes longer than `timeout_s`; it is cancelled.
        """
        try:
            return self._thread.run(coro, timeout_s)
        except TimeoutError:
            raise UnreachableError(f"there was no answer for {timeout_s:g} s") from None

    def start(self, coro: Coroutine[Any, Any, None]) -> None:
        """Begins a coroutine on the session's loop and does not wait."""

        async def begin() -> None:
            await coro

        self._thread.submit(begin)

    def owner(self) -> KeyPair:
        """The key that networks are submitted and cancelled with; it is made when first used."""
        data = DataDir(self._data_dir)
        data.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return identity.load_or_create(data.path / "owner")

    async def _connect(self, socket: Path) -> Session:
        return Session(socket)


class Network:
    """A network in the swarm. Made by `Client.submit` and `Client.network`."""

    def __init__(self, client: Client, info: NetworkInfo) -> None:
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

    def train(
        self,
        batches: Iterable[tuple[Any, Any]] | Callable[[int], Iterable[tuple[Any, Any]]],
        *,
        epochs: int = 1,
        on_step: Callable[[int, float], None] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Trains; returns a dict an epoch: epoch, loss, accuracy (or None), samples_per_s.

        Args:
            batches: of (x, y), arrays or tensors; gone through once an epoch, or,
                where it is callable, called with the epoch (from 1).
            on_step: told (step, loss) of each decided step. The loss is NaN in the rare
                case that the step counts and its result was lost with an orchestrator.
            on_notice: told what is worth knowing meanwhile, a sentence at a time: that
                the orchestrator is gone, say; from another thread. By default it is
                logged as a warning.
        """
        self._on_notice = on_notice
        try:
            history = self._train(batches, epochs, on_step, on_epoch)
        except BaseException:
            self.abandon()
            raise
        self.finish()
        return history

    def _train(
        self,
        batches: Iterable[tuple[Any, Any]] | Callable[[int], Iterable[tuple[Any, Any]]],
        epochs: int,
        on_step: Callable[[int, float], None] | None,
        on_epoch: Callable[[dict[str, Any]], None] | None,
    ) -> list[dict[str, Any]]:
        history = []
        for epoch in range(1, epochs + 1):
            started = time.monotonic()
            loss = samples = correct = 0.0
            fed = 0
            for x, y in batches(epoch) if callable(batches) else batches:
                result = self._step(x, y)
                fed += len(x)
                if result.known:
                    loss += result.loss * result.samples
                    correct += result.correct
                    samples += result.samples
                if on_step is not None:
                    on_step(result.step, result.loss)
            if not fed:
                raise UsageError("there is nothing to train on: no batches came")
            known = samples or math.nan
            row = {
                "epoch": epoch,
                "loss": loss / known,
                "accuracy": correct / known if self.graph.loss.type in _CLASSIFIES else None,
                "samples_per_s": fed / (time.monotonic() - started),
            }
            history.append(row)
            if on_epoch is not None:
                on_epoch(row)
        return history

    def train_step(self, x: Any, y: Any) -> float:
        """One step; returns its loss. It is committed at the next cut, or by `finish`."""
        return float(self._step(x, y).loss)

    def finish(self) -> int:
        """Commits what was trained; returns the step. Done by itself before weights are read."""
        if self._run is None:
            return 0
        run, self._run = self._run, None
        try:
            done = self._client.run(run.finish(), STEP_TIMEOUT_S)
        finally:
            self.recoveries += run.recoveries
            self._client.run(run.close())
        return int(done.step)

    def abandon(self) -> None:
        """Ends a training run as it is; what was decided is still committed."""
        if self._run is not None:
            run, self._run = self._run, None
            self._client.run(run.close())

    def __call__(self, x: Any) -> Any:
        """The network's output: a Tensor for a Tensor, else an array. Samples first."""
        self.finish()
        output = self._client.run(
            inference.infer(self._client.session, self.info, self.graph, {self._input: _array(x)}),
            STEP_TIMEOUT_S,
        )
        return _like(x, output)

    def locate(self, vnode: str | None = None) -> list[dict[str, Any]]:
        """Where VNodes live, as the DHT says: all, or one; rows as of `p2pnet whereis --json`."""
        vnodes = () if vnode is None else (vnode,)
        rows = self._client.run(self._client.session.where_is(self.info, vnodes))
        return [where_json(row) for row in rows]

    def status(self) -> orchestrator_pb2.StatusReply:
        """What the orchestrator says of the network."""
        reply: orchestrator_pb2.StatusReply = self._client.run(
            self._client.session.status(self.info)
        )
        return reply

    def cancel(self, reason: str = "") -> None:
        """Ends the network for good: nobody hosts, trains or asks it any more.

        Raises:
            UsageError: somebody else submitted it, it is closed already, or the reason
                has over 200 characters.
        """
        self.abandon()
        self._client.run(self._client.session.cancel(self.info, self._client.owner(), reason))

    def weights(self) -> dict[str, Array]:
        """Parameters and buffers of the last cut as numpy arrays, keys VNODE.PARAM."""
        self.finish()
        session = self._client.session
        states = self._client.run(session.cut(self.info), STEP_TIMEOUT_S)
        found: dict[str, Array] = self._client.run(
            weights.fetch_weights(session, self.info, states)
        )
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under torch's own names, as `load_state_dict` takes them."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self.weights().items()}

    def digest(self) -> str:
        """`model_digest` of the weights, hex."""
        return model_digest(self.weights())

    @property
    def graph(self) -> CompiledGraph:
        """The compiled graph."""
        if self._graph is None:
            self._graph = CompiledGraph.from_json(self.status().graph)
        return self._graph

    @property
    def _input(self) -> str:
        if len(self.graph.inputs) != 1:
            raise UsageError(f"network {self.name} has several inputs, which this cannot feed yet")
        return next(iter(self.graph.inputs))

    def _step(self, x: Any, y: Any) -> Any:
        inputs, target = {self._input: _array(x)}, _array(y)
        if self._run is None:
            self._run = self._client.run(self._begin())
        try:
            return self._client.run(self._run.step(inputs, target), STEP_TIMEOUT_S)
        except BaseException:
            self.abandon()  # the next step begins a run of its own
            raise

    async def _begin(self) -> TrainingRun:
        return TrainingRun(self._client.session, self.info, self._on_notice)


_CLASSIFIES = ("CrossEntropyLoss",)


def _array(value: Any) -> Array:
    if hasattr(value, "detach"):  # a torch.Tensor, without importing torch
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _like(given: Any, output: Array) -> Any:
    if hasattr(given, "detach"):
        import torch

        return torch.from_numpy(output)
    return output
