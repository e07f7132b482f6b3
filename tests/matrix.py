"""Run engines on tiny models, each with a drafter, a runner and a way of scheduling.

    python -m tests.matrix FOLDER first|second [CASE...]

A process of its own, because the second runner needs Triton's interpreter, which the first must not
have. It imports vLLM once and forks a child for each engine. Each writes what it saw as a line of
JSON to stdout; nothing is judged here.

Steps run when they are sent, so nothing overlaps in time; the order of calls, and what the
scheduler knows when, are those of a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moecascade.vllm import compat
from tests import tiny

MAX_K = tiny.MAX_K
TOKENS = 24  # of a step: longer prompts are split, and five requests with four drafts do not fit
BLOCK, BLOCKS = 32, 9  # of the KV cache: less than five long requests need
LENGTH = 40  # of an answer; of what the second runner writes, which takes long, the beginning:
BEGINNING = 26
SPECS = ("off", f"static:{MAX_K}", "random", "cascade", "marginal")
SAMPLES, SAMPLED = 250, 8  # answers at a temperature, and their tokens

LENGTHS = (30, 7, 22, 3, 70)
_random = random.Random(0)
PROMPTS = [[_random.randrange(20, 2000) for _ in range(n)] for n in LENGTHS]
PROMPTS[2] = PROMPTS[2][:6] * 3 + PROMPTS[2][:4]  # for the drafters that search

VLLM = compat.numbers((compat.installed_version() or ("", "0"))[1])
FIRST = ("ngram", "ngram_gpu", "draft_model", "eagle", "eagle3", "mtp", "custom")
MEDUSA = ("medusa",) if VLLM < (0, 33) else ()  # gone since
CASES: dict[str, dict[str, tuple[str, ...]]] = {
    "first": {
        "sync": (*FIRST, *MEDUSA),
        "async": ("ngram_gpu", "draft_model", "eagle", "eagle3", "mtp"),
    },
    "second": {  # which wants a real Triton before 0.32
        "sync": ("ngram", "draft_model", "eagle", "eagle3", "mtp"),
        "async": ("ngram_gpu", "draft_model", "eagle", "eagle3", "mtp"),
    }
    if VLLM >= (0, 32)
    else {},
}
NGRAM = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}


def specs_of(runner: str, method: str) -> tuple[str, ...]:
    """Return the policies that a case tries: on the second runner, which takes long, the least."""
    if runner == "first":
        return SPECS
    return (*SPECS[:3], "marginal") if method in ("eagle", "ngram_gpu") else SPECS[:3]


class CustomDrafter:
    """A drafter of the user's own (method `custom_class`): the token after each one's last use."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def load_model(self, *_: Any, **__: Any) -> None: ...

    def propose(
        self, sampled: Sequence[Sequence[int]], lengths: Any, tokens: Any, **_: Any
    ) -> list[list[int]]:
        """Return a draft for each request of the batch."""
        drafts: list[list[int]] = []
        for i, new in enumerate(sampled):
            text = tokens[i, : lengths[i]].tolist()
            at = [j for j, token in enumerate(text[:-1]) if token == text[-1]]
            drafts.append(text[at[-1] + 1 :][: MAX_K - 1] if new and at else [])
        return drafts


def speculative(method: str, models: Path) -> dict[str, Any]:
    """Return the configuration of a drafter."""
    if method == "mtp":
        return {"method": "mtp"}
    if method == "custom":
        return {"method": "custom_class", "model": "tests.matrix.CustomDrafter"}
    if method.startswith("ngram"):
        return {"method": method, **NGRAM}
    return {"method": method, "model": str(models / method)}


def main(models: Path, runner: str, wanted: Sequence[str]) -> None:
    """Run the cases, one after the other; plain engines first."""
    _prepare(runner)
    if runner == "first":  # the others are compared with it
        for name in ("target", "mtp"):
            made = _in_child(partial(_plain, models / name))
            print(json.dumps({"case": name, **made}), flush=True)
    for mode, methods in CASES[runner].items():
        for method in methods:
            case = f"{runner} {mode} {method}"
            if not wanted or {case, mode, method} & set(wanted):
                seen = _in_child(partial(_drafted, models, method, mode == "async", runner))
                print(json.dumps({"case": case, **seen}), flush=True)


