"""The verb infer: a network's outputs for a file of samples."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import click

from p2pnet.cli.options import client_options, connect, print_json
from p2pnet.errors import UnreachableError, UsageError

if TYPE_CHECKING:
    from p2pnet.client.inference import Missing

MISSING_SHOWN = 8


@click.command()
@click.argument("name")
@click.option(
    "--input", "sources", required=True, multiple=True, metavar="[NAME=]F.npy",
    help="A .npy file, samples first; of a network with several inputs each with its name.",
)  # fmt: skip
@click.option(
    "--output", required=True, type=click.Path(dir_okay=False, path_type=Path),
    help="The .npy file to write.",
)  # fmt: skip
@client_options
def infer(
    name: str,
    sources: tuple[str, ...],
    output: Path,
    data_dir: Path,
    bootstrap: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run a network forward on a file of samples.

    What can be had is written in any case: the rows of samples without an output are NaN,
    they are listed, and the exit code is then 1.
    """
    import numpy as np

    from p2pnet.client.batches import fitted, named
    from p2pnet.client.inference import Missing
    from p2pnet.data.arrays import write_npy

    x = _read(sources)
    missing: list[Missing] = []
    with connect(data_dir, bootstrap) as client:
        network = client.network(name)
        graph = network.graph
        given = {ref: fitted(graph, ref, array) for ref, array in named(graph, x).items()}
        samples = len(next(iter(given.values())))
        spec = graph.tensor(graph.output)
        result = np.full((samples, *spec.shape), np.nan, spec.dtype)
        started = time.monotonic()
        with _Bar(None if as_json else samples) as bar:
            for item in network.infer(given):
                if isinstance(item, Missing):
                    missing.append(item)
                    bar.advance(item.last - item.first + 1)
                else:
                    result[item.first : item.first + len(item.output)] = item.output
                    bar.advance(len(item.output))
        seconds = time.monotonic() - started
    write_npy(output, result)
    lost = sum(item.last - item.first + 1 for item in missing)
    if as_json:
        rows = [
            {
                "first": item.first,
                "last": item.last,
                "reason": item.reason,
                "vnode": item.vnode or None,
                "host": item.host or None,
            }
            for item in missing
        ]
        print_json({"shape": list(result.shape), "seconds": seconds, "missing": rows})
    else:
        for item in missing[:MISSING_SHOWN]:
            click.echo(f"p2pnet: {item}", err=True)
        click.echo(f"{samples - lost} samples in {seconds:.2f} s, written to {output}.")
    if missing:
        raise UnreachableError(
            f"{lost} of {samples} samples have no output; their rows in {output} are NaN"
        )


def _read(sources: tuple[str, ...]) -> Any:
    """One array, or arrays by name."""
    from p2pnet.data.arrays import read_npy

    if len(sources) == 1 and (Path(sources[0]).exists() or "=" not in sources[0]):
        return read_npy(Path(sources[0]))
    arrays = {}
    for source in sources:
        name, found, path = source.partition("=")
        if not found or name in arrays:
            raise UsageError(
                f"--input {source}: of several inputs each is given once, as NAME=FILE.npy"
            )
        arrays[name] = read_npy(Path(path))
    return arrays


class _Bar:
    """A progress bar on standard error, or nothing."""

    def __init__(self, samples: int | None) -> None:
        self._samples = samples
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._samples is not None:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(stderr=True)
            # Where nobody looks, an empty line would be all that is left of the bar.
            self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
            self._bar.start()
            self._task = self._bar.add_task("samples", total=self._samples)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, samples: int) -> None:
        """So many more are done."""
        if self._bar is not None:
            self._bar.advance(self._task, samples)
