"""Where a node starts from: bootstrap lists, and single multiaddrs. Pure but for reading files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from p2pnet.errors import MalformedError, UsageError
from p2pnet.net.multiaddr import parse

LIST_BYTES_MAX = 1 << 20
ADDRS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Multiaddrs (each with /p2p/PEER at its end) and what was wrong with the rest."""

    addrs: tuple[str, ...]
    problems: tuple[str, ...] = ()


def parse_list(text: str, name: str) -> Bootstrap:
    """One multiaddr a line, # comments; a broken line is named and left out."""
    addrs: list[str] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        addr = line.split("#", 1)[0].strip()
        if not addr:
            continue
        try:
            check(addr)
        except MalformedError as error:
            problems.append(f"{name}, line {number}: {error}; the line is left out")
            continue
        if addr not in addrs:
            addrs.append(addr)
    return Bootstrap(tuple(addrs[:ADDRS_MAX]), tuple(problems))


def check(addr: str) -> None:
    """Raises MalformedError unless `addr` is a TCP multiaddr that names its peer."""
    if not parse(addr).peer_id:
        raise MalformedError(f"{addr!r} does not say which peer is there: /p2p/PEER_ID is missing")


def read(source: str) -> Bootstrap:
    """A multiaddr, or the path of a list.

    Raises:
        UsageError: neither.
    """
    if source.startswith(("/ip", "/dns")):
        try:
            check(source)
        except MalformedError as error:
            raise UsageError(f"--bootstrap {source}: {error}") from None
        return Bootstrap((source,))
    path = Path(source).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(LIST_BYTES_MAX + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(
            f"--bootstrap {source}: neither a multiaddr (/ip4/…/tcp/…/p2p/…) nor a file that "
            f"can be read ({reason})"
        ) from None
    if len(data) > LIST_BYTES_MAX:
        raise UsageError(f"--bootstrap {source}: a list has at most {LIST_BYTES_MAX} bytes")
    return parse_list(text, source)


def read_all(sources: Sequence[str]) -> Bootstrap:
    """Several of them, or, where none is given, `$P2PNET_BOOTSTRAP`, or the packaged list."""
    given = list(sources) or [s for s in os.environ.get("P2PNET_BOOTSTRAP", "").split(",") if s]
    if given:
        parts = [read(source) for source in given]
    else:
        packaged = resources.files("p2pnet").joinpath("bootstrap_peers.txt")
        parts = [parse_list(packaged.read_text(), "bootstrap_peers.txt")]
    addrs = dict.fromkeys(addr for part in parts for addr in part.addrs)
    problems = tuple(problem for part in parts for problem in part.problems)
    return Bootstrap(tuple(addrs)[:ADDRS_MAX], problems)
