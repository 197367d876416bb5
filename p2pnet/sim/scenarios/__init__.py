"""What `p2pnet sim --scenario` can play: a module each, which has a `SCENARIO`. Pure."""

from __future__ import annotations

from p2pnet.sim.scenario import Scenario
from p2pnet.sim.scenarios import (
    accusers,
    churn,
    detection,
    eclipse,
    jobs,
    log,
    lookups,
    orchestration,
    partition,
    pauses,
    race,
    relocation,
    spread,
    stalls,
    swarm,
    takeover,
)

SCENARIOS: dict[str, Scenario] = {
    module.SCENARIO.name: module.SCENARIO
    for module in (
        accusers,
        churn,
        detection,
        eclipse,
        jobs,
        log,
        lookups,
        orchestration,
        partition,
        pauses,
        race,
        relocation,
        spread,
        stalls,
        swarm,
        takeover,
    )
}
