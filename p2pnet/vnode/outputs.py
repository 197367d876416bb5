"""The outputs of forward passes, until who asked for them comes for them, or comes no more."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from p2pnet.errors import P2PNetError, ResourceError
from p2pnet.vnode.tensors import Array

OUTPUTS_MAX = 1024
BYTES_MAX = 256 << 20
KEPT_S = 60.0


class Outputs:
    """The outputs of this host, the oldest first; each is given out once. On the gRPC thread."""

    def __init__(self) -> None:
        self._outputs: dict[Hashable, asyncio.Future[Array]] = {}
        self._sizes: dict[Hashable, int] = {}
        self._size_bytes = 0

    async def wait(self, key: Hashable, timeout_s: float) -> Array:
        """The output of a request, which may have to come yet.

        Raises:
            TimeoutError: it has not come.
            MalformedError: the inputs can never be right.
            ResourceError: a VNode on the way failed, or this host had no room for it.
        """
        future = self._of(key)
        async with asyncio.timeout(timeout_s):
            output = await asyncio.shield(future)
        self._drop(key, future)
        return output

    def settle(self, key: Hashable, output: Array) -> None:
        """What has come of a request; the first word counts."""
        future = self._of(key)
        if future.done():
            return
        future.set_result(output)
        self._sizes[key] = output.nbytes
        self._size_bytes += output.nbytes
        while self._size_bytes > BYTES_MAX and len(self._sizes) > 1:
            self._drop(next(iter(self._sizes)))

    def fail(self, key: Hashable, error: P2PNetError) -> None:
        """Why nothing comes of a request."""
        _fail(self._of(key), error)

    def _of(self, key: Hashable) -> asyncio.Future[Array]:
        if key not in self._outputs:
            loop = asyncio.get_running_loop()
            future = self._outputs[key] = loop.create_future()
            loop.call_later(KEPT_S, self._drop, key, future)
            if len(self._outputs) > OUTPUTS_MAX:
                self._drop(next(iter(self._outputs)))
        return self._outputs[key]

    def _drop(self, key: Hashable, future: asyncio.Future[Array] | None = None) -> None:
        kept = self._outputs.get(key)
        if kept is None or (future is not None and kept is not future):
            return
        del self._outputs[key]
        self._size_bytes -= self._sizes.pop(key, 0)
        if not kept.done():
            _fail(kept, ResourceError("this host had no room for the output"))


def _fail(future: asyncio.Future[Array], error: P2PNetError) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # it may be that nobody asks
