"""The command line: parses, asks, prints. No logic.

Nothing heavy is imported before a verb needs it, so that `--help` is instant.
"""

from __future__ import annotations

import logging
import sys

import click

from p2pnet import __version__
from p2pnet.cli.ask import drain, leave, members, status, whereis
from p2pnet.cli.demo import demo
from p2pnet.cli.dht import dht
from p2pnet.cli.events import events, trace
from p2pnet.cli.explain import explain
from p2pnet.cli.generate import generate
from p2pnet.cli.infer import infer
from p2pnet.cli.join import join
from p2pnet.cli.networks import cancel, export, submit, train
from p2pnet.cli.options import Debug
from p2pnet.cli.plan import plan
from p2pnet.cli.service import service
from p2pnet.cli.sim import sim
from p2pnet.errors import P2PNetError

_DEBUG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="p2pnet")
@click.option("--debug", is_flag=True, help="Log everything and show tracebacks.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """A volunteer network that trains and serves one community-governed neural network.

    `p2pnet join` makes this machine a part of it; `p2pnet demo` shows it all on
    this machine alone.
    """
    Debug.on = debug
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format=_DEBUG_FORMAT if debug else "p2pnet: %(message)s",
        stream=sys.stderr,
    )
    if not debug:  # libraries' warnings are not for volunteers
        for library in ("libp2p", "multiaddr", "async_service", "anyio"):
            logging.getLogger(library).setLevel(logging.CRITICAL)


for command in (
    join,
    members,
    plan,
    submit,
    whereis,
    status,
    explain,
    events,
    trace,
    train,
    infer,
    generate,
    export,
    cancel,
    drain,
    leave,
    service,
    dht,
    sim,
    demo,
):
    cli.add_command(command)


def main() -> None:
    """The entry point: one clear sentence and an exit code for whatever goes wrong."""
    try:
        cli.main(prog_name="p2pnet", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("p2pnet: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("p2pnet: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except P2PNetError as error:
        if Debug.on:
            raise
        click.echo(f"p2pnet: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        if Debug.on:
            raise
        click.echo(
            f"p2pnet: something went wrong that should not ({type(error).__name__}: {error}); "
            "the same with `p2pnet --debug …` shows where",
            err=True,
        )
        sys.exit(1)
