"""A process is killed every five seconds, orchestrators and bootstraps included (short form).

The row as written, 60 s, is in tests/bar/test_chaos_run.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chaos import EVERY_S, Story, judge, live_through
from swarm import Figure, Swarm

SEED = 7
FOR_S = 20.0


@pytest.fixture(scope="module", params=[SEED], ids=lambda seed: f"seed{seed}")
def story(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Story]:
    with Swarm(tmp_path_factory.mktemp("chaos")) as swarm:
        yield live_through(swarm, request.param, for_s=FOR_S)


def test_a_run_under_fire_ends_as_a_quiet_one(story: Story, figure: Figure) -> None:
    for line in story.figures():
        figure(line)
    judge(story, kills=round(FOR_S / EVERY_S))
