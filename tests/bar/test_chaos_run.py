"""R4 to R10 in real processes: a process is killed every 5 s for 60 s, whichever it is.

The short form is tests/cluster/test_chaos.py, which runs alone: it needs the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chaos import EVERY_S, judge, live_through
from swarm import Swarm

if TYPE_CHECKING:
    from conftest import Scale

FOR_S = 60.0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_every_five_seconds(
    seed: int, tmp_path: Path, scale: Scale, figure: Callable[[str], None]
) -> None:
    if not scale.as_written:
        pytest.skip("its short form is tests/cluster/test_chaos.py")
    with Swarm(tmp_path) as swarm:
        story = live_through(swarm, seed, for_s=FOR_S)
    figure("\n".join(story.figures()))
    judge(story, kills=round(FOR_S / EVERY_S))
