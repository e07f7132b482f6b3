"""What a drafter that searches the text proposes: it follows from the tokens alone."""

from __future__ import annotations

from collections.abc import Sequence


class NgramDrafter:
    """The choice of vLLM's n-gram proposer, one request at a time, in constant time a token.

    The longest n-gram, of at most `longest` and at least `shortest` tokens, that ends the text and
    occurs in it before; of its places the earliest, or the latest; the draft is what followed
    there, of at most `max_k` tokens and up to the end of the text.

    Args:
        prompt: Token ids of the prompt.
        shortest: Least length of a match (vLLM: ``prompt_lookup_min``).
        longest: Greatest length of a match (vLLM: ``prompt_lookup_max``).
        max_k: Longest draft.
        latest: Whether the latest place counts, as on vLLM's second model runner (0.32:
            `_ngram_scan_kernel`).
    """

    def __init__(
        self, prompt: Sequence[int], shortest: int, longest: int, max_k: int, latest: bool = False
    ) -> None:
        """Index the prompt."""
        self._latest = latest
        self._lengths = range(longest, shortest - 1, -1)
        self._max_k = max_k
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where an n-gram's place ends
        self.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what was generated."""
        for token in tokens:
            self._index()
            self._tokens.append(token)

    def propose(self) -> list[int]:
        """Return the draft for what follows, empty where nothing matches."""
        text = self._tokens
        for n in self._lengths:
            if n < len(text):
                end = self._ends.get(tuple(text[-n:]))
                if end is not None:
                    return text[end : end + self._max_k]
        return []

    def _index(self) -> None:
        """Index the n-grams that end the text; from now on they have occurred before."""
        text = self._tokens
        for n in self._lengths:
            if n <= len(text):
                ending = tuple(text[-n:])
                if self._latest or ending not in self._ends:
                    self._ends[ending] = len(text)
