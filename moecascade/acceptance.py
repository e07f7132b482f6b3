"""How many tokens of a draft will be accepted: learnt online, from drafts verified or not.

A draft that was not verified can still be scored: compare it with the tokens that the target then
generates (*shadow drafts*). With a temperature above 0 a draft token equals the sampled one exactly
as often as rejection sampling would accept it, for a drafter that does not sample itself, so
nothing is lost by looking only. No verification is ever needed to learn.

The chance that token i of a draft is accepted, given that those before it were, is a logistic
function of a few categories of its context, its place in the draft, how the request's last drafts
fared, and what the target wrote after the same words elsewhere (`moecascade.phrases`). Weights are
shared by all requests and follow the outcomes by gradient steps that get smaller with each
category's evidence (AdaGrad).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from math import exp, sqrt

from moecascade.context import Context, Text
from moecascade.phrases import REACH, Phrases

RATE = 0.5  # size of a first step; replay is flat between 0.3 and 0.8
FADE = 0.8  # memory of a request's hits, a draft
START = -0.6  # log-odds before anything is known: rather too low, for a first draft is a risk
HITS = 0.3  # share of hits of a request that has had no draft yet
FURTHER = 0.8, 5.0  # guess of a token's chance after right ones, and its weight in drafts

KEEP = 0.995  # of what is known of a place, a draft
PAIRS = 1 << 16  # pairs of tokens that are told apart, so that memory is bounded

Features = tuple[Hashable, ...]
# Categories of a single token are numbers, which are quick to make: kinds apart, then counted.
_KINDS = 6
_TOKEN, _BEFORE, _PAIR, _PLACE, _SHORTER, _LONGER = range(_KINDS)
_MATCHES = 16  # more than there are classes of a match's length
_NOTHING = (0.0,) * 16  # weights of categories never seen, at least as many as there are kinds


@dataclass(slots=True)
class _Shadow:
    """A draft that waits for the tokens it will be compared with."""

    tokens: Sequence[int]
    features: Features  # that hold for all of its tokens, and
    own: list[Features]  # for each of them
    common: float  # log-odds that all have from `features`
    scored: int = 0
    errors: float = 0.0  # of the chances that were predicted, summed, and
    squares: float = 0.0  # their squares


@dataclass(slots=True)
class Record:
    """One request's text and how its drafts fared.

    Attributes:
        text: Prompt and output so far.
        hits: Recent share of drafts whose first token was right.
        last: Outcomes of the last three drafts: none, 1 or 2, 3 or more tokens right.
        shadow: The latest draft, until it is scored to its end. Older ones are not followed: they
            overlap it, and replay is no better with them.
        unread: Tokens that are not in `text` yet: it is indexed once somebody asks.
    """

    text: Text
    hits: float = HITS
    last: tuple[int, ...] = (0, 0, 0)
    shadow: _Shadow | None = None
    unread: list[int] = field(default_factory=list)

    def ending(self, count: int) -> Sequence[int]:
        """Return the last tokens, read or not, at most `count`."""
        unread = self.unread[-count:]
        return self.text.ending(count - len(unread)) + unread if len(unread) < count else unread


class Acceptance:
    """The predictor, shared by all requests of a policy."""

    def __init__(self) -> None:
        """Begin with no evidence."""
        self._weights: dict[Hashable, float] = {}
        self._evidence: dict[Hashable, float] = {}
        self._phrases = Phrases()
        self._right: dict[int, float] = {}  # by place in a draft, of those that were compared
        self._tried: dict[int, float] = {}

    def predict(self, record: Record, draft: Sequence[int]) -> list[float]:
        """Return the chance that at least 1, 2, ... tokens of `draft` are accepted.

        The draft is remembered, and scored when the tokens come: see `learn`.
        """
        if record.unread:
            record.text.extend(record.unread)
            record.unread.clear()
        context = record.text.context(draft[0])
        features = _features(record, context)
        phrases = self._phrases.classes(record.text.ending(REACH), draft)
        own = _own(draft, context, phrases)
        if record.shadow is not None:
            self._end(record.shadow)
        weight = self._weights.get
        common = START + sum(map(weight, features, _NOTHING))
        record.shadow = _Shadow(draft, features, own, common)
        survival, chance = [], 1.0
        for keys in own:
            chance /= 1.0 + exp(-common - sum(map(weight, keys, _NOTHING)))
            survival.append(chance)
        return survival

    def prolonged(self, survival: Iterable[float], length: int) -> list[float]:
        """Return a prediction prolonged to `length` tokens, those of which nothing is known yet.

        A token there has the chance that tokens in its place have had, given those before it.
        """
        longer = list(survival)[:length]
        guess, weight = FURTHER
        while longer and len(longer) < length:
            place = len(longer)
            right, tried = self._right.get(place, 0.0), self._tried.get(place, 0.0)
            longer.append(longer[-1] * (right + guess * weight) / (tried + weight))
        return longer

    def learn(self, record: Record, tokens: Sequence[int]) -> None:
        """Take the tokens that were generated: score the draft, learn, extend the text."""
        if record.shadow is not None and not self._score(record, record.shadow, tokens):
            record.shadow = None
        self._phrases.learn(record.ending(REACH), tokens)
        record.unread.extend(tokens)

    def _score(self, record: Record, shadow: _Shadow, tokens: Sequence[int]) -> bool:
        """Compare a draft with new tokens; return whether it has tokens left to compare."""
        weight = self._weights.get
        for token in tokens:
            i = shadow.scored
            keys = shadow.own[i]
            hit = shadow.tokens[i] == token
            odds = shadow.common + sum(map(weight, keys, _NOTHING))
            error = 1.0 / (1.0 + exp(-odds)) - hit
            square = error * error
            self._move(keys, error, square)
            shadow.errors += error
            shadow.squares += square
            self._right[i] = KEEP * self._right.get(i, 0.0) + hit
            self._tried[i] = KEEP * self._tried.get(i, 0.0) + 1.0
            shadow.scored += 1
            if not hit or shadow.scored == len(shadow.tokens):
                self._end(shadow)
                _remember(record, i + hit)
                return False
        return True

    def _end(self, shadow: _Shadow) -> None:
        """Learn from a draft what is the same for all of its tokens: once for those compared."""
        if shadow.scored:
            self._move(shadow.features, shadow.errors, shadow.squares)

    def _move(self, keys: Features, error: float, square: float) -> None:
        """Move weights against an error, the less the more has been seen of each."""
        weights, evidence = self._weights, self._evidence
        for key in keys:
            seen = evidence[key] = evidence.get(key, 1.0) + square
            weights[key] = weights.get(key, 0.0) - RATE * error / sqrt(seen)


def _remember(record: Record, right: int) -> None:
    record.hits = FADE * record.hits + (1.0 - FADE) * (right > 0)
    record.last = (*record.last[1:], 0 if right == 0 else 1 if right < 3 else 2)


def _features(record: Record, context: Context) -> Features:
    """Return the categories that hold for every token of a draft."""
    share = 0 if not context.agreed else 1 + 3 * context.agreed // context.places
    return (
        ("match", _step_of(context.agreeing)),
        ("agreed", share, min(context.places, 4)),
        ("against", context.opposing >= context.agreeing, _step_of(context.opposing)),
        ("where", context.from_prompt, min(_step_of(context.agreeing), 6)),
        ("hits", int(record.hits * 8)),
        ("last", record.last),
    )


def _own(
    draft: Sequence[int], context: Context, phrases: Sequence[tuple[int, int]]
) -> list[Features]:
    """Return the categories of each token of a draft.

    They are: its place after such a match; itself; what it follows; both; and how it stands to the
    phrases before it.
    """
    before, match = context.before, _PLACE + _KINDS * _step_of(context.agreeing)
    own: list[Features] = []
    for i, token in enumerate(draft):
        own.append(
            (
                match + _KINDS * _MATCHES * i,
                _TOKEN + _KINDS * token,
                _BEFORE + _KINDS * before,
                _PAIR + _KINDS * ((before * 1_000_003 + token) % PAIRS),
                _SHORTER + _KINDS * phrases[i][0],
                _LONGER + _KINDS * phrases[i][1],
            )
        )
        before = token
    return own


_STEPS = (0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, *[8] * 15, 9)


def _step_of(length: int) -> int:
    """Return the class of a match's length: 2, 3, 4, 5-6, 7-8, 9-12, 13-16, 17-31, 32."""
    return _STEPS[length]
