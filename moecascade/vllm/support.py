"""What of vLLM is supported: versions, runners, topologies; the rest is refused at start.

Written against vLLM 0.32.0; `make test-matrix` runs it with 0.29 to 0.33.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moecascade.errors import ConfigError, SetupError
from moecascade.replay.planning import devices, plan
from moecascade.replay.planning.architecture import parse
from moecascade.replay.planning.step_time import Setup
from moecascade.vllm import compat, drafters

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.moecascade")  # below "vllm", whose handlers print it

OLDEST = (0, 29)
TESTED = (0, 33)
RANGE = f">={OLDEST[0]}.{OLDEST[1]},<{TESTED[0]}.{TESTED[1] + 1}"  # for pip

HOOKS: dict[str, tuple[str, ...]] = {
    "schedule": (),
    "_update_after_schedule": ("scheduler_output",),
    "update_from_output": ("scheduler_output", "model_runner_output"),
    "update_draft_token_ids": ("draft_token_ids",),
    "add_request": ("request",),
    "_free_request": ("request",),
    "set_pause_state": ("pause_state",),
    "shutdown": (),
}
"""Methods of vLLM's scheduler that the plugin extends, and what they have to be given."""


def check_version() -> None:
    """Raise SetupError where vLLM is missing or too old; warn where it is newer than tested."""
    found = compat.installed_version()
    wanted = f"vLLM {OLDEST[0]}.{OLDEST[1]} or newer"
    if found is None:
        raise SetupError(
            f"vLLM is not installed; moecascade needs {wanted}. Install it: pip install "
            f"'vllm{RANGE}' on a machine with a GPU; without one 'make setup' in a clone of "
            "moecascade does it all"
        )
    name, version = found
    numbers = compat.numbers(version)
    if numbers < OLDEST:
        raise SetupError(
            f"{name} {version} is too old; moecascade needs {wanted}. "
            f"Upgrade it: pip install '{name}{RANGE}'"
        )
    if numbers > TESTED:
        logger.warning(
            "moecascade was tested with vLLM %d.%d, this is %s: if something is wrong, "
            "start vLLM without --scheduler-cls and report it",
            *TESTED,
            version,
        )


def check_hooks(scheduler: type) -> None:
    """Raise SetupError where a method of vLLM's scheduler that we extend is another one."""
    strange = []
    for name, wanted in HOOKS.items():
        method = getattr(scheduler, name, None)
        if method is None:
            strange.append(f"has no {name}")
        elif (asked := _asked_for(method)) != wanted:
            strange.append(f"{name} takes ({', '.join(asked)}), not ({', '.join(wanted)})")
    if strange:
        raise SetupError(
            f"this vLLM's scheduler is not as moecascade knows it: {'; '.join(strange)}; it "
            f"supports vLLM {OLDEST[0]}.{OLDEST[1]} to {TESTED[0]}.{TESTED[1]}"
        )


def _asked_for(method: Callable[..., Any]) -> tuple[str, ...]:
    """Return the arguments that a method cannot do without, after the first."""
    _, *rest = inspect.signature(method).parameters.values()
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(p.name for p in rest if p.default is p.empty and p.kind not in optional)


def facts(config: VllmConfig) -> dict[str, Any]:
    """Return what policies may want to know of the target, the drafter and CUDA graphs."""
    graphs = drafters.ladder(config) if config.speculative_config else {}
    return {**model_facts(config), **drafters.search_facts(config), **graphs}


def expected_facts(config: VllmConfig, device: str) -> dict[str, list[float]]:
    """Return what the planner expects steps to take, where it knows model and device.

    Args:
        config: The engine's.
        device: What the driver calls the card.
    """
    model, parallel = config.model_config, config.parallel_config
    try:
        found = parse(str(model.model), model.hf_config.to_dict())
        split = parallel.tensor_parallel_size
        whole = bool(parallel.enable_expert_parallel)
        if whole:  # experts are spread over the ranks of data, too
            split *= parallel.data_parallel_size
        setup = Setup(devices.find(device), split, whole, compat.weight_bits(config))
        times = plan.expected_times(found, setup, max_k=drafters.max_k(config))
    except Exception as error:  # noqa: BLE001 -- configurations are of all kinds; a guess is a luxury
        logger.debug("moecascade: no plan of step times, they are learnt from nothing: %s", error)
        return {}
    return {"expected": times}


def model_facts(config: VllmConfig) -> dict[str, int]:
    """Return experts a layer, experts a token.

    Both are 1 for a dense model; what its configuration does not tell is left out.
    """
    text = config.model_config.hf_text_config
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    experts = next((n for name in names if (n := getattr(text, name, None))), 1)
    top_k = 1 if experts == 1 else getattr(text, "num_experts_per_tok", None)
    # Some models have lists here, a number for each modality.
    if not (isinstance(experts, int) and isinstance(top_k, int) and 1 <= top_k <= experts):
        return {}
    return {"experts": experts, "top_k": top_k}


def check_supported(config: VllmConfig) -> None:
    """Raise ConfigError, with reason and remedy, for what the plugin cannot serve."""
    in_advance = bool(config.scheduler_config.async_scheduling)
    drafters.check(config.speculative_config, shows_drafts=not in_advance)
    second, model, parallel = (
        drafters.second_runner(config),
        config.model_config,
        config.parallel_config,
    )
    if second and (model.is_hybrid or model.is_attention_free):
        # Read in the source of 0.32, not run: the order of a batch, and `mamba_attn`.
        raise ConfigError(
            "vLLM's second model runner is not supported here: there Mamba layers may read the "
            "wrong state for requests without drafts; start vLLM with VLLM_USE_V2_MODEL_RUNNER=0 "
            "in the environment"
        )
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        raise ConfigError(
            "distributed_executor_backend='external_launcher' runs a scheduler on every rank; K "
            "follows measured times, so they would come to differ; use 'mp'"
        )
    if parallel.pipeline_parallel_size > 1 and not (second and in_advance):
        raise ConfigError(pipeline(parallel.pipeline_parallel_size))
    context = getattr(parallel, "decode_context_parallel_size", 1)
    if context > 1:
        raise ConfigError(untried_context(context))


def untried_context(size: int) -> str:
    """Return what is to be said of decode-context parallelism."""
    return (
        f"decode_context_parallel_size={size} is not supported by moecascade, because nobody has "
        "tried drafts of different lengths with it; use 1"
    )


def pipeline(size: int) -> str:
    """Return what is to be said of pipeline parallelism where steps are scheduled in turn."""
    return (
        f"pipeline_parallel_size={size} is supported by moecascade with asynchronous scheduling on "
        "vLLM's second model runner only, because without it vLLM itself is not right with drafts "
        "(vLLM issue 52071); use 1, or a drafter that vLLM schedules asynchronously"
    )
