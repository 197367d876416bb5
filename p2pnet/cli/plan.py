"""`p2pnet plan`: where a network's VNodes would go, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from p2pnet.cli.options import client_options, connect, print_json
from p2pnet.errors import UsageError

PLAN_TIMEOUT_S = 60.0
_ROWS_MAX = 20  # of what was rejected, for people


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option(
    "--batch-size", type=click.IntRange(1, 1024), default=32, show_default=True,
    help="Of the steps whose time is foretold.",
)  # fmt: skip
@client_options
def plan(
    spec: Path, batch_size: int, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool
) -> None:
    """Show where a network's VNodes would go and why, placing nothing."""
    from p2pnet.orchestrator.spec import load_spec
    from p2pnet.v1 import control_pb2

    graph = load_spec(spec)
    request = control_pb2.PlanRequest(graph=graph.to_json(), batch_size=batch_size)
    with connect(data_dir, bootstrap) as client:
        reply = client.run(
            client.session.control("Plan", request, control_pb2.PlanReply, PLAN_TIMEOUT_S)
        )
    found: dict[str, Any] = json.loads(reply.json)
    if as_json:
        print_json(found)
    if "error" in found:
        raise UsageError(f"{graph.name} cannot be placed: {found['error']}")
    if not as_json:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from p2pnet.units import format_size

    # Plain lines rather than a table that fits the terminal: ids are there to be copied.
    line = "{:16}  {:52}  {:>9}  {:>9}  {:>9}  {}"
    click.echo(line.format("VNode", "Peer", "Memory", "Step", "Score", "Group").rstrip())
    for row in found["placements"]:
        memory = format_size(row["memory_bytes"])
        step, score = f"{row['step_ms']:.1f} ms", f"{row['score']:.1f} ms"
        click.echo(
            line.format(row["vnode"], row["peer_id"], memory, step, score, row["group"]).rstrip()
        )
    predicted, edge = found["predicted"], found["predicted"]["slowest_edge"]
    host = predicted["slowest_host"]
    far = f", {edge['ms']:.0f} ms between {edge['from']} and {edge['to']}" if edge else ""
    click.echo(
        f"A step of {found['batch_size']} samples would take about {predicted['step_ms']:.0f} ms "
        f"({predicted['samples_per_s']:.0f} samples/s), {host['ms']:.0f} ms of it on "
        f"{host['peer_id']}{far}."
    )
    for row in found["rejected"][:_ROWS_MAX]:
        what = row["vnode"] or "nothing"
        click.echo(f"not on {row['peer_id']}: {what}, {row['reason']}")
    if len(found["rejected"]) > _ROWS_MAX:
        click.echo(f"... and {len(found['rejected']) - _ROWS_MAX} more, which --json shows")
    for warning in found["warnings"]:
        click.secho(f"Warning: {warning['text']}.", fg="yellow")
