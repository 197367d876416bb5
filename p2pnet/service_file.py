"""A shell: a service as a file that people read, sign and pass on.

JSON, so that a governor sees what a signature is for. What is signed is not the text
but the one protobuf message that follows from it; blanks and order change nothing.

    {"name": "digits club", "version": 1, "threshold": 2,
     "governors": ["12D3KooW…", …], "networks": ["0123…"], "owners": ["12D3KooW…"],
     "issued_at_ms": 1800000000000,
     "signatures": [{"governor": "12D3KooW…", "signature": "base64"}]}

To pin a service `name`, `threshold` and `governors` are enough.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from p2pnet import keys
from p2pnet.datadir import read_whole, write_whole
from p2pnet.dht import service as core
from p2pnet.dht.service import Service
from p2pnet.errors import RemoteError, ResourceError, UsageError
from p2pnet.v1 import records_pb2

T = TypeVar("T")

FILE_BYTES_MAX = 64 << 10
_ID = re.compile(r"[0-9a-f]{32}")
_FIELDS = {
    "name", "version", "threshold", "governors", "networks", "owners", "issued_at_ms",
    "signatures",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pin:
    """The service that a node is told to serve, and its manifest where the file has it signed."""

    service_id: str
    signed: records_pb2.SignedService | None = None


def read_pin(text: str) -> Pin:
    """What `join --service FILE|ID` names.

    Raises:
        UsageError: neither a service's id nor a file of one; says what is wrong with it.
    """
    if _ID.fullmatch(text):
        return Pin(text)
    path = Path(text)
    if not path.is_file():
        raise UsageError(
            f"{text!r} is neither a service's id, which has 32 hexadecimal digits, nor a file"
        )
    signed = read(path)
    try:
        service = core.open_draft(signed)
    except RemoteError as error:
        raise UsageError(f"{path}: {error}") from None
    complete = len(service.signers) >= service.threshold
    return Pin(service.service_id, signed if complete else None)


def read(path: Path) -> records_pb2.SignedService:
    """A service's manifest from a file, with the signatures that stand there, unchecked.

    Raises:
        UsageError: the file cannot be read, or is none of a service; says where.
    """
    try:
        data = read_whole(path, FILE_BYTES_MAX)
    except ResourceError as error:
        raise UsageError(str(error)) from None
    if data is None:
        raise UsageError(f"there is no file {path}: make one with `p2pnet service new`")
    try:
        return _from_json(json.loads(data))
    except (UsageError, RemoteError) as error:
        raise UsageError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise UsageError(
            f"{path} is not JSON: a service's file is made with `p2pnet service new`"
        ) from None


def write(path: Path, signed: records_pb2.SignedService) -> None:
    """What `read` reads; raises ResourceError, and as `core.open_draft`."""
    service = core.open_draft(signed)
    shown = to_json(service)
    for derived in ("id", "valid", "signatures"):
        del shown[derived]
    shown["issued_at_ms"] = records_pb2.ServiceManifest.FromString(signed.payload).issued_at_ms
    shown["signatures"] = [
        {
            "governor": keys.peer_id_of(signature.public_key),
            "signature": base64.b64encode(signature.signature).decode(),
        }
        for signature in signed.signatures
    ]
    write_whole(path, json.dumps(shown, indent=2).encode() + b"\n")


def to_json(service: Service) -> dict[str, Any]:
    """As `p2pnet service show --json` prints it; keys as peer ids."""
    return {
        "id": service.service_id,
        "name": service.name,
        "version": service.version,
        "threshold": service.threshold,
        "governors": [keys.peer_id_of(key) for key in service.governors],
        "networks": list(service.networks),
        "owners": [keys.peer_id_of(key) for key in service.owners],
        "signatures": [keys.peer_id_of(key) for key in service.signers],
        "valid": len(service.signers) >= service.threshold,
    }


def with_signature(
    signed: records_pb2.SignedService, keypair: keys.KeyPair
) -> records_pb2.SignedService:
    """The same with one governor's signature more; signing twice changes nothing.

    Raises:
        UsageError: the key is no governor's.
        ForgedError: a signature that is there already does not hold.
        MalformedError: not a manifest.
    """
    service = core.open_draft(signed)
    if keypair.public_key not in service.governors:
        raise UsageError(
            f"the key {keypair.peer_id} is none of the {len(service.governors)} governors of "
            f"{service.name}"
        )
    signatures = {signature.public_key: signature for signature in signed.signatures}
    signatures[keypair.public_key] = core.sign(signed.payload, keypair)
    return records_pb2.SignedService(
        payload=signed.payload, signatures=[signatures[key] for key in sorted(signatures)]
    )


def public_key_of(text: str) -> bytes:
    """A public key that people wrote, as a peer id or in hexadecimal; raises UsageError."""
    try:
        return bytes.fromhex(text) if len(text) == 64 else keys.public_key_of(text)
    except (ValueError, RemoteError):
        raise UsageError(
            f"{text[:80]!r} is not a public key: one looks like 12D3KooW…, as "
            "`p2pnet service key` shows it, or has 64 hexadecimal digits"
        ) from None


def _from_json(file: Any) -> records_pb2.SignedService:
    if not isinstance(file, dict):
        raise UsageError("a service is an object with name, threshold and governors")
    unknown = sorted(set(map(str, file)) - _FIELDS)
    if unknown:
        raise UsageError(f"a service has no {unknown[0]!r}")
    payload = core.make_payload(
        _get(file, "name", str, ""),
        _get(file, "threshold", int, 0),
        [public_key_of(key) for key in _texts(file, "governors")],
        version=_get(file, "version", int, 1),
        networks=_texts(file, "networks"),
        owners=[public_key_of(key) for key in _texts(file, "owners")],
        issued_at_ms=_get(file, "issued_at_ms", int, 0),
    )
    signatures = {}
    for entry in _get(file, "signatures", list, []):
        if not isinstance(entry, dict) or set(entry) != {"governor", "signature"}:
            raise UsageError("a signature is an object with governor and signature")
        key = public_key_of(_get(entry, "governor", str, ""))
        if key in signatures:
            raise UsageError(f"two signatures of {keys.peer_id_of(key)}")
        raw = base64.b64decode(_get(entry, "signature", str, ""), validate=True)
        signatures[key] = records_pb2.Signature(public_key=key, signature=raw)
    return records_pb2.SignedService(
        payload=payload, signatures=[signatures[key] for key in sorted(signatures)]
    )


def _texts(file: dict[str, Any], field: str) -> Sequence[str]:
    entries = _get(file, field, list, [])
    if not all(isinstance(entry, str) for entry in entries):
        raise UsageError(f"{field!r} is a list of texts")
    return entries


def _get(file: dict[str, Any], field: str, kind: type[T], default: T) -> T:
    value = file.get(field, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{field!r} has to be {_WORDS[kind]}")
    if isinstance(value, int) and not 0 <= value <= core.VERSION_MAX:
        raise UsageError(f"{field!r} is out of range")
    return value


_WORDS: dict[type, str] = {str: "a text", int: "a whole number", list: "a list"}
