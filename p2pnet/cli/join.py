"""`p2pnet join`: runs a PNode."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from p2pnet.cli.options import Parsed, data_dir_option, print_json
from p2pnet.errors import root_of
from p2pnet.units import parse_size
from p2pnet.vnode.devices import CPU, parse_device


@click.command()
@click.option(
    "--bootstrap",
    multiple=True,
    metavar="FILE|MULTIADDR",
    help="Peers to start from; may be given several times. Default: $P2PNET_BOOTSTRAP, then the "
    "packaged list, and always the peers met before.",
)
@click.option(
    "--listen",
    multiple=True,
    metavar="MULTIADDR",
    default=("/ip4/0.0.0.0/tcp/0",),
    show_default=True,
    help="Where to listen; port 0 is any free one.",
)
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=0, help="Port for gRPC.")
@data_dir_option
@click.option(
    "--memory",
    type=Parsed("size", parse_size),
    help="Memory to lend, such as 4GiB. Default: half.",
)
@click.option("--cpus", type=click.FloatRange(0.1), help="CPUs to lend. Default: all.")
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Threads within one operation. The same on all nodes, or results differ in last bits.",
)
@click.option(
    "--device",
    type=Parsed("device", parse_device),
    default="auto",
    show_default="a GPU where torch can use one",
    help="What to compute on: auto, cpu, cuda or cuda:N.",
)
@click.option(
    "--state",
    "state_url",
    default="",
    metavar="URL",
    help="Where networks submitted here keep log and states, such as file:///mnt/shared or "
    "s3://bucket/prefix. Default: on other peers.",
)
@click.option(
    "--service",
    default="",
    metavar="FILE|ID",
    help="Host and orchestrate only the networks of this service. Default: of anybody.",
)
@click.option(
    "--kad-protocol", envvar="P2PNET_KAD_PROTOCOL", metavar="ID", help="Protocol id of the DHT."
)
@click.option("--faults", is_flag=True, hidden=True, help="Let faults be injected, for tests.")
@click.option("--until-eof", is_flag=True, hidden=True, help="Stop when standard input ends.")
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON.")
def join(
    bootstrap: tuple[str, ...],
    listen: tuple[str, ...],
    grpc_port: int,
    data_dir: Path,
    memory: int | None,
    cpus: float | None,
    threads: int,
    device: str,
    state_url: str,
    service: str,
    kad_protocol: str | None,
    faults: bool,
    until_eof: bool,
    as_json: bool,
) -> None:
    """Make this machine a PNode until Ctrl-C; then leave in good order."""
    import trio

    from p2pnet.bootstrap import read_all
    from p2pnet.data.blobs import check_state
    from p2pnet.dht.wire import KAD_PROTOCOL
    from p2pnet.keys import short
    from p2pnet.node import NodeConfig, NodeInfo, run_node
    from p2pnet.service_file import read_pin

    if state_url:
        check_state(state_url)  # what is wrong with it is said now, not at the first submission
    peers = read_all(bootstrap)
    for problem in peers.problems:
        click.echo(f"p2pnet: {problem}", err=True)
    config = NodeConfig(
        data_dir=data_dir,
        listen=listen,
        grpc_port=grpc_port,
        bootstrap=peers.addrs,
        cpus=cpus,
        threads=threads,
        device=device,
        memory_bytes=memory,
        kad_protocol=kad_protocol or KAD_PROTOCOL,
        state_url=state_url,
        service=read_pin(service) if service else None,
        faults=faults,
    )

    def on_ready(info: NodeInfo) -> None:
        if as_json:
            print_json(
                {
                    "event": "ready",
                    "peer_id": info.peer_id,
                    "addrs": list(info.addrs),
                    "grpc": info.grpc,
                    "data_dir": info.data_dir,
                    "new_network": info.starts_new_network,
                    "device": info.device,
                    "service": info.service,
                }
            )
            sys.stdout.flush()
            return
        click.echo(f"This machine is PNode {info.peer_id} ({short(info.peer_id)}).")
        if info.starts_new_network:
            click.echo("There is no peer to start from, so this is the first one of a new network.")
        if info.device != CPU:
            click.echo(f"It computes on {info.device}.")
        click.echo(_scope(info.service))
        click.echo("Others can join with:")
        for addr in info.addrs:
            click.echo(f"    p2pnet join --bootstrap {addr}")
        click.echo("See who is here with `p2pnet members`. Ctrl-C leaves.")

    async def main() -> None:
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_at_signal, stop)
            if until_eof:
                nursery.start_soon(_stop_at_eof, stop)
            await run_node(config, on_ready=on_ready, stop=stop)
            nursery.cancel_scope.cancel()

    async def _stop_at_signal(stop: trio.Event) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for number in signals:
                if stop.is_set():  # asked twice: now
                    os._exit(128 + number)
                if not as_json:
                    click.echo("Leaving… (Ctrl-C again to go at once)")
                stop.set()

    async def _stop_at_eof(stop: trio.Event) -> None:
        async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
            while await stdin.receive_some(1024):
                pass
        stop.set()

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        logging.getLogger(__name__).debug("the node stopped", exc_info=group)
        raise root_of(group) from None
    if as_json:
        print_json({"event": "left"})
    else:
        click.echo("Left.")


def _scope(service: Mapping[str, Any] | None) -> str:
    if service is None:
        return "It is open: it hosts networks of anybody. --service limits it to one service's."
    if not service["version"]:
        return (
            f"It serves only the service {service['id']}, and hosts nothing before it has found "
            "that service's manifest."
        )
    return (
        f"It serves only the service {service['name']} ({service['id']}), version "
        f"{service['version']}: {len(service['networks'])} networks, and all of "
        f"{len(service['owners'])} owners."
    )
