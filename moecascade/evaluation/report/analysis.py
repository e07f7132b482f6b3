"""The one pass: rows in, numbers out. Headline, charts, tables and page read an `Analysis` only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moecascade.evaluation.report.diagnostics import Diagnostics, diagnostics
from moecascade.evaluation.report.roles import varied
from moecascade.evaluation.report.speedups import Speedups, speedups
from moecascade.evaluation.request_record import Row


@dataclass(frozen=True, slots=True)
class Analysis:
    """All numbers of a report.

    Attributes:
        requests: How many requests they are from.
        models: The models that were measured.
        policies: The policies, in order of appearance.
        main: Speed-ups, but for
        varied: those of runs that vary a policy's settings, which may differ in other ways too.
        diagnostics: All else, of the runs in `main` if there are any.
    """

    requests: int
    models: tuple[str, ...]
    policies: tuple[str, ...]
    main: Speedups
    varied: Speedups
    diagnostics: Diagnostics


def analyse(rows: Sequence[Row], timed: Sequence[Row] = ()) -> Analysis:
    """Return the numbers of some rows.

    Args:
        rows: Of requests that somebody could have sent.
        timed: Of requests that only measured step times: their drafts meant nothing.

    Raises:
        ConfigError: No request ran under the baseline.
    """
    runs = ablations(rows)
    main = [row for row in rows if row.run not in runs]
    aside = [row for row in rows if row.run in runs]
    return Analysis(
        requests=len(rows) + len(timed),
        models=tuple(dict.fromkeys(row.model for row in (*rows, *timed))),
        policies=tuple(dict.fromkeys(row.policy for row in rows)),
        main=speedups(main) if main or not (aside or timed) else Speedups(),
        varied=speedups(aside) if aside else Speedups(),
        diagnostics=diagnostics(main or aside, timed),
    )


def ablations(rows: Sequence[Row]) -> set[str]:
    """Return the runs that vary a policy's settings."""
    return {row.run for row in rows if varied(row.policy)}
