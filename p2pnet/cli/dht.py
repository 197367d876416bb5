"""`p2pnet dht`: what the DHT says, asked directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from p2pnet.cli.options import client_options, connect, print_json


@click.group()
def dht() -> None:
    """Look into the DHT: peers, records, providers."""


@dht.command("find-peer")
@click.argument("peer_id")
@client_options
def find_peer(peer_id: str, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Show where a peer may be reached."""
    from p2pnet.client import dht as ask

    with connect(data_dir, bootstrap) as client:
        found = client.run(ask.find_peer(client.session, peer_id))
    if as_json:
        print_json(found)
        return
    _print_peer(found)


@dht.command()
@click.argument("key", metavar="NAME|NAME/VNODE|CID")
@client_options
def get(key: str, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Show the records under a key: of a network, of a VNode, or of a CID."""
    from p2pnet.client import dht as ask

    with connect(data_dir, bootstrap) as client:
        records = client.run(ask.get(client.session, key))
    if as_json:
        print_json(records)
        return
    for record in records:
        click.echo(
            f"{record['kind']} by {record['author']}, epoch {record['epoch']}, sequence "
            f"{record['sequence']}, {record['age_s']:.0f} s old, for {record['expires_in_s']:.0f} s"
        )
        for name, value in record["content"].items():
            click.echo(f"    {name:12}  {_for_people(value)}")


@dht.command()
@click.argument("key", metavar="CID|NAME/VNODE")
@client_options
def providers(key: str, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Show who says that it provides a CID, or hosts a VNode: hints, which nobody signed."""
    from p2pnet.client import dht as ask

    with connect(data_dir, bootstrap) as client:
        peers = client.run(ask.providers(client.session, key))
    if as_json:
        print_json(peers)
        return
    if not peers:
        click.echo(f"Nobody says that it provides {key}.")
    for peer in peers:
        _print_peer(peer)


@dht.command()
@client_options
def stats(data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Show counts of the node's own part in the DHT."""
    from p2pnet.client import dht as ask

    with connect(data_dir, bootstrap) as client:
        counts = client.run(ask.stats(client.session))
    if as_json:
        print_json(counts)
        return
    for name, count in counts.items():
        click.echo(f"{_words(name):24}  {_amount(name, count)}")


def _print_peer(peer: dict[str, Any]) -> None:
    """Multiaddrs that can be copied to where a peer to start from is asked for."""
    click.echo(peer["peer_id"])
    for addr in peer["addrs"]:
        click.echo(f"    {addr}/p2p/{peer['peer_id']}")
    if not peer["addrs"]:
        click.echo("    at no address that anybody knows")


def _for_people(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _words(name: str) -> str:
    return name.removesuffix("_bytes").removesuffix("_s").replace("_", " ").capitalize()


def _amount(name: str, count: float | None) -> str:
    from p2pnet.units import format_size

    if count is None:
        return "not known yet"
    if name.endswith("_bytes"):
        return format_size(count)
    return f"{count * 1000:.1f} ms" if name.endswith("_s") else f"{count:g}"
