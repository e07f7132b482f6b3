"""Policies: who decides the draft length K, and the registry that finds them by name.

A policy is named by a *spec*: its name, for some an argument after a colon (``off``, ``static:3``,
``cascade``), and settings in brackets where they differ from the defaults
(``cascade[set_steps=32,backoff=1]``). Adding one takes one class, derived from `Policy` and passed
to `register`. Every process finds it, the engine's too, where one of these says where it is:

* an installed package, by an entry point of the group ``moecascade.policies`` that names the class,
* the environment variable ``MOECASCADE_POLICIES``: modules to import, with commas between.

Both are of the server's making. What a request says is only ever looked up.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib import import_module, metadata
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
from moecascade.core.spec import Spec, parse
from moecascade.errors import ConfigError, nearest

logger = logging.getLogger("moecascade")

ENTRY_POINTS = "moecascade.policies"
MODULES = "MOECASCADE_POLICIES"

ANY_K = sys.maxsize
"""`max_k` for checking a spec where the engine's longest draft is not known."""
MOST_DIGITS = 9  # of an argument

_REGISTRY: dict[str, type[Policy]] = {}
_MEMBERS = ("name", *(member for member in vars(Policy) if not member.startswith("_")))

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
            f"policy {getattr(policy, '__qualname__', policy)!r} lacks {', '.join(missing)}; "
            "derive it from moecascade.Policy, then only 'name' and 'decide' are needed"
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


@cache
def _load_others() -> None:
    """Register the policies of other packages, and those of modules that the environment names.

    Raises:
        ConfigError: One of these modules cannot be imported.
    """
    for point in metadata.entry_points(group=ENTRY_POINTS):
        try:
            register(point.load())
        except Exception as fault:  # noqa: BLE001 -- one broken package must not stop the others
            logger.warning("policy %r of %s cannot be loaded: %r", point.name, point.value, fault)
    for module in filter(None, map(str.strip, os.environ.get(MODULES, "").split(","))):
        try:
            import_module(module)
        except Exception as fault:
            raise ConfigError(
                f"{MODULES}: module {module!r} cannot be imported ({fault!r}); is its folder on "
                "PYTHONPATH?"
            ) from fault


def classes() -> Mapping[str, type[Policy]]:
    """Return the registered classes by name."""
    _load_others()
    return _REGISTRY


def names() -> tuple[str, ...]:
    """Return the forms of spec that `create` takes, for messages and help."""
    return tuple(
        f"{name}:{policy.argument.upper()}" if policy.argument else name
        for name, policy in sorted(classes().items())
    )


def _find(name: str) -> type[Policy] | None:
    return _REGISTRY.get(name) or classes().get(name)


def learns(spec: str) -> bool:
    """Return whether the policy of a valid spec gains by the requests that it has served."""
    policy = _find(parse(spec).name)
    return policy is not None and policy.learns


def reads_drafts(spec: str) -> bool:
    """Return whether the policy of a valid spec has to see drafts before it decides."""
    policy = _find(parse(spec).name)
    return policy is not None and policy.reads_drafts


def applicable(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the facts of a model that a policy takes as settings."""
    policy = _find(name)
    known = {field.name for field in fields(policy.Settings)} if policy else set()
    return {key: value for key, value in facts.items() if key in known}


def settings_for(spec: str | Spec, max_k: int, options: Mapping[str, Any] | None = None) -> Any:
    """Return the validated settings of the policy that `spec` names; see `create`."""
    spec = parse(spec) if isinstance(spec, str) else spec
    policy = _find(spec.name)
    if policy is None:
        raise ConfigError(
            f"unknown policy {str(spec)!r}{nearest(spec.name, _REGISTRY)}; "
            f"allowed: {', '.join(names())}"
        )
    values = {**(options or {}), **spec.settings}
    given = spec.argument
    if policy.argument:
        if given is None or not given.isdecimal() or len(given) > MOST_DIGITS:
            raise ConfigError(
                f"policy {str(spec)!r} needs a whole number after the colon; "
                f"write for example {spec.name}:{min(3, max_k)}"
            )
        values[policy.argument] = int(given)
    elif given is not None:
        raise ConfigError(
            f"policy {spec.name!r} takes no argument, but got {str(spec)!r}; write {spec.name!r}"
        )
    with _refused(spec):
        settings = from_mapping(policy.Settings, values, f"options of policy {spec.name!r}")
        policy.check(settings, max_k)
    return settings


def create(spec: str | Spec, max_k: int, options: Mapping[str, Any] | None = None) -> Policy:
    """Make the policy that `spec` names.

    Args:
        spec: ``name`` or ``name:argument``, with settings in brackets or without.
        max_k: The longest draft that the engine can verify, at least 1.
        options: Settings of this policy by field name, see its `Settings`; those of the spec come
            first.

    Raises:
        ConfigError: Unknown name, missing or wrong argument, K above `max_k`, unknown setting, or
            settings with which the policy cannot be made.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    settings = settings_for(spec, max_k, options)
    with _refused(spec):
        return _REGISTRY[spec.name](settings, max_k)


@contextmanager
def _refused(spec: Spec) -> Iterator[None]:
    """Turn whatever a policy raises at its settings into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as fault:
        raise ConfigError(f"policy {str(spec)[:80]!r} cannot be made: {fault!r:.80}") from fault
