"""Steps as `Network.train` makes them, timed where they are steady."""

from __future__ import annotations

from benchmarks.processes import Process

_WARM = 4  # steps: connections, torch's first calls, the filling of the pipeline
_TRAIN_S = 240.0  # a deadline that only a bug meets


def mean_s(client: Process, name: str, samples: int, steps: int, warm: int = _WARM) -> float:
    """A step's share of the time of so many steps, after `warm` others.

    Not the median: where several are in flight, they are decided in bursts.
    """
    done = client.ask("train_through", _TRAIN_S, name=name, samples=samples, steps=warm + steps)
    decided_s = done["decided_s"]
    return float(decided_s[-1] - decided_s[warm - 1]) / steps
