"""The metrics of a server's engines in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from moecascade.telemetry.metrics import FAMILIES, PREFIX, Family

OWN = ("model_name", "engine")  # labels of every series, as vLLM's own metrics have them


class Exposition:
    """What `Metrics.snapshot` gave, of one or more engines.

    Args:
        model: The model's name.
        engines: Snapshots by engine.
    """

    def __init__(self, model: str, engines: Mapping[int, Mapping[str, Sequence[Any]]]) -> None:
        """Keep them."""
        self._model = model
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        """Yield metrics, as `prometheus_client` asks of whoever has some."""
        for name, family in FAMILIES.items():
            yield self._filled(PREFIX + name, name, family)

    def text(self) -> bytes:
        """Return the text."""
        return bytes(generate_latest(self))  # which asks for no more than `collect`

    def _filled(self, full: str, name: str, family: Family) -> Metric:
        labels = (*family.labels, *OWN)
        series = [
            ([*map(str, of), self._model, str(engine)], values)
            for engine, snapshot in self._engines.items()
            for of, *values in snapshot.get(name, ())
        ]
        if family.kind == "histogram":
            histogram = HistogramMetricFamily(full, family.help, labels=labels)
            bounds = [*map(str, family.buckets), "+Inf"]
            for of, (counts, total) in series:
                buckets = list(zip(bounds, accumulate(counts), strict=True))
                histogram.add_metric(of, buckets=buckets, sum_value=total)
            return histogram
        kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
        metric = kind(full, family.help, labels=labels)
        for of, (value,) in series:
            metric.add_metric(of, value)
        return metric
