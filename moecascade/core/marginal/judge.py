"""What a judge is: it says how many tokens of a draft will be accepted.

There are two: by the request's text (`acceptance`), and by how its last drafts fared (`recent`),
coarser and much cheaper. A judge keeps what it knows of each request by itself.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Protocol, cast

from moecascade.core.cost import Array
from moecascade.core.step import RequestStep

Rows = Sequence[Sequence[float]] | Array  # for few requests lists, for many an array: each quickest
LONGEST = 64  # tokens of a draft that are judged


class Judge(Protocol):
    """Chances of draft tokens, learnt from what the target then wrote."""

    def begin(self, request_id: str, prompt: Sequence[int]) -> None:
        """A request begins."""

    def end(self, request_id: str) -> None:
        """A request ended: forget it. What it taught remains."""

    def propose(self, request_ids: Sequence[str], drafts: Sequence[Sequence[int]]) -> Rows:
        """Take the drafts of a step, to be compared with what is written; return their survival.

        That is the chance that at least 1, 2, ... of a draft's tokens are accepted, a row of the
        judge's width for each. Beyond a draft's end it means nothing.
        """

    def prolonged(self, survival: Rows, lengths: Sequence[int]) -> Array:
        """Return survival with a guess for tokens beyond drafts of such lengths."""

    def learn(self, parts: Sequence[RequestStep]) -> None:
        """Compare the drafts with what their requests wrote."""

    def follow(self, parts: Sequence[RequestStep], /) -> None:
        """Take what requests wrote in a step that the other judge decided."""


def outcome(last: int, right: int, states: int) -> int:
    """Return how a request's last drafts fared, as a number below `states`.

    Each is a digit to the base of 3: no token right, one or two, more. The latest is the last.

    Args:
        last: The number before this draft.
        right: Tokens of it that were right.
        states: 3 to the power of the drafts that are remembered.
    """
    return (3 * last + (0 if right == 0 else 1 if right < 3 else 2)) % states


def one_by_one(table: Array) -> MutableSequence[float]:
    """Return a table's numbers in a row: the same memory, quicker to change one at a time."""
    return cast("MutableSequence[float]", table.reshape(-1).data)
