"""Shell: a network's log in a directory (DESIGN D6).

Entry n is the file `<network id>/<n as 8 digits>.entry`, a serialized Signed. It is
written to a temporary file and synced, and then gets its name by `os.link`, which
fails where the name is taken: that is the compare-and-set. Works on any file
system with hard links, shared ones too. Methods block: call them in a worker thread.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

from p2pnet.datadir import sync_folder
from p2pnet.dht.manifest import check_network_id, is_network_id
from p2pnet.errors import LocalError, ResourceError
from p2pnet.log.entry import parse_entry
from p2pnet.log.stored import SLOT_MAX, STORED_BYTES_MAX, name_of, open_stored
from p2pnet.v1 import common_pb2

_NAME = re.compile(r"(\d{8})\.entry")


class DirectoryLog:
    """The logs of any number of networks under one directory, which is made if need be."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def append(self, signed: common_pb2.Signed, slot: int) -> common_pb2.Signed:
        """Puts an entry into its slot; returns the entry that is there now, ours or another's.

        It is on disk when this returns. Whether it counts is `History`'s to say.

        Raises:
            MalformedError: not an entry for that slot.
            LocalError: the slot before is empty, or the winner's file is damaged.
            ResourceError: the directory cannot be written.
        """
        entry = parse_entry(signed)
        if entry.slot != slot or slot > SLOT_MAX:
            raise LocalError(f"a log entry for slot {entry.slot} was to be put into slot {slot}")
        folder = self._root / entry.network_id
        path = _path(folder, slot)
        try:
            if slot > 1 and not _path(folder, slot - 1).exists():
                raise LocalError(f"slot {slot} of the log in {folder} comes after an empty one")
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                sync_folder(folder.parent)
            won = _create(path, signed.SerializeToString(deterministic=True))
            # The loser too: what it reports must not vanish with the winner's power cut.
            sync_folder(folder)
        except OSError as error:
            raise _cannot("write", path, error) from error
        return signed if won else _load(path, entry.network_id, slot)

    def networks(self) -> list[str]:
        """The networks that have a log here; raises ResourceError."""
        try:
            names = os.listdir(self._root)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _cannot("read", self._root, error) from error
        return sorted(name for name in names if is_network_id(name))

    def read(self, network_id: str, from_slot: int = 1) -> list[common_pb2.Signed]:
        """The entries from a slot on, in order; empty where there are none.

        Raises:
            MalformedError: not a network id.
            LocalError: a file is missing or damaged, and which.
            ResourceError: the directory cannot be read.
        """
        check_network_id(network_id)
        folder = self._root / network_id
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _cannot("read", folder, error) from error
        slots = sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))
        for expected, slot in enumerate(slots, start=1):
            if slot != expected:
                raise LocalError(f"the log is damaged: {_path(folder, expected)} is missing")
        return [
            _load(_path(folder, slot), network_id, slot) for slot in slots[max(1, from_slot) - 1 :]
        ]


def _path(folder: Path, slot: int) -> Path:
    return folder / name_of(slot)


def _create(path: Path, data: bytes) -> bool:
    """Whether the file is ours: it appears whole, or not at all where there is one."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # signed, not secret: others on a shared disk read it
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            # NFS may have done it and lost the answer: then both names are one file.
            return os.path.samefile(temporary, path)
        return True
    finally:
        os.unlink(temporary)


def _load(path: Path, network_id: str, slot: int) -> common_pb2.Signed:
    try:
        with path.open("rb") as file:
            data = file.read(STORED_BYTES_MAX + 1)
    except OSError as error:
        raise _cannot("read", path, error) from error
    return open_stored(data, network_id, slot, str(path))


def _cannot(verb: str, path: Path, error: OSError) -> LocalError:
    hint = ""
    if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
        hint = ": its file system may lack hard links"
    return ResourceError(f"cannot {verb} the log at {path}: {error.strerror}{hint}")
