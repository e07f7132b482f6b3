"""Servers with several workers or engines, under `marginal`: the text is that of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moecascade.serving import command, server
from moecascade.serving.server import Server
from moecascade.telemetry import step_log
from moecascade.telemetry.metrics import PREFIX
from moecascade.vllm import compat
from tests import matrix

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = 50


@pytest.fixture(scope="module")
def expected(tiny_models: Path) -> list[list[int]]:
    """What one engine without drafts answers to the prompts of the matrix."""
    asked = [sys.executable, "-m", "tests.matrix", str(tiny_models), "first", "none of the cases"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    made = subprocess.run(
        asked, capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    target = next(line for line in made.stdout.splitlines() if '"target"' in line)
    answers: list[list[int]] = json.loads(target)["answers"]["text"]
    return answers


@pytest.fixture(params=["tensor", "data"])
def served(
    request: pytest.FixtureRequest,
    tiny_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[str, Path, list[str]]]:
    """A server's address, its step log, and the numbers of its engines."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    several = request.param == "data"
    if several:
        call_it_vllm(tmp_path / "site", monkeypatch)
    log = tmp_path / "steps.jsonl"
    drafter = {"method": "ngram", "num_speculative_tokens": matrix.MAX_K, **matrix.NGRAM}
    planned = command.plan(
        str(tiny_models / "target"),
        [
            *("--host", "127.0.0.1", "--port", str(server.free_port())),
            *("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8"),
            *(f"--{request.param}-parallel-size", "2"),
            *("--speculative-config", json.dumps(drafter)),
            *("--served-model-name", "tiny"),
        ],
        policy="marginal",
        step_log=log,
    )
    with Server(planned, tmp_path / "server.log") as running:
        running.wait_ready(600)
        assert ("ApiServer_1" in (tmp_path / "server.log").read_text()) == several
        yield running.launch.url, log, ["0", "1"] if several else ["0"]


def call_it_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU build go by the name of ``vllm``: then its command starts, and an API server more.

    ``vllm serve`` runs as many API servers as ranks, which the module behind it does not.
    """
    _, version = compat.installed_version() or ("", "")
    known = folder / f"vllm-{version}+cpu.dist-info"  # that is how vLLM knows what it was built for
    known.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (known / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    )


def test_answers_are_those_of_one_engine(
    served: tuple[str, Path, list[str]], expected: list[list[int]]
) -> None:
    url, log, engines = served

    def ask(i: int) -> Any:
        body = {
            "model": "tiny",
            "prompt": matrix.PROMPTS[i % len(matrix.PROMPTS)],
            "max_tokens": matrix.LENGTH,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    for i, answer in enumerate(answers):
        assert answer == expected[i % len(expected)]
    rows = [row for step in step_log.read(log) for row in step["requests"]]
    assert sum(row["drafted"] for row in rows) > 0

    emitted = Counter[str]()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.name == f"{PREFIX}tokens_emitted_total":
                emitted[sample.labels["engine"]] += int(sample.value)
    assert sorted(emitted) == engines  # each of them answers, whichever API server asks
    assert emitted.total() == REQUESTS * matrix.LENGTH
    assert min(emitted.values()) > 0
