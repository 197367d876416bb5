"""A network spec, as people write it, into a compiled graph.

The only place that reads YAML or imports pydantic, so only a process that
submits does. What is wrong is told in one sentence that names the file and the
node. Shapes, names and config values are `compile_graph`'s to judge.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from p2pnet.errors import SpecError
from p2pnet.vnode.compiling import compile_graph
from p2pnet.vnode.draft import DTYPE, LOCAL, Draft, Settings, TensorSpec
from p2pnet.vnode.graph import CompiledGraph
from p2pnet.vnode.local import HEADS, with_heads

try:  # ten times as fast where PyYAML was built with libyaml
    from yaml import CSafeLoader as _SafeLoader
except ImportError:
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

SPEC_BYTES_MAX = 1 << 20
DEPTH_MAX = 16
_USUAL = Settings()


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Input(_Model):
    shape: list[StrictInt]
    dtype: StrictStr = DTYPE


class _Node(_Model):
    id: StrictStr
    type: StrictStr
    config: dict[StrictStr, Any] = Field(default_factory=dict)
    inputs: list[StrictStr] | None = None
    group: StrictStr | None = None
    tied: StrictStr | None = None
    codec: StrictStr | None = None


class _Optimizer(BaseModel):
    model_config = ConfigDict(extra="allow")  # its config stands beside its type
    type: StrictStr


class _Spec(_Model):
    name: StrictStr
    inputs: dict[StrictStr, _Input] = Field(min_length=1)
    nodes: list[_Node] = Field(min_length=1)
    loss: _Node
    optimizer: _Optimizer
    learning: StrictStr = _USUAL.learning
    head: StrictStr | None = None  # of the blocks, where learning is local
    seed: StrictInt = _USUAL.seed
    micro_batches: StrictInt = _USUAL.micro_batches
    cut_every: StrictInt = _USUAL.cut_every
    batch_max: StrictInt = _USUAL.batch_max
    clip_norm: StrictFloat = _USUAL.clip_norm
    staleness: StrictInt = _USUAL.staleness
    replicas: StrictInt = _USUAL.replicas
    codec: StrictStr = _USUAL.codec


def load_spec(source: Path | str | Mapping[str, Any]) -> CompiledGraph:
    """Compiles a spec: a path, a mapping, or YAML text (text that has a line break).

    Raises:
        SpecError: one sentence that names the file, the node and what was expected.
    """
    if isinstance(source, Mapping):
        return _compile(dict(source))
    if isinstance(source, str) and "\n" in source:
        return _compile(_parse_yaml(source.encode()))
    path = Path(source)
    try:
        return _compile(_parse_yaml(_read(path)))
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(SPEC_BYTES_MAX + 1)
    except FileNotFoundError:
        raise SpecError("there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise SpecError(f"cannot be read: {getattr(error, 'strerror', error)}") from None


# --- YAML ---------------------------------------------------------------------


class _Loader(_SafeLoader):
    """Safe YAML in which a key stands once, and 1e-3 is a number as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=True)
        if len(mapping) < len(node.value):
            line = node.start_mark.line + 1
            raise SpecError(f"a key stands twice in the mapping that begins in line {line}")
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse_yaml(data: bytes) -> Mapping[str, Any]:
    if len(data) > SPEC_BYTES_MAX:
        raise SpecError(f"a spec has at most {SPEC_BYTES_MAX >> 20} MiB")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise SpecError("is not YAML: it is not UTF-8 text") from None
    try:
        _check_events(text)
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise SpecError(f"is not YAML: {problem}{line}") from None
    except ValueError as error:  # a date or a number that cannot be
        raise SpecError(f"is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise SpecError("a spec is a mapping with name, inputs, nodes, loss and optimizer")
    return content


def _check_events(text: str) -> None:
    """Refuses what makes a small text a huge value: aliases, and nesting without end."""
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise SpecError(f"YAML aliases (*{event.anchor}) are not taken in a spec")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEPTH_MAX:
            raise SpecError(f"the YAML is nested deeper than {DEPTH_MAX} levels")


# --- the mapping --------------------------------------------------------------


def _compile(content: Mapping[str, Any]) -> CompiledGraph:
    try:
        spec = _Spec.model_validate(content)
    except ValidationError as error:
        raise SpecError(_sentence(error, content)) from None
    previous = next(iter(spec.inputs))
    drafts = []
    for node in spec.nodes:
        drafts.append(_draft(node, previous))
        previous = node.id
    inputs = {
        name: TensorSpec(tuple(given.shape), given.dtype) for name, given in spec.inputs.items()
    }
    loss = _draft(spec.loss, previous)
    if spec.learning == LOCAL:
        drafts, loss = with_heads(inputs, drafts, loss, head=spec.head or HEADS[0])
    elif spec.head is not None:
        raise SpecError("head is for learning: local")
    return compile_graph(
        name=spec.name,
        inputs=inputs,
        nodes=drafts,
        loss=loss,
        optimizer=spec.optimizer.type,
        optimizer_config=dict(spec.optimizer.model_extra or {}),
        settings=Settings(
            **{key.name: getattr(spec, key.name) for key in dataclasses.fields(Settings)}
        ),
    )


def _draft(node: _Node, previous: str) -> Draft:
    """A node without `inputs` takes the one before it."""
    inputs = (previous,) if node.inputs is None else tuple(node.inputs)
    for key in ("group", "tied", "codec"):
        if getattr(node, key) == "":
            raise SpecError(f"{node.id} has an empty {key}: name it, or leave the key out")
    return Draft(
        node.id, node.type, node.config, inputs, node.group or "", node.tied or "", node.codec or ""
    )


_EXPECTED = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "list_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping",
    "invalid_key": "a key has to be text",
    "too_short": "must not be empty",
}


def _sentence(error: ValidationError, content: Mapping[str, Any]) -> str:
    """The first of pydantic's errors as one sentence, with the node's id instead of its number."""
    first = error.errors(include_url=False, include_context=False)[0]
    *parents, last = _place(first["loc"], content)
    where = ".".join(parents) or "the spec"
    if first["type"] == "missing":
        return f"{where} has no {last}"
    if first["type"] == "extra_forbidden":
        model = _Input if "inputs" in first["loc"] else _Node if len(parents) else _Spec
        return f"{where} has the unknown key {last!r}: it takes {', '.join(model.model_fields)}"
    what = _EXPECTED.get(first["type"], first["msg"])
    got = "" if first["type"] == "too_short" else f", not {repr(first['input'])[:60]}"
    return f"{'.'.join((*parents, last))}: {what}{got}"


def _place(loc: tuple[int | str, ...], content: Mapping[str, Any]) -> list[str]:
    names = [str(part) for part in loc if part != "[key]"]
    if loc[0] == "nodes" and len(loc) > 1 and isinstance(loc[1], int):
        node = content["nodes"][loc[1]]
        name = node.get("id") if isinstance(node, dict) else None
        label = f"node {name}" if isinstance(name, str) else f"node number {loc[1] + 1}"
        names[:2] = [label]
    return names
