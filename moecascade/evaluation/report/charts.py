"""Charts, the report's first: which there are, how to read them, and how they are drawn.

Every chart comes in two shapes, wide for screens and paper and narrow for phones, with text that is
readable in both. matplotlib is imported here only, and only when something is drawn.
"""

from __future__ import annotations

import importlib.util
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecascade.errors import SetupError
from moecascade.evaluation.report.analysis import Analysis
from moecascade.evaluation.report.diagnostics import Course, StepTime, UtilityPoint
from moecascade.evaluation.report.roles import static_k
from moecascade.evaluation.report.speedups import Cell, Condition, by_workload, totals
from moecascade.evaluation.request_record import BASELINE
from moecascade.replay.planning.plan import Choice, Profile
from moecascade.replay.planning.step_time import as_dict

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


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of the report.

    Attributes:
        name: Of its file and its place in the page.
        title: What it shows, as a statement where the data allow one.
        text: How to read it.
        draw: Makes it, narrow or wide.
    """

    name: str
    title: str
    text: str
    draw: Callable[[bool], Figure]


INTERVALS = (
    "Points: all prompts together; lines: 95% intervals, bootstrap over prompts. Left of 1 a user "
    "waits longer than without speculation."
)


def charts(analysis: Analysis, flags: str = "") -> list[Chart]:
    """Return the charts that the numbers allow.

    Args:
        analysis: The numbers.
        flags: What the servers ran with where settings of policies were varied.
    """
    return [*_speedups(analysis, flags), *_diagnostics(analysis)]


def _speedups(analysis: Analysis, flags: str) -> Iterable[Chart]:
    """Yield an overview of the conditions, then each of them, one request at a time."""
    together = {c.head: of for c, of in totals(analysis.main.cells).items() if c.concurrency == 1}
    if len(together) > 1:
        title = "Speed-up over no speculation, all tasks together"
        yield Chart("overview", title, INTERVALS, partial(speedups, together))
    with_flags = f"{INTERVALS} Servers ran with {flags}." if flags else INTERVALS
    for name, title, text, cells in (
        ("speedups", "Speed-up over no speculation", INTERVALS, analysis.main.cells),
        ("settings", "Other settings of policies", with_flags, analysis.varied.cells),
    ):
        for at, panels in by_workload(cells).items():
            if at.concurrency == 1:
                draw = partial(speedups, panels)
                yield Chart(f"{name}-{_slug(at)}", f"{title}: {at.title}", text, draw)


def _diagnostics(analysis: Analysis) -> Iterable[Chart]:
    """Yield what explains the speed-ups."""
    found = analysis.diagnostics
    if found.step_times:
        yield Chart(
            "step-times",
            "What verifying drafts costs",
            "Time of a step by the drafts it verified, over a step without, same prompts, one "
            "request at a time. Bands: middle half of the requests.",
            partial(step_times, found.step_times),
        )
    if (squared := found.r_squared) is not None:
        yield Chart(
            "utility",
            f"Utility is the speed-up: R² = {squared:.3f} over {len(found.utility)} points",
            "Each point is a policy on a task under one condition: tokens a step over relative "
            "step time, from the engine's log, against what a client measured.",
            partial(utility, found.utility),
        )
    if found.courses:
        yield Chart(
            "course",
            "K along one request",
            f"The same prompt under each policy ({found.courses[0].condition.title}). Grey: the "
            "utility that the policy sees (cascade: measured in its window; marginal: expected "
            "of the step).",
            partial(course, found.courses),
        )
    if found.k_shares:
        yield Chart(
            "k-shares",
            "Which draft lengths were verified",
            "All steps with one request at a time, all models together. Also a policy that "
            "asks for drafts verifies none where the drafter has none.",
            partial(k_shares, found.k_shares),
        )


def _slug(of: Condition) -> str:
    model = "".join(c if c.isalnum() else "-" for c in of.model)
    return f"{model}-t{of.temperature:g}".replace(".", "")


def check_installed() -> None:
    """Raise SetupError where charts cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError("charts need matplotlib: 'pip install matplotlib', or --no-plot")


