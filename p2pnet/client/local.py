"""A shell: where a client finds a node; the one that runs here, or one of its own.

With `--bootstrap` the client starts a node in its own process that listens
nowhere, hosts nothing and is no member, and talks to it as to any other.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2pnet.bootstrap import read_all
from p2pnet.datadir import DataDir
from p2pnet.errors import LocalError, UsageError, root_of

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0


@contextmanager
def control_socket(
    data_dir: Path, bootstrap: tuple[str, ...], kad_protocol: str | None = None
) -> Iterator[Path]:
    """The control socket of a node that answers while the block runs.

    Raises:
        UsageError: no node runs in `data_dir`, or the bootstrap list is empty.
    """
    if not bootstrap:
        yield DataDir(data_dir).socket()
        return
    peers = read_all(bootstrap)
    if not peers.addrs:
        problem = f" ({peers.problems[0]})" if peers.problems else ""
        raise UsageError(f"there is no peer in {', '.join(bootstrap)} to start from{problem}")
    for problem in peers.problems:
        logger.warning("%s", problem)
    with (
        tempfile.TemporaryDirectory(prefix="p2pnet-client-") as directory,
        _node_of_our_own(Path(directory), peers.addrs, kad_protocol) as socket,
    ):
        yield socket


@contextmanager
def _node_of_our_own(
    data_dir: Path, addrs: tuple[str, ...], kad_protocol: str | None
) -> Iterator[Path]:
    import trio

    from p2pnet.dht.wire import KAD_PROTOCOL
    from p2pnet.node import NodeConfig, NodeInfo, run_node

    ready = threading.Event()
    found: list[NodeInfo] = []
    failed: list[BaseException] = []
    handle: list[tuple[trio.lowlevel.TrioToken, trio.Event]] = []

    def on_ready(info: NodeInfo) -> None:
        found.append(info)
        ready.set()

    async def main() -> None:
        stop = trio.Event()
        handle.append((trio.lowlevel.current_trio_token(), stop))
        config = NodeConfig(
            data_dir=data_dir,
            listen=(),
            bootstrap=addrs,
            kad_protocol=kad_protocol or KAD_PROTOCOL,
        )
        await run_node(config, on_ready=on_ready, stop=stop)

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="p2pnet-client", daemon=True)
    thread.start()
    try:
        if not ready.wait(START_TIMEOUT_S) or not found:
            reason = str(root_of(failed[0])) if failed else f"not within {START_TIMEOUT_S:g} s"
            raise LocalError(f"the client could not start: {reason}")
        yield found[0].socket
    finally:
        if handle and thread.is_alive():
            token, stop = handle[0]
            try:
                trio.from_thread.run_sync(stop.set, trio_token=token)
            except trio.RunFinishedError:
                pass
            thread.join(STOP_TIMEOUT_S)
