"""How a policy is named: a *spec* is its name, an argument for some, settings in brackets.

``off``, ``static:3``, ``cascade``, ``cascade[set_steps=32,backoff=1]``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moecascade.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Spec:
    """A spec taken apart; ``str()`` puts it together again.

    Attributes:
        name: The policy's name.
        argument: What stands after the colon, "" where nothing does, None where there is no colon.
        settings: Those in brackets, by name.
    """

    name: str
    argument: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        argument = "" if self.argument is None else f":{self.argument}"
        items = [f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in self.settings.items()]
        return self.name + argument + (f"[{','.join(items)}]" if items else "")

    @property
    def static_k(self) -> int | None:
        """K of a policy ``static:K``, None for all others."""
        if self.name == "static" and self.argument is not None and self.argument.isdecimal():
            return int(self.argument)
        return None


def parse(text: str) -> Spec:
    """Return a spec taken apart. Whether there is such a policy is the registry's business.

    Raises:
        ConfigError: The brackets are not of the form ``[name=value,...]``.
    """
    plain, bracket, inside = text.partition("[")
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
                f"policy {text!r}: settings have the form {plain}[name=value,...]"
            ) from None
    return Spec(name, argument if colon else None, values)


def split(specs: str) -> list[str]:
    """Return the specs of a list with commas between; those within brackets are theirs."""
    depth, begin, found = 0, 0, []
    for at, sign in enumerate(specs):
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth:
            found.append(specs[begin:at])
            begin = at + 1
    return [spec.strip() for spec in (*found, specs[begin:])]
