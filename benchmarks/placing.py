"""How long a placement takes, at three sizes; and what one step of it would."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from p2pnet.gossip.coordinates import Coordinate
from p2pnet.orchestrator.placement import HostView, place
from p2pnet.orchestrator.predict import predict
from p2pnet.vnode.compiling import compile_graph
from p2pnet.vnode.draft import Draft, TensorSpec
from p2pnet.vnode.graph import CompiledGraph

SIZES = ((100, 20), (1_000, 100), (10_000, 1_000))  # VNodes, PNodes
_SEED = 7
_BATCH = 32
_PLACES = 20
_TIMES = 3


@dataclass(frozen=True)
class Placed:
    """Of one size; times in seconds, the median of three on one core."""

    vnodes: int
    pnodes: int
    place_s: float  # nobody says where it is
    place_far_s: float  # with coordinates, in twenty places of the world
    again_far_s: float  # the same after one PNode was lost
    moved: int  # VNodes, by then
    step_s: float  # foretold, with coordinates


def place_all() -> list[Placed]:
    """Every size."""
    return [_measure(vnodes, pnodes) for vnodes, pnodes in SIZES]


def as_rows(placed: list[Placed]) -> dict[str, dict[str, float]]:
    """For JSON, by size."""
    return {f"{one.vnodes:,}/{one.pnodes:,}": asdict(one) for one in placed}


def _measure(vnodes: int, pnodes: int) -> Placed:
    graph = _chain(vnodes - 1)  # and the loss
    near, far = _hosts(pnodes, False), _hosts(pnodes, True)
    place_s = _median_s(lambda: place(graph, near, batch_size=_BATCH))
    place_far_s = _median_s(lambda: place(graph, far, batch_size=_BATCH))
    before = place(graph, far, batch_size=_BATCH).assignments

    def again() -> Mapping[str, str]:
        lost = (before["fc0"],)
        return place(graph, far, batch_size=_BATCH, current=before, exclude=lost).assignments

    again_s, after = _median_s(again), again()
    moved = sum(before[vnode] != after[vnode] for vnode in before)
    step_s = predict(graph, far, before, batch_size=_BATCH).step_s
    return Placed(vnodes, pnodes, place_s, place_far_s, again_s, moved, step_s)


def _median_s(work: Callable[[], object]) -> float:
    took = []
    for _ in range(_TIMES):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return sorted(took)[_TIMES // 2]


def _chain(count: int) -> CompiledGraph:
    wide = {"in_features": 64, "out_features": 64}
    return compile_graph(
        name="chain",
        inputs={"x": TensorSpec((64,))},
        nodes=[
            Draft(f"fc{n}", "Linear", wide, (f"fc{n - 1}" if n else "x",)) for n in range(count)
        ],
        loss=Draft("loss", "MSELoss", {}, (f"fc{count - 1}",)),
        optimizer="Adam",
        optimizer_config={},
    )


def _hosts(count: int, far: bool) -> list[HostView]:
    rng = random.Random(_SEED)
    places = [[rng.uniform(-0.08, 0.08) for _ in range(4)] for _ in range(_PLACES)]
    hosts = []
    for n in range(count):
        centre = rng.choice(places)
        axes = tuple(axis + rng.gauss(0, 0.005) for axis in centre)
        at = Coordinate(axes, rng.uniform(0.0005, 0.01), 0.1)
        hosts.append(
            HostView(
                peer_id=f"{rng.getrandbits(128):032x}",
                cpus=2.0,
                memory_free_bytes=rng.choice([4, 8, 1024]) << 20,
                gflops=rng.uniform(1, 100),
                vnodes=rng.randrange(3),
                ip_group=f"g{n // 3}",
                coordinate=at if far else None,
            )
        )
    return hosts
