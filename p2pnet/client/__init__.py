"""The Python client: submit, train, ask and fetch networks.

with p2pnet.Client(bootstrap="bootstrap_peers.txt") as client:
    net = client.submit(model, name="digits", loss="CrossEntropyLoss",
                        optimizer={"type": "Adam", "lr": 1e-3})
    net.train(loader, epochs=3)
    y = net(x)

What is named here is loaded at first use, so that the simulator can have the run's core
without the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pnet.client.api import Client, Network

__all__ = ["Client", "Network"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from p2pnet.client import api

        return getattr(api, name)
    raise AttributeError(f"module 'p2pnet.client' has no attribute {name!r}")
