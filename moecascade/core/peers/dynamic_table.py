"""Policy `dynamic-table`: K from a table by batch size, as vLLM's Dynamic SD has it.

Source: vLLM 0.32, ``num_speculative_tokens_per_batch_size``: ranges of batch sizes, each with a K
that all requests of the batch use; a gap keeps the K before it, so do sizes beyond the last range.
vLLM has no default table. Ours stands for what people write by hand: the longest drafts for a few
requests, shorter ones as the batch grows, none beyond 64.

`tuned` makes the best table in hindsight from measured throughputs: the bar that vLLM's users name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moecascade.core.peers.uniform import OneForAll
from moecascade.core.step import RequestStep
from moecascade.errors import ConfigError

TABLE = ((1, 4, 5), (5, 16, 3), (17, 64, 1), (65, 65_536, 0))


@dataclass(frozen=True, slots=True)
class TableSettings:
    """The table.

    Attributes:
        table: Entries (first batch size, last batch size, K), as in vLLM's configuration.
    """

    table: Sequence[Any] = field(default=TABLE)

    def __post_init__(self) -> None:
        """Check the table as vLLM does; ConfigError says what is wrong with it."""
        where = "options of policy 'dynamic-table': table"
        end = 0
        for entry in self.table:
            whole = isinstance(entry, Sequence) and all(isinstance(n, int) for n in entry)
            if not whole or len(entry) != 3:
                raise ConfigError(f"{where}: each entry is [first size, last size, K], got {entry}")
            first, last, k = entry
            if not end < first <= last:
                raise ConfigError(
                    f"{where}: batch sizes must rise and not overlap, got {first} to {last} "
                    f"after {end}"
                )
            if k < 0:
                raise ConfigError(f"{where}: K must be at least 0, got {k}")
            end = last
        if not self.table or self.table[0][0] != 1:
            raise ConfigError(f"{where}: the first entry must begin with batch size 1")


class DynamicTable(OneForAll):
    """One K for the batch, looked up."""

    name = "dynamic-table"
    Settings = TableSettings
    settings: TableSettings

    def __init__(self, settings: TableSettings, max_k: int) -> None:
        super().__init__(settings, max_k)
        self._table = tuple(settings.table)

    def chosen(self, requests: int) -> int:
        """Return the K of the last range that begins at or below this batch size."""
        return next((k for first, _, k in reversed(self._table) if first <= requests), 0)

    def learn(self, parts: Sequence[RequestStep], seconds: float | None) -> None:
        """Nothing to learn: the table says it all."""

    def lookahead(self, request_ids: Sequence[str]) -> int:
        """Return the K of the step under way; it changes with the batch only."""
        return self._k


def tuned(measured: Mapping[tuple[int, int], float]) -> list[tuple[int, int, int]]:
    """Return the table that would have been best.

    Args:
        measured: Tokens a second by (batch size, K).
    """
    sizes = sorted({size for size, _ in measured})
    table: list[tuple[int, int, int]] = []
    for i, size in enumerate(sizes):
        ks = [k for s, k in measured if s == size]
        best = max(ks, key=lambda k: measured[size, k])
        first = 1 if i == 0 else size
        last = sizes[i + 1] - 1 if i + 1 < len(sizes) else 65_536
        if table and table[-1][2] == best:
            first = table.pop()[0]
        table.append((first, last, best))
    return table
