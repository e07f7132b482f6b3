"""What predicts acceptance from text, compiled: in an engine the caches are cold at every step.

Three things, each a few functions on arrays. The text of a request, indexed by its pairs, says
where it has been before (`Context`): a draft is believable where a long stretch that ends the text
has occurred earlier, and was followed by what is drafted now; all the more where it occurred often
and was always followed by that. Phrases say what the target has written after the same words in
whatever request: counts by hash, no text, in a fixed amount of memory, and they fade. Features put
a token of a draft in buckets, each with a weight; `judge` reads the weights, `learn` moves them.

Plain arrays, because Python's numbers lie scattered over memory, where each costs a miss of the
cache. Compiled code is kept on disk, and known to be out of date by this file's date alone. So all
that it uses is in this file, or shows in the types of its arguments (`LONGEST`); what others may
want to vary comes with the data (`MODEL`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import exp, sqrt
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from moecascade.core.marginal.judge import LONGEST

P = ParamSpec("P")
R = TypeVar("R")
Array = NDArray[Any]

LONGEST_MATCH = 32  # tokens of a match that are told apart
PHRASE_TOKENS = 4  # tokens of the longer phrases; the shorter ones have two
SLOTS = 1 << 19  # counts of phrases that are kept; hashes that meet share one
BUCKETS = 40  # for each of the two phrases that a draft's token follows
TOKENS = 1 << 17  # tokens that are told apart, and as many pairs of them: memory is bounded
OUTCOMES: int = 3**3  # of a request's last three drafts together, see `judge.outcome`

_LENGTHS = 10  # buckets of a match's length: none, 2, 3, 4, 5-6, 7-8, 9-12, 13-16, 17-31, 32
_LENGTH = (0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, *[8] * 15, 9)  # the bucket of each
_SHARES = 5  # buckets of a share of earlier places: none; up to a third, two thirds, more; all
_COUNTS = 5  # buckets of their number: 0, 1, 2, 3, more
_HITS = 9  # buckets of a share of hits: eighths
# The first of the five buckets of a phrase that occurred n times: 1, 2, 3, 4-7, 8-15, 16-63, more.
_OCCURRED = (*[5 * n for n in (0, 1, 2, 3, *[4] * 4, *[5] * 8, *[6] * 48)], 35)
_OFTEN = len(_OCCURRED) - 1

# Features: name and buckets. The first are of a draft, the same for all of its tokens.
DRAFT_FEATURES = (
    ("any", 1),
    ("match", _LENGTHS),  # longest match that was followed by the draft's first token
    ("agreed", _SHARES * _COUNTS),  # earlier places, and how many were followed by that token
    ("against", 2 * _LENGTHS),  # longest other match, and whether that is longer
    ("hits", _HITS),  # share of the request's drafts whose first token was right
    ("last", OUTCOMES),  # how its last ones fared
)
# The others are of one of its tokens.
TOKEN_FEATURES = (
    ("place", _LENGTHS * LONGEST),  # in the draft, after a match of such a length
    ("phrase of two", BUCKETS),
    ("phrase of four", BUCKETS),
    ("token", TOKENS),
    ("token before", TOKENS),
    ("pair", TOKENS),  # of both
)
# The weights of all features are one table, which is quick to read: where each feature's begin.
BEGINS = dict(
    zip(
        [name for name, _ in DRAFT_FEATURES + TOKEN_FEATURES],
        accumulate([size for _, size in DRAFT_FEATURES + TOKEN_FEATURES], initial=0),
        strict=False,
    )
)
_ANY, _MATCH, _AGREED, _AGAINST, _OF_HITS, _LAST = [BEGINS[name] for name, _ in DRAFT_FEATURES]
_PLACE, _OF_TWO, _OF_FOUR, _TOKEN, _BEFORE, _PAIR = [BEGINS[name] for name, _ in TOKEN_FEATURES]
_WEIGHTS = _PAIR + TOKENS
_DRAFTS, _TOKENS = len(DRAFT_FEATURES), len(TOKEN_FEATURES)

_ODD, _FAR = 40_503, 60_493  # multipliers of the hashes: odd, so that nothing of a hash is lost
_SCATTER = 0x9E3779B1  # likewise
_NONE = 0  # stands for what precedes the text
_PHRASE_MASK, _TOKEN_MASK = SLOTS - 1, TOKENS - 1

MODEL = np.dtype(
    [
        ("weights", "f8", (_WEIGHTS, 2)),  # each with its evidence, which is read with it
        ("slope", "f8"),  # of the log-odds
        ("slope_evidence", "f8"),
        ("right", "f8", LONGEST),  # by place in a draft, of those that were compared
        ("tried", "f8", LONGEST),
        ("seen", "f4", SLOTS),  # phrases
        ("followed", "f4", SLOTS),  # phrases with the token after them
        ("next", "i8", (OUTCOMES, 4)),  # outcome after an outcome and 0, 1, 2, more right tokens
        ("places", "i8"),  # latest earlier places of the last two tokens that are looked at
        ("first_odds", "f8"),
        ("learning_rate", "f8"),
        ("slope_rate", "f8"),
        ("decay_hits", "f8"),
        ("decay_places", "f8"),
    ]
)
"""What all requests teach, and the constants by which they do; an array of one."""

REQUEST = np.dtype(
    [
        ("hits", "f8"),  # recent share of drafts whose first token was right
        ("last", "i8"),  # outcomes of the last drafts that were scored to their end
        # The latest draft, until it is scored to its end. Older ones are not followed: they overlap
        # it, and replay is no better with them.
        ("judged", "i8"),  # tokens of it; 0 where there is none
        ("draft", "i8", LONGEST),
        ("common", "i4", _DRAFTS),  # the weights that hold for all of its tokens
        ("own", "i4", (LONGEST, _TOKENS)),  # the weights of each token
        ("odds", "f8", LONGEST),  # log-odds of each, given that those before it are right
        ("scored", "i8"),  # tokens that were compared so far
        ("right", "i8"),  # how many of these were right
        ("errors", "f8"),  # sum of the errors of the chances that were predicted for these
        ("squares", "f8"),  # sum of the squares of these errors
    ]
)
"""What is kept of one request beside its text; an array of one."""

TEXT = np.dtype(
    [
        ("token", "i4"),
        ("earlier", "i4"),  # the place before this one that follows the same two tokens; 0: none
    ]
)
"""One place in a text. With it goes `latest`, a hash table of the latest place after each pair: a
power of two of them, more than there are tokens."""


class Context(NamedTuple):
    """A draft in its text.

    Attributes:
        agreeing: Longest match that was followed by the draft's first token, in tokens; at most
            `LONGEST_MATCH`, 0 for none.
        opposing: Longest match that was followed by another token.
        places: Earlier places of the last two tokens, at most the model's ``places``.
        agreed: How many of them were followed by the draft's first token.
    """

    agreeing: int
    opposing: int
    places: int
    agreed: int


def compiled(*types: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Compile a function: now for arguments of `types`; without them for others that call it."""

    def compiling(function: Callable[P, R]) -> Callable[P, R]:
        signature = [types] if types else None
        try:
            made = numba.njit(signature, cache=bool(types))(function)
        except (RuntimeError, OSError):  # there is no folder that could keep it
            made = numba.njit(signature)(function)
        return cast("Callable[P, R]", made)

    return compiling


