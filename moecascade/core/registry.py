"""Policies: who decides the draft length K, and the registry that finds them by name.

A policy is named by a *spec*: its name, for some an argument after a colon (``off``, ``static:3``,
``cascade``), and settings in brackets where they differ from the defaults
(``cascade[set_steps=32,backoff=1]``). Adding one takes one file: a class with the members of
`Policy`, passed to `register`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from moecascade.core.marginal.rule import Marginal
from moecascade.core.peers.bandit import Bandit
from moecascade.core.peers.dynamic_table import DynamicTable
from moecascade.core.peers.goodput import Goodput
from moecascade.core.peers.huggingface import HuggingFace
from moecascade.core.peers.sglang_adaptive import SglangAdaptive
from moecascade.core.peers.survival_budget import SurvivalBudget
from moecascade.core.policies.cascade import Cascade
from moecascade.core.policies.static import Off, Static
from moecascade.core.policy import Policy
from moecascade.core.settings import from_mapping
from moecascade.core.spec import parse
from moecascade.errors import ConfigError, nearest

_REGISTRY: dict[str, type[Policy]] = {}
_MEMBERS = ("name", *(member for member in vars(Policy) if not member.startswith("_")))

ANY_K = sys.maxsize
"""`max_k` for checking a spec where the engine's longest draft is not known."""
MOST_DIGITS = 9  # of an argument


C = TypeVar("C", bound=type[Any])


def register(policy: C) -> C:
    """Add a policy class under its `name`; usable as a decorator. A later one replaces it.

    Args:
        policy: A subclass of `Policy`, or a class that has all of its members.

    Raises:
        ConfigError: It lacks some of them; they are named.
    """
    missing = [member for member in _MEMBERS if not hasattr(policy, member)]
    missing += sorted(getattr(policy, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(
            f"policy class {policy.__qualname__!r} lacks {', '.join(missing)}; derive it from "
            "moecascade.Policy, then only 'name' and 'decide' are needed"
        )
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
    settings = from_mapping(policy.Settings, values, f"options of policy {name!r}")
    policy.check(settings, max_k)
    return policy(settings, max_k)
