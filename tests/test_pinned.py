"""`marginal` and `cascade` decide as they did, step by step, on texts and costs that chance made.

Nothing says that these decisions are the best ones; replay of real text does. They are kept so that
nobody changes a policy without noticing, by a constant that is off by one or by a tidier loop.
Where a change is meant, show in replay what it is worth, then renew what is kept:

    python -m tests.test_pinned
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from moecascade.core.step import Proposal, RequestStep, Step
from moecascade.policies import Policy, create

KEPT = Path(__file__).with_suffix(".json")
MAX_K = 8


@dataclass(frozen=True)
class Scene:
    """What is played: requests that come and go, how often drafts are right, what steps take.

    Attributes:
        requests: At once.
        length: Tokens of an answer, about.
        right: Chance that the target goes on as a phrase of its text did before.
        passes: Whether a model drafts, so that every token drafted but the first takes a pass.
        slope: Time that a position adds to a step, over a step without any.
        others: Requests of other policies in every step.
        uneasy: Whether the machine pauses at times, and becomes slower half-way.
        unseen: Whether K is decided one step early, without seeing the draft.
        filled: Whether what was not found is filled up then, and paid for.
    """

    requests: int
    length: int = 120
    right: float = 0.85
    passes: bool = False
    slope: float = 0.12
    others: int = 0
    uneasy: bool = False
    unseen: bool = field(default=False, repr=False)
    filled: bool = field(default=True, repr=False)


SCENES = {
    "alone": Scene(1),
    "alone, seldom right": Scene(1, right=0.4),
    "alone, cheap": Scene(1, slope=0.03),
    "few": Scene(4),
    "few, with others": Scene(3, others=3),
    "crowd": Scene(12, slope=0.04),
    "crowd, dear": Scene(10, slope=0.15),
    "a model drafts": Scene(1, passes=True, slope=0.05),
    "a model drafts for some": Scene(3, passes=True, slope=0.03),
    "uneasy machine": Scene(2, uneasy=True),
    "unseen": Scene(1, unseen=True),
    "unseen, as far as found": Scene(1, unseen=True, filled=False),
    "unseen, seldom right": Scene(1, right=0.3, slope=0.05, unseen=True, filled=False),
    "unseen, for some": Scene(3, slope=0.05, unseen=True),
    "unseen crowd": Scene(11, slope=0.1, unseen=True),
    "a model drafts unseen": Scene(1, passes=True, slope=0.05, unseen=True),
    "a model drafts unseen for some": Scene(3, passes=True, slope=0.03, unseen=True),
}
POLICIES = ("marginal", "cascade")


class Writer:
    """A target whose text repeats itself, and a drafter that copies from it."""

    def __init__(self, rng: random.Random, right: float) -> None:
        self._rng, self._right = rng, right
        self._phrases = [[rng.randrange(300) for _ in range(rng.randint(4, 14))] for _ in range(9)]
        self._source: list[int] = []
        self.text = [token for phrase in rng.sample(self._phrases, 4) for token in phrase]

    def ahead(self, tokens: int) -> list[int]:
        """Return what the target writes next; it is written by `write`."""
        while len(self._source) < tokens:
            phrase = self._rng.choice(self._phrases)
            self._source += phrase[: self._rng.randint(3, len(phrase))]
            if self._rng.random() > self._right:
                self._source.append(self._rng.randrange(300, 600))
        return self._source[:tokens]

    def write(self, tokens: int) -> list[int]:
        written = self.ahead(tokens)
        self._source = self._source[tokens:]
        self.text += written
        return written

    def draft(self, most: int) -> list[int]:
        """Return what followed the last two tokens where they stood before."""
        for place in range(len(self.text) - 1, 1, -1):
            if self.text[place - 2 : place] == self.text[-2:]:
                return self.text[place : place + most]
        return []

    def guess(self, most: int) -> list[int]:
        """Return what a model would draft: right as often as `right` says, then no more."""
        draft = self.ahead(most)
        wrong = next((i for i in range(most) if self._rng.random() > self._right), most)
        return [*draft[:wrong], *[599] * (most - wrong)]


def proposals(scene: Scene, drafts: dict[str, list[int]], ahead: int) -> list[Proposal]:
    """Return what a policy is told of drafts; one that is not seen is filled up, and paid for."""
    if not scene.unseen:
        return [Proposal(name, draft) for name, draft in drafts.items()]
    if scene.filled and not scene.passes:
        for draft in drafts.values():
            draft.extend([599] * (MAX_K - len(draft)))
    return [Proposal(name, unseen=ahead if scene.passes else MAX_K) for name in drafts]


def play(policy: Policy, scene: Scene, steps: int) -> Iterator[list[tuple[str, int, Any]]]:
    """Yield for each step what was decided: request, K, what was expected."""
    rng = random.Random(repr(scene))
    writers: dict[str, Writer] = {}
    left: dict[str, int] = {}
    born = 0
    ahead = 1
    early: dict[str, int] = {}  # K of the next step, where it is decided early
    for at in range(steps):
        while len(writers) < scene.requests:
            name, born = f"r{born}", born + 1
            writers[name] = Writer(rng, scene.right)
            left[name] = rng.randint(scene.length // 2, scene.length)
            policy.add(name, MAX_K if born % 5 else 3, writers[name].text)
        drafts = {
            name: writer.guess(ahead) if scene.passes else writer.draft(MAX_K)
            for name, writer in writers.items()
        }
        decisions = policy.decide(proposals(scene, drafts, ahead))
        yield [(d.request_id, d.k, policy.explain(d.request_id)) for d in decisions]
        known = {d.request_id: d.k for d in decisions}
        ks, early = (early, known) if scene.unseen else (known, known)
        parts = []
        for name in drafts:
            draft = drafts[name][: ks.get(name, 0)]
            coming = writers[name].ahead(len(draft) + 1)
            same = next((i for i, token in enumerate(draft) if token != coming[i]), len(draft))
            tokens = writers[name].write(same + 1)
            k = ks.get(name, 0) if scene.unseen else None
            parts.append(RequestStep(name, len(draft), len(tokens), tokens, k))
        parts += [RequestStep(f"other{i}", i % 3, 1, [1]) for i in range(scene.others)]
        positions = len(parts) + sum(part.drafted for part in parts)
        passes = ahead - 1 if scene.passes else 0
        seconds = (
            0.02 * (1 + scene.slope * positions**0.9 + 0.05 * passes) * rng.uniform(0.97, 1.05)
        )
        if scene.uneasy:
            seconds *= (1.6 if at > steps / 2 else 1.0) * (8.0 if rng.random() < 0.04 else 1.0)
        policy.observe(Step(seconds, at % 37 != 0, tuple(parts), passes))
        for part in parts:
            if part.request_id in left:
                left[part.request_id] -= part.emitted
                if left[part.request_id] <= 0:
                    policy.drop(part.request_id)
                    del writers[part.request_id], left[part.request_id]
        if scene.passes:
            ahead = max(1, policy.lookahead(list(writers)))


def played(name: str, scene: Scene) -> dict[str, Any]:
    """Return each request's K, step by step, and what was expected of them all."""
    ks: dict[str, str] = {}
    sums = dict.fromkeys(("utility", "tokens", "seconds", "lambda", "lost"), 0.0)
    settings = {"experts": 8, "top_k": 2} if name == "marginal" else {}
    if settings and scene.unseen and not scene.passes:
        settings |= {"search_min": 2, "search_max": 2, "filled": scene.filled}
    for decided in play(create(name, MAX_K, settings), scene, 300):
        for request_id, k, expected in decided:
            ks[request_id] = ks.get(request_id, "") + str(k)
            if expected is not None:
                for key in sums:
                    value = getattr(expected, key, None) or expected.parts.get(key)
                    sums[key] += value or 0.0
    return {"ks": ks, "sums": sums}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("policy", POLICIES)
def test_decisions_are_what_they_were(policy: str, scene: str) -> None:
    kept = json.loads(KEPT.read_text())[policy][scene]
    found = played(policy, SCENES[scene])
    assert found["ks"] == kept["ks"]
    assert found["sums"] == pytest.approx(kept["sums"], rel=1e-7)


def test_scenes_tell_policies_something() -> None:
    """Decisions that never change could not tell one rule from another."""
    kept = json.loads(KEPT.read_text())
    for policy in POLICIES:
        for scene, of in kept[policy].items():
            assert len(set("".join(of["ks"].values()))) > 2, (policy, scene)


if __name__ == "__main__":
    renewed = {p: {name: played(p, scene) for name, scene in SCENES.items()} for p in POLICIES}
    KEPT.write_text(json.dumps(renewed, indent=1) + "\n")
