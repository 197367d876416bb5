"""A node's data dir: made private, used by one node at a time, with a socket to control it.

identity       the node's Ed25519 key, mode 0600
owner          the key that networks are submitted with, mode 0600
tls/           the gRPC certificate and its key
lock           held while a node runs
control.path   where the control socket is
peers          members met before, as their own signed adverts: to start from
records        what the DHT's other peers left here: records, marks, hints
peers.json     where there is no `peers` yet: what an older version remembered
blobs/         states of VNodes, by content
events.jsonl   what happened here; events.jsonl.1: before that
keeper/        this node's part in other networks' logs
hosting/       whose claims on networks this node has followed, a file a network
services/      the newest manifest of each service that this node was told to serve
governor       the key of a governor of a service, mode 0600, where its user is one
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from pathlib import Path

from p2pnet.errors import ResourceError, UsageError

# sun_path of a Unix socket holds 108 bytes on Linux and 104 on macOS and the BSDs.
SOCKET_PATH_BYTES_MAX = 100
PEERS_KEPT = 100
_PEERS_FILE_BYTES_MAX = 1 << 20


def default_data_dir() -> Path:
    """`$P2PNET_DATA_DIR`, or ~/.p2pnet."""
    return Path(os.environ.get("P2PNET_DATA_DIR") or Path.home() / ".p2pnet")


class DataDir:
    """One data dir. `open` takes it for a node; without that only the paths are good."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self._lock: int | None = None
        self._socket: Path | None = None

    def open(self) -> None:
        """Makes the directory, private to this user, and locks it.

        Raises:
            ResourceError: another node runs in it, or it cannot be written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ResourceError(
                f"the data dir {self.path} cannot be used ({error.strerror}): "
                "choose another one with --data-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise ResourceError(
                f"another node is running in {self.path}: stop it with `p2pnet leave "
                f"--data-dir {self.path}`, or choose another data dir with --data-dir"
            ) from None

    def close(self) -> None:
        """Gives the directory back."""
        if self._lock is not None:
            (self.path / "control.path").unlink(missing_ok=True)
            self._remove_socket()
            os.close(self._lock)
            self._lock = None

    def _remove_socket(self) -> None:
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)
            if self._socket.parent != self.path:
                try:
                    self._socket.parent.rmdir()
                except OSError:  # somebody has put something there
                    pass
            self._socket = None

    def new_socket(self) -> Path:
        """Where the control socket of the node that has just taken this data dir goes.

        In the data dir, or, where that path is too long for a socket, in a
        private directory among the system's temporary files. `socket()` finds it.
        """
        socket = self.path / "control.sock"
        if len(os.fsencode(socket)) > SOCKET_PATH_BYTES_MAX:
            name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
            private = Path(tempfile.gettempdir()) / f"p2pnet-{os.getuid()}-{name}"
            private.mkdir(mode=0o700, exist_ok=True)
            status = private.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise ResourceError(f"{private} belongs to somebody else: take it away")
            socket = private / "control.sock"
        socket.unlink(missing_ok=True)
        self._socket = socket
        write_whole(self.path / "control.path", str(socket).encode())
        return socket

    def socket(self) -> Path:
        """The control socket of the node that runs in this data dir.

        Raises:
            UsageError: no node runs here.
        """
        try:
            return Path((self.path / "control.path").read_text())
        except OSError:
            raise UsageError(
                f"no node is running in {self.path}: start one with `p2pnet join`, or say which "
                "with --data-dir; most verbs can do without, with --bootstrap FILE or MULTIADDR"
            ) from None

    def remembered_peers(self) -> list[str]:
        """What an older version remembered: multiaddrs with /p2p/."""
        file = self.path / "peers.json"
        try:
            if file.stat().st_size > _PEERS_FILE_BYTES_MAX:
                return []
            peers = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError):  # only a hint: a node starts without it
            return []
        if not isinstance(peers, list):
            return []
        return [peer for peer in peers if isinstance(peer, str)][:PEERS_KEPT]


def read_whole(path: Path, size_bytes_max: int) -> bytes | None:
    """What is in a file, None where there is none.

    Raises:
        ResourceError: it cannot be read, or is longer than it can be.
    """
    try:
        with path.open("rb") as file:
            data = file.read(size_bytes_max + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > size_bytes_max:
        raise ResourceError(f"{path} has over {size_bytes_max} bytes: it is none of ours")
    return data


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlast a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file so that readers see all of the old or all of the new, after a crash too.

    Raises:
        ResourceError: it cannot be written (a full disk, say).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a broken disk this fails, too
            temporary.unlink(missing_ok=True)
        raise ResourceError(f"{path} cannot be written: {error.strerror}") from error
