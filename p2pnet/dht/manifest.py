"""A network's manifest: what its owner signs, and what its id is made of. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from p2pnet import keys
from p2pnet.dht.canonical import parse_canonical
from p2pnet.errors import ForgedError, MalformedError
from p2pnet.v1 import common_pb2, records_pb2

MANIFEST_BYTES_MAX = 8 << 10
NAME_CHARS_MAX = 64
ORCHESTRATORS_MAX = 64
KEEPERS_MAX = 9
STATE_URL_CHARS_MAX = 512
STATE_SCHEMES = ("file://", "s3://")
_WALL_MS_MAX = 2**53
_NONCE_BYTES_MAX = 64
_NETWORK_ID = re.compile(r"[0-9a-f]{32}")


def network_id_of(signed_manifest: common_pb2.Signed) -> str:
    """A network's id: the first 16 bytes of the SHA-256 of the manifest's payload, as hex."""
    return keys.sha256(signed_manifest.payload)[:16].hex()


def is_network_id(text: str) -> bool:
    """Whether it is 32 hexadecimal digits."""
    return _NETWORK_ID.fullmatch(text) is not None


def check_network_id(network_id: str) -> None:
    """Raises MalformedError for anything but 32 hexadecimal digits."""
    if not is_network_id(network_id):
        raise MalformedError(f"{network_id[:64]!r} is not a network id: it is 32 hex digits")


def open_manifest(signed: common_pb2.Signed) -> records_pb2.Manifest:
    """The manifest in a signed statement, verified.

    Raises:
        ForgedError: not signed by the owner that it names.
        MalformedError: not a manifest, or with a field out of bounds.
    """
    manifest = parse_canonical(records_pb2.Manifest, signed.payload, MANIFEST_BYTES_MAX)
    keys.verify(keys.MANIFEST, signed)
    if manifest.owner != signed.public_key:
        raise ForgedError("a manifest that another than its owner signed")
    check_name("network", manifest.name)
    if len(manifest.spec_digest) != 32:
        raise MalformedError("a manifest whose spec digest is no SHA-256")
    if len(manifest.nonce) > _NONCE_BYTES_MAX:
        raise MalformedError("a manifest with too long a nonce")
    if len(manifest.orchestrators) > ORCHESTRATORS_MAX:
        raise MalformedError(f"a manifest with over {ORCHESTRATORS_MAX} orchestrators")
    for peer_id in manifest.orchestrators:
        keys.public_key_of(peer_id)
    check_keepers(manifest.keepers)
    check_state_url(manifest.state_url)
    if manifest.keepers and manifest.state_url:
        raise MalformedError("a manifest that keeps the log both on peers and in a store")
    if not 0 <= manifest.limits.expires_at_ms <= _WALL_MS_MAX:
        raise MalformedError("a manifest with an impossible end")
    return manifest


def check_keepers(keepers: Sequence[str]) -> None:
    """Raises MalformedError for anything but up to 9 peer ids, sorted, each once."""
    if len(keepers) > KEEPERS_MAX or sorted(dict.fromkeys(keepers)) != list(keepers):
        raise MalformedError(f"a log has up to {KEEPERS_MAX} keepers, sorted, each once")
    for peer_id in keepers:
        keys.public_key_of(peer_id)


def check_state_url(url: str) -> None:
    """Raises MalformedError for what is no file:// or s3:// URL; "" means the peers."""
    if not url:
        return
    if len(url) > STATE_URL_CHARS_MAX or not url.isprintable():
        raise MalformedError(f"a state URL has up to {STATE_URL_CHARS_MAX} printable characters")
    if not url.startswith(STATE_SCHEMES):
        raise MalformedError(f"{url[:80]!r} is neither a file:// nor an s3:// URL")


def grants(manifest: records_pb2.Manifest, peer_id: str) -> bool:
    """Whether the owner lets that peer orchestrate the network."""
    return manifest.any_orchestrator or peer_id in manifest.orchestrators


def check_name(what: str, name: str, chars_max: int = NAME_CHARS_MAX) -> None:
    """Raises MalformedError for a name that is empty, too long, or not printable."""
    if not 0 < len(name) <= chars_max or not name.isprintable():
        raise MalformedError(f"a {what} name has 1 to {chars_max} printable characters")