_OF_MODEL = numba.from_dtype(MODEL)[::1]
_OF_REQUEST = numba.from_dtype(REQUEST)[::1]
_OF_TEXT = numba.from_dtype(TEXT)[::1]
_PLACES = numba.int32[::1]
_INTS, _FLOATS, _INT = numba.int64[::1], numba.float64[::1], numba.int64


# ---- the text ------------------------------------------------------------------------------------


@compiled()
def _slot(text: Array, latest: Array, place: int) -> int:
    """Return where in `latest` the two tokens before `place` are, or would be."""
    first, second = text[place - 2].token, text[place - 1].token
    mask = len(latest) - 1
    slot = ((first * _FAR + second) * _SCATTER >> 15) & mask
    while latest[slot]:
        other = latest[slot]
        if text[other - 2].token == first and text[other - 1].token == second:
            break
        slot = (slot + 1) & mask
    return int(slot)


@compiled(_OF_TEXT, _PLACES, _INT, _INTS)
def append(text: Array, latest: Array, length: int, tokens: Array) -> None:
    """Append tokens to a text of some length, which has room for them."""
    for token in tokens:
        text[length].token = token
        if length >= 2:
            slot = _slot(text, latest, length)
            text[length].earlier = latest[slot]
            latest[slot] = length
        length += 1


