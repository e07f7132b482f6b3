"""What it costs to be seen: metrics, the live page open in a browser, the line in the log.

    python benchmarks/operating_cost.py [--rounds 12]

First what counting takes for a step, in microseconds, by batch. Then a real engine in this process,
whose rounds have everything on and off in turn, the order drawn each time: time of a step on over
off, the median over pairs of rounds and the middle half of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import threading
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from moecascade.core.options import CONFIG_KEY, RequestOptions, ServerOptions
from moecascade.core.step import Decision, Proposal, RequestStep, Step
from moecascade.localmodel.locate import find_model
from moecascade.serving.machine import caption, describe
from moecascade.telemetry.recorder import Recorder

BATCHES = (1, 8, 64, 256)
STEPS = 300
TOKENS = 96
REQUESTS = 4
ASK_EVERY = 1.0  # seconds, as an open page does; metrics are asked for as often here


def microseconds(batch: int, live_page: bool) -> float:
    """Return the median time of counting a step."""
    options = ServerOptions(live_page=live_page)
    recorder = Recorder(options, lambda *_: None, {"experts": 8, "top_k": 2})
    names = [f"r{n}" for n in range(batch)]
    for name in names:
        recorder.begin(name, RequestOptions(), (), "marginal")
    rng, times = random.Random(0), []
    decisions = {name: Decision(name, 3, "marginal") for name in names}
    for _ in range(STEPS):
        parts = tuple(
            RequestStep(name, 3, n, [1] * n) for name in names if (n := rng.randint(1, 4))
        )
        step = Step(rng.uniform(0.02, 0.03), True, parts)
        proposals = [Proposal(name, [1, 2, 3]) for name in names]
        began = time.perf_counter()
        recorder.propose(proposals)
        recorder.step(step, decisions, lambda _: "marginal", (1e-5, 1e-5))
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


class Watching:
    """Asks as an open page and a scraper do."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._done.wait(ASK_EVERY):
            for wanted in ("live", "metrics"):
                json.dumps(self._recorder.answer({"want": wanted}, 1))


def ratios(rounds: int, console: Console) -> dict[str, list[float]]:
    """Return time of a step with everything on over off, by policy."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM, SamplingParams

    path, _ = find_model("local", build=True)
    llm: Any = LLM(
        model=path,
        enforce_eager=True,
        max_model_len=1024,
        disable_log_stats=True,
        scheduler_cls="moecascade.vllm.Scheduler",
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 8,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        },
        additional_config={CONFIG_KEY: {"live_page": True}},
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    recorder = scheduler._recorder  # noqa: SLF001 -- nothing else switches it
    kept = {name: getattr(recorder, name).it for name in ("_metrics", "_live")}
    prompts = [
        f"A list of colours that repeats: red, green, blue, {n}, red," for n in range(REQUESTS)
    ]

    def a_round(spec: str, on: bool) -> float:
        for name, what in kept.items():
            getattr(recorder, name).it = what if on else None
        params = SamplingParams(
            temperature=0.0, max_tokens=TOKENS, ignore_eos=True,
            extra_args={"cascade_policy": spec, "cascade_task": "x"},
        )  # fmt: skip
        began = time.perf_counter()
        if on:
            with Watching(recorder):
                llm.generate(prompts, params, use_tqdm=False)
        else:
            llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    found: dict[str, list[float]] = {}
    rng = random.Random(0)
    for spec in ("off", "static:3"):  # both take as many steps each time
        a_round(spec, on=True)
        for number in range(rounds):
            order = [True, False] if rng.random() < 0.5 else [False, True]
            times = {on: a_round(spec, on) for on in order}
            found.setdefault(spec, []).append(times[True] / times[False])
            console.print(f"{spec}: round {number + 1} of {rounds}", end="\r")
    return found


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=12, help="pairs for each policy (default 12)")
    asked = parser.parse_args()
    console = Console()
    table = Table(title="Counting a step, microseconds (median)")
    table.add_column("")
    for batch in BATCHES:
        table.add_column(f"batch {batch}", justify="right")
    for name, live in (("metrics", False), ("metrics and live page", True)):
        table.add_row(name, *(f"{microseconds(batch, live):.0f}" for batch in BATCHES))
    console.print(table)
    found = ratios(asked.rounds, console)
    table = Table(title=f"Time of a step, everything on over off, {REQUESTS} requests")
    for name in ("policy", "median", "middle half"):
        table.add_column(name)
    for spec, each in found.items():
        low, middle, high = statistics.quantiles(each, n=4)
        table.add_row(spec, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)
    console.print(f"machine: {caption(describe())}")


if __name__ == "__main__":
    main()
