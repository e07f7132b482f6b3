"""Policies on models and devices that are not here: replay, with step times of the planner.

Half of the paper's method: five models, seven workloads, one device. What is said in a workload is
recorded text; what a step takes is `planning`'s; the policies are those that serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy as np

from moecascade.errors import ConfigError
from moecascade.replay.planning.architecture import Model
from moecascade.replay.planning.plan import Profile
from moecascade.replay.planning.step_time import Drafter, Setup, by_positions, drafting_time
from moecascade.replay.player import ReplayConditions, play, summarise
from moecascade.telemetry.traces import Trace

PAPER = (
    "mistralai/Mixtral-8x7B-v0.1",
    "microsoft/Phi-3.5-MoE-instruct",
    "allenai/OLMoE-1B-7B-0924",
    "deepseek-ai/deepseek-moe-16b-base",
    "Qwen/Qwen1.5-MoE-A2.7B",
)
"""The models of the paper, of which it ran the first three in FP8 (section 6)."""
IN_FP8 = PAPER[:3]


@dataclass(frozen=True, slots=True)
class Fared:
    """A policy on a workload of a model.

    Attributes:
        model: The model's name.
        workload: Name of the mix of tasks.
        policy: Spec.
        speedup: Over no speculation, mean over the seeds.
        worst: Of a single long answer, lowest over the seeds.
    """

    model: str
    workload: str
    policy: str
    speedup: float
    worst: float


def conditions_of(
    model: Model,
    setup: Setup,
    drafter: Drafter,
    *,
    max_k: int,
    batch: int = 1,
    context: int = 1024,
    noise: float = 0.05,
    late: bool = False,
    ngram_min: int = 1,
    ngram_max: int = 4,
) -> ReplayConditions:
    """Return the engine that replay simulates: this model on this device.

    Args:
        model: What is served.
        setup: Where.
        drafter: Who drafts: a search, or a model whose drafts are in the traces.
        max_k: Longest draft.
        batch: Requests at once.
        context: Tokens of each.
        noise: Sigma of the log-normal noise on each step's time.
        late: Whether K is decided a step early, drafts unseen.
        ngram_min: Least length of a match; of vLLM 0.6, which the paper ran, 1 by default.
        ngram_max: Greatest length of a match.
    """
    times = by_positions(model, setup, requests=batch, max_k=max_k, context=context)
    passes = drafting_time(drafter, setup, requests=batch, k=1, context=context)
    experts, top_k = model.routing
    times += [times[-1]] * max(0, max_k + 1 - len(times))
    return ReplayConditions(
        costs=[t / times[0] for t in times[: max_k + 1]],
        further=[t / times[0] for t in times[max_k + 1 :]],
        noise=noise,
        max_k=max_k,
        batch=batch,
        experts=experts,
        top_k=top_k,
        late=late,
        recorded=drafter.pass_ is not None,
        pass_cost=passes / times[0],
        ngram_min=ngram_min,
        ngram_max=ngram_max,
    )


def simulate(
    traces: Sequence[Trace],
    engines: Iterable[tuple[str, ReplayConditions]],
    workloads: dict[str, tuple[str, ...]],
    policies: Sequence[str],
    *,
    seeds: int = 3,
    jobs: int = 1,
    tell: Callable[[], None] = lambda: None,
) -> list[Fared]:
    """Return how each policy fares on each workload of each engine.

    Args:
        traces: Recorded requests, each with its task.
        engines: Names of models, and what replay simulates of them.
        workloads: Tasks by name of the workload; tasks take turns in equal shares.
        policies: Specs.
        seeds: Repetitions, each with another order and noise.
        jobs: Processes.
        tell: Called each time that something is done.

    Raises:
        ConfigError: A workload has no request.
    """
    mixes = {name: mixed(traces, tasks) for name, tasks in workloads.items()}
    asked = [
        (name, workload, policy, conditions)
        for name, conditions in engines
        for workload in mixes
        for policy in policies
    ]
    found: dict[int, Fared] = {}
    if jobs == 1:
        for i, job in enumerate(asked):
            found[i] = _fared(mixes, seeds, job)
            tell()
    else:
        with ProcessPoolExecutor(jobs) as pool:
            work = partial(_fared, mixes, seeds)
            running = {pool.submit(work, job): i for i, job in enumerate(asked)}
            for done in as_completed(running):
                found[running[done]] = done.result()
                tell()
    return [found[i] for i in range(len(asked))]


def with_drafts(traces: Sequence[Trace], profile: Profile, seed: int = 0) -> list[Trace]:
    """Return traces with drafts that are right as often as published, each place on its own.

    Real drafts are right and wrong in stretches, which policies can tell apart; these are not.
    """
    survival = np.array(profile.survival)
    random = np.random.default_rng(seed)
    drawn = []
    for trace in traces:
        luck = random.random(len(trace.output))
        right = (luck[:, None] < profile.found * survival).sum(axis=1)
        drawn.append(replace(trace, drafts=tuple(map(int, right))))
    return drawn


def mixed(traces: Sequence[Trace], tasks: Sequence[str]) -> list[Trace]:
    """Return the requests of some tasks, as many of each; ConfigError where one has none."""
    by_task = {task: [t for t in traces if t.task == task and len(t.output) > 1] for task in tasks}
    for task, found in by_task.items():
        if not found:
            raise ConfigError(f"no request of task {task!r} in the traces; record some")
    fewest = min(map(len, by_task.values()))
    return [trace for found in by_task.values() for trace in found[:fewest]]


def _fared(
    mixes: dict[str, list[Trace]], seeds: int, job: tuple[str, str, str, ReplayConditions]
) -> Fared:
    name, workload, policy, conditions = job
    found = [
        summarise(play(mixes[workload], policy, replace(conditions, seed=seed)))
        for seed in range(seeds)
    ]
    return Fared(
        name,
        workload,
        policy,
        fmean(one.speedup for one in found),
        min(one.worst_request for one in found),
    )
