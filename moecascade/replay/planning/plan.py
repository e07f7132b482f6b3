"""What a person asks before deploying: what does K cost, when does it pay, how to start.

A draft pays when its tokens come for less than they cost: a step that gives E tokens and takes c
baseline steps is E / c times as fast. The baseline is the same model without a drafter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from moecascade.errors import ConfigError, SetupError, nearest
from moecascade.replay.planning.architecture import Model, parse
from moecascade.replay.planning.step_time import (
    Drafter,
    Setup,
    StepTime,
    head_of,
    step_time,
    with_drafting,
)

SEARCHES = ("ngram", "suffix")
HEADS = ("eagle", "eagle3", "mtp")
OCTAVES = 12  # of positions in a step: up to 4096
DRAFTERS = (*SEARCHES, *HEADS, "draft_model")


@dataclass(frozen=True, slots=True)
class Profile:
    """How often drafts are right.

    Attributes:
        name: What kind of text.
        drafters: Whose drafts they were.
        survival: Chance that at least 1, 2, ... tokens are accepted, at any place of the text.
        source: Where this was measured.
        found: Share of places at which there is a draft at all; a step without one verifies none.
    """

    name: str
    drafters: Sequence[str]
    survival: tuple[float, ...]
    source: str
    found: float = 1.0

    def tokens(self, k: int) -> float | None:
        """Return the tokens that a step gives which verifies K; None beyond what was measured."""
        return 1.0 + sum(self.survival[:k]) if k <= len(self.survival) else None

    def tokens_of_a_draft(self, k: int) -> float | None:
        """Return the tokens of a step with a draft, which pays where it costs less than that."""
        tokens = self.tokens(k)
        return None if tokens is None else 1.0 + (tokens - 1.0) / self.found


@dataclass(frozen=True, slots=True)
class Choice:
    """One K under one load.

    Attributes:
        requests: Requests at once.
        k: Draft length.
        step: Where the time of a step goes.
        cost: That time over a step without drafter and drafts.
        break_even: Chance of each token at which it pays; None where it never can.
        speedups: By profile; None where acceptance so far was not measured.
    """

    requests: int
    k: int
    step: StepTime
    cost: float
    break_even: float | None
    speedups: Mapping[str, float | None]


def choices(
    model: Model,
    setup: Setup,
    drafter: Drafter,
    *,
    requests: Sequence[int] = (1, 4, 16, 64),
    max_k: int = 8,
    context: int = 1024,
    profiles: Sequence[Profile] = (),
) -> list[Choice]:
    """Return every K under every load."""
    if max_k < 1:
        raise ConfigError(f"longest draft {max_k}: give 1 or more")
    found = []
    for n in requests:
        plain = step_time(model, setup, requests=n, context=context).total
        for k in range(max_k + 1):
            step = with_drafting(model, setup, drafter, requests=n, k=k, context=context)
            cost = step.total / plain
            gains = {p.name: _speedup(p, k, cost) for p in profiles}
            found.append(Choice(n, k, step, cost, break_even(k, cost), gains))
    return found


def _speedup(profile: Profile, k: int, cost: float) -> float | None:
    """Return what a fixed K gains; in a batch as if requests had drafts and none together."""
    tokens = profile.tokens(k)
    mean = profile.found * cost + (1.0 - profile.found)
    return None if tokens is None else tokens / mean


def break_even(k: int, cost: float) -> float | None:
    """Return the chance a of a token at which ``1 + a + ... + a^K`` tokens are worth the cost."""
    if k == 0 or cost <= 1.0:
        return 0.0 if cost <= 1.0 else None
    if cost >= k + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**j for j in range(k + 1)) < cost else (low, middle)
    return high


def expected_times(model: Model, setup: Setup, *, max_k: int) -> list[float]:
    """Return the seconds of steps that compute 1, 2, 4, ... positions, as cost models take them.

    As many as one request's drafts can be are that; more are of requests with a draft each.
    """
    times = []
    for octave in range(OCTAVES + 1):
        positions = 2**octave
        n = 1 if positions <= max_k + 1 else positions // 2
        times.append(step_time(model, setup, requests=n, k=positions / n - 1, context=0).total)
    return times


def best(found: Sequence[Choice], profile: str) -> dict[int, Choice]:
    """Return for each number of requests the K that is fastest for a profile."""
    chosen: dict[int, Choice] = {}
    for choice in found:
        gain = choice.speedups[profile]
        if gain is not None:
            other = chosen.get(choice.requests)
            if other is None or gain > (other.speedups[profile] or 0.0):
                chosen[choice.requests] = choice
    return chosen


def ladder(found: Sequence[Choice], profiles: Sequence[Profile]) -> list[int]:
    """Return the draft lengths worth having CUDA graphs for: those best somewhere, and none."""
    best_ks = {choice.k for p in profiles for choice in best(found, p.name).values()}
    return sorted({0, 1, *best_ks})


@cache
def _profiles() -> tuple[Profile, ...]:
    text = (resources.files(__package__) / "profiles.json").read_text(encoding="utf-8")
    return tuple(
        Profile(name, **{**of, "survival": tuple(of["survival"])})
        for name, of in json.loads(text).items()
    )


def profiles_for(drafter: str) -> list[Profile]:
    """Return the profiles that were measured with a kind of drafter."""
    return [profile for profile in _profiles() if drafter in profile.drafters]


@cache
def _models() -> dict[str, Any]:
    text = (resources.files(__package__) / "models.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def known_models() -> tuple[str, ...]:
    """Return the models whose configurations come with this package."""
    return tuple(_models())


def published(name: str) -> float | None:
    """Return how many parameters a known model has, in billions, as its makers say, if they do."""
    said: float | None = _models()[name]["published_billions"]
    return said


def find_model(name: str) -> Model:
    """Return a model by the folder or file of its configuration, or by its name on the hub.

    Raises:
        ConfigError: Not a configuration, an unknown architecture or name.
        SetupError: The hub is needed, and cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model {name!r}: cannot be read ({error})") from None
        if not isinstance(values, Mapping):
            raise ConfigError(f"model {name!r}: not a configuration; give a config.json")
        return parse(name, values)
    known = _models()
    short = {full.rpartition("/")[2].lower(): full for full in known}
    full = name if name in known else short.get(name.lower())
    if full is not None:
        return parse(full, known[full]["config"])
    if name.count("/") == 1 and not name.startswith((".", "~", "/")):
        return parse(name, _from_hub(name))
    raise ConfigError(
        f"unknown model {name!r}{nearest(name, [n.rpartition('/')[2] for n in known])}; give a "
        f"config.json, its folder, a name on the hub (owner/name), or one of {', '.join(known)}"
    )


