"""A program: prints what torch can do with a GPU, or why nothing, as one line of JSON.

Run as `python -m p2pnet.vnode.cuda_shell cuda:0` by a node that is starting, in a
process of its own because torch is large and a driver may hang.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

SIZE = 4096
SECONDS = 0.4


def inspect(torch: Any, name: str) -> dict[str, Any]:
    """`{"title", "memory_bytes", "gflops"}` of a GPU, or `{"error"}`: one sentence's end."""
    if torch.version.cuda is None:
        return {"error": f"this torch ({torch.__version__}) is built without CUDA"}
    if not torch.cuda.is_available():
        return {"error": "torch finds no GPU with a driver that it can use"}
    index, count = int(name.partition(":")[2]), torch.cuda.device_count()
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        return {"error": f"there is no {name} here, only {there}"}
    try:
        return {
            "title": f"{name} {torch.cuda.get_device_name(index)}",
            "memory_bytes": torch.cuda.mem_get_info(index)[0],
            "gflops": round(_gflops(torch, name), 3),
        }
    except RuntimeError as error:  # taken by others, too old for this torch, ...
        return {"error": f"{name} cannot be used: {str(error).splitlines()[0]}"}


def _gflops(torch: Any, name: str) -> float:
    """The best of the repetitions that fit into `SECONDS`, as for a CPU."""
    a = torch.full((SIZE, SIZE), 0.5, device=name)
    best_s = float("inf")
    end = time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end or best_s == float("inf"):
        torch.matmul(a, a)
        torch.cuda.synchronize(name)
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * SIZE**3 / best_s / 1e9


if __name__ == "__main__":
    import torch

    sys.stdout.write(json.dumps(inspect(torch, sys.argv[1])) + "\n")
