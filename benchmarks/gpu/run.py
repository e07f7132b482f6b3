"""All that a GPU can tell, one stage after the other, worth most first; then a report.

    make bench-gpu                                        # the paper's shapes, the local model
    make bench-gpu ARGS=--tiny                            # everything small: runs on CPUs as well
    python benchmarks/gpu/run.py --model Qwen/Qwen3-30B-A3B --drafter eagle3:org/head

A stage is a process of its own: what fails or takes too long costs no other. Its log lies beside
the results. What was measured before is kept; `--stages` runs some of them again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import shapes
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
POLICIES = "vllm,off,static:1,static:3,static:8,cascade,marginal"


@dataclass(frozen=True, slots=True)
class Stage:
    """Something to measure.

    Attributes:
        name: What it is called, also its log.
        command: What runs.
        minutes: After which it is ended.
    """

    name: str
    command: tuple[str, ...]
    minutes: float


def stages(asked: argparse.Namespace) -> Iterator[Stage]:
    """Yield the stages in the order of running."""
    python = sys.executable
    out = ("--out", str(asked.out))
    tiny = ("--tiny", "--turns", "2", "--steps", "4") if asked.tiny else ()
    models = asked.model or ["olmoe"] if asked.tiny else asked.model or list(shapes.SHAPES)
    for model in models:
        times = (python, str(HERE / "step_times.py"), model, *tiny, *out)
        if asked.tiny:
            times += ("--requests", "1,4")
        yield Stage(f"step-times-{Path(model).name}", times, 4)
    real = [model for model in models if model not in shapes.SHAPES] or ["local"]
    few = ("--prompts", "1", "--tokens", "24") if asked.tiny else ()
    for model in real:
        text = (python, str(HERE / "lossless.py"), model, "--drafter", asked.drafter, *few)
        yield Stage(f"lossless-{Path(model).name}", text, 5)
        if not asked.drafter.startswith(("ngram", "suffix")) and not asked.tiny:
            yield Stage(f"lossless-{Path(model).name}-async", (*text, "--async"), 5)
        yield Stage(f"policies-{Path(model).name}", _bench(model, asked), asked.minutes + 5)
    report = (python, "-m", "moecascade", "report", str(asked.out))
    yield Stage("report", report, 5)


def _bench(model: str, asked: argparse.Namespace) -> tuple[str, ...]:
    """Return the command that measures policies, and plain vLLM beside them."""
    command = [sys.executable, "-m", "moecascade", "bench", "--models", model, "--fresh"]
    command += ["--out", str(asked.out / f"policies-{Path(model).name}"), "--warm-up", "1"]
    method, _, head = asked.drafter.partition(":")
    if method != "ngram":
        chosen = {"method": method, "model": head, "num_speculative_tokens": 8}
        command += ["--speculative-config", json.dumps(chosen)]
    if asked.tiny:
        command += ["--policies", "vllm,off,marginal", "--prompts-per-task", "1"]
        command += ["--max-tokens", "24"]
    else:
        command += ["--policies", POLICIES, "--temperatures", "0,0.8"]
        command += ["--minutes", str(asked.minutes)]
    return tuple(command)


def run(stage: Stage, out: Path) -> str:
    """Run a stage; return what became of it."""
    with (out / f"{stage.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                stage.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=60 * stage.minutes,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"ended after {stage.minutes:g} minutes"
    return "done" if code == 0 else f"failed with code {code}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        action="append",
        help=f"{', '.join(shapes.SHAPES)}; a folder; a name on the hub; repeatable",
    )
    parser.add_argument("--drafter", default="ngram", help="METHOD or METHOD:MODEL")
    parser.add_argument("--minutes", type=float, default=10, help="for the policies of a model")
    parser.add_argument("--stages", default="", help="beginnings of names, with commas between")
    parser.add_argument("--tiny", action="store_true", help="everything small")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    wanted: Sequence[str] = tuple(filter(None, asked.stages.split(",")))
    screen = Console()
    became = {}
    for stage in stages(asked):
        if wanted and not stage.name.startswith(tuple(wanted)):
            continue
        began = time.monotonic()
        screen.print(f"{stage.name} ...", highlight=False)
        became[stage.name] = (run(stage, asked.out), time.monotonic() - began)
    table = Table("stage", "outcome", "seconds")
    for name, (outcome, seconds) in became.items():
        table.add_row(name, outcome, f"{seconds:.0f}")
    screen.print(table)
    screen.print(f"Results and logs: {asked.out}", highlight=False)
    sys.exit(any(outcome != "done" for outcome, _ in became.values()))


if __name__ == "__main__":
    main()
