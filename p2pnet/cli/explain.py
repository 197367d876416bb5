"""`p2pnet explain`: why VNodes are where they are, by the network's signed log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from p2pnet.cli.options import client_options, connect, print_json

_MOVES_SHOWN = 6
_WIDTH = 160


@click.command()
@click.argument("name", metavar="NETWORK[/VNODE]")
@client_options
def explain(name: str, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Show who placed a network's VNodes where, when and why, and what was committed."""
    from p2pnet.client.explain import explain as ask

    with connect(data_dir, bootstrap) as client:
        shown = client.run(ask(client.session, name))
    if as_json:
        print_json(shown)
        return
    _print_table(shown)
    if "vnode" in shown:
        _print_now(shown)


def _print_table(shown: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    of_vnode = "vnode" in shown
    title = f"{shown['name']}/{shown['vnode']}" if of_vnode else shown["name"]
    table = Table(title=f"{title} ({shown['network_id']})", title_justify="left")
    for head in ("Slot", "Entry", "Epoch", "Decided by", "Signed"):
        table.add_column(head, no_wrap=True)
    for head in ("Host" if of_vnode else "What", "Why", "Committed" if of_vnode else ""):
        if head:
            table.add_column(head)
    for row in shown["history"]:
        said = [
            str(row["slot"]),
            row["kind"],
            "" if row["epoch"] is None else str(row["epoch"]),
            _peer(row["orchestrator"]),
            "yes" if row["signature_ok"] else "NO",
            _host(row) if of_vnode else _what(row),
            row["reason"] if row["counts"] else f"does not count: {row['void']}",
        ]
        if of_vnode:
            said.append(_steps(row["commits"]))
        table.add_row(*(Text(_printable(word)) for word in said))
    # On a terminal as wide as that; elsewhere nothing has to be cut off.
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def _print_now(shown: dict[str, Any]) -> None:
    now = shown["now"]
    if now["host"] is None:
        click.echo("Now: the DHT does not know where it lives.")
    else:
        click.echo(
            f"Now: on {now['host']}, epoch {now['epoch']}, for {now['expires_in_s']:.0f} s more."
        )
    if now["committed_step"] is None:
        click.echo("Nothing is committed yet.")
    else:
        state = now["state_digest"] or "unknown"
        click.echo(f"Last commit: step {now['committed_step']}, state {state}.")


def _host(row: dict[str, Any]) -> str:
    if row["kind"] != "claim":
        return ""
    if row["host"] is None:
        return "not said"
    return _peer(row["host"]) + (f", from {_peer(row['from'])}" if row["from"] else "")


def _what(row: dict[str, Any]) -> str:
    if row["kind"] == "commit":
        return f"step {row['step']}"
    if row["kind"] != "claim":
        return "the end"
    moved = [f"{move['vnode']} to {_peer(move['to'])}" for move in row["moved"] if move["from"]]
    if len(moved) > _MOVES_SHOWN:
        moved[_MOVES_SHOWN:] = [f"and {len(moved) - _MOVES_SHOWN} more"]
    return f"{len(row['hosts'])} hosts" + (f"; moved {', '.join(moved)}" if moved else "")


def _steps(steps: list[int]) -> str:
    if len(steps) <= 4:
        return ", ".join(str(step) for step in steps)
    return f"{steps[0]}, {steps[1]} … {steps[-1]} ({len(steps)} commits)"


def _peer(peer_id: str | None) -> str:
    from p2pnet.keys import short

    return "" if peer_id is None else short(peer_id)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
