"""`python -m benchmarks`: see docs/benchmarks.md and docs/performance.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import dht
from benchmarks.runtime import plot
from benchmarks.runtime import run as runtime
from benchmarks.systems import ALL, HIVEMIND, P2PNET, install_hivemind

_RUNTIME = "runtime"
_DHT_ROUNDS, _RUNTIME_ROUNDS = 2, 3  # these are shorter
_PLOTTED = "delays"  # the row that has a picture


def main() -> None:
    """Measures, prints tables, and writes JSON where asked to."""
    options = _options()
    console = Console(stderr=options.json == Path("-"), width=None if sys.stdout.isatty() else 160)
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends our processes
    systems = [system for system in ALL if system.name in options.only]
    rows = [name for name in runtime.ROWS if {name, _RUNTIME} & set(options.only)]
    notes: dict[str, str] = {}  # what was not measured, and why
    if (HIVEMIND in systems or rows) and (why := install_hivemind()):
        notes[HIVEMIND.name] = why
        systems = [system for system in systems if system is not HIVEMIND]
        console.print(f"hivemind: {why}", style="yellow", highlight=False)
    figures: dict[str, Any] = {}

    def say(what: str) -> None:
        console.print(f"{what} ...", style="dim", highlight=False)

    # /tmp: the data dirs hold sockets, whose paths have to be short.
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as temporary:
        if systems:
            figures |= dht.run(
                console,
                systems,
                options.rounds or _DHT_ROUNDS,
                Path(temporary),
                notes,
                quick=options.quick,
                long=options.long,
                say=say,
            )
        if rows:
            figures[_RUNTIME] = runtime.run(
                console,
                rows,
                1 if options.quick else options.rounds or _RUNTIME_ROUNDS,
                Path(temporary),
                hivemind=HIVEMIND.name not in notes,
                say=say,
            )
    if options.plot and _PLOTTED in rows:
        plot.plot(figures[_RUNTIME][_PLOTTED], options.plot)
    machine = (
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    console.print(f"{machine}; {time.perf_counter() - began:.0f} s in all", style="dim")
    if options.json:
        _write(options.json, {"machine": machine, "notes": notes, **figures})


def _options() -> argparse.Namespace:
    names = [*(system.name for system in ALL), _RUNTIME, *runtime.ROWS]
    parser = argparse.ArgumentParser(prog="make bench ARGS='...'", description=main.__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="p2pnet and hivemind, one small round; 5 minutes")
    add("--long", action="store_true", help="also the simulations that take half an hour")
    add("--rounds", type=int, help="of each system (default 2; of the runtime 3)")
    add(
        "--only",
        choices=names,
        action="append",
        metavar="NAME",
        help=f"one system's DHT, {_RUNTIME}, or a row of that, or several: {', '.join(names)}",
    )
    add("--json", type=Path, metavar="FILE", help="every figure and sample; - for stdout")
    add("--plot", type=Path, metavar="FILE", help="chain against local over delays, as a picture")
    options = parser.parse_args()
    if not options.only:
        some = (P2PNET, HIVEMIND) if options.quick else ALL
        options.only = [*(system.name for system in some), _RUNTIME]
    return options


def _write(file: Path, figures: dict[str, Any]) -> None:
    text = json.dumps(figures, indent=1) + "\n"
    if file == Path("-"):
        sys.stdout.write(text)
    else:
        file.write_text(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
