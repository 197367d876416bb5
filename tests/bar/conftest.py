"""The reliability bar: `make test` judges each row's short form, `make bar` the row as written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Scale:
    """How large a row is: its short form, or as docs/reliability.md has it."""

    as_written: bool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-written", action="store_true", help="the rows as written: hours")


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Scale:
    """The scale of this session."""
    # Unknown where pytest was not started in this directory: then it is the short form.
    return Scale(bool(request.config.getoption("--as-written", default=False)))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a figure that was measured, for docs/reliability.md (seen with -s)."""

    def say(text: str) -> None:
        sys.stdout.write(f"\n[{request.node.name}] {text}\n")

    return say
