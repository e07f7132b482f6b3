"""The judge by text: learnt online, from drafts verified or not.

A draft that was not verified can still be scored: compare it with the tokens that the target then
generates (*shadow drafts*). With a temperature above 0 a draft token equals the sampled one exactly
as often as rejection sampling would accept it, for a drafter that does not sample itself, so
nothing is lost by looking only. No verification is ever needed to learn.

The chance that token i of a draft is accepted, given that those before it were, is a logistic
function of a few features: of the draft in its text, of how the request's last drafts fared, of the
token's place, and of what the target wrote after the same words elsewhere. Each feature puts a
token in one of its buckets, and each bucket has a weight. Weights are shared by all requests and
follow the outcomes by gradient steps that get smaller with each bucket's evidence (AdaGrad).

Many weights that are learnt at once from few drafts promise too much, above all for the drafts that
look best, which are those that are verified. So log-odds are scaled by a slope, learnt in the same
way from how the promises were kept (Platt 1999), before they become chances.

All of that is compiled (`predictor`): to import this module takes half a second, two where the
compiled code is not on disk yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moecascade.core.cost import Array
from moecascade.core.marginal import predictor
from moecascade.core.marginal.judge import LONGEST, Rows, outcome
from moecascade.core.step import RequestStep

NEWEST = 16_384  # tokens of a prompt that are kept, the latest ones: memory is bounded
HALVED_EVERY = predictor.SLOTS // 4  # tokens after which what is known of phrases counts half, so
# that slots come free

# Swept by `benchmarks/constants.py`; flat: the speed-up changed by less than half a percent.
PLACES = 8  # latest earlier places of the text's last two tokens that are looked at; flat from 2 to
# 32
LEARNING_RATE = 0.5  # size of a weight's first step, in log-odds; flat from 0.125 to 2
SLOPE_RATE = 1.0  # the same for the slope; flat from 0.25 to 4
SLOPE_EVIDENCE = 20.0  # squared errors that it begins with, so that its first steps are small;
# flat from 5 to 80
FIRST_ODDS = -0.6  # log-odds before anything is known: rather too low, a first draft is a risk;
# flat from -2.4 to -0.15
FIRST_HITS = 0.3  # share of hits of a request that has had no draft yet; flat from 0.08 to 0.6
DECAY_HITS = 0.8  # of a request's share of hits, from one draft to the next; flat from 0.2 to 0.95
NEXT_CHANCE = 0.8  # guess of a token's chance after right ones, beyond a draft's end
NEXT_BELIEF = 5.0  # drafts that this guess weighs as much as
DECAY_PLACES = 0.995  # of what is known of a place in drafts, from one draft to the next


def new_model() -> predictor.Array:
    """Return a model without evidence."""
    made = np.zeros(1, predictor.MODEL)
    model = made[0]
    model["weights"][:, 1] = 1.0
    model["slope"], model["slope_evidence"] = 1.0, SLOPE_EVIDENCE
    for last, following in enumerate(model["next"]):
        following[:] = [outcome(last, right, predictor.OUTCOMES) for right in range(4)]
    model["places"], model["first_odds"], model["learning_rate"] = PLACES, FIRST_ODDS, LEARNING_RATE
    model["slope_rate"], model["decay_hits"] = SLOPE_RATE, DECAY_HITS
    model["decay_places"] = DECAY_PLACES
    return made


def new_request() -> predictor.Array:
    """Return what is kept of a request beside its text."""
    made = np.zeros(1, predictor.REQUEST)
    made["hits"] = FIRST_HITS
    return made


@dataclass(slots=True, eq=False)
class Record:
    """One request: its text so far, prompt and output, and how its drafts fared.

    Attributes:
        unread: The newest tokens, which nobody has asked about: for a request that is never judged
            by its text that is all of it, and costs next to nothing.
        state: See `predictor.REQUEST`.
        text: The tokens before, see `predictor.TEXT`, with room for more.
        latest: See there.
        length: How many they are.
    """

    unread: list[int]
    state: predictor.Array = field(default_factory=new_request)
    text: predictor.Array = field(default_factory=lambda: np.empty(0, predictor.TEXT))
    latest: predictor.Array = field(default_factory=lambda: np.empty(0, np.int32))
    length: int = 0

    def make_room(self, more: int) -> None:
        """See to it that the text can be extended by so many tokens."""
        needed = self.length + more
        if needed > len(self.text):
            tokens = self.text["token"][: self.length].astype(np.int64)
            size = 1 << needed.bit_length()
            self.text, self.latest = np.empty(size, predictor.TEXT), np.zeros(2 * size, np.int32)
            predictor.append(self.text, self.latest, 0, tokens)

    def read(self) -> None:
        """Take what was not read into the text. A draft from before is not waited for any more."""
        self.make_room(len(self.unread))
        predictor.append(self.text, self.latest, self.length, np.array(self.unread, np.int64))
        self.length += len(self.unread)
        self.unread.clear()
        self.state["judged"] = 0

    @property
    def tokens(self) -> list[int]:
        """The text."""
        known: list[int] = self.text["token"][: self.length].tolist()
        return known + self.unread


class TextJudge:
    """The predictor, shared by all requests of a policy.

    Args:
        width: Tokens of a draft that it answers for.
    """

    def __init__(self, width: int) -> None:
        """Begin with no evidence."""
        self._width = width
        self._records: dict[str, Record] = {}
        self._model = new_model()
        self._survival = np.zeros(LONGEST)
        self._learnt = 0

    def begin(self, request_id: str, prompt: Sequence[int]) -> None:
        """Keep the prompt."""
        self._records[request_id] = Record(list(prompt[-NEWEST:]))

    def end(self, request_id: str) -> None:
        """Forget the text."""
        self._records.pop(request_id, None)

    def written(self, request_id: str) -> list[int]:
        """Return a request's text, prompt and output, as far as it is kept."""
        return self._records[request_id].tokens[-NEWEST:]

    def propose(
        self, request_ids: Sequence[str], drafts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Judge drafts in turn, each to be scored when its tokens come; see `Judge.propose`.

        A draft takes the place of the request's last one, which is learnt from first.
        """
        width, nothing = self._width, [0.0] * self._width
        return [(row + nothing)[:width] for row in map(self.judged, request_ids, drafts)]

    def judged(self, request_id: str, draft: Sequence[int]) -> list[float]:
        """Judge a request's draft, to be scored when its tokens come; return its survival.

        Of no draft nothing is said, and the last one goes on to be scored.
        """
        if not draft:
            return []
        r, survival = self._records[request_id], self._survival
        if r.unread:
            r.read()
        tokens = np.array(draft[:LONGEST], np.int64)
        predictor.judge(self._model, r.state, r.text, r.latest, r.length, tokens, survival)
        chances: list[float] = survival[: len(tokens)].tolist()
        return chances

    def prolonged(self, survival: Rows, lengths: Sequence[int]) -> Array:
        """Return survival prolonged: see `Judge.prolonged`.

        A token there has the chance that tokens in its place have had, given those before it.
        """
        right, tried = self._model[0]["right"], self._model[0]["tried"]
        chances = (right + NEXT_CHANCE * NEXT_BELIEF) / (tried + NEXT_BELIEF)
        longer = np.array(survival)
        for row, length in zip(longer, lengths, strict=True):
            if 0 < length < self._width:
                row[length:] = row[length - 1] * np.cumprod(chances[length : self._width])
        return longer

    def learn(self, parts: Sequence[RequestStep]) -> None:
        """Take what was written: score drafts, learn, extend the texts."""
        for part in parts:
            r, tokens = self._records[part.request_id], np.array(part.tokens, np.int64)
            if r.unread:
                r.read()
            length = r.length + len(tokens)
            if length > len(r.text):
                r.make_room(len(tokens))
            predictor.learn(self._model, r.state, r.text, r.latest, r.length, tokens)
            self._learnt += len(tokens)
            r.length = length
        if self._learnt >= HALVED_EVERY:
            self._learnt = 0
            self._model["seen"] *= 0.5
            self._model["followed"] *= 0.5

    def follow(self, parts: Sequence[RequestStep]) -> None:
        """Extend the texts; their drafts were not waited for."""
        records = self._records
        for part in parts:
            records[part.request_id].unread.extend(part.tokens)
