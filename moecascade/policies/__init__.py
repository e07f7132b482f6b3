"""Policies: who decides the draft length K, and the registry that finds them by name.

A policy is named by a *spec*: its name, for some an argument after a colon (``off``, ``static:3``,
``cascade``), and settings in brackets where they differ from the defaults
(``cascade[set_steps=32,backoff=1]``). Adding one takes one file: a class with the members of
`Policy`, passed to `register`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moecascade.errors import ConfigError, nearest
from moecascade.policies.bandit import Bandit
from moecascade.policies.base import Policy
from moecascade.policies.cascade import Cascade
from moecascade.policies.dynamic_table import DynamicTable
from moecascade.policies.goodput import Goodput
from moecascade.policies.huggingface import HuggingFace
from moecascade.policies.marginal import Marginal
from moecascade.policies.off import Off
from moecascade.policies.sglang_adaptive import SglangAdaptive
from moecascade.policies.static import Static
from moecascade.policies.survival_budget import SurvivalBudget
from moecascade.settings import from_mapping

_REGISTRY: dict[str, type[Policy]] = {}

ANY_K = sys.maxsize
"""`max_k` for checking a spec where the engine's longest draft is not known."""
MOST_DIGITS = 9  # of an argument


def register(policy: type[Policy]) -> type[Policy]:
    """Add a policy class under its `name`; usable as a decorator. A later one replaces it."""
    _REGISTRY[policy.name] = policy
    return policy


OURS: tuple[type[Policy], ...] = (Off, Static, Cascade, Marginal)
PEERS: tuple[type[Policy], ...] = (
    SglangAdaptive,
    DynamicTable,
    HuggingFace,
    Goodput,
    Bandit,
    SurvivalBudget,
)
"""What others use, to compare with."""

for _policy in (*OURS, *PEERS):
    register(_policy)


def names() -> tuple[str, ...]:
    """Return the forms of spec that `create` takes, for messages and help."""
    return tuple(
        f"{name}:{policy.argument.upper()}" if policy.argument else name
        for name, policy in sorted(_REGISTRY.items())
    )


def classes() -> Mapping[str, type[Policy]]:
    """Return the registered classes by name."""
    return _REGISTRY


def learns(spec: str) -> bool:
    """Return whether the policy of a valid spec gains by the requests that it has served."""
    return _REGISTRY[parse(spec)[0]].learns


def applicable(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the facts of a model that a policy takes as settings."""
    if name not in _REGISTRY:
        return {}
    known = {field.name for field in fields(_REGISTRY[name].Settings)}
    return {key: value for key, value in facts.items() if key in known}


def create(spec: str, max_k: int, options: Mapping[str, Any] | None = None) -> Policy:
    """Make the policy that `spec` names.

    Args:
        spec: ``name`` or ``name:argument``.
        max_k: The longest draft that the engine can verify, at least 1.
        options: Settings of this policy by field name, see its `Settings`.

    Raises:
        ConfigError: Unknown name, missing or wrong argument, K above `max_k`, unknown setting.
    """
    name, argument, inline = parse(spec)
    policy = _REGISTRY.get(name)
    if policy is None:
        raise ConfigError(
            f"unknown policy {spec!r}{nearest(name, _REGISTRY)}; allowed: {', '.join(names())}"
        )
    values = {**(options or {}), **inline}
    if policy.argument:
        if argument is None or not argument.isdecimal() or len(argument) > MOST_DIGITS:
            raise ConfigError(
                f"policy {spec!r} needs a whole number after the colon; "
                f"write for example {name}:{min(3, max_k)}"
            )
        values[policy.argument] = int(argument)
    elif argument is not None:
        raise ConfigError(f"policy {name!r} takes no argument, but got {spec!r}; write {name!r}")
    return policy(from_mapping(policy.Settings, values, f"options of policy {name!r}"), max_k)


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


__all__ = [
    "ANY_K",
    "Policy",
    "applicable",
    "classes",
    "create",
    "learns",
    "names",
    "parse",
    "register",
    "split",
]
