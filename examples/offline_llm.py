"""vLLM in this process, with the plugin; afterwards the step log says what K was, and why.

    python examples/offline_llm.py [POLICY [MODEL]]

By default `marginal` on the small local mixture of experts.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from vllm import LLM, SamplingParams

from moecascade import localmodel
from moecascade.telemetry import step_log

PROMPT = "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. "


def main() -> None:
    """Generate under the policy and without speculation; count the drafts verified."""
    policy = sys.argv[1] if len(sys.argv) > 1 else "marginal"
    model = sys.argv[2] if len(sys.argv) > 2 else str(localmodel.ensure("local"))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps.jsonl"
        llm = LLM(
            model,
            max_model_len=512,
            enforce_eager=True,
            scheduler_cls="moecascade.vllm.Scheduler",
            speculative_config={
                "method": "ngram",
                "num_speculative_tokens": 8,
                "prompt_lookup_min": 2,
                "prompt_lookup_max": 4,
            },
            additional_config={"cascade": {"step_log": str(log)}},
        )
        for spec in (policy, "off"):
            params = SamplingParams(
                temperature=0.0, max_tokens=48, extra_args={"cascade_policy": spec}
            )
            (answer,) = llm.generate([PROMPT * 2], params, use_tqdm=False)
            print(f"{spec}: {answer.outputs[0].text!r}")
        llm.llm_engine.engine_core.shutdown()
        used = Counter(
            (part["policy"], part["drafted"])
            for step in step_log.read(log)
            for part in step["requests"]
        )
    for (spec, k), steps in sorted(used.items()):
        print(f"{spec}: {steps} steps verified {k} drafts")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; of use on CPUs only
    main()
