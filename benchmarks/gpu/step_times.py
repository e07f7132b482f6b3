"""What a step costs by the drafts that it verifies, on the machine at hand.

    python benchmarks/gpu/step_times.py olmoe --out results/gpu
    python benchmarks/gpu/step_times.py Qwen/Qwen3-30B-A3B --requests 1,8 --out results/gpu
    moecascade replay traces.jsonl --cost results/gpu/step-times-olmoe.json

A model is one of the paper's shapes with random weights (`shapes.py`), a folder, or a name on the
hub. Drafts are random tokens, so that hardly one is accepted and each step verifies what it was
told. K goes up and down at random over several passes, so that drift cancels.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # drafts are replaced in this process
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
import shapes

from moecascade.evaluation import results
from moecascade.evaluation.request_record import BASELINE, Row, summed, tally
from moecascade.serving import machine
from moecascade.telemetry import step_log

MAX_K = 8
PROMPT = 128  # tokens
SIZES = [*range(1, 17), 20, 24, 32, 36, 48, 64, 72, 96, 144, 288]  # that CUDA graphs are made for


def draft_at_random(vocabulary: int) -> None:
    """Let the n-gram drafters of both model runners propose as many random tokens as can be."""
    import torch
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    draw = random.Random(0)

    def propose(
        _self: Any, length: int, sampled: Sequence[Sequence[int]], *_: Any, **__: Any
    ) -> list[list[int]]:
        return [
            [draw.randrange(10, vocabulary) for _ in range(length)] if new else []
            for new in sampled
        ]

    NgramProposer.propose = propose
    try:
        from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
    except ImportError:  # no Triton: the first runner only
        return
    theirs = NgramGPUSpeculator.propose

    def scattered(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = theirs(self, *args, **kwargs)
        with torch.inference_mode():
            drafts.random_(10, vocabulary)
        return drafts

    NgramGPUSpeculator.propose = scattered


def engine(model: str, log: Path, scratch: Path, asked: argparse.Namespace) -> Any:
    """Start vLLM with the plugin."""
    from vllm import LLM

    shape = model in shapes.SHAPES
    settings: dict[str, Any] = {
        "model": str(shapes.write(model, scratch, tiny=asked.tiny)) if shape else model,
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": max(32, *asked.requests),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
        "async_scheduling": False,  # K is told right before the step that has it
        "scheduler_cls": "moecascade.vllm.Scheduler",
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": MAX_K,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        },
        "additional_config": {"cascade": {"policy": BASELINE, "step_log": str(log)}},
    }
    if shape:
        settings["load_format"] = "dummy"
    if shape and model in shapes.FP8 and not asked.tiny:
        settings["quantization"] = "fp8_per_tensor"
    if asked.eager or asked.tiny or machine.vllm_runs_on_cpu():
        settings["enforce_eager"] = True
    else:
        settings["compilation_config"] = {
            "mode": 0,  # graphs, but no compiling for minutes
            "cudagraph_mode": "FULL",
            "cudagraph_capture_sizes": SIZES,
        }
    if machine.vllm_runs_on_cpu():
        settings["kv_cache_memory_bytes"] = 512 << 20
    llm = LLM(**settings)
    if shape:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        shapes.spread(getattr(runner, "model", None) or runner.get_model())
    return llm


class Measured:
    """An engine, and its step log as far as it has not been read."""

    def __init__(self, llm: Any, log: Path, model: str) -> None:
        self._engine = llm.llm_engine
        self._vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        self._read = step_log.Reader(log)
        self._model = model
        self._number = 0

    def run(self, k: int, requests: int, tokens: int, turn: int) -> list[Row]:
        """Run some requests at one K, and return what the engine's log says of them."""
        from vllm import SamplingParams

        policy = f"static:{k}" if k else BASELINE
        params = SamplingParams(
            temperature=0,
            max_tokens=tokens + MAX_K + 1,  # drafts never reach beyond it
            ignore_eos=True,
            detokenize=False,
            extra_args={"cascade_policy": policy},
        )
        names = []
        for i in range(requests):
            self._number += 1
            names.append(f"mc-00000000-{self._number:05d}")
            draw = random.Random(i)
            prompt = [draw.randrange(10, self._vocabulary) for _ in range(PROMPT)]
            self._engine.add_request(names[-1], {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        found = tally(self._read())
        return [self._row(names, i, found[name], policy, turn) for i, name in enumerate(names)]

    def _row(self, names: list[str], i: int, steps: Any, policy: str, turn: int) -> Row:
        whole = [step for step in steps if len(steps) < 3 or step is not steps[-1]]
        told = summed(whole)
        assert told is not None
        seconds = told.seconds or 0.0
        return Row(
            run=f"step-times-{turn}",
            request=names[i],
            model=self._model,
            prompt=f"random-{i}",
            task="random drafts",
            policy=policy,
            temperature=0.0,
            concurrency=len(names),
            block=names[0],
            block_seconds=seconds,
            place=0,
            seed=i,
            prompt_tokens=PROMPT,
            tokens=told.emitted + 1,
            decoded=told.emitted,
            first_seconds=0.0,
            decode_seconds=seconds,
            gaps=None,
            finish_reason="length",
            engine=told,
        )


def curves(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield for each number of requests the time of a step by K, in milliseconds and over K = 0."""
    for requests in sorted({row.concurrency for row in rows}):
        times: dict[int, list[float]] = {}
        for row in rows:
            if row.concurrency == requests and row.engine:
                for at in row.engine.by_k:
                    if at.seconds:
                        times.setdefault(at.drafted, []).append(1e3 * at.seconds / at.steps)
        middle = {k: statistics.median(values) for k, values in sorted(times.items())}
        quartiles = {k: np.percentile(values, [25, 75]).tolist() for k, values in times.items()}
        for k, ms in middle.items():
            yield {
                "requests": requests,
                "k": k,
                "ms": ms,
                "quartiles_ms": quartiles[k],
                "cost": ms / middle[0],
            }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"{', '.join(shapes.SHAPES)}; a folder; a name on the hub")
    parser.add_argument("--requests", default="1,4,16", help="at once, with commas between")
    parser.add_argument("--turns", type=int, default=3, help="over all K")
    parser.add_argument("--steps", type=int, default=24, help="at each K, of each answer")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a shape with two narrow layers")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    asked = parser.parse_args()
    asked.requests = [int(n) for n in asked.requests.split(",")]

    name = Path(asked.model).name
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="moecascade-") as scratch:
        log = Path(scratch) / "steps.jsonl"
        llm = engine(asked.model, log, Path(scratch), asked)
        config = llm.llm_engine.vllm_config
        draft_at_random(config.model_config.get_vocab_size())
        measured = Measured(llm, log, name)
        draw = random.Random(0)
        for requests in asked.requests:
            for k in range(MAX_K + 1):  # kernels are compiled and tuned at first use
                measured.run(k, requests, 4, 0)
            for turn in range(asked.turns):
                for k in draw.sample(range(MAX_K + 1), MAX_K + 1):
                    rows += measured.run(k, requests, asked.steps, turn)
            shown = " ".join(
                f"{at['cost']:.2f}" for at in curves(rows) if at["requests"] == requests
            )
            print(f"{name}, {requests} at once: {shown}", file=sys.stderr, flush=True)
        about = {
            "name": name,
            "tiny": asked.tiny,
            "second_runner": bool(getattr(config, "use_v2_model_runner", False)),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "quantization": config.model_config.quantization,
            "dtype": str(config.model_config.dtype),
        }
        found = results.collect(
            results.STEP_TIMES,
            arguments={key: value for key, value in vars(asked).items() if key != "out"},
            models=[about],
            servers=[],
            rows=[results.plain(row) for row in rows],
            summary=list(curves(rows)),
        )
        path = asked.out / f"step-times-{name}.json"
        results.write(path, found)
    print(path)


if __name__ == "__main__":
    main()
