"""How to start vLLM's server: from what the user asked for to a command line.

What would fail late, deep in vLLM, is refused here: unknown policies and keys, K out of range,
options that contradict each other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecascade.core.options import CONFIG_KEY, check_unseen, server_options
from moecascade.core.registry import ANY_K, reads_drafts
from moecascade.errors import ConfigError
from moecascade.serving import machine
from moecascade.serving.flags import Flags, to_json
from moecascade.vllm import drafters, support

DRAFTER: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 8,
    "prompt_lookup_min": 2,
    "prompt_lookup_max": 4,
}
"""Speculative decoding where the user asks for none: copies from prompt and output, at most 8."""

BOLD = {"prompt_lookup_min": 1}
"""What is copied after a single token is seldom right. Fixed draft lengths lose by it; `marginal`,
which sees which drafts are good, gains (docs/policies.md)."""

LADDER = (0, 1, 2, 3, 5, 8)
"""Draft lengths for which vLLM captures whole CUDA graphs, beside the drafter's longest: each takes
time at start and memory."""

SCHEDULER = "moecascade.vllm.Scheduler"
MIDDLEWARE = "moecascade.vllm.http.Middleware"
ANY_HOST = "0.0.0.0"  # noqa: S104 -- recognised, not bound
LOCAL_MAX_MODEL_LEN = 4096
CPU_CACHE_GIB = {True: 2, False: 4}
"""Memory for the KV cache on a CPU, for a local model and for others."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server.

    Attributes:
        command: Program and arguments.
        environment: Variables to set besides those that are set already.
        model: The name by which requests ask for the model.
        host: Where it will listen.
        port: Where it will listen.
        socket_path: The Unix socket where it listens instead, or "".
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    model: str
    host: str
    port: int
    socket_path: str = ""

    @property
    def url(self) -> str:
        """The server's address as seen from this machine."""
        host = {"": "127.0.0.1", ANY_HOST: "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{host}:{self.port}"

    def __str__(self) -> str:
        """Return a line that a shell would take."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])


def plan(
    model: str,
    arguments: Sequence[str] = (),
    *,
    policy: str | None = None,
    max_k: int | None = None,
    step_log: Path | None = None,
    trace_log: Path | None = None,
    trace_drafts: bool = False,
    live_page: bool = False,
    local_name: str | None = None,
    ladder: Sequence[int] | None = None,
    bold: bool = False,
) -> Launch:
    """Return how to serve `model` with the plugin on.

    Args:
        model: A folder or a name on the hub.
        arguments: vLLM's own flags. They are passed on as they are and override our defaults.
        policy: Spec of the policy for requests that choose none; the plugin's default if None.
        max_k: Longest draft of the default drafter.
        step_log: File for the plugin's step log.
        trace_log: File for the plugin's traces, with token ids.
        trace_drafts: Whether they hold what the drafter proposed, which it is then made to show.
        live_page: Whether the server shows ``/cascade``.
        local_name: The name of our local model that lives in the folder `model`, if it is one.
        ladder: Draft lengths for which vLLM is to capture whole CUDA graphs, none for its own
            choice; None for `LADDER` where there are such graphs.
        bold: Whether the default drafter is to be `BOLD`, where policies see its drafts.

    Raises:
        ConfigError: An unknown policy or key, K out of range, options that contradict each other.
    """
    flags = Flags(arguments)
    ours: list[str] = []
    table = _table(flags, max_k, ladder)
    if "speculative-config" in flags:
        if max_k is not None:
            raise ConfigError(
                f"--max-k {max_k} sets the default drafter's length, but you chose a drafter "
                'yourself; write "num_speculative_tokens" in its configuration instead'
            )
        if table:
            ours += ["--speculative-config", to_json({**drafter_of(flags), **table})]
            arguments = _without(arguments, "speculative-config")
    else:
        drafter = _drafter(max_k) | (BOLD if bold and not _asynchronous(arguments) else {})
        ours += ["--speculative-config", to_json({**drafter, **table})]
    is_ours = flags.value("scheduler-cls", SCHEDULER) == SCHEDULER
    if is_ours:
        _check_supported(flags)
        ours += _scheduling(flags, arguments, policy, trace_drafts)
    logs = {"step_log": step_log, "trace_log": trace_log}
    switches = {"trace_drafts": trace_drafts, "live_page": live_page}
    ours += _plugin(flags, policy, max_k, logs, switches)
    return _launch(model, flags, [*ours, *arguments], local_name)


def _check_supported(flags: Flags) -> None:
    """Refuse what the plugin would refuse in the engine, where the model has been loaded by then.

    As far as flags tell; `moecascade.vllm.support.check_supported` sees all of it.
    """
    method = drafter_of(flags).get("method")
    if isinstance(method, str):
        drafters.check_method(method)
    if (size := _size(flags, "decode-context-parallel-size")) > 1:
        raise ConfigError(support.untried_context(size))
    if (size := _size(flags, "pipeline-parallel-size")) > 1 and method in drafters.SEARCHES:
        raise ConfigError(support.pipeline(size))


def _size(flags: Flags, name: str, otherwise: int = 1) -> int:
    """Return a number that a flag says; what it is where it says none."""
    said = flags.value(name)
    return int(said) if said.isdecimal() else otherwise


def _scheduling(
    flags: Flags, arguments: Sequence[str], policy: str | None, shown: bool
) -> list[str]:
    """Return the flag that makes vLLM show drafts before they are verified, where that is better.

    A search of the text finds its drafts in no time, and what was found says much; a policy that
    looks at drafts has been asked for. Models draft better while nobody waits for them.
    """
    if "async-scheduling" in flags:
        if policy is not None and _asynchronous(arguments):
            check_unseen(policy)
        return []
    looks = shown or (policy is not None and reads_drafts(policy))
    return (
        ["--no-async-scheduling"]
        if looks or drafter_of(flags).get("method") in drafters.SEARCHES
        else []
    )


def _asynchronous(arguments: Sequence[str]) -> bool:
    """Return whether asynchronous scheduling is asked for; of several flags the last one counts."""
    said = [argument.replace("_", "-").removeprefix("--") for argument in arguments]
    switches = [word for word in said if word.removeprefix("no-") == "async-scheduling"]
    return bool(switches) and switches[-1] == "async-scheduling"


def plain(model: str, arguments: Sequence[str] = (), *, local_name: str | None = None) -> Launch:
    """Return how to serve `model` without plugin and speculation, otherwise as `plan` would.

    Args:
        model: A folder or a name on the hub.
        arguments: vLLM's flags for `plan`; those that choose a drafter are left out.
        local_name: As for `plan`.

    Raises:
        ConfigError: A ``--config`` file chooses a drafter.
    """
    kept = _without(arguments, "speculative-config")
    flags = Flags(kept)
    if "speculative-config" in flags:
        raise ConfigError(
            f"--config {flags.value('config')} chooses a drafter, so vLLM cannot be measured "
            "without; name the drafter on the command line instead"
        )
    return _launch(model, flags, kept, local_name)


def _without(arguments: Sequence[str], flag: str) -> list[str]:
    """Return arguments without a flag, whichever spelling it has, and without its value."""
    kept: list[str] = []
    dropping = False
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, _ = argument.partition("=")
            dropping = Flags.canonical(name) == flag
            if dropping and equals:
                dropping = False
                continue
        if not dropping:
            kept.append(argument)
    return kept


def _table(flags: Flags, max_k: int | None, ladder: Sequence[int] | None) -> dict[str, Any]:
    """Return what of a speculative configuration names the lengths to capture CUDA graphs for.

    vLLM's table is meant to say a length for each batch size, which the plugin decides otherwise;
    so each length stands for a batch size of its own.
    """
    key = "num_speculative_tokens_per_batch_size"
    drafter = _drafter(max_k) if "speculative-config" not in flags else drafter_of(flags)
    longest = drafter.get("num_speculative_tokens")
    if ladder is None and not _captures(flags, str(drafter.get("method"))):
        return {}
    if key in drafter or not isinstance(longest, int) or (ladder is not None and not ladder):
        return {}
    chosen = LADDER if ladder is None else ladder
    if wrong := [k for k in chosen if not 0 <= k <= longest and ladder is not None]:
        raise ConfigError(
            f"--ladder: K = {wrong[0]} is not from 0 to {longest}, the drafter's longest draft"
        )
    lengths = sorted({longest, *(k for k in chosen if k <= longest)}, reverse=True)
    most = _size(flags, "max-num-seqs", len(lengths))
    if len(lengths) > most:
        if ladder is None:
            return {}
        raise ConfigError(
            f"--ladder: {len(lengths)} draft lengths need --max-num-seqs {len(lengths)} or more, "
            f"it is {most}: vLLM has one for each batch size at most"
        )
    return {key: [[size, size, k] for size, k in enumerate(lengths, 1)]}


def _captures(flags: Flags, method: str) -> bool:
    """Return whether vLLM captures whole CUDA graphs for several draft lengths, as far as one sees.

    Its second runner does on a GPU, which it drops the table for where engines meet in each pass.
    """
    _, second = drafters.DRAFTERS.get(method, (None, drafters.Drafts.ALL))
    return (
        not machine.vllm_runs_on_cpu()
        and second is not None
        and os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1") != "0"
        and "enforce-eager" not in flags
        and _size(flags, "data-parallel-size") == 1
    )


def _launch(model: str, flags: Flags, arguments: Sequence[str], local_name: str | None) -> Launch:
    """Add what every server needs here."""
    ours: list[str] = []
    environment: dict[str, str] = {}
    if machine.vllm_runs_on_cpu():
        ours += _for_cpu(flags, local=local_name is not None)
        environment |= _cpu_environment(local=local_name is not None)
    if local_name is not None:
        environment["HF_HUB_OFFLINE"] = "1"
        if "max-model-len" not in flags:
            ours += ["--max-model-len", str(LOCAL_MAX_MODEL_LEN)]
        if "served-model-name" not in flags:
            ours += ["--served-model-name", local_name]
    try:
        port = int(flags.value("port", "8000"))
    except ValueError:
        raise ConfigError(f"--port {flags.value('port')}: give a number, such as 8000") from None
    return Launch(
        command=(*_entry(model), *ours, *arguments),
        environment=environment,
        model=flags.value("served-model-name", local_name or model),
        host=flags.value("host"),
        port=port,
        socket_path=flags.value("uds"),
    )


def _for_cpu(flags: Flags, *, local: bool) -> list[str]:
    """Return flags that work on a CPU, where the user did not decide.

    The local models are small enough for float32 where that is faster.
    """
    dtype = "float32" if local and not machine.multiplies_bfloat16() else "bfloat16"
    wanted = {"enforce-eager": ["--enforce-eager"], "dtype": ["--dtype", dtype]}
    return [word for name, words in wanted.items() if name not in flags for word in words]


def _cpu_environment(*, local: bool) -> dict[str, str]:
    """Return variables that vLLM wants on a CPU, where the user did not set them."""
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    return {"VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GIB[local])}


def _drafter(max_k: int | None) -> dict[str, Any]:
    """Return the default drafter with drafts of at most `max_k`."""
    if max_k is None:
        return DRAFTER
    if max_k < 1:
        raise ConfigError(f"--max-k {max_k}: must be at least 1; for no speculation: --policy off")
    return {**DRAFTER, "num_speculative_tokens": max_k}


def _plugin(
    flags: Flags,
    policy: str | None,
    max_k: int | None,
    logs: Mapping[str, Path | None],
    switches: Mapping[str, bool],
) -> list[str]:
    """Return the flags that switch the plugin on and configure it; check what was asked of it."""
    named = {f"--{name.replace('_', '-')}": path for name, path in logs.items()}
    chosen = {"--policy": policy, **named}
    asked = [f"{name} {value}" for name, value in chosen.items() if value is not None]
    asked += ["--live-page"] if switches["live_page"] else []
    if "scheduler-cls" in flags:
        if asked:
            raise ConfigError(
                f"{asked[0]} is for our scheduler, but --scheduler-cls "
                f"{flags.value('scheduler-cls')} replaces it; drop one of the two"
            )
        return []
    longest = max_k if max_k is not None else _longest_draft(flags)
    switch = ["--scheduler-cls", SCHEDULER, "--middleware", MIDDLEWARE]
    if "additional-config" in flags:
        if asked:
            raise ConfigError(
                f"{asked[0]} and --additional-config were both given; write it there instead: "
                f"""'{{"{CONFIG_KEY}": {{"policy": "...", "step_log": "..."}}}}'"""
            )
        if text := flags.value("additional-config"):
            try:
                server_options(json.loads(text), longest)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"--additional-config {text}: not JSON ({error}); put the whole of it in "
                    "single quotes and names in double quotes"
                ) from None
        return switch
    config: dict[str, Any] = {}
    if policy is not None:
        config["policy"] = policy
    config |= {name: str(path.absolute()) for name, path in logs.items() if path is not None}
    if logs.get("trace_log") is not None:
        config["trace_tokens"] = True
    config |= {name: True for name, on in switches.items() if on}
    server_options({CONFIG_KEY: config}, longest)
    return [*switch, "--additional-config", to_json({CONFIG_KEY: config})] if config else switch


def drafter_of(flags: Flags) -> Mapping[str, Any]:
    """Return the speculative configuration that `plan` serves with, as far as it can be read."""
    if "speculative-config" not in flags:
        return DRAFTER
    with suppress(ValueError):  # vLLM will say what is wrong with it
        found = json.loads(flags.value("speculative-config"))
        if isinstance(found, dict):
            return found
    return {}


def _longest_draft(flags: Flags) -> int:
    """Return the longest draft of the drafter that the user chose, as far as it can be read."""
    with suppress(ValueError, KeyError, TypeError):
        return int(drafter_of(flags)["num_speculative_tokens"])
    return ANY_K


def _entry(model: str) -> list[str]:
    """Return the command that starts a server: the first of vLLM's ways that works here.

    ``vllm serve`` does all that vLLM can, but needs the distribution to be called ``vllm``; CPU
    builds are not. The module behind it serves one engine, and moved from an old place to a new.
    """
    python = [sys.executable, "-m"]
    if machine.version("vllm") is not None:
        return [*python, "vllm.entrypoints.cli.main", "serve", model]
    new = "vllm.entrypoints.launchers.api_server.entry"
    old = "vllm.entrypoints.openai.api_server"
    return [*python, new if _exists(new) else old, "--model", model]


def _exists(module: str) -> bool:
    """Return whether a module of vLLM exists, without importing any of it."""
    found = importlib.util.find_spec("vllm")
    roots = (found.submodule_search_locations or []) if found else []
    path = Path(*module.split(".")[1:]).with_suffix(".py")
    return any((Path(root) / path).is_file() for root in roots)
