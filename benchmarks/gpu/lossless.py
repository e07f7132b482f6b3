"""Whether greedy text in float32 is the plain engine's, token by token, under every policy.

python benchmarks/gpu/lossless.py local
python benchmarks/gpu/lossless.py Qwen/Qwen3-30B-A3B --drafter eagle3:org/head --async
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from moecascade.evaluation.workloads import TASKS, own
from moecascade.localmodel.locate import find_model
from moecascade.serving import machine

MAX_K = 8
POLICIES = ("off", "static:1", "static:3", f"static:{MAX_K}", "cascade", "marginal")


def speculative(drafter: str) -> dict[str, Any]:
    """Return vLLM's configuration of a drafter given as METHOD or METHOD:MODEL."""
    method, _, model = drafter.partition(":")
    chosen: dict[str, Any] = {"method": method, "num_speculative_tokens": MAX_K}
    if method.startswith("ngram"):
        chosen |= {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    if model:
        chosen["model"] = find_model(model)[0]
    return chosen


def answers(llm: Any, policy: str | None, prompts: Sequence[str], tokens: int) -> list[list[int]]:
    """Return greedy answers, all prompts at once."""
    from vllm import SamplingParams

    extra = {"cascade_policy": policy} if policy else None
    params = SamplingParams(temperature=0, max_tokens=tokens, extra_args=extra)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    made = llm.chat(chats, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in made]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a local model, a folder, a name on the hub")
    parser.add_argument("--drafter", default="ngram", help="METHOD or METHOD:MODEL")
    parser.add_argument("--async", dest="ahead", action="store_true", help="schedule a step early")
    parser.add_argument("--prompts", type=int, default=4, help="of each of our tasks")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    asked = parser.parse_args()

    from vllm import LLM

    prompts = [prompt.prompt for task in TASKS for prompt in own(task)[: asked.prompts]]
    settings: dict[str, Any] = {
        "model": find_model(asked.model)[0],
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "disable_log_stats": True,
        "seed": 0,
    }
    if machine.vllm_runs_on_cpu():
        settings["kv_cache_memory_bytes"] = 1 << 30
    llm = LLM(**settings)
    plain = answers(llm, None, prompts, asked.tokens)
    llm.llm_engine.engine_core.shutdown()
    llm = LLM(
        **settings,
        scheduler_cls="moecascade.vllm.Scheduler",
        speculative_config=speculative(asked.drafter),
        async_scheduling=asked.ahead,
    )
    differ = {}
    for policy in POLICIES:
        made = answers(llm, policy, prompts, asked.tokens)
        differ[policy] = sum(a != b for a, b in zip(made, plain, strict=True))
        print(f"{policy}: {differ[policy]} of {len(prompts)} texts differ", file=sys.stderr)
    mode = "asynchronous" if asked.ahead else "synchronous"
    print(
        f"{asked.model}, {asked.drafter}, {mode}, greedy float32: {sum(map(len, plain))} tokens of "
        f"{len(prompts)} answers; answers that differ from the plain engine's: {differ}"
    )
    sys.exit(any(differ.values()))


if __name__ == "__main__":
    main()
