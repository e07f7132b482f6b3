"""The scheduler under a scripted model runner: any order of arrivals, aborts, preemptions, steps.

Nothing of a model runs, so thousands of steps take seconds; vLLM's scheduler and the engine's order
of calls are real. What the runner writes is made up: some of each draft is right, by chance.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from moecascade import policies
from moecascade.core import registry
from moecascade.policies import register
from tests.policies import RandomK

MAX_K = 4
BLOCK, BLOCKS = 32, 8
SPECS = ["off", f"static:{MAX_K}", "random", "cascade"]
CHANCE = st.randoms(use_true_random=False)


@pytest.fixture(autouse=True)
def own_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(policies.classes()))
    register(RandomK)


@functools.cache
def configuration(models: Path, ahead: bool) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(
        model=str(models / "target"),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=5,
        max_num_batched_tokens=12,
        block_size=BLOCK,
        speculative_config={
            "method": "draft_model",
            "model": str(models / "draft_model"),
            "num_speculative_tokens": MAX_K,
        },
        scheduler_cls="moecascade.vllm.Scheduler",
        async_scheduling=ahead,
    ).create_engine_config()
    made.scheduler_config.async_scheduling = ahead  # which the CPU platform switches off
    made.cache_config.num_gpu_blocks = BLOCKS
    return made


@functools.cache
def _hasher() -> Any:
    """Return what knows prompts that are in the cache already."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK, sha256)


def scheduler(config: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )


def padded_in(output: Any) -> set[str]:
    """Return the requests that begin with this step: vLLM pads some with drafts that are none."""
    begun = {request.req_id for request in output.scheduled_new_reqs}
    return begun | set(output.scheduled_cached_reqs.resumed_req_ids)


