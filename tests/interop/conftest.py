"""Where the Go libp2p daemon is; tests that need it are skipped where it is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from p2pd import Daemon, daemon

ROOT = Path(__file__).parents[2]


def find_p2pd() -> Path | None:
    """$P2PNET_P2PD, or what `make test` or `make bench` has brought."""
    if given := os.environ.get("P2PNET_P2PD"):
        return Path(given)
    beside = Path(sys.executable).with_name("p2pd")
    benched = ROOT.glob(".venv-hivemind/lib/*/site-packages/hivemind/hivemind_cli/p2pd")
    return next((path for path in (beside, *benched) if path.exists()), None)


@pytest.fixture(scope="session")
def p2pd() -> Path:
    """The daemon's binary."""
    path = find_p2pd()
    if path is None:
        pytest.skip("no Go libp2p daemon here: `make test` fetches it, or set $P2PNET_P2PD")
    return path


@pytest.fixture
def go(p2pd: Path) -> Iterator[Daemon]:
    """A running daemon."""
    with daemon(p2pd) as running:
        yield running


@pytest.fixture
def second_go(p2pd: Path) -> Iterator[Daemon]:
    """Another one."""
    with daemon(p2pd) as running:
        yield running
