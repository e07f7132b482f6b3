"""`make bench-gpu`, small, on a CPU: every stage runs, and what it leaves can be used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moecascade.evaluation import results
from tests.conftest import Answer

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.engine
def test_all_stages_run_small_on_a_cpu(tmp_path: Path, cli: Callable[..., Answer]) -> None:
    script = str(ROOT / "benchmarks" / "gpu" / "run.py")
    command = [sys.executable, script, "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    logs = {path.name: path.read_text()[-800:] for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stdout, logs)

    timed = results.read(tmp_path / "step-times-olmoe.json")
    curves = {(at["requests"], at["k"]): at["cost"] for at in timed.summary}
    assert set(curves) == {(n, k) for n in (1, 4) for k in range(9)}
    assert curves[1, 0] == curves[4, 0] == 1.0
    assert "differ from the plain engine's: {'off': 0," in logs["lossless-local.log"]
    measured = results.read(tmp_path / "policies-local" / "bench.json")
    assert {row["policy"] for row in measured.rows} == {"vllm", "off", "marginal"}
    page = (tmp_path / "report.html").read_text()
    assert "What verifying drafts costs" in page
    assert "olmoe" in page

    trace = {"id": "a", "task": "t", "prompt_token_ids": [1, 2, 3], "output_token_ids": [1, 2, 3]}
    (tmp_path / "t.jsonl").write_text(json.dumps(trace))
    file = tmp_path / "step-times-olmoe.json"
    assert cli("replay", tmp_path / "t.jsonl", "--cost", file, "--json").returncode == 0
    file.write_text(json.dumps({**json.loads(file.read_text()), "rows": []}))
    refused = cli("replay", tmp_path / "t.jsonl", "--cost", file)
    assert (refused.returncode, "no step times" in refused.stderr) == (2, True)
