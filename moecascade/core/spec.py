"""How a policy is named: a *spec* is its name, an argument for some, settings in brackets.

``off``, ``static:3``, ``cascade``, ``cascade[set_steps=32,backoff=1]``.
"""

from __future__ import annotations

import json
from typing import Any

from moecascade.errors import ConfigError


def parse(spec: str) -> tuple[str, str | None, dict[str, Any]]:
    """Return a spec's name, its argument if it has one, and its settings.

    Raises:
        ConfigError: The brackets are not of the form ``[name=value,...]``.
    """
    plain, bracket, inside = spec.partition("[")
    name, colon, argument = plain.partition(":")
    values: dict[str, Any] = {}
    if bracket:
        try:
            if not inside.endswith("]"):
                raise ValueError
            for item in split(inside[:-1]):
                key, _, value = item.partition("=")
                values[key.strip()] = json.loads(value)
        except (ValueError, RecursionError):
            raise ConfigError(
                f"policy {spec!r}: settings have the form {plain}[name=value,...]"
            ) from None
    return name, argument if colon else None, values


def split(specs: str) -> list[str]:
    """Return the specs of a list with commas between; those within brackets are theirs."""
    depth, begin, found = 0, 0, []
    for at, sign in enumerate(specs):
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth:
            found.append(specs[begin:at])
            begin = at + 1
    return [spec.strip() for spec in (*found, specs[begin:])]
