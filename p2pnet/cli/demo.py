"""`p2pnet demo`: the main job in one command."""

from __future__ import annotations

import sys
from typing import Any

import click

from p2pnet.cli.options import print_json


@click.command()
@click.option("--nodes", type=click.IntRange(3, 32), default=5, show_default=True)
@click.option("--no-kill", is_flag=True, help="Spare the nodes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def demo(nodes: int, no_kill: bool, as_json: bool) -> None:
    """Train a network on real handwritten digits in a swarm of processes, and kill three."""
    if nodes < 5 and not no_kill:
        raise click.UsageError("with fewer than 5 nodes there are too few left after three kills: "
                               "add --no-kill")  # fmt: skip
    from p2pnet.demo import run_demo

    with _Screen(as_json) as screen:
        result = run_demo(nodes, not no_kill, screen)
    if as_json:
        print_json(result)
        return
    click.echo("")
    click.echo("Where each VNode lives, as the DHT says:")
    for row in result["vnodes"]:
        click.echo(f"  {row['vnode']:6} {row['peer_id']}  epoch {row['epoch']}")
    if result["relocations"]:
        click.echo("Relocated:")
    for move in result["relocations"]:  # how long they took only who orchestrated then knew
        click.echo(
            f"  {move['vnode']:6} …{move['from'][-8:]} -> …{move['to'][-8:]} ({move['reason']})"
        )
    for kill in result["killed"]:
        click.echo(
            f"Killed: …{kill['peer_id'][-8:]}, {kill['what']}: the next step was decided "
            f"{kill['seconds']:.1f} s later"
        )
    click.echo("Phases: " + ", ".join(f"{name} {s:.1f} s" for name, s in screen.phases))
    click.echo(f"Model digest {result['model_digest']}, bit for bit that of plain torch.")
    click.echo(
        f"Test accuracy {result['accuracy']:.4f} after {result['steps']} steps and "
        f"{len(result['killed'])} kills, {result['seconds']:.0f} s in all."
    )


class _Screen:
    """Progress for people on standard error; for scripts a JSON line an event on stdout."""

    def __init__(self, as_json: bool) -> None:
        self.phases: list[tuple[str, float]] = []
        self._json = as_json
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Screen:
        if not self._json:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """See `demo.Reporter`."""
        if self._json:
            print_json({"event": "said", "text": text})
            sys.stdout.flush()
        else:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def phase(self, name: str, seconds: float) -> None:
        """See `demo.Reporter`."""
        self.phases.append((name, seconds))
        if self._json:
            print_json({"event": "phase", "name": name, "seconds": round(seconds, 2)})
            sys.stdout.flush()
        else:
            self.say(f"✓ {name} ({seconds:.1f} s)")

    def steps(self, done: int, of: int, loss: float) -> None:
        """See `demo.Reporter`."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("training", total=of)
            self._bar.update(self._task, completed=done, description=f"loss {loss:.4f}")
