"""What the paper reports (arXiv 2506.20675): five models, n-gram drafts, one RTX 6000 Ada."""

from __future__ import annotations

SOURCE = "arXiv 2506.20675: five mixtures of experts, seven workloads, one RTX 6000 Ada"

WORST = {"cascade": "5% slower", "static": "26%, 38%, 54% slower at K = 1, 2, 3"}
"""The worst of 35 workloads and models against no speculation, as time for the same tokens."""

SLOWER = {"static:1": 0.26, "static:2": 0.38, "static:3": 0.54, "cascade": 0.05}
"""The same, as part of the time."""

BEST_STATIC = "Mixtral: +18% over K = 2"
"""Cascade over the best static K of a model."""

UTILITY = "0.994 over 120 points"
"""R² of utility against measured speed-up."""

STEP_AT = 7
STEP_TIME = "at K = 7: MoE 2x to 3x, dense at most 1.03x"
"""Time of a step that verifies so many drafts, over one without."""

COMPARED = "cascade is 7% to 14% faster than a static K, by K"
ABLATED = "cascade's worst workload is 14% slower without back-off, 5% with"

MODELS = (
    ("Mixtral 8x7B", "cascade +18% over its best static K (2); code +57% over none, K = 3 +39%"),
    ("OLMoE-1B-7B", "cascade +29% over none, K = 2 and 3 +31% and +33%"),
    ("DeepSeek-MoE-16B", "cascade about +1% over none"),
    ("LLaMA-3, dense", "1.4x to 1.8x at K = 7"),
)
"""What is said of single models."""


def by_model() -> str:
    """Return what is said of single models, in a line."""
    return "; ".join(f"{model}: {said}" for model, said in MODELS)