def _prepare(runner: str) -> None:
    """Set the process up, before vLLM is imported."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        TORCH_COMPILE_DISABLE="1",
        OMP_NUM_THREADS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_USE_V2_MODEL_RUNNER="1" if runner == "second" else "0",
    )
    if runner == "second":
        _interpret()
    import torch

    torch.set_num_threads(1)
    import vllm  # noqa: F401
    from vllm.platforms import current_platform

    platform = type(current_platform)
    theirs = platform.__dict__["check_and_update_config"].__func__

    def check(cls: Any, config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling  # which 0.32 switches off at the end
        theirs(cls, config)
        config.scheduler_config.async_scheduling = wanted

    platform.check_and_update_config = classmethod(check)
    zeros = torch.zeros

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return zeros(*args, **kwargs)

    torch.zeros = unpinned  # without a GPU no memory can be pinned

    from moecascade.policies import register
    from tests.policies import RandomK

    register(RandomK)


def _interpret() -> None:
    """Let Triton's kernels, of which the second runner is made, be interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.backends  # type: ignore[import-untyped]
    from triton.runtime import interpreter  # type: ignore[import-untyped]

    class Driver:
        is_active = staticmethod(lambda: True)

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
    builder = interpreter.InterpreterBuilder
    for name, at in (("create_masked_load", 1), ("create_masked_store", 2)):
        theirs = getattr(builder, name)

        def call(self: Any, *args: Any, theirs: Any = theirs, at: int = at) -> Any:
            mask = args[at]  # some are whole numbers, which the interpreter refuses
            if mask is not None and mask.data.dtype != bool:
                mask = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
            return theirs(self, *args[:at], mask, *args[at + 1 :])

        setattr(builder, name, call)


