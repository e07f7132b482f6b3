"""The judge by text: learnt online, from drafts verified or not.

A draft that was not verified can still be scored: compare it with the tokens that the target then
generates (*shadow drafts*). With a temperature above 0 a draft token equals the sampled one exactly
as often as rejection sampling would accept it, for a drafter that does not sample itself, so
nothing is lost by looking only. No verification is ever needed to learn.

The chance that token i of a draft is accepted, given that those before it were, is a logistic
function of a few features: of the draft in its text (`context`), of how the request's last drafts
fared, of the token's place, and of what the target wrote after the same words elsewhere
(`continuations`). Each feature puts a token in one of its buckets, and each bucket has a weight.
Weights are shared by all requests and follow the outcomes by gradient steps that get smaller with
each bucket's evidence (AdaGrad).

Many weights that are learnt at once from few drafts promise too much, above all for the drafts that
look best, which are those that are verified. So log-odds are scaled by a slope, learnt in the same
way from how the promises were kept (Platt 1999), before they become chances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp, sqrt

import numpy as np

from moecascade.core.cost import Array
from moecascade.core.marginal.context import LONGEST_MATCH, NEWEST, Context, Text
from moecascade.core.marginal.continuations import BUCKETS, PHRASE_TOKENS, Phrases
from moecascade.core.marginal.judge import LONGEST, Rows, outcome
from moecascade.core.step import RequestStep

# Swept by `benchmarks/constants.py`; flat: the speed-up changed by less than half a percent.
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

OUTCOMES: int = 3**3  # of a request's last three drafts together
TOKENS = 1 << 17  # tokens that are told apart, and as many pairs of them: memory is bounded
_MASK = TOKENS - 1
_LENGTHS = 10  # buckets of a match's length: none, 2, 3, 4, 5-6, 7-8, 9-12, 13-16, 17-31, 32
_LENGTH = (0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, *[8] * 15, 9)  # the bucket of each
_SHARES = 5  # buckets of a share of earlier places: none; up to a third, two thirds, more; all
_COUNTS = 5  # buckets of their number: 0, 1, 2, 3, more
_HITS = 9  # buckets of a share of hits: eighths

assert len(_LENGTH) == LONGEST_MATCH + 1


@dataclass(slots=True)
class Shadow:
    """A judged draft that waits for the tokens it will be compared with.

    Attributes:
        draft: Its tokens.
        common: The weights that hold for all of its tokens.
        own: The weights of each token.
        odds: Log-odds of each token, given that those before it are right.
        survival: Chance that at least 1, 2, ... tokens are accepted.
        scored: Tokens that were compared so far.
        right: How many of these were right.
        errors: Sum of the errors of the chances that were predicted for these.
        squares: Sum of the squares of these errors.
    """

    draft: Sequence[int]
    common: tuple[int, ...]
    own: list[tuple[int, ...]]
    odds: list[float]
    survival: list[float]
    scored: int = 0
    right: int = 0
    errors: float = 0.0
    squares: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether no token is left to compare: all were, or one was wrong."""
        return self.right < self.scored or self.scored == len(self.own)


@dataclass(slots=True)
class Record:
    """One request's text and how its drafts fared.

    Attributes:
        text: Prompt and output so far.
        hits: Recent share of drafts whose first token was right.
        last: Outcomes of its last drafts that were scored to their end, see `judge.outcome`.
        shadow: The latest draft, until it is scored to its end. Older ones are not followed: they
            overlap it, and replay is no better with them.
    """

    text: Text
    hits: float
    last: int = 0
    shadow: Shadow | None = None


def _agreed(_record: Record, context: Context) -> int:
    share = 0 if not context.agreed else 1 + 3 * context.agreed // context.places
    return _COUNTS * share + min(context.places, _COUNTS - 1)


def _against(_record: Record, context: Context) -> int:
    return 2 * _LENGTH[context.opposing] + (context.opposing >= context.agreeing)


