"""What is compared: how a peer of each system is started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
_HIVEMIND = ROOT / ".venv-hivemind"
HIVEMIND_PYTHON = _HIVEMIND / "bin/python"
HIVEMIND_PEERS = ROOT / "benchmarks/peers"
# torch goes in first and alone: any other version than the pinned one may bring
# gigabytes of GPU libraries along.
_STEPS = (("torch==2.13.0",), ("hivemind>=1.1.12,<1.2", "numpy<2.4"))
_INSTALL_S = 900.0


@dataclass(frozen=True)
class System:
    """One of them.

    Attributes:
        command: starts a peer of the benchmark, without the address to listen on.
        meets_at_start: a peer is told whom to join through when it is started.
        bulk: how many keys go into the bulk measurements.
        rounds_max: in so many rounds it takes part; a slow one in one.
    """

    name: str
    command: tuple[str, ...]
    directory: Path
    meets_at_start: bool = False
    bulk: int = 200
    rounds_max: int = 9

    def peer(self, bootstrap: Sequence[str]) -> list[str]:
        """The command line of one more peer."""
        through = bootstrap if self.meets_at_start else ()
        return [*self.command, LOOPBACK, *through]


P2PNET = System("p2pnet", (sys.executable, "-m", "benchmarks.peers.p2pnet_dht"), ROOT)
HIVEMIND = System(
    "hivemind",
    (str(HIVEMIND_PYTHON), "hivemind_dht.py"),
    HIVEMIND_PEERS,
    meets_at_start=True,
)
STOCK = System(
    "py-libp2p KadDHT",
    (sys.executable, "-m", "benchmarks.peers.stock_kad"),
    ROOT,
    bulk=16,
    rounds_max=1,
)
ALL = (P2PNET, HIVEMIND, STOCK)

# The shipped commands, for memory and start-up: a whole node each.
P2PNET_NODE = (sys.executable, "-m", "p2pnet", "join", "--json", "--until-eof", "--device", "cpu")
HIVEMIND_NODE = (str(_HIVEMIND / "bin/hivemind-dht"),)


def install_hivemind() -> str:
    """Makes hivemind's environment unless it is there; "" or why that failed."""
    ready = _HIVEMIND / ".ready"
    if ready.exists():
        return ""
    print("installing hivemind into .venv-hivemind, once (half a gigabyte; a minute or more)")
    pip = str(_HIVEMIND / "bin/pip")
    steps = [[sys.executable, "-m", "venv", str(_HIVEMIND)]]
    steps += [[pip, "install", "--quiet", *packages] for packages in _STEPS]
    steps += [[str(HIVEMIND_PYTHON), "-c", "import hivemind"]]
    for step in steps:
        try:
            done = subprocess.run(
                step, capture_output=True, text=True, timeout=_INSTALL_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"could not be installed: {error}"
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            return f"could not be installed: {last}"
    ready.touch()
    return ""
