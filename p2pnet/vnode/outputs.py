"""The outputs of forward passes, until who asked for them comes for them, or comes no more."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass

from p2pnet.errors import P2PNetError, ResourceError
from p2pnet.vnode.tensors import Array

OUTPUTS_MAX = 1024
BYTES_MAX = 256 << 20
KEPT_S = 60.0


@dataclass(slots=True)
class _Output:
    future: asyncio.Future[Array]
    timer: asyncio.TimerHandle  # for when nobody comes
    size_bytes: int = 0


class Outputs:
    """The outputs of this host, the oldest first; each is given out once. On the gRPC thread."""

    def __init__(self) -> None:
        self._outputs: dict[Hashable, _Output] = {}
        self._size_bytes = 0

    async def wait(self, key: Hashable, timeout_s: float) -> Array:
        """The output of a request, which may have to come yet.

        Raises:
            TimeoutError: it has not come.
            MalformedError: the inputs can never be right.
            ResourceError: a VNode on the way failed, or this host had no room for it.
        """
        future = self._of(key).future
        async with asyncio.timeout(timeout_s):
            output = await asyncio.shield(future)
        if key in self._outputs and self._outputs[key].future is future:
            self._drop(key)
        return output

    def settle(self, key: Hashable, output: Array) -> None:
        """What has come of a request; the first word counts."""
        entry = self._of(key)
        if entry.future.done():
            return
        entry.future.set_result(output)
        entry.size_bytes = output.nbytes
        self._size_bytes += output.nbytes
        while self._size_bytes > BYTES_MAX and len(self._outputs) > 1:
            self._drop(next(iter(self._outputs)))

    def fail(self, key: Hashable, error: P2PNetError) -> None:
        """Why nothing comes of a request."""
        _fail(self._of(key).future, error)

    def _of(self, key: Hashable) -> _Output:
        if key not in self._outputs:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(KEPT_S, self._drop, key)
            self._outputs[key] = _Output(loop.create_future(), timer)
            if len(self._outputs) > OUTPUTS_MAX:
                self._drop(next(iter(self._outputs)))
        return self._outputs[key]

    def _drop(self, key: Hashable) -> None:
        entry = self._outputs.pop(key)
        entry.timer.cancel()
        self._size_bytes -= entry.size_bytes
        _fail(entry.future, ResourceError("this host had no room for the output"))


def _fail(future: asyncio.Future[Array], error: P2PNetError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # it may be that nobody asks