# Features of a draft, the same for all of its tokens: name, buckets, and in which bucket it is.
DRAFT_FEATURES: tuple[tuple[str, int, Callable[[Record, Context], int]], ...] = (
    ("any", 1, lambda _record, _context: 0),
    ("match", _LENGTHS, lambda _record, context: _LENGTH[context.agreeing]),
    ("agreed", _SHARES * _COUNTS, _agreed),
    ("against", 2 * _LENGTHS, _against),
    ("hits", _HITS, lambda record, _context: int(record.hits * (_HITS - 1))),
    ("last", OUTCOMES, lambda record, _context: record.last),
)
# Features of one of its tokens: name and buckets; `TextJudge.predict` says in which bucket it is,
# in line, for that is most of the work.
TOKEN_FEATURES = (
    ("place", _LENGTHS * LONGEST),  # in the draft, after a match of such a length
    ("phrase of two", BUCKETS),
    ("phrase of four", BUCKETS),
    ("token", TOKENS),
    ("token before", TOKENS),
    ("pair", TOKENS),  # of both
)
# The weights of all features are one table, which is quick to read: where each feature's begin.
_SIZES = [size for _, size, _ in DRAFT_FEATURES] + [size for _, size in TOKEN_FEATURES]
_BEGINS = list(accumulate(_SIZES, initial=0))
_OF_DRAFT = [
    (begin, bucket) for begin, (_, _, bucket) in zip(_BEGINS, DRAFT_FEATURES, strict=False)
]
_PLACE, _PHRASE_OF_TWO, _PHRASE_OF_FOUR, _TOKEN, _BEFORE, _PAIR, _END = _BEGINS[len(_OF_DRAFT) :]
_PLACES = [range(_PLACE + i, _PHRASE_OF_TWO, _LENGTHS) for i in range(_LENGTHS)]  # by match


