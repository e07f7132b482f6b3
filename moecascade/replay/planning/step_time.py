"""The time of a step: every tensor's bytes and operations, on a roofline, and what comes on top.

A step of n requests that verify K drafts each computes t = n (K + 1) positions. A tensor takes the
longer of reading it and of computing with it,

    max(bytes / (A b),  operations / (F f))

for a device of bandwidth b and rate f, of which kernels achieve the parts A and F. What makes an
MoE different is how many experts are read: U of E, not all, and more with every position. On top
come launches for each layer, what the host does for each step, and the network between cards.

The constants are few (`Constants`). Seven are fitted on other people's measurements of vLLM by
``benchmarks/published.py --fit``, `waiting` on two of SGLang's; `reading`, `computing` and
`exchange` are guesses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from moecascade.core.cost import expert_union
from moecascade.errors import ConfigError
from moecascade.replay.planning.architecture import Layer, Model
from moecascade.replay.planning.devices import Device

KV_BYTES = 2  # a cached value
TILE = 16  # rows that a kernel for experts computes at least
HEAD_BITS = 16.0  # embedding and output matrix are not quantised


@dataclass(frozen=True, slots=True)
class Constants:
    """What data sheets do not say.

    Attributes:
        reading: Part of the bandwidth that kernels achieve.
        experts_reading: The same where experts are read, which are many small matrices.
        computing: Part of the rate that kernels achieve.
        layer: Seconds of launches and small kernels, a layer.
        routed: Seconds more where a layer is routed: router, sorting, two grouped products.
        step: Seconds of the host, a step.
        verifying: Seconds more where drafts are verified: preparing, sampling, taking back.
        drafting: Seconds of the host for each pass of a drafter.
        affinity: Part of a position's experts that the one before it in the text has chosen too,
            beyond chance.
        exchange: Seconds of latency of one exchange between cards.
        waiting: Seconds of a step in which the device waits for the host, in engines whose host
            does not work ahead while it drafts. Not vLLM's: only `validation` uses it.
    """

    reading: float = 0.75
    experts_reading: float = 0.95
    computing: float = 0.5
    layer: float = 31e-6
    routed: float = 24e-6
    step: float = 6e-4
    verifying: float = 5.4e-4
    drafting: float = 8.6e-5
    affinity: float = 0.32
    exchange: float = 8e-6
    waiting: float = 2.5e-3


@dataclass(frozen=True, slots=True)
class Setup:
    """Where a model is served.

    Attributes:
        device: Each card.
        cards: How many share the model (tensor parallel).
        expert_parallel: Whether experts lie whole on cards, instead of a slice of each on all.
        bits: Bits a weight; None for what the model's configuration says.
        constants: What data sheets do not say.
    """

    device: Device
    cards: int = 1
    expert_parallel: bool = False
    bits: float | None = None
    constants: Constants = Constants()

    def __post_init__(self) -> None:
        """Check the numbers; ConfigError names what is allowed."""
        if self.cards < 1:
            raise ConfigError(f"{self.cards} cards: give 1 or more")
        if self.bits is not None and not 1 <= self.bits <= 32:
            raise ConfigError(f"{self.bits:g} bits a weight: give 1 to 32")


@dataclass(frozen=True, slots=True)
class StepTime:
    """Where the seconds of a step go.

    Attributes:
        attention: Weights of attention and norms.
        shared: Weights of dense layers and shared experts.
        experts: Routed experts.
        cache: Keys and values of the text so far.
        head: The output matrix.
        launches: Launches and small kernels.
        network: Exchanges between cards.
        host: What is not the device's.
        drafting: The drafter.
    """

    attention: float
    shared: float
    experts: float
    cache: float
    head: float
    launches: float
    network: float
    host: float
    drafting: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(getattr(self, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Drafter:
    """Who drafts, as far as it costs anything.

    Attributes:
        name: For people.
        pass_: What one pass runs: a model of a few layers; None where the text is searched.
        passes_all: Whether all K tokens come from one pass.
    """

    name: str
    pass_: Model | None = None
    passes_all: bool = False


def unique_experts(layer: Layer, requests: int, k: float, affinity: float) -> float:
    """Return the expected number of experts that a layer reads in a step.

    ``E (1 - (1 - k/E)^m)`` for m positions that choose alone. A position chooses some of its
    experts after the one before it, so K + 1 in a row count as 1 + K (1 - affinity); requests
    choose apart. Independent choice (affinity 0) is the upper bound.
    """
    positions = requests * (1.0 + k * (1.0 - affinity))
    return min(float(expert_union(positions, layer.experts, layer.top_k)), float(layer.experts))


def imbalance(unique: float, cards: int) -> float:
    """Return how many more experts the fullest card reads than the mean, as a factor.

    Experts in use are spread over cards by chance: the fullest of R has about
    ``m + sqrt(2 m ln R)`` where the mean is m, and never all of them.
    """
    mean = unique / cards
    if cards == 1 or mean <= 0:
        return 1.0
    return min(float(cards), 1.0 + math.sqrt(2.0 * math.log(cards) / mean))


def step_time(
    model: Model, setup: Setup, *, requests: int = 1, k: float = 0, context: int = 1024
) -> StepTime:
    """Return the time of a step without drafting.

    Args:
        model: What is served.
        setup: Where.
        requests: Requests in the step.
        k: Drafts that it verifies of each, on average.
        context: Tokens of each request so far.
    """
    if requests < 1 or k < 0 or context < 0:
        raise ConfigError(
            f"{requests} requests, K = {k}, {context} tokens of context: give at least 1, 0 and 0"
        )
    c, device = setup.constants, setup.device
    positions = requests * (k + 1)
    bits = model.bits if setup.bits is None else setup.bits
    other = HEAD_BITS if model.kind == "gpt_oss" and setup.bits is None else bits  # MXFP4: experts
    read = device.bandwidth_gbps * 1e9 * setup.cards
    fast = device.fp8_tflops if bits <= 8 and device.fp8_tflops else device.bf16_tflops
    computed = fast * 1e12 * c.computing * setup.cards

    def matrices(parameters: float, rows: float, width: float, share: float) -> float:
        """Return the seconds of matrices that are read once and multiplied with so many rows."""
        return max(parameters * width / 8.0 / (read * share), 2.0 * parameters * rows / computed)

    attention = shared = experts = cache = launches = 0.0
    for layer, many in _alike(model):
        attention += many * matrices(layer.attention, positions, other, c.reading)
        shared += many * matrices(layer.dense, positions, other, c.reading)
        seen = min(context, layer.window) if layer.window else context
        kept = requests * seen * layer.kv * KV_BYTES
        cache += many * kept / (read * c.reading)
        launches += many * c.layer
        if layer.experts:
            unique = unique_experts(layer, requests, k, c.affinity)
            each = TILE * math.ceil(positions * layer.top_k / unique / TILE)  # rows of an expert
            one = max(
                layer.expert * bits / 8.0 / (read * c.experts_reading),
                2.0 * layer.expert * min(each, positions) / computed,
            )
            uneven = imbalance(unique, setup.cards) if setup.expert_parallel else 1.0
            experts += many * unique * one * uneven
            launches += many * c.routed
    return StepTime(
        attention=attention,
        shared=shared,
        experts=experts,
        cache=cache,
        head=matrices(model.head, positions, HEAD_BITS, c.reading),
        launches=launches,
        network=_network(model, setup, positions),
        host=c.step + (c.verifying if k else 0.0),
    )


def _alike(model: Model) -> list[tuple[Layer, int]]:
    """Return the different layers, and how many there are of each."""
    counts: dict[Layer, int] = {}
    for layer in model.layers:
        counts[layer] = counts.get(layer, 0) + 1
    return list(counts.items())


def _network(model: Model, setup: Setup, positions: float) -> float:
    """Return the seconds of two sums over all cards a layer: latency, and hidden states moved."""
    if setup.cards == 1:
        return 0.0
    moved = 2.0 * (setup.cards - 1) / setup.cards * positions * model.hidden * 2.0
    one = setup.constants.exchange + moved / (setup.device.link_gbps * 1e9)
    return 2.0 * len(model.layers) * one


def by_positions(
    model: Model, setup: Setup, *, requests: int, max_k: int, context: int
) -> list[float]:
    """Return the seconds of steps that compute 1, 2, ... positions, as replay takes them.

    Up to the number of requests they are single ones of as many, beyond that drafts of all.
    """
    times = []
    for positions in range(1, requests * (max_k + 1) + 1):
        n = min(positions, requests)
        step = step_time(model, setup, requests=n, k=positions / n - 1.0, context=context)
        times.append(step.total)
    return times


def drafting_time(drafter: Drafter, setup: Setup, *, requests: int, k: int, context: int) -> float:
    """Return the seconds of drafting K tokens for each request; once is made for none, too."""
    if drafter.pass_ is None:
        return 0.0
    passes = 1 if drafter.passes_all else max(1, k)
    one = step_time(drafter.pass_, setup, requests=requests, context=context)
    return passes * (one.total - one.host + setup.constants.drafting)


def with_drafting(
    model: Model, setup: Setup, drafter: Drafter, *, requests: int, k: int, context: int
) -> StepTime:
    """Return the time of a step that verifies K drafts and drafts as many."""
    step = step_time(model, setup, requests=requests, k=k, context=context)
    cost = drafting_time(drafter, setup, requests=requests, k=k, context=context)
    return replace(step, drafting=cost)


def head_of(model: Model, *, method: str) -> Model:
    """Return what one pass of a drafter of the model's own kind runs.

    An EAGLE head is a dense layer of the model's attention, EAGLE-3's chooses among 32,000 tokens;
    a module of multi-token prediction (MTP) is a whole layer of the model, experts included.
    """
    last = model.layers[-1]
    if method == "mtp":
        layer = replace(last, attention=last.attention + 2 * model.hidden**2)
        return replace(model, layers=(layer,))
    wide = 3 * model.hidden * 4 * model.hidden  # as dense layers usually are
    layer = Layer(last.attention + 2 * model.hidden**2, max(last.kv, 1), wide)
    vocabulary = min(model.vocabulary, 32_000) if method == "eagle3" else model.vocabulary
    return replace(model, layers=(layer,), vocabulary=vocabulary, bits=16.0)


def as_dict(step: StepTime) -> dict[str, Any]:
    """Return where the time goes, in milliseconds, with the total."""
    parts = {name: 1e3 * getattr(step, name) for name in step.__slots__}
    return {**parts, "total": 1e3 * step.total}
