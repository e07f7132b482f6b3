"""The luck of the text: what of a measured speed is the sampled answer's, not the policy's.

With a temperature above 0 every policy writes answers of its own, and one that happens to repeat
itself is fast under any of them. Speculation is lossless, so no policy is luckier than another on
average; but over few prompts that luck is most of what is measured. It can be told from the text:
replay says how long `REFERENCE` would take for that very answer. How far that lies from the mean of
all answers to the prompt is luck, and is taken out of the measured time, by a factor that
regression finds for each policy (a control variate, so nothing is added on average).

On 60 answers to ten prompts (the local 8-expert model, 96 tokens, temperature 0.8, replay) the
reference explains 95% to 98% of how the time of one prompt's answers varies under `cascade`,
`marginal`, `static:1` and `static:8`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moecascade.evaluation.request_record import BASELINE, MARK, Row
from moecascade.replay.player import MIXTRAL_LIKE, Conditions, play
from moecascade.telemetry.traces import Trace

REFERENCE = "static:3"
FEWEST = 8  # answers under a policy from which its factor can be found
LEAST = 0.2  # of a measured time is left, however unlucky the text


def conditions(drafter: Mapping[str, Any]) -> Conditions | None:
    """Return what replay needs to make a drafter's drafts; None where it cannot.

    Args:
        drafter: vLLM's speculative configuration.
    """
    if drafter.get("method") != "ngram":
        return None
    longest = int(drafter.get("prompt_lookup_max") or drafter.get("prompt_lookup_min") or 5)
    shortest = int(drafter.get("prompt_lookup_min") or longest)
    return Conditions(MIXTRAL_LIKE, ngram_min=shortest, ngram_max=longest)


def times(lines: Iterable[Mapping[str, Any]], played: Conditions) -> dict[str, float]:
    """Return the reference's baseline steps a token for the answers of a trace log, by request."""
    found = {}
    for line in lines:
        mark, output = MARK.search(line["id"]), line["output_token_ids"]
        if mark and output and len(output) > 1:
            trace = Trace(line["id"], "", tuple(line["prompt_token_ids"]), tuple(output))
            (outcome,) = play([trace], REFERENCE, played)
            found[mark.group()] = outcome.time / outcome.tokens
    return found


@dataclass(frozen=True, slots=True)
class _Answer:
    """A sampled answer among those to its prompt."""

    at: int  # its place among the rows
    time: float  # its seconds a token over the baseline's
    typical: float  # mean reference of the prompt's answers, and
    luck: float  # how far above it its own lies


def evened(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the decode times that answers of equal luck would have taken.

    Changed are sampled answers that ran one at a time under a policy that drafts; others, and those
    whose text is not known, stay as they are.
    """
    changed = list(rows)
    for answers in _by_policy(rows).values():
        if len(answers) < FEWEST:
            continue
        known = np.array([(1.0, answer.typical, answer.luck) for answer in answers])
        times = np.array([answer.time for answer in answers])
        factor = float(np.linalg.lstsq(known, times, rcond=None)[0][2])
        for answer in answers:
            row = rows[answer.at]
            left = max(1.0 - factor * answer.luck / answer.time, LEAST)
            changed[answer.at] = replace(row, decode_seconds=left * row.decode_seconds)
    return changed


def _by_policy(rows: Sequence[Row]) -> dict[str, list[_Answer]]:
    """Return the answers that are to be changed, by policy."""
    prompts: dict[tuple[str, str, float, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.temperature and row.concurrency == 1 and row.decoded and row.reference is not None:
            prompts[row.run, row.model, row.temperature, row.prompt].append(i)
    found: dict[str, list[_Answer]] = defaultdict(list)
    for places in prompts.values():
        typical = float(np.mean([rows[i].reference for i in places]))
        plain = [rows[i].seconds_per_token for i in places if rows[i].policy == BASELINE]
        for row, i in ((rows[i], i) for i in places):
            if plain and row.policy != BASELINE and row.reference is not None:
                time = row.seconds_per_token / plain[0]
                found[row.policy].append(_Answer(i, time, typical, row.reference - typical))
    return found
