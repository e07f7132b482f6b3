"""What the target has written before, in whatever request: which token followed which phrase.

A draft is copied from its own request. Where the target, in other answers, went on in the same way
after the same words, the copy is likelier to be right, whether anything was ever drafted there or
not. So every token that is generated counts here, not drafts alone. What is kept are counts by
hash, no text, in a fixed amount of memory, and they fade.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

PHRASE_TOKENS = 4  # tokens of the longer phrases; the shorter ones have two
SLOTS = 1 << 19  # counts that are kept; hashes that meet share one
HALVED_EVERY = SLOTS // 4  # tokens after which what is known counts half, so that slots come free
BUCKETS = 40  # for each of the two phrases that a draft's token follows

_ODD, _FAR = 40_503, 60_493  # multipliers of the hashes: odd, so that nothing of a hash is lost
_NONE = 0  # stands for what precedes the text
_MASK = SLOTS - 1
# The first of the five buckets of a phrase that occurred n times: 1, 2, 3, 4-7, 8-15, 16-63, more.
_OCCURRED = [5 * n for n in (0, 1, 2, 3, *[4] * 4, *[5] * 8, *[6] * 48, 7)]
_OFTEN = len(_OCCURRED) - 1


class Phrases:
    """Counts of phrases and of what followed them."""

    def __init__(self) -> None:
        """Begin with none."""
        self._counts = np.zeros((2, SLOTS), np.float32)
        self._seen, self._followed = _view(self._counts[0]), _view(self._counts[1])
        self._learnt = 0

    def learn(self, before: Sequence[int], tokens: Sequence[int]) -> None:
        """Count what was generated.

        Args:
            before: The last `PHRASE_TOKENS` tokens before them, fewer where there are no more.
            tokens: The tokens.
        """
        seen, followed = self._seen, self._followed
        two_back, one_back, pair, last = _pairs(before)
        for token in tokens:
            four = pair * _FAR + two_back
            seen[pair & _MASK] += 1.0
            followed[(pair * _ODD + token) & _MASK] += 1.0
            seen[four & _MASK] += 1.0
            followed[(four * _ODD + token) & _MASK] += 1.0
            two_back, one_back, pair, last = one_back, pair, last * _ODD + token, token
        self._learnt += len(tokens)
        if self._learnt >= HALVED_EVERY:
            self._learnt = 0
            self._counts *= 0.5

    def buckets(self, before: Sequence[int], draft: Sequence[int]) -> list[tuple[int, int]]:
        """Return for each token of a draft how it stands to the phrases that it would follow.

        Of the phrase of two tokens and of that of four the bucket, a number below `BUCKETS`: by how
        often the phrase occurred, and how often that token followed; 0 where it never occurred.
        """
        seen, followed = self._seen, self._followed
        two_back, one_back, pair, last = _pairs(before)
        found = []
        for token in draft:
            of_two = of_four = 0
            if n := seen[pair & _MASK]:
                of_two = _bucket(n, followed[(pair * _ODD + token) & _MASK])
                four = pair * _FAR + two_back
                if n := seen[four & _MASK]:  # which cannot be where the two were never seen
                    of_four = _bucket(n, followed[(four * _ODD + token) & _MASK])
            found.append((of_two, of_four))
            two_back, one_back, pair, last = one_back, pair, last * _ODD + token, token
        return found


def _view(counts: NDArray[np.float32]) -> MutableSequence[float]:
    """Return the same memory, quicker to read and write one at a time."""
    return cast("MutableSequence[float]", counts.data)


def _bucket(occurred: float, so: float) -> int:
    """Return the bucket of a phrase that occurred, and went on so: never, seldom, ..., always."""
    share = 0 if so == 0.0 else 4 if so >= occurred else 1 + int(3.0 * so / occurred)
    return share + _OCCURRED[int(occurred) if occurred < _OFTEN else _OFTEN]


def _pairs(before: Sequence[int]) -> tuple[int, int, int, int]:
    """Return hashes of the pairs of the last four tokens, the earliest first, and the last token.

    The last pair is the phrase of two; with the pair two back it is the phrase of four.
    """
    a, b, c, d = (_NONE,) * (PHRASE_TOKENS - len(before)) + tuple(before)
    return a * _ODD + b, b * _ODD + c, c * _ODD + d, d
