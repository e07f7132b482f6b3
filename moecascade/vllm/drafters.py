"""vLLM's drafters: which are served, and which of them can be told to draft less.

Written against vLLM 0.32.0. What is a test's, and what was read only: docs/compatibility.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from moecascade.errors import ConfigError, nearest
from moecascade.vllm import compat

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig


class Drafts(Enum):
    """How a drafter makes its tokens."""

    ONE_BY_ONE = "a forward pass a token, as many as it is told"
    ALL = "all that it can, whatever it is told"


# On vLLM's first and second model runner; None where vLLM itself does not have it. Of those that
# draft all, some do nothing else (0.32: `StandaloneARSpeculator`, the n-gram search on the second
# runner), and some must be told the full number (an assertion in `NgramProposerGPU`,
# `SuffixDecodingProposer`, `MedusaProposer`): they are, and only what is verified is cut.
DRAFTERS: dict[str, tuple[Drafts | None, Drafts | None]] = {
    "ngram": (Drafts.ALL, Drafts.ALL),
    "ngram_gpu": (Drafts.ALL, Drafts.ALL),
    "suffix": (Drafts.ALL, None),
    "draft_model": (Drafts.ONE_BY_ONE, Drafts.ALL),
    "eagle": (Drafts.ONE_BY_ONE, Drafts.ONE_BY_ONE),
    "eagle3": (Drafts.ONE_BY_ONE, Drafts.ONE_BY_ONE),
    "mtp": (Drafts.ONE_BY_ONE, Drafts.ONE_BY_ONE),
    "medusa": (Drafts.ALL, None),
    "dflash": (Drafts.ALL, Drafts.ALL),
    "dspark": (None, Drafts.ALL),
    "custom_class": (Drafts.ALL, None),
}

SEARCHES = ("ngram", "ngram_gpu", "suffix")
"""Drafters that look for the text's end in the text: with no match there is no draft."""


@dataclass(frozen=True, slots=True)
class Drafter:
    """The drafter of an engine.

    Attributes:
        max_k: The longest draft that the engine can verify.
        one_by_one: Whether each token costs a forward pass, and it makes no more than it is told.
        gaps: Whether -1 stands for what a search did not find; else it means that nobody tells.
        pads: Whether drafts are filled up with the text's last token: see `compat.without_fill`.
        idles: Whether it does nothing where it is told 0, though else it drafts all that it can.
        counted_late: Whether what drafting takes falls into the time of the step after.
    """

    max_k: int
    one_by_one: bool = False
    gaps: bool = False
    pads: bool = False
    idles: bool = False
    counted_late: bool = False


def max_k(config: VllmConfig) -> int:
    """Return the longest draft that an engine with a drafter can verify."""
    assert config.speculative_config is not None
    return int(config.speculative_config.num_speculative_tokens or 0)


def drafter(config: VllmConfig) -> Drafter:
    """Return what an engine's drafter is like; `check` has let it pass."""
    speculative = config.speculative_config
    assert speculative is not None
    second = second_runner(config)
    return Drafter(
        max_k=max_k(config),
        one_by_one=_how(speculative, second) is Drafts.ONE_BY_ONE and not _in_step(config),
        gaps=speculative.method == "ngram_gpu" and not second,
        pads=second and speculative.method in SEARCHES,
        idles=speculative.method == "ngram" and not second,  # 0.32: `NgramProposer.propose`
        # The second runner hands the tokens over before it drafts (0.32: `sample_tokens`).
        counted_late=second,
    )


def second_runner(config: VllmConfig) -> bool:
    """Return whether vLLM runs the model by its second runner, which GPUs have by default."""
    return bool(getattr(config, "use_v2_model_runner", False))


def _how(speculative: SpeculativeConfig, second: bool) -> Drafts | None:
    if getattr(speculative, "parallel_drafting", False):
        return Drafts.ALL  # all tokens in one pass
    if second and speculative.method == "mtp" and speculative.use_multi_module_mtp():
        return Drafts.ALL  # each module runs (0.32: `MultiModuleMTPSpeculator`)
    if second and not compat.second_runner_is_told():
        return Drafts.ALL
    return DRAFTERS[str(speculative.method)][second]


def _in_step(config: VllmConfig) -> bool:
    """Return whether other engines run the drafter's passes in step with this one.

    The ranks of a data-parallel mixture of experts meet in every pass, so all have to make as many.
    """
    return bool(getattr(config.parallel_config, "data_parallel_size", 1) > 1)


def ladder(config: VllmConfig) -> dict[str, tuple[int, ...]]:
    """Return the draft lengths that have whole CUDA graphs, as a setting of `marginal`.

    The second runner captures them for steps whose requests all verify as many: for the longest,
    or for those that `num_speculative_tokens_per_batch_size` names (0.32: `cudagraph_utils`). The
    first has none that drafts of another length than the longest could use.
    """
    if not second_runner(config):
        return {}
    mode = config.compilation_config.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        return {}
    most = max_k(config)
    assert config.speculative_config is not None
    table = config.speculative_config.num_speculative_tokens_per_batch_size
    lengths = {min(k, most) for _, _, k in table} if table else {most}
    return {"ladder": tuple(sorted(lengths))}


def search_facts(config: VllmConfig) -> dict[str, int]:
    """Return how a drafter searches the text, as settings of `marginal`; nothing for others."""
    speculative = config.speculative_config
    if speculative is None or speculative.method not in ("ngram", "ngram_gpu"):
        return {}
    return {
        "search_min": int(speculative.prompt_lookup_min or 0),
        "search_max": int(speculative.prompt_lookup_max or 0),
        "filled": second_runner(config),
    }


def check(speculative: SpeculativeConfig | None, *, shows_drafts: bool) -> None:
    """Raise ConfigError for what of --speculative-config the plugin cannot serve."""
    if speculative is None:
        raise ConfigError(
            "moecascade.vllm.Scheduler chooses draft lengths, but this engine has no drafter; add "
            """--speculative-config '{"method": "ngram", "num_speculative_tokens": 8, """
            """"prompt_lookup_min": 2, "prompt_lookup_max": 4}' or drop --scheduler-cls"""
        )
    check_method(str(speculative.method))
    if getattr(speculative, "enable_adaptive_verification", False):
        raise ConfigError(
            "enable_adaptive_verification and moecascade both choose how much of a draft is "
            "verified, and moecascade would count what vLLM cuts as rejected; remove it from "
            "--speculative-config"
        )
    if shows_drafts and getattr(speculative, "draft_sample_method", "greedy") != "greedy":
        raise ConfigError(
            f"draft_sample_method {speculative.draft_sample_method!r} is not supported with "
            "--no-async-scheduling: K would be chosen by looking at sampled drafts, which changes "
            'what is accepted and so the text; use "greedy", vLLM\'s default, or schedule '
            "asynchronously"
        )


def check_method(method: str) -> None:
    """Raise ConfigError for a drafter that is not supported."""
    if method in DRAFTERS or method.endswith("_mtp"):  # vLLM's older names of the models' own
        return
    raise ConfigError(
        f"speculative method {method!r} is not supported by moecascade"
        f"{nearest(method, DRAFTERS)}; allowed: {', '.join(DRAFTERS)}"
    )
