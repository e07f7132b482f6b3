"""Plots of results. Needs matplotlib, which is only imported here and only when a plot is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moecascade.errors import SetupError
from moecascade.evaluation.report.speedups import Cell
from moecascade.evaluation.request_record import BASELINE
from moecascade.evaluation.workloads import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EMPHASIS = "#c2410c"
STATIC = ("#bfd3e6", "#7ba3c9", "#3b6ea5", "#1d4470", "#0f2a4a")
"""Fixed draft lengths, light to dark with K: they are one family."""
OTHERS = ("#0f766e", "#7e22ce", "#a16207", "#be185d")
INK = "#374151"


def check_installed() -> None:
    """Raise SetupError where plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError(
            "the plot needs matplotlib: 'pip install matplotlib', or do without it by --no-plot"
        )


def speedups(cells: Sequence[Cell], path: Path, title: str, caption: str) -> None:
    """Draw the speed-up of each policy over the baseline, grouped by task, into a file.

    A bar is the speed-up of all prompts of the task, its line the 95% interval, each dot a prompt.

    Args:
        cells: From `summary.summarise`.
        path: The file; its ending says which kind (png, svg, pdf).
        title: Above the plot.
        caption: Below it: machine, model, number of prompts.

    Raises:
        SetupError: matplotlib is not installed.
    """
    check_installed()
    from matplotlib.figure import Figure

    shown = [cell for cell in cells if cell.policy != BASELINE and cell.speedup is not None]
    tasks = list(dict.fromkeys(cell.workload for cell in shown))
    policies = list(dict.fromkeys(cell.policy for cell in shown))
    colours = _colours(policies)
    width = 0.8 / max(len(policies), 1)
    figure = Figure(figsize=(max(7.5, 1.2 + 2.0 * len(tasks)), 4.8), layout="constrained")
    axes = figure.subplots()
    for cell in shown:
        x = (
            tasks.index(cell.workload)
            + (policies.index(cell.policy) - (len(policies) - 1) / 2) * width
        )
        _bar(axes, cell, x, width, colours[cell.policy])
    axes.axhline(1, color=INK, linewidth=1)
    axes.annotate(
        "no speculation",
        (1, 1),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=INK,
    )
    axes.set_xticks(
        range(len(tasks)), ["all three" if task == ALL else task for task in tasks], fontsize=11
    )
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylabel("speed-up of decoding over no speculation")
    axes.yaxis.set_major_formatter("{x:.1f}x")
    axes.set_ylim(*_limits(shown))
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    for policy in policies:
        axes.bar(0, 0, color=colours[policy], label=_label(policy))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=len(policies),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        handleheight=0.9,
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(caption, fontsize=8, color=INK, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _bar(axes: Axes, cell: Cell, x: float, width: float, colour: str) -> None:
    """Draw a cell: bar, interval, dots and the number."""
    assert cell.speedup is not None
    axes.bar(x, cell.speedup, width * 0.92, color=colour, zorder=2)
    # Dots in a fixed pattern across the bar, so that equal values stay apart.
    for i, ratio in enumerate(cell.each):
        offset = ((i * 0.618) % 1 - 0.5) * width * 0.6
        axes.plot(
            x + offset, ratio, "o", ms=2.6, color="white", mec=INK, mew=0.5, alpha=0.8, zorder=3
        )
    if cell.low is not None and cell.high is not None:
        axes.vlines(x, cell.low, cell.high, color="#111827", linewidth=1.6, zorder=4)
    axes.annotate(
        f"{cell.speedup:.2f}",
        (x, 0),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=9 if width > 0.18 else 7.5,
        fontweight="bold",
        color="#111827" if colour in STATIC[:2] else "white",
        zorder=5,
    )


def _limits(cells: Sequence[Cell]) -> tuple[float, float]:
    """Return the range of the y axis: from 0, as bars must, to above all that is drawn."""
    tops = [value for cell in cells for value in (*cell.each, cell.high, cell.speedup) if value]
    return 0.0, max([1.2, *tops]) * 1.08


def _colours(policies: Sequence[str]) -> dict[str, str]:
    """Return a colour for each policy."""
    static = [policy for policy in policies if policy.startswith("static:")]
    rest = [policy for policy in policies if policy not in static and policy != "cascade"]
    step = max(1, len(STATIC) // max(len(static), 1))
    colours = {policy: STATIC[min(i * step, 4)] for i, policy in enumerate(static)}
    colours |= {policy: OTHERS[i % len(OTHERS)] for i, policy in enumerate(rest)}
    return colours | {"cascade": EMPHASIS}


def _label(policy: str) -> str:
    """Return a policy's name for the legend."""
    name, _, argument = policy.partition(":")
    return f"K = {argument}, always" if name == "static" else policy
