"""How many tokens of a draft will be accepted: learnt online, from drafts verified or not.

A draft that was not verified can still be scored: compare it with the tokens that the target then
generates (*shadow drafts*). With a temperature above 0 a draft token equals the sampled one exactly
as often as rejection sampling would accept it, for a drafter that does not sample itself, so
nothing is lost by looking only. No verification is ever needed to learn.

The chance that token i of a draft is accepted, given that those before it were, is a logistic
function of a few categories of its context, its place in the draft, how the request's last drafts
fared, and what the target wrote after the same words elsewhere (`continuations`). Weights are
shared by all requests and follow the outcomes by gradient steps that get smaller with each
category's evidence (AdaGrad).

Many weights that are learnt at once from few drafts promise too much, above all for the drafts that
look best, which are those that are verified. So log-odds are scaled by a slope, learnt in the same
way from how the promises were kept (Platt 1999), before they become chances.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp, sqrt

from moecascade.core.marginal.context import Context, Text
from moecascade.core.marginal.continuations import CLASSES, REACH, Phrases

RATE = 0.5  # size of a first step; replay is flat between 0.3 and 0.8
FADE = 0.8  # memory of a request's hits, a draft
SLOPE_RATE, SLOPE_EVIDENCE = 1.0, 20.0  # of the slope: so that its first steps are small
START = -0.6  # log-odds before anything is known: rather too low, for a first draft is a risk
HITS = 0.3  # share of hits of a request that has had no draft yet
FURTHER = 0.8, 5.0  # guess of a token's chance after right ones, and its weight in drafts

KEEP = 0.995  # of what is known of a place, a draft
LONGEST = 64  # tokens of a draft that are judged
TOKENS = 1 << 17  # that are told apart, as many pairs of them, so that memory is bounded

# Categories are places in one table, which is quick to read; each kind has a stretch of it.
Features = tuple[int, ...]
_MATCHES = 10  # classes of a match's length: none, 2, 3, 4, 5-6, 7-8, 9-12, 13-16, 17-31, 32
_STEPS = (0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, *[8] * 15, 9)  # the class of each
_STRETCHES = {
    # of a draft
    "any": 1,
    "match": _MATCHES,
    "agreed": 25,
    "against": 2 * _MATCHES,
    "hits": 9,
    "last": 27,
    # of one of its tokens
    "place": _MATCHES * LONGEST,
    "shorter": CLASSES,
    "longer": CLASSES,
    "token": TOKENS,
    "before": TOKENS,
    "pair": TOKENS,
}
_BEGINS = list(accumulate(_STRETCHES.values(), initial=0))
_ANY, _MATCH, _AGREED, _AGAINST, _HITS, _LAST = _BEGINS[:6]
_PLACE, _SHORTER, _LONGER, _TOKEN, _BEFORE, _PAIR, _END = _BEGINS[6:]
_PLACES = [range(_PLACE + i, _SHORTER, _MATCHES) for i in range(_MATCHES)]  # after each match
_MASK = TOKENS - 1


@dataclass(slots=True)
class _Shadow:
    """A draft that waits for the tokens it will be compared with."""

    tokens: Sequence[int]
    features: Features  # that hold for all of its tokens, and
    own: list[Features]  # for each of them
    odds: list[float]  # log-odds of each, given that those before it are right
    scored: int = 0
    errors: float = 0.0  # of the chances that were predicted, summed, and
    squares: float = 0.0  # their squares


@dataclass(slots=True)
class Record:
    """One request's text and how its drafts fared.

    Attributes:
        text: Prompt and output so far.
        hits: Recent share of drafts whose first token was right.
        last: Outcomes of the last three drafts that were scored to their end, each a digit to the
            base of 3: none, 1 or 2, 3 or more tokens right.
        shadow: The latest draft, until it is scored to its end. Older ones are not followed: they
            overlap it, and replay is no better with them.
    """

    text: Text
    hits: float = HITS
    last: int = 0
    shadow: _Shadow | None = None


class Acceptance:
    """The predictor, shared by all requests of a policy."""

    def __init__(self) -> None:
        """Begin with no evidence."""
        self._weights = [0.0] * _END
        self._evidence = [1.0] * _END
        self._slope, self._slope_evidence = 1.0, SLOPE_EVIDENCE
        self._phrases = Phrases()
        self._right = [0.0] * LONGEST  # by place in a draft, of those that were compared
        self._tried = [0.0] * LONGEST

    def predict(self, record: Record, draft: Sequence[int]) -> list[float]:
        """Return the chance that at least 1, 2, ... tokens of `draft` are accepted.

        Of its first `LONGEST`, that is. The draft is remembered, and scored when the tokens come:
        see `learn`.
        """
        text, weights, slope = record.text, self._weights, self._slope
        context = text.context(draft[0])
        if record.shadow is not None:
            self._end(record.shadow)
            if record.shadow.scored:  # right as far as it was compared, or it would not be here
                record.hits = _faded(record.hits, True)
        features = _features(record, context)
        common = START + sum([weights[key] for key in features])
        own: list[Features] = []
        odds: list[float] = []
        survival: list[float] = []
        chance = 1.0
        before = context.before & _MASK
        for token, place, (shorter, longer) in zip(
            draft,
            _PLACES[_STEPS[context.agreeing]],
            self._phrases.classes(text.ending(REACH), draft),
            strict=False,
        ):
            # Its place after such a match; itself; what it follows; both; and how it stands to the
            # phrases before it.
            here = token & _MASK
            keys = (
                place,
                _TOKEN + here,
                _BEFORE + before,
                _PAIR + ((before * 1_000_003 + here) & _MASK),
                _SHORTER + shorter,
                _LONGER + longer,
            )
            a, b, c, d, e, f = keys
            z = common + weights[a] + weights[b] + weights[c] + weights[d] + weights[e] + weights[f]
            chance /= 1.0 + exp(-slope * z)
            own.append(keys)
            odds.append(z)
            survival.append(chance)
            before = here
        record.shadow = _Shadow(draft, features, own, odds)
        return survival

    def prolonged(self, survival: Iterable[float], length: int) -> list[float]:
        """Return a prediction prolonged to `length` tokens, those of which nothing is known yet.

        A token there has the chance that tokens in its place have had, given those before it.
        """
        longer = list(survival)[:length]
        guess, weight = FURTHER
        while longer and len(longer) < length:
            place = min(len(longer), LONGEST - 1)
            right, tried = self._right[place], self._tried[place]
            longer.append(longer[-1] * (right + guess * weight) / (tried + weight))
        return longer

    def learn(self, record: Record, tokens: Sequence[int]) -> None:
        """Take the tokens that were generated: score the draft, learn, extend the text."""
        if record.shadow is not None and not self._score(record, record.shadow, tokens):
            record.shadow = None
        self._phrases.learn(record.text.ending(REACH), tokens)
        record.text.extend(tokens)

    def _score(self, record: Record, shadow: _Shadow, tokens: Sequence[int]) -> bool:
        """Compare a draft with new tokens; return whether it has tokens left to compare."""
        right, tried = self._right, self._tried
        draft, i = shadow.tokens, shadow.scored
        for token in tokens:
            hit = draft[i] == token
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
            right[i] = KEEP * right[i] + hit
            tried[i] = KEEP * tried[i] + 1.0
            i += 1
            if not hit or i == len(shadow.own):
                shadow.scored = i
                self._end(shadow)
                _remember(record, i - 1 + hit)
                return False
        shadow.scored = i
        return True

    def _end(self, shadow: _Shadow) -> None:
        """Learn from a draft what is the same for all of its tokens: once for those compared."""
        if shadow.scored:
            self._move(shadow.features, shadow.errors, shadow.squares)

    def _move(self, keys: Features, error: float, square: float) -> None:
        """Move weights against an error, the less the more has been seen of each."""
        weights, evidence = self._weights, self._evidence
        error *= RATE
        for key in keys:
            seen = evidence[key] = evidence[key] + square
            weights[key] -= error / sqrt(seen)


def _faded(hits: float, hit: bool) -> float:
    return FADE * hits + (1.0 - FADE) * hit


def _remember(record: Record, right: int) -> None:
    record.hits = _faded(record.hits, right > 0)
    record.last = (3 * record.last + (0 if right == 0 else 1 if right < 3 else 2)) % 27


def _features(record: Record, context: Context) -> Features:
    """Return the categories that hold for every token of a draft, the first for any draft."""
    agreeing, opposing, places, agreed, _ = context
    share = 0 if not agreed else 1 + 3 * agreed // places
    return (
        _ANY,
        _MATCH + _STEPS[agreeing],
        _AGREED + 5 * share + min(places, 4),
        _AGAINST + 2 * _STEPS[opposing] + (opposing >= agreeing),
        _HITS + int(record.hits * 8),
        _LAST + record.last,
    )