@compiled()
def context(text: Array, latest: Array, length: int, token: int, most: int) -> Context:
    """Return the context of a draft whose first token is `token`, by `most` places at most."""
    agreeing = opposing = places = agreed = 0
    place = latest[_slot(text, latest, length)] if length >= 2 else 0
    while place and places < most:
        match, longest = 2, min(LONGEST_MATCH, place)
        while match < longest and text[place - 1 - match].token == text[length - 1 - match].token:
            match += 1
        if text[place].token == token:
            agreed += 1
            agreeing = max(agreeing, match)
        else:
            opposing = max(opposing, match)
        places += 1
        place = text[place].earlier
    return Context(agreeing, opposing, places, agreed)


# ---- phrases -------------------------------------------------------------------------------------


@compiled()
def _hashes(text: Array, length: int) -> tuple[int, int, int, int]:
    """Return hashes of the pairs of the last four tokens, the earliest first, and the last token.

    The last pair is the phrase of two; with the pair two back it is the phrase of four.
    """
    a = text[length - 4].token if length > 3 else _NONE
    b = text[length - 3].token if length > 2 else _NONE
    c = text[length - 2].token if length > 1 else _NONE
    d = text[length - 1].token if length > 0 else _NONE
    return a * _ODD + b, b * _ODD + c, c * _ODD + d, d


@compiled()
def count_phrases(model: Array, text: Array, length: int, tokens: Array) -> None:
    """Count what was generated after a text."""
    seen, followed = model[0].seen, model[0].followed
    two_back, one_back, two, last = _hashes(text, length)
    for token in tokens:
        four = two * _FAR + two_back
        for phrase in (two, four):
            seen[phrase & _PHRASE_MASK] += 1.0
            followed[(phrase * _ODD + token) & _PHRASE_MASK] += 1.0
        two_back, one_back, two, last = one_back, two, last * _ODD + token, token


@compiled()
def _phrase_bucket(occurred: float, so: float) -> int:
    """Return the bucket of a phrase that occurred, and went on so: never, seldom, ..., always."""
    share = 0 if so == 0.0 else 4 if so >= occurred else 1 + int(3.0 * so / occurred)
    return share + _OCCURRED[min(int(occurred), _OFTEN)]


@compiled()
def phrase_bucket(model: Array, phrase: int, token: int) -> int:
    """Return how a token stands to a phrase that it would follow, a number below `BUCKETS`.

    By how often the phrase occurred, and how often that token followed; 0 where it never occurred.
    """
    occurred = model[0].seen[phrase & _PHRASE_MASK]
    if occurred == 0.0:
        return 0
    return _phrase_bucket(occurred, model[0].followed[(phrase * _ODD + token) & _PHRASE_MASK])


# ---- learning ------------------------------------------------------------------------------------


@compiled()
def _move(model: Array, keys: Array, error: float, square: float) -> None:
    """Move weights against an error, the less the more has been seen of each."""
    weights = model[0].weights
    step = model[0].learning_rate * error
    for key in keys:
        weights[key, 1] += square
        weights[key, 0] -= step / sqrt(weights[key, 1])


@compiled()
def _ended(request: Array) -> bool:
    """Return whether no token of a draft is left to compare: all were, or one was wrong."""
    r = request[0]
    return bool(r.right < r.scored or r.scored == r.judged)


@compiled()
def close(model: Array, request: Array) -> None:
    """Learn from a request's draft what is the same for all of its tokens: once for those seen.

    One that is replaced before its end was right as far as it was compared.
    """
    m, r = model[0], request[0]
    if r.judged and r.scored:
        _move(model, r.common, r.errors, r.squares)
        r.hits = m.decay_hits * r.hits + (1.0 - m.decay_hits) * (r.right > 0)
        if _ended(request):
            r.last = m.next[r.last, min(r.right, 3)]
    r.judged = 0


