"""Policies: who decides the draft length K, and the registry that finds them by name.

A policy is named by a *spec*: its name, and for some an argument after a colon (``off``,
``static:3``, ``cascade``). Adding one takes one file: a class with the members of `Policy`, passed
to `register`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from moecascade.errors import ConfigError, nearest
from moecascade.policies.base import Policy
from moecascade.policies.cascade import Cascade
from moecascade.policies.marginal import Marginal
from moecascade.policies.off import Off
from moecascade.policies.static import Static
from moecascade.settings import from_mapping

_REGISTRY: dict[str, type[Policy]] = {}

ANY_K = sys.maxsize
"""`max_k` for checking a spec where the engine's longest draft is not known."""


def register(policy: type[Policy]) -> type[Policy]:
    """Add a policy class under its `name`; usable as a decorator. A later one replaces it."""
    _REGISTRY[policy.name] = policy
    return policy


for _policy in (Off, Static, Cascade, Marginal):
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


def create(spec: str, max_k: int, options: Mapping[str, Any] | None = None) -> Policy:
    """Make the policy that `spec` names.

    Args:
        spec: ``name`` or ``name:argument``.
        max_k: The longest draft that the engine can verify, at least 1.
        options: Settings of this policy by field name, see its `Settings`.

    Raises:
        ConfigError: Unknown name, missing or wrong argument, K above `max_k`, unknown setting.
    """
    name, colon, argument = spec.partition(":")
    policy = _REGISTRY.get(name)
    if policy is None:
        raise ConfigError(
            f"unknown policy {spec!r}{nearest(name, _REGISTRY)}; allowed: {', '.join(names())}"
        )
    values = dict(options or {})
    if policy.argument:
        if not argument.isdecimal():
            raise ConfigError(
                f"policy {spec!r} needs a whole number after the colon; "
                f"write for example {name}:{min(3, max_k)}"
            )
        values[policy.argument] = int(argument)
    elif colon:
        raise ConfigError(f"policy {name!r} takes no argument, but got {spec!r}; write {name!r}")
    return policy(from_mapping(policy.Settings, values, f"options of policy {name!r}"), max_k)


__all__ = ["ANY_K", "Policy", "classes", "create", "names", "register"]