def _in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` returns in a process of its own, or why it does not."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(2, 1)  # vLLM prints
                file.write(json.dumps(work()))
            except BaseException:  # noqa: BLE001 -- reported below
                file.write(json.dumps({"error": traceback.format_exc()[-3000:]}))
            file.flush()
            os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        return json.loads(file.read() or '{"error": "the process died"}')  # type: ignore[no-any-return]


def _engine(model: Path, **settings: Any) -> Any:
    from vllm import LLM

    return LLM(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=TOKENS,
        block_size=BLOCK,
        num_gpu_blocks_override=BLOCKS,
        seed=0,
        disable_log_stats=True,
        **settings,
    )


def _params(spec: str = "", **settings: Any) -> Any:
    from vllm import SamplingParams

    extra = {"cascade_policy": spec} if spec else None
    length = BEGINNING if os.environ.get("TRITON_INTERPRET") else LENGTH
    chosen = {"temperature": 0.0, "max_tokens": length, "ignore_eos": True, **settings}
    return SamplingParams(extra_args=extra, **chosen)


def _answers(llm: Any, spec: str = "") -> dict[str, Any]:
    """Return what an engine answers to what tests ask, with nothing but K to tell runs apart."""
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]

    def ask(params: Any, asked: Sequence[Any] = prompts) -> list[Any]:
        return [made.outputs[0] for made in llm.generate(asked, params, use_tqdm=False)]

    def tokens(outputs: Sequence[Any]) -> list[list[int]]:
        return [list(output.token_ids) for output in outputs]

    answers: dict[str, Any] = {"text": tokens(ask(_params(spec)))}
    # Some tokens end an answer, as soon as it is long enough.
    ending = _params(spec, max_tokens=40, min_tokens=11, stop_token_ids=list(range(20, 2048, 17)))
    answers["ending"] = tokens(ask(ending))
    # All of the prompt is cached now, but for its last token.
    cached = [
        {"prompt_token_ids": prompt[: len(prompt) // BLOCK * BLOCK + 1]} for prompt in PROMPTS
    ]
    answers["cached"] = tokens(ask(_params(spec, max_tokens=8), cached[4:]))
    return answers


def _slower_answers(llm: Any, spec: str = "") -> dict[str, Any]:
    """Return answers with what costs the interpreter a second a step."""
    from vllm.sampling_params import StructuredOutputsParams

    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:3]]
    penal = _params(
        spec,
        max_tokens=16,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        min_tokens=9,
        logprobs=2,
        ignore_eos=False,
    )
    made = [output.outputs[0] for output in llm.generate(prompts, penal, use_tqdm=False)]
    answers = {
        "penalties": [list(output.token_ids) for output in made],
        "logprobs": [
            [sorted((token, p.logprob) for token, p in at.items()) for at in output.logprobs]
            for output in made
        ],
    }
    params = [_params(spec, max_tokens=16, ignore_eos=False) for _ in prompts]
    params[1].structured_outputs = StructuredOutputsParams(regex="[abc]{4,9}(x|yz)+!")
    made = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    answers["grammar"] = [list(output.token_ids) for output in made]
    return answers


def _sampled(llm: Any, spec: str = "", samples: int = SAMPLES) -> list[list[int]]:
    """Return answers to one prompt at a temperature of 0.8."""
    params = _params(spec, temperature=0.8, max_tokens=SAMPLED)
    made = llm.generate([{"prompt_token_ids": PROMPTS[3]}] * samples, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in made]


def _plain(model: Path) -> dict[str, Any]:
    llm = _engine(model)
    answers = {**_answers(llm), **_slower_answers(llm), "sampled": _sampled(llm, samples=1000)}
    return {"answers": answers}


def _drafted(models: Path, method: str, ahead: bool, runner: str) -> dict[str, Any]:
    """Return the answers of an engine with a drafter under each policy, and what it did."""
    folder = Path(tempfile.mkdtemp())
    llm = _engine(
        models / ("mtp" if method == "mtp" else "target"),
        async_scheduling=ahead,
        scheduler_cls="moecascade.vllm.Scheduler",
        speculative_config={"num_speculative_tokens": MAX_K, **speculative(method, models)},
        additional_config={"cascade": {"step_log": str(folder / "steps.jsonl")}},
    )
    core = llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    from moecascade.telemetry import step_log

    began = time.monotonic()
    seen: dict[str, Any] = {"answers": {}, "counts": {}, "preempted": 0}
    passes = _count_passes(core)
    read = 0
    with _watching(scheduler, seen):
        for spec in specs_of(runner, method):
            passes.clear()
            answers = _answers(llm, spec)
            if runner == "first" or (spec == "random" and method == "eagle"):
                answers |= _slower_answers(llm, spec)
            seen["answers"][spec] = answers
            scheduler._recorder.flush(idle=True)
            steps = list(step_log.read(folder / "steps.jsonl"))[read:]
            read += len(steps)
            rows = [row for step in steps for row in step["requests"]]
            seen["counts"][spec] = {
                "steps": len(steps),
                "drafted": sum(row["drafted"] for row in rows),
                "accepted": sum(max(0, row["emitted"] - 1) for row in rows if row["drafted"]),
                "emitted": sum(row["emitted"] for row in rows),
                "too many": sum(row["drafted"] > row["k"] for row in rows),
                "sizes": sorted({len(step["requests"]) for step in steps if step["decode"]}),
                "passes": sum(passes),
            }
        seen["aborted"] = _aborted(llm)
        seen["sampled"] = _sampled(llm, "random") if method == "eagle" else []
    if ahead:
        seen["unseen"] = _answers(llm, "survival-budget")["text"]
        seen["unseen faults"] = dict(scheduler.cascade_faults)
        scheduler.cascade_faults.clear()
    while scheduler.has_requests() or core.batch_queue:
        core.step_fn()
    seen["left"] = {
        "controller": len(scheduler.controller),
        "decisions": len(scheduler._decisions),
        "under way": len(scheduler._under_way),
        "faults": dict(scheduler.cascade_faults),
        "placeholders": sum(r.num_output_placeholders for r in scheduler.requests.values()),
    }
    seen["seconds"] = time.monotonic() - began
    seen["scheduler"] = [base.__name__ for base in type(scheduler).__mro__]
    worker = core.model_executor.driver_worker.worker
    seen["runner"] = type(worker.model_runner).__module__
    return seen


@contextlib.contextmanager
def _watching(scheduler: Any, seen: dict[str, Any]) -> Iterator[None]:
    """Count preemptions, and requests whose prompt is split."""
    theirs = scheduler._preempt_request

    def preempt(*args: Any, **kwargs: Any) -> Any:
        seen["preempted"] += 1
        return theirs(*args, **kwargs)

    scheduler._preempt_request = preempt
    yield
    scheduler._preempt_request = theirs


def _count_passes(core: Any) -> list[int]:
    """Return a list that gets the length to which a drafter is told to draft, each step."""
    told: list[int] = []
    theirs = core.model_executor.execute_model

    def execute(output: Any, *args: Any, **kwargs: Any) -> Any:
        if output.total_num_scheduled_tokens:
            told.append(output.num_spec_tokens_to_schedule)
        return theirs(output, *args, **kwargs)

    core.model_executor.execute_model = execute
    return told


def _aborted(llm: Any) -> list[list[int]]:
    """Return the answers of requests beside which two were aborted while a step was under way."""
    engine = llm.llm_engine
    for i, prompt in enumerate(PROMPTS):
        spec = ("random", f"static:{MAX_K}", "cascade")[i % 3]
        engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, _params(spec))
    answers: dict[str, list[int]] = {}
    for step in range(10_000):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
        if step in (8, 11):
            engine.abort_request([f"r{1 if step == 8 else 3}"])
    return [answers[f"r{i}"] for i in (0, 2, 4)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
