"""The judge of drafts that nobody sees, of a drafter that searches the text: it searches as well.

With asynchronous scheduling the draft of the next step is made after K has been chosen, and the
step in flight has not told yet what it wrote. But what it verifies is known, for it follows from
the text; `acceptance` says how likely that is right. If all of it is right, and the token after it
as well, then the next draft goes on where it ended, and the same chances hold further on: this
judge looks *through* the step in flight. Otherwise a new match decides, of which nothing is known;
what such drafts are worth is learnt from what they would have been, verified or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moecascade.core.cost import Array
from moecascade.core.marginal.judge import Rows
from moecascade.core.ngram import NgramDrafter
from moecascade.core.step import RequestStep, matching_prefix

if TYPE_CHECKING:
    from moecascade.core.marginal.acceptance import TextJudge

STATES = 5  # of the text before a break: no match, or one of four chances of its first token
FADING = 0.998  # of what is known of new matches, from one to the next
FOUND = (0.5, 4.0)  # chance that there is a new match, and of how many matches that is a guess
RIGHT = (0.02, 1.0)  # the same for the first token of one
NEXT = (0.5, 1.0)  # and for each further token, given those before it


@dataclass(slots=True)
class _Request:
    """What the judge keeps of one request.

    Attributes:
        drafter: Finds what the engine's drafter finds.
        k: Drafts that the step in flight verifies.
        foreseen: What that step writes if the next draft is the one that was looked at.
        state: Of the text before that step.
        broke: The state before the last step, where it wrote something else.
        fresh: The new match after that, compared with what is written.
        compared: Tokens of it that were right so far.
        fresh_state: The state that it is evidence for.
    """

    drafter: NgramDrafter
    k: int = 0
    foreseen: Sequence[int] = ()
    state: int = 0
    broke: int | None = None
    fresh: Sequence[int] = ()
    compared: int = 0
    fresh_state: int = 0


class AheadJudge:
    """Survival of the next draft, looked at through the step in flight.

    Args:
        width: Tokens of a draft that it answers for.
        text: Judges the drafts that are known; its requests are begun and ended by its owner.
        lengths: Least and greatest length of the drafter's match.
        filled: Whether drafts are filled up where nothing was found, and paid for.
    """

    def __init__(self, width: int, text: TextJudge, lengths: tuple[int, int], filled: bool) -> None:
        """Begin with guesses."""
        self._width, self._text, self._lengths, self._filled = width, text, lengths, filled
        self._requests: dict[str, _Request] = {}
        self._found = np.tile([FOUND[0] * FOUND[1], FOUND[1]], (STATES, 1))  # of how many
        guess = np.array([RIGHT] + [NEXT] * (width - 1))
        self._right = np.tile(guess[:, 0] * guess[:, 1], (STATES, 1))
        self._tried = np.tile(guess[:, 1], (STATES, 1))

    def begin(self, request_id: str, _prompt: Sequence[int]) -> None:
        """Nothing yet: the text is searched when somebody first asks."""

    def end(self, request_id: str) -> None:
        """Forget the request."""
        self._requests.pop(request_id, None)

    def propose(self, request_ids: Sequence[str], _drafts: Sequence[Sequence[int]]) -> Array:
        """Return the survival of the next drafts; see `Judge.propose`.

        Where a draft is paid for only if there is one, and the request is alone: its survival given
        that there is. Together with others it is taken to be there, for what a batch pays does not
        grow in proportion.
        """
        rows = np.zeros((len(request_ids), self._width))
        given = not self._filled and len(request_ids) == 1
        for row, name in zip(rows, request_ids, strict=True):
            self._look(name, row, given)
        return rows

    def _look(self, name: str, row: Array, given: bool) -> None:
        request = self._requests.get(name)
        if request is None:
            most = 2 * self._width + 1
            text = self._text.written(name)
            drafter = NgramDrafter(text, *self._lengths, most, self._filled)
            request = self._requests[name] = _Request(drafter)
        draft = request.drafter.propose()
        survival = self._text.judged(name, draft)
        if request.broke is not None:
            self._renew(request, request.broke, draft)
        k = min(request.k, len(draft))
        request.foreseen = draft[: k + 1]
        request.state = state = 1 + min(3, int(4 * survival[0])) if draft else 0
        through = survival[k] if len(survival) > k else 0.0
        ahead = survival[k + 1 : k + 1 + self._width]
        row[: len(ahead)] = ahead
        row += (1.0 - through) * np.cumprod(self._right[state] / self._tried[state])
        if given:
            found, of = self._found[state]
            row /= through + (1.0 - through) * found / of
            np.minimum(row, 1.0, out=row)

    def decided(self, request_ids: Sequence[str], ks: Sequence[int]) -> None:
        """Take how many drafts the next step verifies."""
        for name, k in zip(request_ids, ks, strict=True):
            if name in self._requests:
                self._requests[name].k = k

    def prolonged(self, survival: Rows, _lengths: Sequence[int]) -> Array:
        """Return survival as it is: it reaches as far as a draft can."""
        return np.asarray(survival)

    def learn(self, parts: Sequence[RequestStep]) -> None:
        """Take what was written, whoever decided."""
        self._text.learn(parts)
        for part in parts:
            request = self._requests.get(part.request_id)
            if request is not None:
                self._compare(request, part.tokens)
                request.drafter.extend(part.tokens)
                foreseen = list(part.tokens) == list(request.foreseen)
                request.broke = None if foreseen else request.state

    follow = learn

    def _renew(self, request: _Request, state: int, draft: Sequence[int]) -> None:
        """A new match, or none: count it, and see what becomes of it."""
        for evidence in (self._found, self._tried, self._right):
            evidence[state] *= FADING
        self._found[state] += (bool(draft), 1.0)
        if not draft:
            self._tried[state, 0] += 1.0
        request.fresh, request.compared = draft[: self._width], 0
        request.fresh_state, request.broke = state, None

    def _compare(self, request: _Request, tokens: Sequence[int]) -> None:
        """Count the tokens of a new match that can be compared now."""
        at, state, rest = request.compared, request.fresh_state, request.fresh[request.compared :]
        right = matching_prefix(rest, tokens)
        tried = min(right + 1, len(rest), len(tokens))
        self._right[state, at : at + right] += 1.0
        self._tried[state, at : at + tried] += 1.0
        request.compared += right
        if tried > right:
            request.fresh = ()
