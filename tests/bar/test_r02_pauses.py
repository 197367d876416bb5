"""R2: machines that stand still again and again get nobody healthy declared failed.

Short form: 24 nodes with 5 % loss, of which 12 pause for up to 5 s again and again with
hardly a moment between, for 40 s. The local health rule stands alone there: one accuser
is enough, and the accused has no time to refute. The mutant lacks the rule. As written:
1,000 nodes, 100 that pause for up to 20 s, for 60 s, all defences in place; then, for the
figure, without the rule, and the rule alone with and without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from p2pnet.sim.scenarios.pauses import SCENARIO

if TYPE_CHECKING:
    from conftest import Scale

SEED = 7
ALONE = {"quorum": 1.0, "refutation_s": 0.0}
SHORT = {"pausing": 0.5, "pause_s": 5.0, "awake_s": 0.01, "lasts_s": 40.0, **ALONE}
WITHOUT = {"local_health": 0.0}


def test_r02(scale: Scale, figure: Callable[[str], None]) -> None:
    if not scale.as_written:
        assert SCENARIO.play(24, SEED, SHORT).failures == []
        return
    report = SCENARIO.play(1000, SEED)
    figure(report.text())
    assert report.failures == []
    for options in (WITHOUT, ALONE, ALONE | WITHOUT):
        figure(SCENARIO.play(1000, SEED, options).text())


def test_r02_mutant() -> None:
    assert SCENARIO.play(24, SEED, SHORT | WITHOUT).failures != []
