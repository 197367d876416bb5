"""The verbs for networks: submit, train, infer, export, cancel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pnet.cli.options import Parsed, client_options, connect, print_json
from p2pnet.errors import UsageError
from p2pnet.units import parse_duration

if TYPE_CHECKING:
    from p2pnet.vnode.graph import CompiledGraph
    from p2pnet.vnode.tensors import Array


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--orchestrator", default="", metavar="PEER", help="Who looks after it at first.")
@click.option(
    "--allow", multiple=True, metavar="PEER",
    help="Only this peer may ever look after it; repeat it for several. By default anybody may.",
)  # fmt: skip
@click.option(
    "--hosts-max", type=click.IntRange(1), default=None, metavar="N",
    help="Place it on at most so many peers at a time.",
)  # fmt: skip
@click.option(
    "--claims-max", type=click.IntRange(1), default=None, metavar="N",
    help="Let it be placed at most so often over its life.",
)  # fmt: skip
@click.option(
    "--expires", type=Parsed("duration", parse_duration), default=0.0, metavar="DURATION",
    show_default="never",
    help="Have nobody take it on any more after so long, for example 30d.",
)  # fmt: skip
@client_options
def submit(
    spec: Path,
    orchestrator: str,
    allow: tuple[str, ...],
    hosts_max: int | None,
    claims_max: int | None,
    expires: float,
    data_dir: Path,
    bootstrap: tuple[str, ...],
    as_json: bool,
) -> None:
    """Submit a network (a YAML spec) and wait until it is placed."""
    from p2pnet.orchestrator.spec import load_spec

    graph = load_spec(spec)  # what is wrong with it is said before anybody is asked
    with connect(data_dir, bootstrap) as client:
        network = client.submit(
            spec,
            orchestrator=orchestrator,
            allow=allow,
            hosts_max=hosts_max or 0,
            claims_max=claims_max or 0,
            expires_in_s=expires,
        )
    info = network.info
    if as_json:
        print_json(
            {
                "network_id": info.network_id,
                "name": info.name,
                "vnodes": list(info.vnodes),
                "orchestrator": info.orchestrator,
            }
        )
    else:
        example = "text:FILE" if _reads_tokens(graph) else "digits:train"
        click.echo(
            f"{info.name} ({info.network_id}) is placed: {len(info.vnodes)} VNodes. "
            f"Train it with `p2pnet train {info.name} --data {example}`."
        )


@click.command()
@click.argument("name")
@click.option(
    "--data", "ref", required=True, metavar="REF",
    help="digits:train or :test; file:///path.npz or .safetensors; for a language model "
    "text:FILE, python-reference:train or :test.",
)  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True)
@click.option("--batch-size", type=click.IntRange(1, 1024), default=32, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the samples' order.")
@client_options
def train(
    name: str,
    ref: str,
    epochs: int,
    batch_size: int,
    seed: int,
    data_dir: Path,
    bootstrap: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a network that was submitted."""
    from p2pnet.data.datasets import batches

    data = _Data(ref)
    with connect(data_dir, bootstrap) as client:
        network = client.network(name)
        x, y = data.samples(network.graph)
        smallest = network.graph.micro_batches
        progress = _Progress(None if as_json else _steps(len(x), batch_size, smallest) * epochs)
        with progress:
            network.train(
                lambda epoch: batches(x, y, batch_size, seed, epoch, smallest=smallest),
                epochs=epochs,
                on_step=progress.step,
                on_epoch=print_json if as_json else progress.epoch,
                on_notice=progress.notice,
            )
        done = {
            "event": "done",
            "steps": network.status().committed_step,
            "model_digest": network.digest(),
        }
        for reason in network.recoveries:
            if not as_json:
                click.echo(f"went on after: {reason}")
    if as_json:
        print_json(done)
    else:
        click.echo(f"Done after step {done['steps']}. Model digest {done['model_digest']}.")


@click.command()
@click.argument("name")
@click.option(
    "--output", required=True, type=click.Path(dir_okay=False, path_type=Path),
    help="The .safetensors file to write.",
)  # fmt: skip
@client_options
def export(
    name: str, output: Path, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool
) -> None:
    """Write a network's weights, as of its last cut, to a file."""
    from p2pnet.client.weights import write_weights
    from p2pnet.vnode.state import model_digest

    with connect(data_dir, bootstrap) as client:
        weights = client.network(name).weights()
    write_weights(output, weights)
    digest = model_digest(weights)
    if as_json:
        print_json({"tensors": len(weights), "model_digest": digest})
    else:
        click.echo(f"{len(weights)} tensors written to {output}. Model digest {digest}.")


@click.command()
@click.argument("name")
@click.option(
    "--reason", default="", metavar="TEXT", help="What others are told, up to 200 characters."
)
@client_options
def cancel(
    name: str, reason: str, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool
) -> None:
    """End a network that you submitted, for good."""
    with connect(data_dir, bootstrap) as client:
        network = client.network(name)
        network.cancel(reason)
    info = network.info
    if as_json:
        print_json({"network_id": info.network_id, "name": info.name, "closed": True})
    else:
        click.echo(
            f"{info.name} ({info.network_id}) is closed: nobody hosts or trains it any more."
        )


class _Data:
    """What `--data` names. What is wrong with it by itself is said before anybody is asked."""

    def __init__(self, ref: str) -> None:
        from p2pnet.data.corpora import is_text, open_text
        from p2pnet.data.datasets import open_data

        self._tokens = open_text(ref) if is_text(ref) else None
        self._samples = None if is_text(ref) else open_data(ref)

    def samples(self, graph: CompiledGraph) -> tuple[Array, Array]:
        """For that network; raises UsageError where it is a text and the network takes none."""
        from p2pnet.data.corpora import samples

        if self._samples is not None:
            return self._samples
        assert self._tokens is not None
        if not _reads_tokens(graph):
            raise UsageError(
                f"{graph.name} is no language model: a text needs a network with one input of "
                "tokens, int64[length]"
            )
        return samples(self._tokens, next(iter(graph.inputs.values())).shape[0])


def _reads_tokens(graph: CompiledGraph) -> bool:
    specs = list(graph.inputs.values())
    return len(specs) == 1 and specs[0].dtype == "int64" and len(specs[0].shape) == 1


def _steps(samples: int, batch_size: int, smallest: int) -> int:
    """In an epoch, where a last batch that is too small is left out."""
    whole, rest = divmod(samples, batch_size)
    return whole * (batch_size >= smallest) + (rest >= smallest)


class _Progress:
    """A progress bar on standard error, or nothing."""

    def __init__(self, steps: int | None) -> None:
        self._steps = steps
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> None:
        if self._steps is None:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._task = self._bar.add_task("training", total=self._steps)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=f"loss {loss:.4f}")

    def notice(self, text: str) -> None:
        if self._bar is None:
            click.echo(f"p2pnet: {text}", err=True)
        else:
            self._bar.console.print(f"p2pnet: {text}", highlight=False, markup=False)

    def epoch(self, row: dict[str, Any]) -> None:
        accuracy = "" if row["accuracy"] is None else f", accuracy {row['accuracy']:.4f}"
        self._bar.console.print(
            f"epoch {row['epoch']}: loss {row['loss']:.4f}{accuracy}, "
            f"{row['samples_per_s']:.0f} samples/s",
            highlight=False,
        )
