"""The examples run as their first lines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*words: str | Path, **variables: str) -> str:
    """Run Python; return what it printed."""
    ran = subprocess.run(
        [sys.executable, *map(str, words)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )
    return ran.stdout


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Return two answers: drafts are right for long in one, and always wrong in the other."""
    path = tmp_path / "traces.jsonl"
    text = [list(range(7)) * 20, [token for n in range(60) for token in (1, 2, 100 + n)]]
    path.write_text(
        "".join(
            json.dumps({"id": f"r{i}", "task": "x", "prompt_token_ids": [1], "output_token_ids": t})
            + "\n"
            for i, t in enumerate(text)
        )
    )
    return path


def test_a_policy_of_ones_own_is_known_to_replay(traces: Path):
    printed = run(
        *("-m", "moecascade", "replay", traces, "--policies", "off,halving,static:8", "--json"),
        PYTHONPATH=str(EXAMPLES / "own_policy"),
        MOECASCADE_POLICIES="halving",
    )
    found = json.loads(printed)["policies"]
    assert found["off"]["mean_k"] == 0
    assert 0 < found["halving"]["mean_k"] < found["static:8"]["mean_k"]
    assert found["halving"]["speedup"] > 1


@pytest.mark.engine
def test_vllm_in_one_process_with_a_policy_of_ones_own():
    printed = run(
        EXAMPLES / "offline_llm.py",
        "halving",
        PYTHONPATH=str(EXAMPLES / "own_policy"),
        MOECASCADE_POLICIES="halving",
    )
    texts = [
        line.partition(": ")[2] for line in printed.splitlines() if line.startswith("halving: '")
    ]
    plain = [line.partition(": ")[2] for line in printed.splitlines() if line.startswith("off: '")]
    assert len(texts) == len(plain) == 1
    assert any(line.startswith("halving: ") and "drafts" in line for line in printed.splitlines())
