"""`make bench-gpu`, small, on a CPU: every stage runs, and what it leaves can be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moecascade.evaluation import results
from tests.beside import Beside
from tests.conftest import Answer


@pytest.mark.engine
def test_all_stages_run_small_on_a_cpu(
    bench_gpu_run: tuple[Beside, Path], tmp_path: Path, cli: Callable[..., Answer]
) -> None:
    beside, made = bench_gpu_run
    status, said = beside.wait()
    logs = {path.name: path.read_text()[-800:] for path in made.glob("*.log")}
    assert status == 0, (said, logs)

    timed = results.read(made / "step-times-olmoe.json")
    curves = {(at["requests"], at["k"]): at["cost"] for at in timed.summary}
    assert set(curves) == {(n, k) for n in (1, 4) for k in range(9)}
    assert curves[1, 0] == curves[4, 0] == 1.0
    assert "differ from the plain engine's: {'off': 0," in logs["lossless-local.log"]
    measured = results.read(made / "policies-local" / "bench.json")
    assert {row["policy"] for row in measured.rows} == {"vllm", "off", "marginal"}
    page = (made / "report.html").read_text()
    assert "What verifying drafts costs" in page
    assert "olmoe" in page

    trace = {"id": "a", "task": "t", "prompt_token_ids": [1, 2, 3], "output_token_ids": [1, 2, 3]}
    (tmp_path / "t.jsonl").write_text(json.dumps(trace))
    file = made / "step-times-olmoe.json"
    assert cli("replay", tmp_path / "t.jsonl", "--cost", file, "--json").returncode == 0
    file.write_text(json.dumps({**json.loads(file.read_text()), "rows": []}))
    refused = cli("replay", tmp_path / "t.jsonl", "--cost", file)
    assert (refused.returncode, "no step times" in refused.stderr) == (2, True)
