"""p2pnet: a volunteer network that trains and serves one community-governed neural network.

Importing this costs nothing: what is named here is loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AsyncClient", "AsyncNetwork", "Client", "Network", "__version__"]

if TYPE_CHECKING:
    from p2pnet.client import AsyncClient, AsyncNetwork, Client, Network


def __getattr__(name: str) -> Any:
    if name in __all__ and name != "__version__":
        return getattr(import_module("p2pnet.client"), name)
    raise AttributeError(f"module 'p2pnet' has no attribute {name!r}")
