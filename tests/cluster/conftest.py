"""A swarm that many tests share, and what its processes said where a test fails."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from digits import DIGITS, digits_batches
from swarm import Figure, Swarm

import p2pnet

FIGURES: list[str] = []


@pytest.fixture(scope="session")
def figure() -> Figure:
    """Takes a line with what was measured; all are shown at the end of the run."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("figures, as measured on this machine in this run")
        for line in FIGURES:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Five nodes. A test that adds some takes them away again; nobody kills these."""
    with Swarm(tmp_path_factory.mktemp("calm")) as swarm:
        swarm.grow(5, "--faults")
        yield swarm


@pytest.fixture(scope="session")
def quiet(calm: Swarm) -> p2pnet.Network:
    """The digits network, trained in peace for 50 steps; orchestrated by node 1."""
    network = calm.nodes[1].client.submit({**DIGITS, "name": "quiet"})
    for x, y in digits_batches():
        network.train_step(x, y)
    network.finish()
    return network


@pytest.fixture(scope="session")
def quiet_digest(quiet: p2pnet.Network) -> str:
    """What every run over the same batches has to end with, whatever happens to it."""
    return quiet.digest()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            swarm = getattr(value, "swarm", value)
            if isinstance(swarm, Swarm):
                report.sections.append(("what the processes said", swarm.describe()))
    return report
