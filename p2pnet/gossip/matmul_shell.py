"""A program: prints how fast this machine multiplies fp32 matrices, `{"gflops": ...}`.

Run as `python -m p2pnet.gossip.matmul_shell` by the node, in a process of its
own because numpy is large; how many threads it uses is set by the environment.
"""

from __future__ import annotations

import json
import sys
import time

SIZE = 512
SECONDS = 0.4


def measure(size: int = SIZE, seconds: float = SECONDS) -> float:
    """The best of the repetitions that fit into `seconds`: others disturb, none helps."""
    import numpy as np

    a = np.full((size, size), 0.5, dtype=np.float32)
    b = np.full((size, size), 0.25, dtype=np.float32)
    out = a @ b  # loads and warms up
    best_s = float("inf")
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        np.matmul(a, b, out=out)
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * size**3 / best_s / 1e9


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"gflops": round(measure(), 3)}) + "\n")
