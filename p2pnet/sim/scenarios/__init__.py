"""What `p2pnet sim --scenario` can play: a module each, which has a `SCENARIO`. Pure."""

from __future__ import annotations

from p2pnet.sim.scenario import Scenario
from p2pnet.sim.scenarios import (
    accusers,
    churn,
    detection,
    eclipse,
    log,
    lookups,
    orchestration,
    pauses,
    spread,
    swarm,
)

SCENARIOS: dict[str, Scenario] = {
    module.SCENARIO.name: module.SCENARIO
    for module in (
        accusers,
        churn,
        detection,
        eclipse,
        log,
        lookups,
        orchestration,
        pauses,
        spread,
        swarm,
    )
}
