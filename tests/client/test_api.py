"""What `Network.train` makes of the steps' results."""

from __future__ import annotations

import math
from typing import Any

import pytest
from small_network import small_graph

from p2pnet.client.api import Network
from p2pnet.client.events import StepResult
from p2pnet.errors import UsageError


class Steps(Network):
    """A network whose steps have these results."""

    def __init__(self, *results: StepResult) -> None:
        self._left = list(results)
        self._run = None
        self._graph = small_graph()

    def _step(self, x: Any, y: Any) -> Any:
        return self._left.pop(0)


LOST = StepResult(2, math.nan, 0, 0, known=False)
BATCH = ([0.0] * 4, [0] * 4)


def test_an_epochs_figures_are_means_over_its_samples() -> None:
    network = Steps(StepResult(1, 1.0, 3, 4), StepResult(2, 4.0, 0, 2))
    seen: list[tuple[int, float]] = []
    (row,) = network.train([BATCH, BATCH], on_step=lambda *step: seen.append(step))
    assert row["loss"] == 2.0
    assert row["accuracy"] == 0.5
    assert seen == [(1, 1.0), (2, 4.0)]


def test_a_result_that_is_lost_is_left_out() -> None:
    network = Steps(StepResult(1, 1.0, 3, 4), LOST, StepResult(3, 3.0, 1, 4))
    (row,) = network.train([BATCH] * 3)
    assert row["loss"] == 2.0
    assert row["accuracy"] == 0.5
    (row,) = Steps(LOST).train([BATCH])
    assert math.isnan(row["loss"])
    assert math.isnan(row["accuracy"])
    assert row["samples_per_s"] > 0


def test_nothing_to_train_on() -> None:
    with pytest.raises(UsageError, match="no batches came"):
        Steps().train([])
