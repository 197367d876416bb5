"""`p2pnet service`: which networks a p2p network serves, signed by its governors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from p2pnet.cli.options import client_options, connect, data_dir_option, print_json
from p2pnet.errors import UsageError

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group()
def service() -> None:
    """Say which networks are served: make a list, sign it, publish it, look at it."""


@service.command()
@click.option("--key", "file", type=_FILE, help="The file. Default: `governor` in --data-dir.")
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def key(file: Path | None, data_dir: Path, as_json: bool) -> None:
    """Show a governor's public key, making the key where there is none."""
    from p2pnet.net import identity

    path = _key_file(file, data_dir)
    governor = identity.load_or_create(path).peer_id
    if as_json:
        print_json({"governor": governor, "file": str(path)})
    else:
        click.echo(f"{governor}\nThe key is in {path}: keep it safe, and a copy of it elsewhere.")


@service.command()
@click.argument("file", type=_FILE)
@click.option("--name", required=True)
@click.option("--threshold", type=click.IntRange(1), required=True, help="How many have to sign.")
@click.option("--governor", "governors", multiple=True, required=True, metavar="KEY")
@click.option("--network", "networks", multiple=True, metavar="ID", help="One that is served.")
@click.option("--owner", "owners", multiple=True, metavar="KEY", help="All of whose are served.")
@click.option("--version", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def new(
    file: Path,
    name: str,
    threshold: int,
    governors: tuple[str, ...],
    networks: tuple[str, ...],
    owners: tuple[str, ...],
    version: int,
    as_json: bool,
) -> None:
    """Write a list of what is served, for governors to sign. Each one replaces the last."""
    from p2pnet import service_file
    from p2pnet.clock import wall_ms
    from p2pnet.dht.service import make_payload, open_draft
    from p2pnet.errors import MalformedError
    from p2pnet.v1.records_pb2 import SignedService

    if file.exists():
        raise UsageError(f"{file} is there already: take it away, or write to another file")
    try:
        payload = make_payload(
            name,
            threshold,
            [service_file.public_key_of(governor) for governor in governors],
            version=version,
            networks=networks,
            owners=[service_file.public_key_of(owner) for owner in owners],
            issued_at_ms=wall_ms(),
        )
    except MalformedError as error:
        raise UsageError(f"such a service cannot be: {error}") from None
    signed = SignedService(payload=payload)
    service_file.write(file, signed)
    _show(service_file.to_json(open_draft(signed)), as_json)


@service.command()
@click.argument("file", type=_FILE)
@click.option("--key", "key_file", type=_FILE, help="Default: `governor` in --data-dir.")
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sign(file: Path, key_file: Path | None, data_dir: Path, as_json: bool) -> None:
    """Add a governor's signature to a file. Needs no network."""
    from p2pnet import service_file
    from p2pnet.dht.service import open_draft
    from p2pnet.net import identity

    path = _key_file(key_file, data_dir)
    if not path.is_file():
        raise UsageError(f"there is no key {path}: make one with `p2pnet service key`")
    signed = service_file.with_signature(service_file.read(file), identity.load_or_create(path))
    service_file.write(file, signed)
    _show(service_file.to_json(open_draft(signed)), as_json)


@service.command()
@click.argument("file", type=_FILE)
@client_options
def publish(file: Path, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Tell the network, once enough governors have signed."""
    from p2pnet import service_file
    from p2pnet.client import service as ask
    from p2pnet.dht.service import missing, open_draft

    signed = service_file.read(file)
    draft = open_draft(signed)
    if len(draft.signers) < draft.threshold:
        raise UsageError(f"{file} cannot be published yet: {missing(draft)}")
    with connect(data_dir, bootstrap) as client:
        published = client.run(ask.publish(client.session, signed))
    _show(published, as_json)


@service.command()
@click.argument("what", metavar="[ID|FILE]", default="")
@client_options
def show(what: str, data_dir: Path, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Show a service: of a file, by its id, or what the local node serves."""
    from p2pnet import service_file
    from p2pnet.client import service as ask
    from p2pnet.dht.service import open_draft

    if what and Path(what).is_file():
        _show(service_file.to_json(open_draft(service_file.read(Path(what)))), as_json)
        return
    pin = service_file.read_pin(what) if what else None
    with connect(data_dir, bootstrap) as client:
        if pin is not None:
            shown = client.run(ask.find(client.session, pin.service_id))
        else:
            shown = ask.check_open(client.run(ask.pinned(client.session)))
    _show(shown, as_json)


def _key_file(file: Path | None, data_dir: Path) -> Path:
    return data_dir / "governor" if file is None else file


def _show(shown: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(shown)
        return
    if not shown["version"]:
        click.echo(f"The service {shown['id']}, whose manifest is not found yet.")
        return
    click.echo(f"The service {shown['name']} ({shown['id']}), version {shown['version']}")
    enough = "enough" if shown["valid"] else "not enough yet"
    click.echo(
        f"  signed by {len(shown['signatures'])} of its {len(shown['governors'])} governors, "
        f"{shown['threshold']} have to: {enough}"
    )
    for governor in shown["governors"]:
        mark = "signed" if governor in shown["signatures"] else ""
        click.echo(f"  governor  {governor}  {mark}".rstrip())
    for network_id in shown["networks"]:
        click.echo(f"  network   {network_id}")
    for owner in shown["owners"]:
        click.echo(f"  owner     {owner}")
