"""A node's identity on disk: 32 bytes that nobody else may read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from p2pnet.datadir import sync_folder
from p2pnet.errors import ResourceError
from p2pnet.keys import KeyPair

_SEED_BYTES = 32


def load_or_create(path: Path) -> KeyPair:
    """The key pair kept in `path`, which is made (mode 0600) where there is none.

    The file appears whole or not at all, and is never overwritten: two nodes
    that start at once in one directory end up with the same identity.

    Raises:
        ResourceError: the file cannot be read, written or trusted; says what to do.
    """
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    try:
        _create(path)
        return _load(path)
    except OSError as error:
        raise ResourceError(
            f"cannot keep this node's identity in {path}: {error.strerror}; "
            "choose another data directory, or make that one writable"
        ) from error


def _load(path: Path) -> KeyPair:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            seed = file.read(_SEED_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ResourceError(
            f"cannot read this node's identity in {path}: {error.strerror}; "
            "run as the user who made it, or move it away to get a new identity"
        ) from error
    if mode & 0o077:
        raise ResourceError(
            f"others can open this node's identity in {path} (mode {mode:o}); if nobody has "
            f"copied it, run: chmod 600 {path}; otherwise move it away to get a new identity"
        )
    if len(seed) != _SEED_BYTES:
        raise ResourceError(
            f"{path} is not a node's identity: it should hold {_SEED_BYTES} bytes; "
            "restore it from a copy, or move it away to get a new identity"
        )
    return KeyPair.from_seed(seed)


def _create(path: Path) -> None:
    """Writes a new seed beside `path`, and links it there unless someone was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(_SEED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # unlike a rename, never replaces what is there
        except FileExistsError:
            return
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
