"""The report's figures: each a function from what was analysed to a matplotlib figure.

Every figure comes in two shapes, wide for screens and paper and narrow for phones, with text that
is readable in both. matplotlib is imported here and in `evaluation.report.plots` only.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moecascade.errors import SetupError
from moecascade.evaluation.report.diagnostics import Calibration, StepTime, UtilityPoint
from moecascade.evaluation.report.speedups import Cell
from moecascade.evaluation.request_record import BASELINE, PLAIN, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1f2937"
SOFT = "#6b7280"
GRID = "#e5e7eb"
EMPHASIS = {"cascade": "#c2410c", "marginal": "#0f766e"}
STATIC = "#7ba3c9"
OTHER = "#9ca3af"
SERIES = ("#1d4470", "#c2410c", "#0f766e", "#7e22ce", "#a16207", "#be185d")

STYLE = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "svg.fonttype": "none",  # text stays text: it can be searched, and the page's size rules
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def colour_of(policy: str) -> str:
    """Return a policy's colour: the same wherever it is drawn."""
    if policy in EMPHASIS:
        return EMPHASIS[policy]
    return STATIC if policy.startswith("static:") else OTHER


def _new(narrow: bool, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure and its axes, an array; side by side where it is wide, else stacked."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise SetupError("the report's figures need matplotlib: 'pip install matplotlib'") from None
    mpl.rcParams.update(STYLE)
    if narrow:
        rows, columns = rows * columns, 1
    width = 3.9 if narrow else 8.2
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()


def speedups(panels: Mapping[str, Sequence[Cell]], narrow: bool) -> Figure:
    """Speed-up of each policy: points with intervals, in panels by their titles."""
    panels = {
        title: [c for c in cells if c.policy != BASELINE and c.speedup is not None]
        for title, cells in panels.items()
    }
    shown = [cell for cells in panels.values() for cell in cells]
    policies = list(dict.fromkeys(c.policy for c in shown))
    columns = 1 if narrow else min(4, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.6 + 0.2 * len(policies)
    figure, axes = _new(narrow, height, rows, columns)
    low = min([c.low or c.speedup or 1 for c in shown] + [0.95])
    high = max([c.high or c.speedup or 1 for c in shown] + [1.05])
    for i, (ax, (title, cells)) in enumerate(zip(axes, panels.items(), strict=False)):
        ax.axvline(1, color=INK, linewidth=1)
        for cell in cells:
            y, colour = policies.index(cell.policy), colour_of(cell.policy)
            if cell.low is not None and cell.high is not None:
                ax.plot([cell.low, cell.high], [y, y], color=colour, linewidth=2)
            ax.plot(cell.speedup or 1, y, "o", color=colour, markersize=5)
        ax.set_title(title, loc="left")
        ax.set_xlim(low - 0.03, high + 0.03)
        ax.set_ylim(len(policies) - 0.5, -0.5)
        labelled = narrow or i % columns == 0
        ax.set_yticks(range(len(policies)), policies if labelled else [""] * len(policies))
        ax.xaxis.set_major_formatter("{x:g}x")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    return figure


def step_times(curves: Mapping[str, Sequence[StepTime]], narrow: bool) -> Figure:
    """Iteration time over the baseline by drafts verified, a line for each model."""
    figure, (ax,) = _new(narrow, 3.6)
    for (model, curve), colour in zip(curves.items(), SERIES * 3, strict=False):
        ks = [at.k for at in curve]
        ax.fill_between(
            ks, [at.low for at in curve], [at.high for at in curve], color=colour, alpha=0.15, lw=0
        )
        ax.plot(ks, [at.cost for at in curve], "o-", color=colour, markersize=3.5, label=model)
        if curve:
            ax.annotate(
                f"{curve[-1].cost:.2f}",
                (ks[-1], curve[-1].cost),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
    ax.set_xlabel("draft tokens verified in a step")
    ax.set_ylabel("step time over no drafts")
    ax.set_ylim(bottom=0.9)
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.legend(loc="upper left")
    return figure


def utility(points: Sequence[UtilityPoint], narrow: bool) -> Figure:
    """Utility from step times against the speed-up that a user saw."""
    figure, (ax,) = _new(narrow, 3.9)
    models = list(dict.fromkeys(point.condition.model for point in points))
    values = [v for point in points for v in (point.utility, point.speedup)] or [1.0]
    ends = [min(values) * 0.95, max(values) * 1.05]
    ax.plot(ends, ends, color=SOFT, linewidth=1)
    for model, colour in zip(models, SERIES * 3, strict=False):
        mine = [point for point in points if point.condition.model == model]
        ax.plot(
            [p.utility for p in mine],
            [p.speedup for p in mine],
            "o",
            color=colour,
            markersize=4,
            alpha=0.7,
            label=model,
        )
    ax.set_xlabel("utility: tokens a step over step time")
    ax.set_ylabel("speed-up measured at the client")
    ax.xaxis.set_major_formatter("{x:g}x")
    ax.yaxis.set_major_formatter("{x:g}x")
    ax.legend(loc="upper left")
    return figure


def acceptance(curves: Mapping[str, Sequence[float]], narrow: bool) -> Figure:
    """Share of draft tokens accepted, by place in the draft, a line for each task."""
    figure, (ax,) = _new(narrow, 3.2)
    for (name, curve), colour in zip(curves.items(), SERIES * 3, strict=False):
        places = range(1, len(curve) + 1)
        ax.plot(places, [100 * share for share in curve], "o-", color=colour, label=name, ms=4)
    ax.set_xlabel("place in the draft")
    ax.set_ylabel("accepted")
    ax.set_ylim(0, 100)
    ax.yaxis.set_major_formatter("{x:g}%")
    ax.legend(loc="upper right")
    return figure


def course(rows: Sequence[Row], narrow: bool) -> Figure:
    """K and utility along one request, a panel for each policy."""
    figure, axes = _new(narrow, 2.2, rows=len(rows))
    for ax, row in zip(axes, rows, strict=True):
        tokens = np.cumsum([0, *(emitted for _, emitted, _, _ in row.series)])
        ks = [k for k, *_ in row.series]
        ax.step(tokens[:-1], ks, where="post", color=colour_of(row.policy), linewidth=1.4)
        ax.set_ylabel("K")
        ax.set_ylim(-0.4, max([8, *ks]) + 0.6)
        ax.set_title(f"{row.policy} on {row.prompt}", loc="left")
        known = [(t, u) for t, (*_, u) in zip(tokens, row.series, strict=False) if u is not None]
        if known:
            second = ax.twinx()
            second.plot(*zip(*known, strict=True), color=SOFT, linewidth=0.9)
            second.axhline(1, color=GRID, linewidth=1)
            second.set_ylabel("utility", color=SOFT)
            second.grid(visible=False)
            second.spines["right"].set_visible(True)
    axes[-1].set_xlabel("tokens generated")
    return figure


def k_shares(shares: Mapping[str, Mapping[int, float]], narrow: bool) -> Figure:
    """Share of steps by drafts verified, a bar for each policy."""
    figure, (ax,) = _new(narrow, 0.9 + 0.28 * len(shares))
    most = max((k for share in shares.values() for k in share), default=1)
    left = np.zeros(len(shares))
    for k in range(most + 1):
        width = np.array([100 * share.get(k, 0.0) for share in shares.values()])
        shade = "#e5e7eb" if k == 0 else _blend("#bfd3e6", "#0f2a4a", (k - 1) / max(1, most - 1))
        ax.barh(range(len(shares)), width, left=left, color=shade, label=str(k))
        left += width
    ax.set_yticks(range(len(shares)), list(shares))
    ax.set_ylim(len(shares) - 0.4, -0.6)
    ax.set_xlim(0, 100)
    ax.xaxis.set_major_formatter("{x:g}%")
    ax.set_xlabel("share of steps, by drafts verified")
    ax.grid(visible=False)
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=5 if narrow else 9,
        handlelength=1,
        columnspacing=1,
    )
    return figure


def foresight(made: Mapping[str, Sequence[Calibration]], narrow: bool) -> Figure:
    """Acceptance expected and realised, error of expected step times, by drafts verified."""
    figure, axes = _new(narrow, 3.0, columns=2)
    for (name, parts), colour in zip(made.items(), SERIES * 3, strict=False):
        known = [at for at in parts if at.expected is not None and at.accepted is not None]
        ks = [at.k for at in known]
        axes[0].plot(ks, [100 * (at.expected or 0) for at in known], "--", color=colour)
        axes[0].plot(
            ks, [100 * (at.accepted or 0) for at in known], "o-", color=colour, ms=4, label=name
        )
        axes[1].plot(
            [at.k for at in parts],
            [100 * at.time_error for at in parts],
            "o-",
            color=colour,
            ms=4,
            label=name,
        )
    axes[0].set_title("drafts accepted (dashed: expected)", loc="left")
    axes[1].set_title("error of expected step time", loc="left")
    for ax in axes:
        ax.set_xlabel("drafts verified")
        ax.yaxis.set_major_formatter("{x:g}%")
    axes[0].set_ylim(0, 100)
    axes[1].set_ylim(bottom=0)
    axes[0].legend(loc="lower right")
    return figure


def throughput(cells: Sequence[Cell], narrow: bool) -> Figure:
    """Tokens a second by requests in flight, a line for each policy."""
    figure, (ax,) = _new(narrow, 3.4)
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    greys = iter(("#9ca3af", "#d1d5db", "#6b7280", "#4b5563") * 5)
    for policy in policies:
        mine = sorted((c for c in cells if c.policy == policy), key=lambda c: c.concurrency)
        known = [(c.concurrency, c.tokens_per_second) for c in mine if c.tokens_per_second]
        colour = EMPHASIS.get(policy) or (INK if policy in (BASELINE, PLAIN) else next(greys))
        style = "o--" if policy == PLAIN else "o-"
        ax.plot(*zip(*known, strict=True), style, color=colour, ms=4, label=policy)
    ax.set_xlabel("requests in flight")
    ax.set_ylabel("tokens a second, all together")
    ax.set_xticks(sorted({cell.concurrency for cell in cells}))
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper left", ncols=1 if narrow else 2)
    return figure


def _blend(light: str, dark: str, share: float) -> str:
    pairs = [(int(light[i : i + 2], 16), int(dark[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an ``<svg>`` element whose ids begin with `name`."""
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = name
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    element = whole[whole.index("<svg") :]
    for kind in ("figure_", "axes_", "patch_", "line2d_", "text_", "matplotlib.axis_"):
        element = element.replace(f'id="{kind}', f'id="{name}-{kind}')
    return element.replace("<svg ", '<svg role="img" ', 1)
