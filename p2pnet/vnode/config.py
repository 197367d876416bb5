"""The keys of a component's config: what each may be, and what it is where it is not given.

Keys, defaults and ranges are those of torch's constructors. A value is plain
data (numbers, booleans, text, tuples), so that a config travels as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from p2pnet.errors import SpecError

Value = bool | int | float | str | tuple[int, ...] | tuple[float, ...]
Config = Mapping[str, Value]

LENGTH_MAX = 2**31 - 1  # of one dimension
DIMS_MAX = 8


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `parse` raises ValueError where a value is not what `expected` says."""

    name: str
    expected: str
    parse: Callable[[object], Value]
    default: Value | None = None  # None: it has to be given
    as_key: str = ""  # where it is not given, it is what this earlier key is


def fill(where: str, keys: tuple[Key, ...], given: Mapping[str, object]) -> dict[str, Value]:
    """Every key of `keys` in their order, given or by default. `where` names the culprit.

    Raises:
        SpecError: an unknown or missing key, or a value that it cannot have.
    """
    names = [key.name for key in keys]
    for name in given:
        if name not in names:
            known = f"it takes {', '.join(names)}" if names else "it takes none"
            raise SpecError(f"{where} has the unknown config key {name!r}: {known}")
    config: dict[str, Value] = {}
    for key in keys:
        if key.name in given:
            try:
                config[key.name] = key.parse(given[key.name])
            except ValueError:
                raise SpecError(
                    f"{where} expects {key.name} to be {key.expected}, not {given[key.name]!r}"
                ) from None
        elif key.as_key:
            config[key.name] = config[key.as_key]
        elif key.default is not None:
            config[key.name] = key.default
        else:
            raise SpecError(f"{where} needs the config key {key.name}: {key.expected}")
    return config


def whole(
    name: str,
    low: int = 1,
    high: int = LENGTH_MAX,
    default: int | None = None,
    but: int | None = None,
) -> Key:
    """A whole number of low..high, but not `but`."""

    def parse(value: object) -> int:
        if type(value) is not int or not low <= value <= high or value == but:
            raise ValueError
        return value

    except_for = "" if but is None else f", but not {but}"
    return Key(name, f"a whole number of {low} to {high}{except_for}", parse, default)


def number(name: str, default: float, *, high: float = math.inf, above_zero: bool = False) -> Key:
    """A number of 0..high; 0 itself only where `above_zero` is not set."""

    def parse(value: object) -> float:
        parsed = _finite(value)
        if parsed > high or (above_zero and parsed == 0):
            raise ValueError
        return parsed

    over = "a number above 0" if above_zero else "a number of at least 0"
    return Key(name, over + (f" and at most {high:g}" if high < math.inf else ""), parse, default)


def flag(name: str, default: bool) -> Key:
    """True or false."""

    def parse(value: object) -> bool:
        if type(value) is not bool:
            raise ValueError
        return value

    return Key(name, "true or false", parse, default)


def choice(name: str, *choices: str) -> Key:
    """One of some words; the first is the default."""

    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return value

    return Key(name, " or ".join(map(repr, choices)), parse, choices[0])


def pair(name: str, low: int = 1, default: int | None = None, as_key: str = "") -> Key:
    """A height and a width, whole numbers from `low`; a bare number stands for both."""

    def parse(value: object) -> tuple[int, ...]:
        items = value if isinstance(value, list | tuple) else [value, value]
        if len(items) != 2:
            raise ValueError
        for item in items:
            if type(item) is not int or not low <= item <= LENGTH_MAX:
                raise ValueError
        return tuple(items)

    usual = None if default is None else (default, default)
    return Key(name, f"a whole number of at least {low}, or two of them", parse, usual, as_key)


def whole_numbers(name: str, low: int, high: int, default: tuple[int, ...] | None = None) -> Key:
    """1 to 8 whole numbers, each of low..high; a bare number stands for one."""

    def parse(value: object) -> tuple[int, ...]:
        items = value if isinstance(value, list | tuple) else [value]
        if not 1 <= len(items) <= DIMS_MAX:
            raise ValueError
        for item in items:
            if type(item) is not int or not low <= item <= high:
                raise ValueError
        return tuple(items)

    expected = f"1 to {DIMS_MAX} whole numbers of {low} to {high}"
    return Key(name, expected, parse, default)


def factor(name: str) -> Key:
    """Any number but an infinite one."""

    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        return math.copysign(_finite(abs(value)), value)

    return Key(name, "a number", parse)


def lengths(name: str) -> Key:
    """A shape of at least one dimension; a bare number stands for one dimension."""

    def parse(value: object) -> tuple[int, ...]:
        items = value if isinstance(value, list | tuple) else [value]
        if not 1 <= len(items) <= DIMS_MAX:
            raise ValueError
        for item in items:
            if type(item) is not int or not 1 <= item <= LENGTH_MAX:
                raise ValueError
        return tuple(items)

    return Key(name, f"a whole number above 0, or a list of 1 to {DIMS_MAX} of them", parse)


def betas(name: str, first: float, second: float) -> Key:
    """Adam's two decay rates, each of 0 up to, but not, 1."""

    def parse(value: object) -> tuple[float, ...]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError
        pair = tuple(_finite(item) for item in value)
        if max(pair) >= 1:
            raise ValueError
        return pair

    return Key(name, "two numbers of at least 0 and below 1", parse, (first, second))


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    parsed = float(value) if abs(value) < 1e300 else math.inf  # a huge int has no float
    if not 0 <= parsed < math.inf:
        raise ValueError
    return parsed
