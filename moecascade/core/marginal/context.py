"""What a request's own text says about a draft: the context that predicts acceptance.

A draft is believable where the text has been here before: where a long stretch that ends the text
has occurred earlier, and was followed by what is drafted now; all the more where it occurred often
and was always followed by that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

PLACES = (
    8  # latest earlier places of the text's last two tokens that are looked at; flat from 2 to 32
)
LONGEST_MATCH = 32  # tokens of a match that are told apart
NEWEST = 16_384  # tokens of a prompt that are kept, the latest ones: memory is bounded


class Context(NamedTuple):
    """A draft in its text.

    Attributes:
        agreeing: Longest match that was followed by the draft's first token, in tokens; at most
            `LONGEST_MATCH`, 0 for none.
        opposing: Longest match that was followed by another token.
        places: Earlier places of the last two tokens, at most `PLACES`.
        agreed: How many of them were followed by the draft's first token.
        before: The last token of the text, which the draft follows; -1 for an empty text.
    """

    agreeing: int
    opposing: int
    places: int
    agreed: int
    before: int


class Text:
    """The tokens of one request, indexed by their pairs once somebody asks about a draft.

    Args:
        prompt: Token ids of the prompt; of a longer one the `NEWEST` are kept.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        """Keep the prompt."""
        self._tokens = list(prompt[-NEWEST:])
        self.extend = self._tokens.extend  # appends what was generated
        self._ends: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self._indexed = 2  # tokens that were looked at: from the third on they follow a pair

    def __len__(self) -> int:
        """Return how many tokens are kept."""
        return len(self._tokens)

    def ending(self, count: int) -> list[int]:
        """Return the last tokens, at most `count`."""
        return self._tokens[-count:] if count else []

    def context(self, token: int) -> Context:
        """Return the context of a draft whose first token is `token`."""
        text = self._tokens
        here = len(text)
        for place in range(self._indexed, here):
            self._ends[text[place - 2], text[place - 1]].append(place)
        self._indexed = max(self._indexed, here)
        places = self._ends.get((text[-2], text[-1]), [])[-PLACES:] if here > 1 else []
        agreeing, opposing, agreed = 0, 0, 0
        for place in places:
            if text[place] == token:
                agreed += 1
                agreeing = _longer(text, place, here, agreeing)
            else:
                opposing = _longer(text, place, here, opposing)
        before = text[-1] if text else -1
        return Context(agreeing, opposing, len(places), agreed, before)


def _longer(text: Sequence[int], place: int, here: int, than: int) -> int:
    """Return how many tokens before `place` equal those before `here`, or `than` if that is more.

    Two are known to be equal.
    """
    length, most = than or 2, min(LONGEST_MATCH, place)
    # One slice tells whether the match is longer; most are not, and time is short.
    if length < most and text[place - length - 1 : place] == text[here - length - 1 : here]:
        length += 1
        while length < most and text[place - length - 1] == text[here - length - 1]:
            length += 1
    return length