def save(figure: Figure, path: Path, title: str, caption: str = "") -> None:
    """Write a chart with its title into a file, whose ending says which kind (png, svg, pdf)."""
    width = figure.get_figwidth()
    title, caption = (textwrap.fill(t, int(n * width)) for t, n in ((title, 11), (caption, 17)))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    if caption:
        figure.supxlabel(caption, fontsize=7.5, color=SOFT, x=0.01, ha="left")
    lines = title.count("\n") + caption.count("\n")
    figure.set_figheight(figure.get_figheight() + 0.3 + 0.18 * lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def colour_of(policy: str) -> str:
    """Return a policy's colour: the same wherever it is drawn."""
    if policy in EMPHASIS:
        return EMPHASIS[policy]
    return OTHER if static_k(policy) is None else STATIC


def _new(narrow: bool, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure and its axes, an array; side by side where it is wide, else stacked."""
    check_installed()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update(STYLE)
    if narrow:
        rows, columns = rows * columns, 1
    width = 3.9 if narrow else 8.2
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()


def speedups(panels: Mapping[str, Sequence[Cell]], narrow: bool, each: bool = False) -> Figure:
    """Speed-up of each policy: points with intervals, in titled panels; `each`: and every pair."""
    found = {
        title: {c.policy: c.speedup for c in cells if c.policy != BASELINE and c.speedup}
        for title, cells in panels.items()
    }
    policies = list(dict.fromkeys(policy for of in found.values() for policy in of))
    columns = 1 if narrow else min(4, len(found))
    rows = -(-len(found) // columns)
    figure, axes = _new(narrow, max(1.2, 0.7 + 0.24 * len(policies)), rows, columns)
    shown = [of for panel in found.values() for of in panel.values()]
    pairs = [ratio for of in shown for ratio in of.each] if each else []
    low = min([0.95, *(of.low or of.value for of in shown), *pairs])
    high = max([1.05, *(of.high or of.value for of in shown), *pairs])
    for i, (ax, (title, panel)) in enumerate(zip(axes, found.items(), strict=False)):
        ax.axvline(1, color=INK, linewidth=1)
        for policy, of in panel.items():
            y, colour = policies.index(policy), colour_of(policy)
            if each:
                ax.plot(of.each, [y + 0.3] * of.pairs, ".", color=colour, ms=5, alpha=0.5, mew=0)
            if of.low is not None and of.high is not None:
                ax.plot([of.low, of.high], [y, y], color=colour, linewidth=2)
            ax.plot(of.value, y, "o", color=colour, markersize=5)
        ax.set_title(title, loc="left")
        ax.set_xlim(low - 0.03, high + 0.03)
        ax.set_ylim(len(policies) - 0.5, -0.5)
        labelled = narrow or i % columns == 0
        ax.set_yticks(range(len(policies)), policies if labelled else [""] * len(policies))
        ax.xaxis.set_major_formatter("{x:g}x")
    for ax in axes[len(found) :]:
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


def course(courses: Sequence[Course], narrow: bool) -> Figure:
    """K and utility along one request, a panel for each policy."""
    figure, axes = _new(narrow, 2.2, rows=len(courses))
    for ax, of in zip(axes, courses, strict=True):
        at = np.cumsum([0, *(tokens for _, tokens, _ in of.steps)])
        ks = [k for k, *_ in of.steps]
        ax.step(at[:-1], ks, where="post", color=colour_of(of.policy), linewidth=1.4)
        ax.set_ylabel("K")
        ax.set_ylim(-0.4, max([8, *ks]) + 0.6)
        ax.set_title(f"{of.policy} on {of.prompt}", loc="left")
        known = [(t, u) for t, (*_, u) in zip(at, of.steps, strict=False) if u is not None]
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


def planned(found: Sequence[Choice], profiles: Sequence[Profile], narrow: bool) -> Figure:
    """What drafts cost and what they give by K; and where the time of a step goes."""
    figure, (ax, parts) = _new(narrow, 3.8, columns=2)
    loads = list(dict.fromkeys(choice.requests for choice in found))
    most = max(choice.k for choice in found)
    for i, n in enumerate(loads):
        mine = [choice for choice in found if choice.requests == n]
        colour = _blend("#9db9d6", "#0f2a4a", i / max(1, len(loads) - 1))
        label = f"costs, {n} at once"
        ax.plot([c.k for c in mine], [c.cost for c in mine], "-", color=colour, label=label)
    for i, profile in enumerate(profiles):
        tokens = [profile.tokens_of_a_draft(k) for k in range(most + 1)]
        known = [value for value in tokens if value is not None]
        shade = _blend("#f0a875", "#7c2d12", i / max(1, len(profiles) - 1))
        ax.plot(range(len(known)), known, "o--", color=shade, ms=3, lw=1, label=profile.name)
    ax.set_xlabel("draft length K")
    ax.set_title("Cost of a step, tokens it gives (dashed)", loc="left")
    ax.legend(fontsize=7)
    ends = [choice for choice in found if choice.k in (0, most)]
    places, top = range(len(ends)), np.zeros(len(ends))
    took = [as_dict(choice.step) for choice in ends]
    names = [name for name in took[0] if name != "total" and any(one[name] for one in took)]
    for i, name in enumerate(names):
        shade = _blend("#dbe7f3", "#0f2a4a", i / max(1, len(names) - 1))
        shade = {"experts": EMPHASIS["cascade"], "drafting": EMPHASIS["marginal"]}.get(name, shade)
        heights = np.array([one[name] for one in took])
        parts.bar(places, heights, bottom=top, color=shade, label=name)
        top += heights
    parts.set_xticks(places, [f"n={choice.requests}\nK={choice.k}" for choice in ends])
    parts.tick_params(axis="x", labelsize=7.5)
    parts.grid(visible=False, axis="x")
    parts.set_title("Milliseconds of a step", loc="left")
    handles, labels = parts.get_legend_handles_labels()
    parts.legend(handles[::-1], labels[::-1], fontsize=7)
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
