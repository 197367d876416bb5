"""Is today's protocol still readable by yesterday's peers?

    python tests/wire/breaking.py            checks proto/ against tests/wire/v1.json
    python tests/wire/breaking.py --accept   writes v1.json, after an addition

A field's number, type, label and name, an enum's values and a service's methods
may be added to, and never changed or taken away (protobuf.dev, "Updating A
Message Type").
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "v1.json"
FILES = sorted(path.stem for path in (HERE.parents[1] / "proto/p2pnet/v1").glob("*.proto"))


def describe() -> dict[str, str]:
    """Every part of the protocol that a peer can see: its full name and what it is."""
    out: dict[str, str] = {}
    for name in FILES:
        module = importlib.import_module(f"p2pnet.v1.{name}_pb2")
        _file(module.DESCRIPTOR, out)
    return out


def _file(file: FileDescriptor, out: dict[str, str]) -> None:
    for message in file.message_types_by_name.values():
        _message(message, out)
    for enum in file.enum_types_by_name.values():
        _enum(enum, out)
    for service in file.services_by_name.values():
        for method in service.methods:
            out[method.full_name] = (
                f"{'stream ' * method.client_streaming}{method.input_type.full_name} -> "
                f"{'stream ' * method.server_streaming}{method.output_type.full_name}"
            )


def _message(message: Descriptor, out: dict[str, str]) -> None:
    out[message.full_name] = "message"
    for field in message.fields:
        kind = field.message_type or field.enum_type
        of = kind.full_name if kind else str(field.type)
        repeated = "repeated " if field.is_repeated else ""
        oneof = f" in {field.containing_oneof.name}" if field.containing_oneof else ""
        out[f"{message.full_name}#{field.number}"] = f"{repeated}{of} {field.name}{oneof}"
    for nested in message.nested_types:
        _message(nested, out)
    for enum in message.enum_types:
        _enum(enum, out)


def _enum(enum: EnumDescriptor, out: dict[str, str]) -> None:
    for value in enum.values:
        out[f"{enum.full_name}={value.number}"] = value.name


def changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """What of `old` is no longer so, a line each."""
    lines = []
    for name, what in sorted(old.items()):
        if name not in new:
            lines.append(f"{name} ({what}) is gone")
        elif new[name] != what:
            lines.append(f"{name} was '{what}' and is '{new[name]}'")
    return lines


def main() -> int:
    new = describe()
    if "--accept" in sys.argv[1:]:
        GOLDEN.write_text(json.dumps(new, indent=0, sort_keys=True) + "\n")
        return 0
    broken = changes(json.loads(GOLDEN.read_text()), new)
    for line in broken:
        print(f"breaking change of the protocol: {line}", file=sys.stderr)
    added = sorted(set(new) - set(json.loads(GOLDEN.read_text())))
    if added:
        print(
            f"{len(added)} additions to the protocol are not in tests/wire/v1.json yet, the first "
            f"is {added[0]}: run `python tests/wire/breaking.py --accept`",
            file=sys.stderr,
        )
    return 1 if broken or added else 0


if __name__ == "__main__":
    sys.exit(main())
