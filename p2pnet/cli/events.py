"""What happened: `p2pnet events` in a node, `p2pnet trace` to a network on all nodes."""

from __future__ import annotations

import json
from pathlib import Path

import click

from p2pnet.cli.options import client_options, connect, data_dir_option, print_json
from p2pnet.errors import UsageError

_CLOCK_MS = 1000  # from which on it is said that a clock is wrong


@click.command()
@click.option("--follow", is_flag=True, help="Go on with what comes.")
@click.option(
    "--since", default="", metavar="T", help="Only what is newer: 90s, 10m, 2h, or an event's `at`."
)
@click.option("--network", default="", metavar="NAME", help="Only of this network, or its id.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON an event.")
@data_dir_option
def events(data_dir: Path, follow: bool, since: str, network: str, as_json: bool) -> None:
    """Show what happened in the local node, in causal order."""
    from p2pnet.client import trace as ask
    from p2pnet.clock import wall_ms

    try:
        after = ask.since_of(since, wall_ms())
    except UsageError as error:
        raise click.BadParameter(str(error), param_hint="--since") from None
    shown = 0

    async def show() -> None:
        nonlocal shown
        found = ask.events(client.session, follow=follow, since=after, network=network)
        async for event in found:
            told = event.to_json()
            del told["node"]
            shown += 1
            if as_json:
                print_json(told)
            elif event.event != "following":
                when = ask.time_of(event.wall_ms)
                click.echo(f"{when}  {event.event:14}  {ask.in_words(event.fields)}".rstrip())

    with connect(data_dir, ()) as client:
        client.run(show(), ask.FOLLOW_TIMEOUT_S)
    if network and not shown:
        click.echo(f"p2pnet: this node remembers nothing of a network {network!r}", err=True)


@click.command()
@click.argument("name", metavar="NETWORK")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a trace for ui.perfetto.dev or chrome://tracing.",
)
@client_options
def trace(
    name: str, output: Path | None, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool
) -> None:
    """Show what happened to a network, on all peers that took part, in causal order."""
    from p2pnet.client import trace as ask
    from p2pnet.datadir import write_whole
    from p2pnet.keys import short
    from p2pnet.perfetto import chrome_trace

    with connect(data_dir, bootstrap) as client:
        shown, timeline = client.run(ask.trace(client.session, name))
    if output is not None:
        write_whole(output, json.dumps(chrome_trace(timeline)).encode())
    if as_json:
        print_json(shown)
        return
    for row, event in zip(shown["events"], timeline.happenings, strict=True):
        click.echo(
            f"{row['ms'] / 1000:10.3f}  {short(event.node)}  {event.event:14}  "
            f"{ask.in_words(event.fields)}".rstrip()
        )
    if not timeline.happenings:
        click.echo(f"Nobody remembers anything of {shown['name']}.")
    for node, ahead in shown["clock_ahead_ms"].items():
        if abs(ahead) >= _CLOCK_MS:
            way = "ahead of" if ahead > 0 else "behind"
            click.echo(
                f"The clock of {short(node)} is {abs(ahead) / 1000:.1f} s {way} this node's."
            )
    for sentence in shown["out_of_order"]:
        click.echo(f"Not in causal order: {sentence}.")
    for peer in shown["silent"]:
        click.echo(f"{peer} did not answer: what it knows is missing.")
    if output is not None:
        click.echo(f"Wrote {output}: open it in https://ui.perfetto.dev or chrome://tracing.")
