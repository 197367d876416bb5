"""The verbs that ask: members, whereis, status; and drain and leave."""

from __future__ import annotations

import json
from pathlib import Path

import click

from p2pnet.cli.options import client_options, connect, data_dir_option, print_json

DRAIN_TIMEOUT_S = 60.0


@click.command()
@client_options
def members(data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Show who is here."""
    with connect(data_dir, bootstrap) as client:
        rows = client.members()
    if as_json:
        print_json(rows)
        return
    from p2pnet.units import format_size

    # Plain lines rather than a table that fits the terminal: ids are there to be copied.
    line = "{:52}  {:7}  {:>4}  {:>9}  {:>12}  {:>6}  {}"
    click.echo(line.format("Peer", "State", "CPUs", "Memory", "Speed", "VNodes", "Address"))
    for row in rows:
        lent = row["capabilities"]
        speed = f"{lent['matmul_gflops']:.0f} GFLOP/s" if lent["matmul_gflops"] else ""
        cpus, memory = f"{lent['cpus']:g}", format_size(lent["memory_bytes"])
        addr = row["addrs"][0] if row["addrs"] else ""
        click.echo(
            line.format(row["peer_id"], row["state"], cpus, memory, speed, row["vnodes"], addr)
        )


@click.command()
@click.argument("name", metavar="NAME[/VNODE]")
@client_options
def whereis(name: str, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Ask the DHT where a network's VNodes live."""
    name, _, vnode = name.partition("/")
    with connect(data_dir, bootstrap) as client:
        rows = client.network(name).locate(vnode or None)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(
            f"{row['vnode']:16} {row['peer_id']}  epoch {row['epoch']}, "
            f"for {row['expires_in_s']:.0f} s" + (", standby" if row["role"] == "standby" else "")
        )


@click.command()
@click.argument("name")
@client_options
def status(name: str, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Show how a network is."""
    from p2pnet.client.describe import status_json

    with connect(data_dir, bootstrap) as client:
        shown = status_json(client.network(name).status())
    if as_json:
        print_json(shown)
        return
    click.echo(
        f"{shown['name']} ({shown['network_id']}) is {shown['state']}: step {shown['step']}, "
        f"committed {shown['committed_step']}, epoch {shown['epoch']}, "
        f"orchestrator {shown['orchestrator']}"
    )
    if shown["detail"]:
        click.echo(f"  {shown['detail']}")
    parts, clip, late = shown["micro_batches"], shown["clip_norm"], shown["staleness"]
    click.echo(
        f"  learning {shown['learning']}, {parts} micro-batch{'es' if parts > 1 else ''} a step"
        + (f", gradients clipped to {clip:g}" if clip else "")
        + (f", weights up to {late} steps old" if late else "")
    )
    for vnode in shown["vnodes"]:
        click.echo(f"  {vnode['vnode']:16} {vnode['peer_id']}  step {vnode['step']}")
        for standby in vnode["standbys"]:
            click.echo(f"  {'':16} {standby}  standby")
    for move in shown["relocations"]:
        click.echo(f"  moved: {move['vnode']} to {move['to']}: {move['reason']}")


@click.command()
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def drain(data_dir: Path, as_json: bool) -> None:
    """Move everything away from the local node, which stays without hosting."""
    from p2pnet.v1 import control_pb2

    with connect(data_dir, ()) as client:
        reply = client.run(
            client.session.control(
                "Drain", control_pb2.DrainRequest(), control_pb2.DrainReply, DRAIN_TIMEOUT_S
            )
        )
    drained = json.loads(reply.json)
    if as_json:
        print_json(drained)
        return
    click.echo(f"VNodes moved away: {drained['moved']}. The node hosts nothing new from now on.")
    if drained["left"]:
        click.echo(
            f"VNodes still here: {drained['left']}, which no other peer can take, or may take as "
            "their owner says."
        )
    for name in drained["handed_over"]:
        click.echo(f"The network {name} is looked after by another peer now.")
    for name in drained["left_behind"]:
        click.echo(f"Nobody has taken over the network {name} yet; its next in rank will.")


@click.command()
@data_dir_option
def leave(data_dir: Path) -> None:
    """Have the local node move its VNodes away and leave."""
    from p2pnet.v1 import control_pb2

    with connect(data_dir, ()) as client:
        client.run(
            client.session.control("Leave", control_pb2.LeaveRequest(), control_pb2.LeaveReply)
        )
    click.echo("The node is leaving.")
