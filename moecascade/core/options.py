"""What a server's configuration and a single request may ask for.

Server: the mapping under ``"cascade"`` in vLLM's ``--additional-config``. Request: the entries
``cascade_policy``, ``cascade_max_k``, ``cascade_task`` and ``cascade_report`` of ``vllm_xargs``
(HTTP) or ``SamplingParams.extra_args``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from moecascade.core import registry
from moecascade.core.settings import from_mapping
from moecascade.core.spec import parse
from moecascade.errors import ConfigError, nearest

CONFIG_KEY = "cascade"
PACKAGE = "moecascade"
REQUEST_PREFIX = "cascade_"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Configuration of the plugin.

    Attributes:
        policy: Spec of the policy for requests that do not choose one.
        options: Settings of policies, by policy name: ``{"cascade": {"set_steps": 32}}``.
        request_options: Whether requests may choose policy and cap; if not, those that do are
            answered with status 400 by `moecascade.vllm.http`, and ignored where it is missing.
        step_log: File to write a line a step to (schema `telemetry.step_log`), or "" for none.
        trace_log: File to write a line a request to (schema `telemetry.traces`), or "" for none.
        trace_tokens: Whether traces hold token ids. They are what users and model said.
        trace_drafts: Whether traces hold what the drafter proposed, where drafts are seen.
        metrics: Whether the engine counts what it does, for ``/metrics``, reports and the log.
        log_seconds: Seconds between two lines in the log while requests run, 0 for no lines.
        live_page: Whether the API server shows ``/cascade``.
    """

    policy: str = "marginal"
    options: Mapping[str, Any] = field(default_factory=dict)
    request_options: bool = True
    step_log: str = ""
    trace_log: str = ""
    trace_tokens: bool = False
    trace_drafts: bool = False
    metrics: bool = True
    log_seconds: float = 10.0
    live_page: bool = False

    def __post_init__(self) -> None:
        """Check what depends on each other; ConfigError names the key and what is allowed."""
        where = f'additional_config["{CONFIG_KEY}"]'
        if not self.log_seconds >= 0:
            raise ConfigError(f"{where}: log_seconds must be at least 0, got {self.log_seconds}")
        if self.live_page and not self.metrics:
            raise ConfigError(f'{where}: live_page needs metrics; leave out "metrics": false')

    def settings_of(self, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a policy: what is known of the model, and what is configured.

        Args:
            name: The policy's name.
            facts: See `core.controller.Controller`.
        """
        return {**registry.applicable(name, facts), **self.options.get(name, {})}


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What one request asks for.

    Attributes:
        policy: Spec of its policy, None for the server's.
        max_k: Cap on K, None for the engine's; 0 switches speculation off.
        task: What kind of request it is, for traces.
        report: Whether its answer is to say what speculation did for it.
    """

    policy: str | None = None
    max_k: int | None = None
    task: str = ""
    report: bool = False


def server_options(
    additional_config: Any,
    max_k: int,
    facts: Mapping[str, Any] | None = None,
    shows_drafts: bool = True,
) -> ServerOptions:
    """Return the validated configuration from vLLM's ``additional_config``.

    Args:
        additional_config: vLLM's mapping; without our key, all defaults.
        max_k: The longest draft that the engine can verify.
        facts: What is known of the model, see `core.controller.Controller`.
        shows_drafts: Whether policies see drafts before they decide, likewise.

    Raises:
        ConfigError: Unknown keys, policies or settings, values out of range.
    """
    given = additional_config if isinstance(additional_config, Mapping) else {}
    for key in given:  # others may have keys of their own there, so only ours misspelt is refused
        alike = difflib.get_close_matches(str(key).lower(), (CONFIG_KEY,), cutoff=0.85)
        if key != CONFIG_KEY and (key == PACKAGE or alike):
            raise ConfigError(f"additional_config: unknown key {key!r}; ours is {CONFIG_KEY!r}")
    values = given.get(CONFIG_KEY, {})
    where = f'additional_config["{CONFIG_KEY}"]'
    chosen = from_mapping(ServerOptions, values, where)
    if not shows_drafts:
        check_unseen(chosen.policy)
    known = registry.classes()  # now, not when a request first asks for one of another package
    for name, settings in chosen.options.items():
        if name not in known:
            raise ConfigError(
                f"{where}: options are for an unknown policy {name!r}{nearest(name, known)}; "
                f"allowed: {', '.join(sorted(known))}"
            )
        about = f"{where}: options of policy {name!r}"
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{about}: expected a mapping of names to values, got {settings!r}")
        filled = chosen.settings_of(name, facts or {})
        if known[name].argument:
            filled.setdefault(known[name].argument, 0)
        from_mapping(known[name].Settings, filled, about)
    settings = chosen.settings_of(parse(chosen.policy).name, facts or {})
    registry.settings_for(chosen.policy, max_k, settings)
    return chosen


def check_unseen(spec: str) -> None:
    """Raise ConfigError where a policy needs drafts that the engine does not show."""
    if registry.reads_drafts(spec):
        raise ConfigError(
            f"policy {spec!r} looks at drafts before it chooses K, and asynchronous scheduling "
            "does not show them; choose another, such as 'marginal', or start vLLM with "
            "--no-async-scheduling"
        )


def _no_settings(_name: str) -> Mapping[str, Any]:
    return {}


def request_options(
    extra_args: Mapping[str, Any] | None,
    max_k: int | None,
    settings_of: Callable[[str], Mapping[str, Any]] = _no_settings,
) -> RequestOptions:
    """Return what a request's ``vllm_xargs`` ask of us; entries of others are left alone.

    Args:
        extra_args: The request's mapping, or None.
        max_k: The longest draft that the engine can verify; None where it is not known, then K is
            only checked for its type and sign.
        settings_of: Gives the settings that the server has for a policy, by its name.

    Raises:
        ConfigError: Unknown ``cascade_*`` entries, unknown policies, K out of range.
    """
    asked = {k: v for k, v in (extra_args or {}).items() if k.startswith(REQUEST_PREFIX)}
    if not asked:
        return RequestOptions()
    allowed = ("cascade_policy", "cascade_max_k", "cascade_task", "cascade_report")
    for key in asked:
        if key not in allowed:
            raise ConfigError(
                f"vllm_xargs: unknown entry {key!r}{nearest(key, allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )
    policy, cap = asked.get("cascade_policy"), asked.get("cascade_max_k")
    if policy is not None:
        if not isinstance(policy, str):
            raise ConfigError(
                f"vllm_xargs: cascade_policy must be one of {', '.join(registry.names())}, "
                f"got {policy!r}"
            )
        longest = registry.ANY_K if max_k is None else max_k
        registry.settings_for(policy, longest, settings_of(parse(policy).name))
    if cap is not None:
        whole = isinstance(cap, int) and not isinstance(cap, bool)
        if not whole or cap < 0 or (max_k is not None and cap > max_k):
            top = "the engine's longest draft" if max_k is None else max_k
            raise ConfigError(
                f"vllm_xargs: cascade_max_k must be a whole number from 0 to {top}, got {cap!r}"
            )
    task = asked.get("cascade_task", "")
    if not isinstance(task, str):
        raise ConfigError(f"vllm_xargs: cascade_task must be a text, got {task!r}")
    report = asked.get("cascade_report", False)
    if report not in (False, True):  # 0 and 1 as well: vLLM 0.29 takes no booleans here
        raise ConfigError(f"vllm_xargs: cascade_report must be true or false, got {report!r}")
    return RequestOptions(policy, cap, task, bool(report))


def valid_request_options(
    extra_args: Mapping[str, Any] | None,
    max_k: int | None,
    settings_of: Callable[[str], Mapping[str, Any]] = _no_settings,
) -> RequestOptions:
    """Return those of a request's options that are right on their own, as `request_options`."""
    found = RequestOptions()
    for key, value in (extra_args or {}).items():
        with suppress(ConfigError):
            one = request_options({key: value}, max_k, settings_of)
            found = RequestOptions(
                one.policy or found.policy,
                found.max_k if one.max_k is None else one.max_k,
                one.task or found.task,
                one.report or found.report,
            )
    return found
