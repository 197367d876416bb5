"""The Python client: submit, train, ask and fetch networks.

with p2pnet.Client(bootstrap="bootstrap_peers.txt") as client:
    net = client.submit(model, name="digits", loss="CrossEntropyLoss",
                        optimizer={"type": "Adam", "lr": 1e-3})
    net.train(loader, epochs=3)
    y = net(x)

`AsyncClient` is the same for programs with `async`.

What is named here is loaded at first use, so that the simulator can have the run's core
without the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pnet.client.aio import AsyncClient, AsyncNetwork
    from p2pnet.client.api import Client, Network

__all__ = ["AsyncClient", "AsyncNetwork", "Client", "Network"]

_MODULES = {"AsyncClient": "aio", "AsyncNetwork": "aio", "Client": "api", "Network": "api"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"p2pnet.client.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'p2pnet.client' has no attribute {name!r}")
