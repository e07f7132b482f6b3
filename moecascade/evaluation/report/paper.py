"""What the paper reports (arXiv 2506.20675): five models, n-gram drafts, one RTX 6000 Ada."""

from __future__ import annotations

SOURCE = "arXiv 2506.20675: five mixtures of experts, seven workloads, one RTX 6000 Ada"

WORST = {
    "cascade": "5% slower",
    "static": "26%, 38%, 54% slower at K = 1, 2, 3",
    "cascade[backoff=1]": "worst 14% slower without, 5% with",
}
"""The worst of 35 workloads and models against no speculation."""

MEAN = "+7% to +14%, by K"
"""Cascade over each static K, on average."""

BEST_STATIC = "Mixtral: +18% over K = 2"
"""Cascade over the best static K of a model."""

UTILITY = "0.994 over 120 points"
"""R² of utility against measured speed-up."""

STEP_AT = 7
STEP_TIME = "at K = 7: MoE 2x to 3x, dense at most 1.03x"
"""Time of a step that verifies so many drafts, over one without."""

MODELS = (
    ("Mixtral 8x7B", "cascade +18% over its best static K (2); code +57% over none, K = 3 +39%"),
    ("OLMoE-1B-7B", "cascade +29% over none, K = 2 and 3 +31% and +33%"),
    ("DeepSeek-MoE-16B", "cascade about +1% over none"),
    ("LLaMA-3, dense", "1.4x to 1.8x at K = 7"),
)
"""What is said of single models."""
