"""Fixtures: the real vLLM, in this process, on the local models.

One engine a drafter serves all tests of that drafter, in float32, where greedy output must not
depend on the draft length. Its KV cache is small, so that preemption can be provoked.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from moecascade.cli import app
from tests.beside import Awaited, Beside
from tests.matrix_runs import Runs

# A slow machine is no failure, and a first call may compile or import. The same examples each
# time: what chance finds must not fail somebody else's change. HYPOTHESIS_PROFILE=explore looks on.
hypothesis.settings.register_profile("moecascade", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "moecascade"))

# Read when vLLM is imported; nothing here imports it before.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engine and test share a process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# Threads of OpenMP that wait by spinning, each tied to a core, make little headway where a core has
# another busy process: with one beside them on two cores tests took 1.8 to 3.5 times as long. These
# sleep, and run where there is room: 1.1 to 1.2 times. Two libraries, each with its own names.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

TINY = pytest.StashKey[Path]()
MATRIX = pytest.StashKey[Runs]()
BENCH_GPU = pytest.StashKey[Beside]()
SOAK = pytest.StashKey[Beside]()

MAX_K = 8
MAX_LEN = 512
KV_BLOCKS = 10  # of 128 tokens: room for eight requests that begin, not for eight of 130 tokens

COLUMNS = 120  # of the terminal that commands print on

NGRAM = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}


Answer = subprocess.CompletedProcess[str]


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Answer]:
    """Return what calls the command line, in this process."""

    def call(*arguments: object) -> Answer:
        words = ["moecascade", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setenv("COLUMNS", str(COLUMNS))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.run()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Answer(words, code or 0, *capsys.readouterr())

    return call


@dataclass
class Engine:
    """A running vLLM with the plugin, and what tests ask of it."""

    llm: Any
    step_log: Path

    @property
    def core(self) -> Any:
        """vLLM's engine core, in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        """The plugin's scheduler."""
        return self.core.scheduler

    def generate(
        self,
        prompts: list[str],
        extra_args: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int = 64,
        **sampling: Any,
    ) -> list[list[int]]:
        """Return the greedy tokens of each prompt, all prompts served at once."""
        outputs = self.llm.generate(
            prompts, self.params(len(prompts), extra_args, max_tokens, **sampling), use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def params(
        self,
        n: int,
        extra_args: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
        max_tokens: int,
        **sampling: Any,
    ) -> list[Any]:
        """Return the sampling parameters of `n` greedy requests."""
        from vllm import SamplingParams

        each = (
            [extra_args] * n
            if extra_args is None or isinstance(extra_args, Mapping)
            else list(extra_args)
        )
        settings = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling}
        return [SamplingParams(extra_args=dict(a) if a else None, **settings) for a in each]

    def add(self, request_id: str, prompt: str, extra_args: Mapping[str, Any], tokens: int) -> None:
        """Add a request without running it."""
        (params,) = self.params(1, extra_args, tokens)
        self.llm.llm_engine.add_request(request_id, prompt, params)

    def step(self, steps: int = 1) -> None:
        """Run some steps, fewer where nothing is left to do."""
        for _ in range(steps):
            if self.llm.llm_engine.has_unfinished_requests():
                self.llm.llm_engine.step()

    def generate_logged(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[Any]]:
        """Return what `generate` returns, and the steps that the plugin logs meanwhile."""
        outputs: list[list[int]] = []
        steps = self.steps_of(lambda: outputs.extend(self.generate(*args, **kwargs)))
        return outputs, steps

    def steps_of(self, act: Callable[[], Any]) -> list[dict[str, Any]]:
        """Return the steps that the plugin logs while `act` runs."""
        from moecascade.telemetry import step_log

        before = sum(1 for _ in step_log.read(self.step_log)) if self.step_log.exists() else 0
        act()
        self.scheduler._recorder.flush(idle=True)
        return list(step_log.read(self.step_log))[before:]

    def drain(self) -> None:
        """Run until nothing is left, and let vLLM flush the requests that finished."""
        core = self.llm.llm_engine.engine_core.engine_core
        self.step(10_000)
        while core.scheduler.has_requests():
            core.step_fn()


def make_engine(step_log: Path, speculative: Mapping[str, Any], **settings: Any) -> Engine:
    """Start vLLM with the plugin on the local model."""
    from vllm import LLM

    from moecascade import localmodel

    arguments: dict[str, Any] = {
        "model": str(localmodel.ensure("local")),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_LEN,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": KV_BLOCKS,
        "seed": 0,
        "disable_log_stats": True,
        "scheduler_cls": "moecascade.vllm.Scheduler",
        "speculative_config": {"num_speculative_tokens": MAX_K, **speculative},
        "additional_config": {
            "cascade": {
                "step_log": str(step_log),
                "trace_log": str(step_log.with_name("traces.jsonl")),
                "trace_tokens": True,
            }
        },
        **settings,
    }
    return Engine(LLM(**arguments), step_log)


def stop_engine(engine: Engine) -> None:
    """Stop an in-process engine and give its memory back."""
    engine.llm.llm_engine.engine_core.shutdown()
    engine.llm = None
    gc.collect()


@pytest.fixture(scope="session")
def tiny_models(pytestconfig: pytest.Config) -> Path:
    """The folder of the models of `tests.tiny`."""
    return _tiny_models(pytestconfig)


def _tiny_models(config: pytest.Config) -> Path:
    from moecascade import localmodel
    from tests import tiny

    if (folder := config.stash.get(TINY, None)) is None:
        kept = tempfile.TemporaryDirectory(prefix="moecascade-tests-")
        config.add_cleanup(kept.cleanup)
        folder = config.stash[TINY] = Path(kept.name) / "models"
        tiny.build(folder, localmodel.ensure("draft"))
    return folder


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start what takes minutes and needs one core only, before the tests that ask for it."""
    if session.config.option.collectonly:
        return
    stems = {item.path.stem for item in session.items}
    stash, keep = session.config.stash, session.config.add_cleanup
    before: Awaited | None = None
    if "test_matrix" in stems:
        models = _tiny_models(session.config)
        before = stash[MATRIX] = runs = Runs(models, models.parent)
        keep(runs.end)
    if "test_bench_gpu" in stems:
        folder = _tiny_models(session.config).parent / "bench-gpu"
        command = ["benchmarks/gpu/run.py", "--tiny", "--out", str(folder / "results")]
        before = stash[BENCH_GPU] = beside = Beside(command, folder, before)
        keep(beside.end)
    if "test_soak" in stems:
        models = _tiny_models(session.config)
        command = ["benchmarks/soak.py", "--model", str(models / "target")]
        command += ["--minutes", "3" if os.environ.get("CI") else "1"]
        before = stash[SOAK] = beside = Beside(command, models.parent / "soak", before)
        keep(beside.end)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask last about what runs beside: it takes longest."""
    order = ("matrix_runs", "bench_gpu_run", "soak_run")

    def place(item: pytest.Item) -> int:
        asked = getattr(item, "fixturenames", ())
        return max((order.index(name) + 1 for name in asked if name in order), default=0)

    items.sort(key=place)


@pytest.fixture(scope="session")
def matrix_runs(pytestconfig: pytest.Config) -> Runs:
    """The engines of `tests.matrix`, which have been at work since tests were collected."""
    return pytestconfig.stash[MATRIX]


@pytest.fixture(scope="session")
def bench_gpu_run(pytestconfig: pytest.Config) -> tuple[Beside, Path]:
    """The small run of `make bench-gpu`, at work since the matrix was done, and its results."""
    return pytestconfig.stash[BENCH_GPU], _tiny_models(pytestconfig).parent / "bench-gpu/results"


@pytest.fixture(scope="session")
def soak_run(pytestconfig: pytest.Config) -> Beside:
    """The soak, which comes after that."""
    return pytestconfig.stash[SOAK]


@pytest.fixture(scope="session")
def ngram_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM with the plugin and n-gram drafting."""
    engine = make_engine(tmp_path_factory.mktemp("ngram") / "steps.jsonl", NGRAM)
    yield engine
    stop_engine(engine)


@pytest.fixture(scope="session")
def draft_model_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM with the plugin and a small draft model."""
    from moecascade import localmodel

    speculative = {"method": "draft_model", "model": str(localmodel.ensure("draft"))}
    engine = make_engine(tmp_path_factory.mktemp("draft") / "steps.jsonl", speculative)
    yield engine
    stop_engine(engine)
