"""Settings come as plain mappings (JSON, command line); here they become typed dataclasses.

A dataclass is the only home of a default. Unknown keys are refused with the nearest name, wrong
types with the type that is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from math import inf
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

from moecascade.errors import ConfigError, nearest

T = TypeVar("T")

MOST = 1e15  # size of a number: beyond, sums and products lose whole numbers


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, UnionType):
        return any(_fits(value, one) for one in get_args(wanted))
    if isinstance(value, bool) and wanted in {int, float}:
        return False
    if wanted is float:
        return isinstance(value, int | float) and abs(value) <= MOST
    if wanted is int:
        return isinstance(value, int) and abs(value) <= MOST
    try:
        return isinstance(value, wanted)
    except TypeError:  # a parametrised type such as Mapping[str, Any]: check its origin
        return isinstance(value, wanted.__origin__)


def _name(wanted: Any) -> str:
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return plain.get(wanted) or str(wanted)


def check_ranges(settings: Any, policy: str, **ranges: tuple[float, float]) -> None:
    """Check that settings of a policy lie within their ranges, ends included.

    Raises:
        ConfigError: One does not; names it and what is allowed.
    """
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            allowed = f"at least {low}" if high == inf else f"from {low} to {high}"
            raise ConfigError(
                f"options of policy {policy!r}: {name} must be {allowed}, got {value}"
            )


def from_mapping(cls: type[T], values: Any, where: str) -> T:
    """Return `cls` made from `values`.

    Args:
        cls: A dataclass; its `__post_init__` may check ranges by raising ConfigError.
        values: A mapping from field name to value.
        where: What the values are, for messages ("options of policy 'cascade'").

    Raises:
        ConfigError: Not a mapping, an unknown key, a missing key, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of names to values, got {values!r}")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {key!r}{nearest(str(key), known)}; "
                f"allowed: {', '.join(known) or 'none'}"
            )
        if not _fits(value, hints[key]):
            raise ConfigError(f"{where}: {key} must be {_name(hints[key])}, got {value!r}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{where}: {name} is missing")
    return cls(**values)