class TextJudge:
    """The predictor, shared by all requests of a policy.

    Args:
        width: Tokens of a draft that it answers for.
    """

    def __init__(self, width: int) -> None:
        """Begin with no evidence."""
        self._width = width
        self._records: dict[str, Record] = {}
        self._weights = [0.0] * _END
        self._evidence = [1.0] * _END
        self._slope, self._slope_evidence = 1.0, SLOPE_EVIDENCE
        self._phrases = Phrases()
        self._right = [0.0] * LONGEST  # by place in a draft, of those that were compared
        self._tried = [0.0] * LONGEST

    def begin(self, request_id: str, prompt: Sequence[int]) -> None:
        """Keep the prompt."""
        self._records[request_id] = Record(Text(prompt), FIRST_HITS)

    def end(self, request_id: str) -> None:
        """Forget the text."""
        self._records.pop(request_id, None)

    def written(self, request_id: str) -> list[int]:
        """Return a request's text, prompt and output, as far as it is kept."""
        return self._records[request_id].text.ending(NEWEST)

    def propose(
        self, request_ids: Sequence[str], drafts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Judge drafts in turn, each to be scored when its tokens come; see `Judge.propose`.

        A draft takes the place of the request's last one, which is learnt from first.
        """
        rows = []
        for request_id, draft in zip(request_ids, drafts, strict=True):
            row = self.judged(request_id, draft)[: self._width] if draft else []
            rows.append(row + [0.0] * (self._width - len(row)))
        return rows

    def judged(self, request_id: str, draft: Sequence[int]) -> list[float]:
        """Judge a request's draft, to be scored when its tokens come; return its survival."""
        record = self._records[request_id]
        self._close(record)
        record.shadow = self.predict(record, draft)
        return record.shadow.survival

    def predict(self, record: Record, draft: Sequence[int]) -> Shadow:
        """Return a draft's first `LONGEST` tokens judged. Changes nothing: asking is free."""
        text, weights, slope = record.text, self._weights, self._slope
        context = text.context(draft[0])
        common = tuple([begin + bucket(record, context) for begin, bucket in _OF_DRAFT])
        base = FIRST_ODDS + sum([weights[key] for key in common])
        own: list[tuple[int, ...]] = []
        odds: list[float] = []
        survival: list[float] = []
        chance = 1.0
        before = context.before & _MASK
        for token, place, (of_two, of_four) in zip(
            draft,
            _PLACES[_LENGTH[context.agreeing]],
            self._phrases.buckets(text.ending(PHRASE_TOKENS), draft),
            strict=False,
        ):
            here = token & _MASK
            keys = (
                place,
                _TOKEN + here,
                _BEFORE + before,
                _PAIR + ((before * 1_000_003 + here) & _MASK),
                _PHRASE_OF_TWO + of_two,
                _PHRASE_OF_FOUR + of_four,
            )
            a, b, c, d, e, f = keys
            z = base + weights[a] + weights[b] + weights[c] + weights[d] + weights[e] + weights[f]
            chance /= 1.0 + exp(-slope * z)
            own.append(keys)
            odds.append(z)
            survival.append(chance)
            before = here
        return Shadow(draft, common, own, odds, survival)

    def prolonged(self, survival: Rows, lengths: Sequence[int]) -> Array:
        """Return survival prolonged: see `Judge.prolonged`.

        A token there has the chance that tokens in its place have had, given those before it.
        """
        right, tried = np.array(self._right), np.array(self._tried)
        chances = (right + NEXT_CHANCE * NEXT_BELIEF) / (tried + NEXT_BELIEF)
        longer = np.array(survival)
        for row, length in zip(longer, lengths, strict=True):
            if 0 < length < self._width:
                row[length:] = row[length - 1] * np.cumprod(chances[length : self._width])
        return longer

    def learn(self, parts: Sequence[RequestStep]) -> None:
        """Take what was written: score drafts, learn, extend the texts."""
        for part in parts:
            self.score(self._records[part.request_id], part.tokens)

    def follow(self, parts: Sequence[RequestStep]) -> None:
        """Extend the texts; their drafts were not waited for."""
        for part in parts:
            record = self._records[part.request_id]
            record.shadow = None
            record.text.extend(part.tokens)

    def score(self, record: Record, tokens: Sequence[int]) -> None:
        """Compare a request's draft with new tokens, learn from both, extend its text."""
        if record.shadow is not None:
            self._compare(record.shadow, tokens)
            if record.shadow.ended:
                self._close(record)
        self._phrases.learn(record.text.ending(PHRASE_TOKENS), tokens)
        record.text.extend(tokens)

    def _compare(self, shadow: Shadow, tokens: Iterable[int]) -> None:
        """Learn from each token of a draft that can be compared now."""
        right, tried = self._right, self._tried
        for token in tokens:
            i = shadow.scored
            hit = shadow.draft[i] == token
            odds = shadow.odds[i]
            error = 1.0 / (1.0 + exp(-odds)) - hit
            square = error * error
            self._move(shadow.own[i], error, square)
            steep = (1.0 / (1.0 + exp(-self._slope * odds)) - hit) * odds
            self._slope_evidence += steep * steep
            slope = self._slope - SLOPE_RATE * steep / sqrt(self._slope_evidence)
            self._slope = max(0.0, slope)  # below, what looks better would count as worse
            shadow.errors += error
            shadow.squares += square
            right[i] = DECAY_PLACES * right[i] + hit
            tried[i] = DECAY_PLACES * tried[i] + 1.0
            shadow.scored += 1
            shadow.right += hit
            if shadow.ended:
                return

    def _close(self, record: Record) -> None:
        """Learn from a request's draft what is the same for all of its tokens: once for those seen.

        One that is replaced before its end was right as far as it was compared.
        """
        shadow, record.shadow = record.shadow, None
        if shadow is None or not shadow.scored:
            return
        self._move(shadow.common, shadow.errors, shadow.squares)
        record.hits = DECAY_HITS * record.hits + (1.0 - DECAY_HITS) * (shadow.right > 0)
        if shadow.ended:
            record.last = outcome(record.last, shadow.right, OUTCOMES)

    def _move(self, keys: Iterable[int], error: float, square: float) -> None:
        """Move weights against an error, the less the more has been seen of each."""
        weights, evidence = self._weights, self._evidence
        error *= LEARNING_RATE
        for key in keys:
            seen = evidence[key] = evidence[key] + square
            weights[key] -= error / sqrt(seen)
