"""The plugin in the real vLLM where steps are scheduled before the one before them is known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from moecascade import policies
from moecascade.core import registry
from moecascade.core.controller import Controller
from moecascade.core.options import ServerOptions, server_options
from moecascade.core.step import Proposal
from moecascade.errors import ConfigError
from moecascade.policies import register
from tests.conftest import MAX_K, Engine
from tests.test_vllm import PROMPTS, RandomK, left_as_it_was, policy

SPECS = ("off", "static:3", f"static:{MAX_K}", "cascade", "random")


@pytest.fixture(autouse=True)
def own_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(policies.classes()))
    register(RandomK)


@pytest.fixture
def engine(async_engine: Engine, request: pytest.FixtureRequest) -> Iterator[Engine]:
    yield from left_as_it_was(async_engine, request)
    assert async_engine.scheduler._under_way == []


@pytest.mark.engine
def test_the_engine_is_what_these_tests_are_about(engine: Engine) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    import moecascade.vllm

    assert isinstance(engine.scheduler, AsyncScheduler)
    assert isinstance(engine.scheduler, moecascade.vllm.Scheduler)
    assert engine.core.batch_queue is not None


@pytest.mark.engine
def test_greedy_output_is_that_of_a_synchronous_engine_without_drafts(
    engine: Engine, ngram_engine: Engine
) -> None:
    reference = ngram_engine.generate(PROMPTS, policy("off"), max_tokens=40)
    seen = {}
    for spec in SPECS:
        outputs, steps = engine.generate_logged(PROMPTS, policy(spec), max_tokens=40)
        assert outputs == reference, spec
        rows = [r for step in steps for r in step["requests"]]
        seen[spec] = Counter(r["drafted"] for r in rows if r["emitted"])
        # Every token is counted once, and no more is verified than was decided.
        emitted: Counter[str] = Counter()
        for r in rows:
            assert r["drafted"] <= r["k"]
            assert 0 <= r["emitted"] <= r["drafted"] + 1
            emitted[r["id"]] += r["emitted"]
        assert emitted.total() == sum(map(len, outputs))
    assert set(seen["off"]) == {0}
    assert {0, 3} <= set(seen["static:3"]) <= {0, 1, 2, 3}
    assert seen[f"static:{MAX_K}"][MAX_K] > 5
    assert len(seen["random"]) > 4
    assert max(seen["cascade"]) >= 1


@pytest.mark.engine
def test_drafts_are_accepted_and_counted(engine: Engine) -> None:
    """The draft model writes much as the target does: were its drafts lost, none would be right."""
    outputs, steps = engine.generate_logged([PROMPTS[1]], policy("static:3"), max_tokens=100)
    rows = [r for step in steps for r in step["requests"]]
    assert sum(r["emitted"] for r in rows) == len(outputs[0])
    assert sum(r["emitted"] - 1 for r in rows if r["drafted"]) > 30


@pytest.mark.engine
def test_requests_that_sit_out_a_step_lose_nothing(engine: Engine, ngram_engine: Engine) -> None:
    """Eight requests of nine tokens do not fit into a step of forty."""
    prompts = [f"{i}. {prompt}" for i, prompt in enumerate(PROMPTS + PROMPTS[:3])]
    reference = ngram_engine.generate(prompts, policy("off"), max_tokens=40)
    for spec in ("random", f"static:{MAX_K}"):
        outputs, steps = engine.generate_logged(prompts, policy(spec), max_tokens=40)
        assert outputs == reference, spec
        sizes = {len(step["requests"]) for step in steps if step["decode"]}
        assert len(sizes) > 2


@pytest.mark.engine
def test_preempted_and_aborted_requests_leave_nothing_and_disturb_nobody(engine: Engine) -> None:
    prompts = [f"{i}. {prompt}" for i, prompt in enumerate(PROMPTS + PROMPTS[:3])]
    length = 130  # with the prompt more than a block
    reference = engine.generate(prompts[:2], policy("off"), max_tokens=length)
    for i, prompt in enumerate(prompts):
        engine.add(f"r{i}", prompt, policy(["random", "cascade", "static:8"][i % 3]), length)
    requests: dict[str, Any] = {}
    outputs: dict[str, list[int]] = {}
    steps = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        requests.update(engine.scheduler.requests)
        for output in engine.llm.llm_engine.step():
            outputs[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps in (40, 41, 60):
            engine.llm.llm_engine.abort_request([f"r{steps % 40 + 3}"])
            requests.update(engine.scheduler.requests)
    assert sum(request.num_preemptions for request in requests.values()) > 0
    assert [outputs["r0"], outputs["r1"]] == reference
    assert len(outputs["r2"]) == length


@pytest.mark.engine
def test_penalties_and_log_probabilities_are_those_without_drafts(engine: Engine) -> None:
    sampling = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "min_tokens": 12, "logprobs": 2}

    def asked(spec: str) -> list[Any]:
        params = engine.params(len(PROMPTS), policy(spec), 32, **{**sampling, "ignore_eos": False})
        made = engine.llm.generate(PROMPTS, params, use_tqdm=False)
        return [
            (
                output.outputs[0].token_ids,
                [
                    {token: round(p.logprob, 3) for token, p in position.items()}
                    for position in output.outputs[0].logprobs
                ],
            )
            for output in made
        ]

    reference = asked("off")
    for spec in ("random", f"static:{MAX_K}"):
        assert [tokens for tokens, _ in asked(spec)] == [tokens for tokens, _ in reference]
    for (_, found), (_, wanted) in zip(asked("random"), reference, strict=True):
        for here, there in zip(found, wanted, strict=True):
            assert here == pytest.approx(there, abs=5e-3)


@pytest.mark.engine
def test_an_answer_with_a_grammar_is_that_without_drafts(engine: Engine) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

    def asked(spec: str) -> list[list[int]]:
        grammar = StructuredOutputsParams(json=json.dumps(schema))
        params = engine.params(3, policy(spec), 24, ignore_eos=False)
        params[1].structured_outputs = grammar
        made = engine.llm.generate(PROMPTS[:3], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in made]

    reference = asked("off")
    for spec in ("random", f"static:{MAX_K}"):
        assert asked(spec) == reference


@pytest.mark.engine
def test_a_policy_that_looks_at_drafts_is_not_to_be_had(engine: Engine) -> None:
    assert engine.scheduler.controller._options.policy == "cascade"
    faults = engine.scheduler.cascade_faults
    before = faults["policies"]
    reference = engine.generate(PROMPTS[:1], policy("off"))
    assert engine.generate(PROMPTS[:1], policy("marginal")) == reference
    assert faults.pop("policies") == before + 1  # told once; it ran under the server's policy


def test_where_drafts_are_not_shown_policies_that_need_them_are_refused() -> None:
    assert server_options({}, 8).policy == "marginal"
    assert server_options({}, 8, shows_drafts=False).policy == "cascade"
    chosen = server_options({"cascade": {"policy": "marginal"}}, 8, shows_drafts=False)
    assert chosen.policy == "marginal"
    faults: list[Any] = []
    for spec in ("marginal", "survival-budget", "marginal[crowd=2]"):
        with pytest.raises(ConfigError) as refused:
            Controller(ServerOptions(policy=spec), 8, lambda *f: faults.append(f), None, False)
        for words in (repr(spec), "asynchronous", "'cascade'", "--no-async-scheduling"):
            assert words in str(refused.value)


@pytest.mark.parametrize("spec", sorted({p for p in SPECS if p != "random"}))
def test_steps_decided_before_a_phase_began_say_nothing_about_it(spec: str) -> None:
    """Decisions one step late, as an asynchronous engine makes them: the same K in the end."""
    from moecascade.core.step import RequestStep, Step

    def settled(late: int) -> Counter[int]:
        made = policies.create(spec, MAX_K)
        made.add("r", MAX_K)
        sent: list[int] = []
        ks: Counter[int] = Counter()
        for _ in range(600):
            (decision,) = made.decide([Proposal("r", unseen=MAX_K)])
            sent.append(decision.k)
            if len(sent) > late:
                k = sent.pop(0)
                ks[k] += 1
                emitted = min(k, 2) + 1  # two drafts are right, always: K = 2 is the best
                part = RequestStep("r", k, emitted, [1] * emitted, k)
                made.observe(Step(0.02 * (1 + 0.4 * k), True, (part,)))
        return ks

    late, known = settled(1), settled(0)
    assert late.most_common(1)[0][0] == known.most_common(1)[0][0]
    if spec == "cascade":
        assert known[2] - late[2] < 30 < known[2]
