"""Options that several verbs share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p2pnet.datadir import default_data_dir
from p2pnet.errors import UsageError

if TYPE_CHECKING:
    from p2pnet.client import Client

F = TypeVar("F", bound=Callable[..., Any])


class Debug:
    """Whether --debug was given."""

    on = False


class Swarm:
    """Whose DHT a client asks, where --kad-protocol says."""

    kad_protocol: str | None = None


def _keep_kad_protocol(_: click.Context, __: click.Parameter, value: str | None) -> None:
    Swarm.kad_protocol = value


class Parsed(click.ParamType[Any]):
    """What `parse` makes of the text; it raises UsageError. `name`: what it is."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        """See click."""
        try:
            return self._parse(value) if isinstance(value, str) else value
        except UsageError as error:
            self.fail(str(error), param, context)


def data_dir_option(command: F) -> F:
    """--data-dir."""
    return click.option(
        "--data-dir",
        type=click.Path(file_okay=False, path_type=Path),
        default=default_data_dir,
        show_default="$P2PNET_DATA_DIR or ~/.p2pnet",
        help="The node's directory.",
    )(command)


def client_options(command: F) -> F:
    """What every verb that asks a network takes."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    command = click.option(
        "--kad-protocol",
        envvar="P2PNET_KAD_PROTOCOL",
        metavar="ID",
        expose_value=False,
        callback=_keep_kad_protocol,
        help="With --bootstrap: the protocol id of that swarm's DHT, where it is not the usual.",
    )(command)
    command = click.option(
        "--bootstrap",
        multiple=True,
        metavar="FILE|MULTIADDR",
        help="Ask through these peers instead of a local node.",
    )(command)
    return data_dir_option(command)


def connect(data_dir: Path, bootstrap: tuple[str, ...]) -> Client:
    """A client, for a `with`."""
    from p2pnet.client import Client

    return Client(bootstrap, data_dir=data_dir, kad_protocol=Swarm.kad_protocol)


def print_json(value: Any) -> None:
    """One JSON value on one line."""
    click.echo(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for: a loss may run away."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value