@compiled()
def _compare(model: Array, request: Array, tokens: Array) -> None:
    """Learn from each token of a draft that can be compared now."""
    m, r = model[0], request[0]
    for token in tokens:
        i = r.scored
        hit = r.draft[i] == token
        odds = r.odds[i]
        error = 1.0 / (1.0 + exp(-odds)) - hit
        square = error * error
        _move(model, r.own[i], error, square)
        steep = (1.0 / (1.0 + exp(-m.slope * odds)) - hit) * odds
        m.slope_evidence += steep * steep
        # Below 0, what looks better would count as worse.
        m.slope = max(0.0, m.slope - m.slope_rate * steep / sqrt(m.slope_evidence))
        r.errors += error
        r.squares += square
        m.right[i] = m.decay_places * m.right[i] + hit
        m.tried[i] = m.decay_places * m.tried[i] + 1.0
        r.scored += 1
        r.right += hit
        if _ended(request):
            close(model, request)
            return


@compiled(_OF_MODEL, _OF_REQUEST, _OF_TEXT, _PLACES, _INT, _INTS)
def learn(
    model: Array, request: Array, text: Array, latest: Array, length: int, tokens: Array
) -> None:
    """Compare a request's draft with new tokens, learn from both, extend its text.

    Args:
        model: The model.
        request: The request.
        text: Its text, with room for the tokens.
        latest: See `TEXT`.
        length: Tokens of the text before.
        tokens: Those that were generated.
    """
    if request[0].judged:
        _compare(model, request, tokens)
    count_phrases(model, text, length, tokens)
    append(text, latest, length, tokens)


# ---- prediction ----------------------------------------------------------------------------------


@compiled()
def _agreed_bucket(places: int, agreed: int) -> int:
    share = 1 + 3 * agreed // places if agreed else 0
    return _COUNTS * share + min(places, _COUNTS - 1)


@compiled()
def _against_bucket(agreeing: int, opposing: int) -> int:
    return 2 * _LENGTH[opposing] + (opposing >= agreeing)


@compiled(_OF_MODEL, _OF_REQUEST, _OF_TEXT, _PLACES, _INT, _INTS, _FLOATS)
def judge(
    model: Array,
    request: Array,
    text: Array,
    latest: Array,
    length: int,
    draft: Array,
    survival: Array,
) -> None:
    """Judge a draft, to be scored when its tokens come, in the place of the request's last one.

    Args:
        model: The model.
        request: The request.
        text: Its text, with `latest` and its length.
        latest: See `TEXT`.
        length: Tokens of the text.
        draft: Tokens of the draft, at least one, at most `LONGEST`.
        survival: Set to the chance that at least 1, 2, ... tokens are accepted.
    """
    close(model, request)
    m, r = model[0], request[0]
    weights = m.weights
    agreeing, opposing, places, agreed = context(text, latest, length, draft[0], m.places)
    r.common[0] = _ANY
    r.common[1] = _MATCH + _LENGTH[agreeing]
    r.common[2] = _AGREED + _agreed_bucket(places, agreed)
    r.common[3] = _AGAINST + _against_bucket(agreeing, opposing)
    r.common[4] = _OF_HITS + int(r.hits * (_HITS - 1))
    r.common[5] = _LAST + r.last
    base = 0.0
    for key in r.common:
        base += weights[key, 0]
    base = m.first_odds + base
    chance = 1.0
    two_back, one_back, two, last = _hashes(text, length)
    before = (text[length - 1].token if length else -1) & _TOKEN_MASK
    for i, token in enumerate(draft):
        here = token & _TOKEN_MASK
        of_two = phrase_bucket(model, two, token)
        # A phrase of four cannot have been seen where the two were never seen.
        known = m.seen[two & _PHRASE_MASK] > 0.0
        of_four = phrase_bucket(model, two * _FAR + two_back, token) if known else 0
        own = r.own[i]
        own[0] = _PLACE + _LENGTHS * i + _LENGTH[agreeing]
        own[1] = _TOKEN + here
        own[2] = _BEFORE + before
        own[3] = _PAIR + ((before * 1_000_003 + here) & _TOKEN_MASK)
        own[4] = _OF_TWO + of_two
        own[5] = _OF_FOUR + of_four
        odds = base
        for key in own:
            odds += weights[key, 0]
        chance /= 1.0 + exp(-m.slope * odds)
        r.odds[i] = odds
        r.draft[i] = token
        survival[i] = chance
        before = here
        two_back, one_back, two, last = one_back, two, last * _ODD + token, token
    r.judged = len(draft)
    r.scored = r.right = 0
    r.errors = r.squares = 0.0