class Engine(RuleBasedStateMachine):
    """An engine core and its worker, of which only the scheduler is real."""

    models: Path
    acts: ClassVar[Counter[str]] = Counter()  # of all lives

    @initialize(ahead=st.booleans(), second=st.booleans())
    def start(self, ahead: bool, second: bool) -> None:
        self.scheduler = scheduler(configuration(self.models, ahead))
        self.scheduler.use_v2_model_runner = second
        self.ahead, self.second = ahead, second
        self.queue: deque[tuple[Any, dict[str, bool]]] = deque()
        self.names = 0
        self.got: dict[str, list[int]] = defaultdict(list)  # what users were given
        self.told: dict[str, list[int]] = defaultdict(list)  # what policies were shown
        self.drafted: dict[str, int] = {}  # tokens that the worker has for a request
        self.last: set[str] = set()
        ticks = itertools.count()  # a life is the same each time: nothing depends on the machine
        for clocked in (self.scheduler._clock, self.scheduler.controller):
            clocked._now = lambda: next(ticks) * 1e-4
        observe = self.scheduler.controller.observe

        def watched(step: Any) -> None:
            for part in step.requests:
                assert 0 <= part.emitted <= part.drafted + 1
                self.told[part.request_id] += part.tokens
            observe(step)

        self.scheduler.controller.observe = watched

    @rule(
        requests=st.integers(1, 4),
        prompt=st.integers(1, 60),
        longest=st.integers(1, 40),
        spec=st.sampled_from(SPECS),
        least=st.integers(0, 6),
    )
    def arrive(self, requests: int, prompt: int, longest: int, spec: str, least: int) -> None:
        for i in range(requests):
            self._add(prompt + i, longest, spec, least)

    def _add(self, prompt: int, longest: int, spec: str, least: int) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(
            temperature=0.0,
            max_tokens=longest,
            min_tokens=min(least, longest),
            ignore_eos=True,
            extra_args={"cascade_policy": spec},
        )
        self.names += 1
        tokens = [7 * i + 3 for i in range(prompt)]  # alike, so that prompts are in the cache
        name = f"r{self.names}"
        hasher = _hasher()
        self.scheduler.add_request(Request(name, tokens, params, None, block_hasher=hasher))

    @precondition(lambda self: self.scheduler.requests)
    @rule(chance=CHANCE)
    def abort(self, chance: Any) -> None:
        from vllm.v1.request import RequestStatus

        name = chance.choice(sorted(self.scheduler.requests))
        self.acts["aborted in a step"] += any(
            name in sent.num_scheduled_tokens for sent, _ in self.queue
        )
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    @rule(chance=CHANCE, steps=st.integers(1, 8))
    def run(self, chance: Any, steps: int) -> None:
        for _ in range(steps):
            if self.scheduler.has_requests():
                self._send()
            if self.queue and len(self.queue) > self.ahead:
                self._finish(chance)

    @precondition(lambda self: self.queue)
    @rule(chance=CHANCE)
    def wait(self, chance: Any) -> None:
        while self.queue:
            self._finish(chance)
        for request in self.scheduler.requests.values():
            assert request.num_output_placeholders == 0

    @invariant()
    def nothing_is_owed(self) -> None:
        if hasattr(self, "scheduler"):
            for request in self.scheduler.requests.values():
                assert request.num_output_placeholders >= 0

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        chance = random.Random(0)
        for _ in range(3000):
            if not self.scheduler.has_requests() and not self.queue:
                break
            self.run(chance, 1)
            while self.queue and not self.scheduler.has_requests():
                self._finish(chance)
        assert not self.scheduler.requests
        assert len(self.scheduler.controller) == 0
        assert self.scheduler._decisions == {}
        assert self.scheduler._under_way == []
        assert dict(self.scheduler.cascade_faults) == {}
        for name, tokens in self.got.items():  # each token once, in order
            assert self.told[name] == tokens

    def _send(self) -> None:
        output = self.scheduler.schedule()
        padded = padded_in(output)
        for name, drafts in output.scheduled_spec_decode_tokens.items():
            if name in padded:
                continue
            self.acts["drafted"] += len(drafts)
            assert len(drafts) <= self.drafted.get(name, 0)
            assert len(drafts) <= self.scheduler._decisions[name].k
            if self.ahead and not self.second:
                assert name in self.last or not drafts
        running = {request.request_id for request in self.scheduler.running}
        self.acts["steps"] += bool(output.num_scheduled_tokens)
        self.acts["left out"] += len((running & self.last) - output.num_scheduled_tokens.keys())
        self.acts["preempted"] += len(output.preempted_req_ids or ())
        self.last = set(output.num_scheduled_tokens)
        for name in output.num_scheduled_tokens:
            self.drafted[name] = output.num_spec_tokens_to_schedule
        chunks = {
            name: self.scheduler.requests[name].is_prefill_chunk
            for name in output.num_scheduled_tokens
        }
        self.queue.append((output, chunks))

    def _finish(self, chance: Any) -> None:
        from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

        output, chunks = self.queue.popleft()
        names = list(output.num_scheduled_tokens)
        written, padded = [], padded_in(output)
        for name in names:
            drafts = () if name in padded else output.scheduled_spec_decode_tokens.get(name, ())
            right = chance.randint(0, len(drafts)) if drafts else 0
            tokens = [chance.randrange(3, 1000) for _ in range(right + 1)]
            written.append([] if chunks[name] else tokens)
        places = {name: i for i, name in enumerate(names)}
        result = ModelRunnerOutput(names, places, sampled_token_ids=written)
        for made in self.scheduler.update_from_output(output, result).values():
            for of in made.outputs:
                self.got[of.request_id] += of.new_token_ids
        if not self.ahead and names:
            made_of = output.num_spec_tokens_to_schedule
            drafts_of = [[chance.randrange(3, 1000) for _ in range(made_of)] for _ in names]
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts_of))


@pytest.mark.engine
def test_requests_come_and_go_in_any_order(tiny_models: Path) -> None:
    """At least 2,000 steps: 200 lives of an engine, each of up to 40 acts of up to 8 steps."""
    from hypothesis.stateful import run_state_machine_as_test

    Engine.models = tiny_models
    run_state_machine_as_test(
        Engine,
        settings=settings(
            max_examples=200,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Engine.acts["steps"] > 2000
    assert min(Engine.acts.values()) > 20, Engine.acts