def _from_hub(name: str) -> Mapping[str, Any]:
    try:
        from huggingface_hub import hf_hub_download
    except ModuleNotFoundError:
        raise SetupError(
            f"model {name!r}{nearest(name, _models())}: fetching its configuration needs the "
            "package huggingface_hub; or give a config.json"
        ) from None
    try:
        return dict(json.loads(Path(hf_hub_download(name, "config.json")).read_text()))
    except Exception as error:  # noqa: BLE001 -- the hub's errors are of many kinds
        said = str(error).partition("\n")[0]
        raise SetupError(
            f"model {name!r}{nearest(name, _models())}: its configuration cannot be fetched "
            f"({said}); give a config.json"
        ) from None


def find_drafter(text: str, model: Model) -> Drafter:
    """Return a drafter given as METHOD, or as draft_model:CONFIG.

    Raises:
        ConfigError: An unknown method, or a draft model without a configuration.
    """
    method, colon, of = text.partition(":")
    if method not in DRAFTERS:
        raise ConfigError(
            f"unknown drafter {text!r}{nearest(method, DRAFTERS)}; known: {', '.join(DRAFTERS)}"
        )
    if method == "draft_model":
        if not of:
            raise ConfigError("drafter 'draft_model': say which, draft_model:CONFIG or a name")
        return Drafter(text, find_model(of))
    if colon:
        raise ConfigError(f"drafter {text!r}: only draft_model names a model; write {method!r}")
    return Drafter(method, head_of(model, method=method) if method in HEADS else None)
