"""Write deploy/grafana-dashboard.json: what an operator reads first comes first.

    python scripts/dashboard.py

A panel is a title, what it shows in PromQL, its unit, and what it means in a sentence. A test asks
a real Prometheus that scrapes a real server each of these questions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "deploy" / "grafana-dashboard.json"
OF = '{model_name=~"$model"}'
WINDOW = "[$__rate_interval]"
DECODE = 'kind="decode"'


def rate(name: str, by: str = "", only: str = "") -> str:
    """Return the growth a second of a counter, summed by labels."""
    of = OF if not only else OF.replace("}", f", {only}}}")
    return f"sum{f' by ({by})' if by else ''} (rate(moecascade:{name}_total{of}{WINDOW}))"


def share(part: str, whole: str, by: str = "", only: str = "") -> str:
    """Return one counter's growth over another's."""
    return f"{rate(part, by, only)} / {rate(whole, by)}"


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: Its title.
        queries: PromQL by legend.
        unit: As Grafana names it.
        says: What it means.
        kind: ``stat``, ``timeseries`` or ``bargauge``.
        wide: Columns of 24.
        stacked: Whether series add up.
    """

    title: str
    queries: dict[str, str]
    unit: str
    says: str
    kind: str = "timeseries"
    wide: int = 12
    stacked: bool = False


def stat(title: str, query: str, unit: str, says: str) -> Panel:
    """Return a panel of one number."""
    return Panel(title, {"": query}, unit, says, "stat", 4)


PANELS = (
    stat(
        "Speed-up now",
        share("baseline_seconds", "decode_seconds"),
        "none",
        "Time that the same tokens would have taken without drafts over the time that they took "
        "(estimated). Below 1, speculation costs more than it earns.",
    ),
    stat(
        "Steps without drafts",
        share("request_steps", "request_steps", only='k="0"'),
        "percentunit",
        "Speculation is off in these: it would not pay, or there was nothing to verify.",
    ),
    stat(
        "Drafts accepted",
        share("draft_tokens_accepted", "draft_tokens_verified"),
        "percentunit",
        "Of the tokens that were verified.",
    ),
    stat(
        "Saved an hour",
        f"3600 * ({rate('saved_seconds')} - ({rate('lost_seconds')} or vector(0)))",
        "s",
        "Decode time that ended requests won, less what others lost (estimated).",
    ),
    stat(
        "Requests",
        f"sum(moecascade:requests_running{OF}) or vector(0)",
        "none",
        "That the controller knows, running or waiting.",
    ),
    stat(
        "Faults, 24 h",
        f"sum(increase(moecascade:faults_total{OF}[24h]))",
        "none",
        "Each cost drafts, and no request. Anything above 0 is worth a look into the log.",
    ),
    Panel(
        "Speed-up by policy",
        {"{{policy}}": share("baseline_seconds", "decode_seconds", "policy")},
        "none",
        "As above, of each policy.",
    ),
    Panel(
        "Steps by K",
        {"K = {{k}}": rate("request_steps", "k")},
        "ops",
        "How many drafts were verified in a request's step; 0 is off.",
        stacked=True,
    ),
    Panel(
        "Drafts and tokens a step",
        {
            "drafts": share("draft_tokens_verified", "request_steps"),
            "tokens": share("tokens_emitted", "request_steps"),
        },
        "none",
        "Mean K, and the effective token rate.",
    ),
    Panel(
        "Time saved and lost",
        {
            "saved": rate("saved_seconds"),
            "lost": f"{rate('lost_seconds')} or vector(0)",
        },
        "none",
        "Seconds a second, by requests that ended (estimated).",
    ),
    Panel(
        "Accepted by position",
        {"{{position}}": share("draft_positions_accepted", "draft_positions_verified", "position")},
        "percentunit",
        "Of the drafts verified as far as that position.",
        "bargauge",
    ),
    Panel(
        "Would have been accepted",
        {
            "{{policy}}": share("shadow_drafts_right", "shadow_drafts", "policy"),
        },
        "percentunit",
        "First tokens of drafts that were seen with K at 0. High and steady: too careful.",
    ),
    Panel(
        "Time of a step",
        {
            "measured": f"{rate('step_seconds', only=DECODE)} / {rate('steps', only=DECODE)}",
            "without drafts": f"avg(moecascade:baseline_step_seconds{OF})",
        },
        "s",
        "Decode steps, and what one without drafts would take now (estimated).",
    ),
    Panel(
        "Measured over expected time of a step",
        {
            "mean": f"sum(rate(moecascade:step_time_ratio_sum{OF}{WINDOW}))"
            f" / sum(rate(moecascade:step_time_ratio_count{OF}{WINDOW}))",
        },
        "none",
        "The cost model is right where this is near 1.",
    ),
    Panel(
        "Speed-up of whole requests",
        {
            f"{name} of requests": f"histogram_quantile({q}, sum by (le) "
            f"(rate(moecascade:utility_measured_bucket{OF}{WINDOW})))"
            for q, name in ((0.05, "slowest 5%"), (0.5, "half"), (0.95, "fastest 5%"))
        },
        "none",
        "Ended requests (estimated).",
    ),
    Panel(
        "What the plugin takes",
        {
            "deciding": share("controller_seconds", "step_seconds"),
            "handing drafts over": share("handover_seconds", "step_seconds"),
        },
        "percentunit",
        "Parts of the engine's time.",
    ),
    Panel(
        "Requests by policy",
        {"{{policy}}": f"sum by (policy) (moecascade:requests_running{OF})"},
        "none",
        "Where clients choose, more than one.",
        stacked=True,
    ),
    Panel(
        "Faults by kind",
        {
            "{{kind}}": f"sum by (kind) (increase(moecascade:faults_total{OF}{WINDOW}))",
        },
        "none",
        "The log says more about the first of each kind.",
    ),
)


def panel(number: int, what: Panel, x: int, y: int, high: int) -> dict[str, Any]:
    """Return a panel as Grafana wants it."""
    options: dict[str, Any] = {
        "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none"},
        "bargauge": {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "vertical"},
        "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"}},
    }[what.kind]
    drawn = {"fillOpacity": 30, "stacking": {"mode": "normal"}} if what.stacked else {}
    return {
        "id": number,
        "title": what.title,
        "description": what.says,
        "type": what.kind,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": x, "y": y, "w": what.wide, "h": high},
        "fieldConfig": {
            "defaults": {"unit": what.unit, "decimals": 2, "custom": drawn},
            "overrides": [],
        },
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + n), "expr": query, "legendFormat": legend}
            for n, (legend, query) in enumerate(what.queries.items())
        ],
    }


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    panels, x, y = [], 0, 0
    for number, what in enumerate(PANELS, 1):
        high = 4 if what.kind == "stat" else 8
        panels.append(panel(number, what, x, y, high))
        x += what.wide
        if x >= 24:
            x, y = 0, y + high
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "model",
            "type": "query",
            "label": "Model",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": "label_values(moecascade:steps_total, model_name)",
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
        },
    ]
    return {
        "uid": "moecascade",
        "title": "moecascade: speculation that pays",
        "tags": ["vllm", "speculative decoding"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": panels,
    }


def main() -> None:
    """Write the file."""
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
    print(f"{FILE.name}: {len(PANELS)} panels")


if __name__ == "__main__":
    main()
