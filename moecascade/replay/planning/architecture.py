"""From a model's ``config.json`` to what a step reads and computes, layer by layer.

Counted are parameters, as the architectures have them in Hugging Face's transformers. A model is a
list of layers; all that a planner asks follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moecascade.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer, in parameters.

    Attributes:
        attention: Of attention or what stands in its place, and of norms.
        kv: Values kept of each token, keys and values together.
        window: Tokens back that attention sees at most, 0 for all; 1 where a state of constant size
            is kept instead.
        dense: Of the feed-forward part that every token uses: a dense layer, shared experts, the
            router.
        experts: Routed experts, 0 for none.
        top_k: Of them, those that a token is routed to.
        expert: Of one routed expert.
    """

    attention: int
    kv: int
    dense: int
    experts: int = 0
    top_k: int = 0
    expert: int = 0
    window: int = 0

    @property
    def total(self) -> int:
        """All parameters."""
        return self.attention + self.dense + self.experts * self.expert

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return self.attention + self.dense + self.top_k * self.expert


@dataclass(frozen=True)
class Model:
    """A model as the planner sees it.

    Attributes:
        name: For people.
        kind: ``model_type`` of its configuration.
        hidden: Width of the hidden state.
        vocabulary: Tokens.
        tied: Whether the output matrix is the embedding.
        layers: In order.
        bits: Bits a weight as published, by the configuration; 16 where it says nothing.
    """

    name: str
    kind: str
    hidden: int
    vocabulary: int
    tied: bool
    layers: tuple[Layer, ...]
    bits: float = 16.0

    @property
    def head(self) -> int:
        """Parameters of the output matrix."""
        return self.hidden * self.vocabulary

    @cached_property
    def total(self) -> int:
        """All parameters."""
        ends = self.head if self.tied else 2 * self.head
        return ends + self.hidden + sum(layer.total for layer in self.layers)

    @cached_property
    def active(self) -> int:
        """Parameters that a token uses, the output matrix among them, the embedding not."""
        return self.head + sum(layer.active for layer in self.layers)

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return any(layer.experts for layer in self.layers)

    @property
    def routing(self) -> tuple[int, int]:
        """Routed experts of its layers and how many a token uses; (1, 1) for a dense model."""
        return next(((at.experts, at.top_k) for at in self.layers if at.experts), (1, 1))


class _Config:
    """A configuration whose missing keys are noted, so that all can be named at once."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.missing: list[str] = []

    def __call__(self, *names: str, default: int | None = None) -> int:
        """Return the first of these keys that is there, as a whole number."""
        for name in names:
            if (value := self._values.get(name)) is not None:
                return int(value)
        if default is None:
            self.missing.append(" or ".join(names))
            return 1
        return default

    def get(self, name: str, default: Any = None) -> Any:
        """Return a key's value as it is."""
        value = self._values.get(name)
        return default if value is None else value


def _gated(hidden: int, width: int) -> int:
    """Return the parameters of a gated feed-forward layer."""
    return 3 * hidden * width


def _grouped(c: _Config, *, biases: str = "", query: int = 1) -> tuple[int, int]:
    """Return the parameters of grouped-query attention, and the values kept of a token.

    Args:
        c: The configuration.
        biases: Which of "qkvo" have a bias.
        query: Times that the query's projection is as wide, for a gate on the output.
    """
    hidden, heads = c("hidden_size"), c("num_attention_heads")
    kv = c("num_key_value_heads", default=heads)
    size = c("head_dim", default=hidden // heads)
    wide, narrow = heads * size, kv * size
    weights = hidden * (query * wide + 2 * narrow) + wide * hidden
    widths = {"q": query * wide, "k": narrow, "v": narrow, "o": hidden}
    return weights + sum(widths[part] for part in biases) + 2 * hidden, 2 * narrow


def _latent(c: _Config) -> tuple[int, int]:
    """Return the same for multi-head latent attention (DeepSeek V2), which keeps what is latent."""
    hidden, heads = c("hidden_size"), c("num_attention_heads")
    nope, rope, value = c("qk_nope_head_dim"), c("qk_rope_head_dim"), c("v_head_dim")
    rank, low = c("kv_lora_rank"), c("q_lora_rank", default=0)
    wide = heads * (nope + rope)
    query = hidden * low + low + low * wide if low else hidden * wide
    keys = hidden * (rank + rope) + rank + rank * heads * (nope + value)
    return query + keys + heads * value * hidden + 2 * hidden, rank + rope


def _linear(c: _Config) -> int:
    """Return the parameters of a gated delta net, in attention's place (Qwen3-Next)."""
    hidden = c("hidden_size")
    keys = c("linear_num_key_heads") * c("linear_key_head_dim")
    heads = c("linear_num_value_heads")
    values = heads * c("linear_value_head_dim")
    into = hidden * (2 * keys + 2 * values) + hidden * 2 * heads
    convolved = (2 * keys + values) * c("linear_conv_kernel_dim", default=4)
    return into + convolved + values * hidden + 2 * heads + 2 * hidden


def _dense(c: _Config) -> tuple[Layer, ...]:
    """Llama, Mistral and Qwen: all layers dense."""
    biases = "qkv" if c.get("model_type") == "qwen2" else ""
    attention, kv = _grouped(c, biases=biases)
    ffn = _gated(c("hidden_size"), c("intermediate_size"))
    return (Layer(attention, kv, ffn),) * c("num_hidden_layers")


def _mixtral(c: _Config) -> tuple[Layer, ...]:
    """Mixtral and Phi-3.5-MoE: all layers routed, no shared expert."""
    phi = c.get("model_type") == "phimoe"
    attention, kv = _grouped(c, biases="qkvo" if phi else "")
    hidden, experts = c("hidden_size"), c("num_local_experts")
    expert = _gated(hidden, c("intermediate_size"))
    norms = 2 * hidden if phi else 0  # with biases
    layer = Layer(
        attention + norms, kv, hidden * experts, experts, c("num_experts_per_tok"), expert
    )
    return (layer,) * c("num_hidden_layers")


def _olmoe(c: _Config) -> tuple[Layer, ...]:
    attention, kv = _grouped(c)
    hidden, experts = c("hidden_size"), c("num_experts")
    norms = hidden + kv // 2  # of queries and keys
    layer = Layer(
        attention + norms,
        kv,
        hidden * experts,
        experts,
        c("num_experts_per_tok"),
        _gated(hidden, c("intermediate_size")),
    )
    return (layer,) * c("num_hidden_layers")


def _qwen_moe(c: _Config) -> tuple[Layer, ...]:
    """Qwen2-MoE with a shared expert, Qwen3-MoE without; layers may be dense here and there."""
    second = c.get("model_type") == "qwen2_moe"
    attention, kv = _grouped(c, biases="qkv" if second else "")
    hidden, experts = c("hidden_size"), c("num_experts")
    every = hidden * experts
    if second:
        every += _gated(hidden, c("shared_expert_intermediate_size")) + hidden
    else:
        attention += 2 * c("head_dim", default=hidden // c("num_attention_heads"))
    routed = Layer(
        attention,
        kv,
        every,
        experts,
        c("num_experts_per_tok"),
        _gated(hidden, c("moe_intermediate_size")),
    )
    plain = Layer(attention, kv, _gated(hidden, c("intermediate_size", default=0)))
    only, step = c.get("mlp_only_layers", []), c("decoder_sparse_step", default=1)
    many = c("num_hidden_layers")
    return tuple(routed if i not in only and (i + 1) % step == 0 else plain for i in range(many))


def _qwen_next(c: _Config) -> tuple[Layer, ...]:
    """Qwen3-Next and Qwen3.5/3.6-MoE: three layers of four keep a state, the fourth attends."""
    hidden, experts = c("hidden_size"), c("num_experts")
    every = hidden * experts + _gated(hidden, c("shared_expert_intermediate_size")) + hidden
    moe = (experts, c("num_experts_per_tok"), _gated(hidden, c("moe_intermediate_size")))
    attention, kv = _grouped(c, query=2)
    full = Layer(attention, kv, every, *moe)
    state = Layer(_linear(c), 0, every, *moe, window=1)
    each = c("full_attention_interval", default=4)
    return tuple(full if (i + 1) % each == 0 else state for i in range(c("num_hidden_layers")))


def _deepseek(c: _Config) -> tuple[Layer, ...]:
    """DeepSeek V1 to V3, Kimi K2, GLM-4.x-MoE: dense layers, then shared and routed experts."""
    kind = c.get("model_type")
    if kind in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2"):
        attention, kv = _latent(c)
    else:
        biased = kind == "glm4_moe" and c.get("attention_bias", True)
        attention, kv = _grouped(c, biases="qkv" if biased else "")
    hidden, experts = c("hidden_size"), c("n_routed_experts")
    expert = _gated(hidden, c("moe_intermediate_size"))
    shared = c("n_shared_experts", default=0)
    routed = Layer(
        attention,
        kv,
        hidden * experts + shared * expert,
        experts,
        c("num_experts_per_tok"),
        expert,
    )
    plain = Layer(attention, kv, _gated(hidden, c("intermediate_size")))
    first, each = c("first_k_dense_replace", default=0), c("moe_layer_freq", default=1)
    return tuple(
        routed if i >= first and i % each == 0 else plain for i in range(c("num_hidden_layers"))
    )


def _gpt_oss(c: _Config) -> tuple[Layer, ...]:
    """gpt-oss: biases everywhere, every other layer sees a window."""
    hidden, width, experts = c("hidden_size"), c("intermediate_size"), c("num_local_experts")
    attention, kv = _grouped(c, biases="qkvo")
    attention += c("num_attention_heads")  # sinks
    expert = _gated(hidden, width) + 2 * width + hidden
    top_k = c("num_experts_per_tok", "experts_per_token")
    window = c("sliding_window", default=0)
    return tuple(
        Layer(
            attention,
            kv,
            hidden * experts + experts,
            experts,
            top_k,
            expert,
            window if i % 2 == 0 else 0,
        )
        for i in range(c("num_hidden_layers"))
    )


def _llama4(c: _Config) -> tuple[Layer, ...]:
    """Llama 4: a shared expert beside one routed, in every layer or every other."""
    hidden, experts = c("hidden_size"), c("num_local_experts")
    attention, kv = _grouped(c)
    expert = _gated(hidden, c("intermediate_size"))
    routed = Layer(
        attention, kv, hidden * experts + expert, experts, c("num_experts_per_tok"), expert
    )
    plain = Layer(attention, kv, _gated(hidden, c("intermediate_size_mlp")))
    step = c("interleave_moe_layer_step", default=1)
    many = c("num_hidden_layers")
    return tuple(routed if (i + 1) % step == 0 else plain for i in range(many))


ARCHITECTURES: dict[str, Callable[[_Config], tuple[Layer, ...]]] = {
    "llama": _dense,
    "mistral": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
    "mixtral": _mixtral,
    "phimoe": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
    "qwen3_next": _qwen_next,
    "qwen3_5_moe": _qwen_next,
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "glm4_moe": _deepseek,
    "glm4_moe_lite": _deepseek,
    "kimi_k2": _deepseek,
    "gemma3": _dense,
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
}
"""How the layers of a model are read, by ``model_type``."""


def parse(name: str, config: Mapping[str, Any]) -> Model:
    """Return the model that a configuration describes.

    Args:
        name: For people and messages.
        config: ``config.json``; of a multimodal model its language part counts.

    Raises:
        ConfigError: An unknown architecture, or keys that are missing; they are named.
    """
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, Mapping) else config
    kind = str(text.get("model_type") or config.get("model_type") or "").removesuffix("_text")
    layers_of = ARCHITECTURES.get(kind)
    if layers_of is None:
        raise ConfigError(
            f"{name}: architecture {kind!r} is not known{nearest(kind, ARCHITECTURES)}; known: "
            f"{', '.join(ARCHITECTURES)}"
        )
    c = _Config({**text, "model_type": kind})
    try:
        hidden, vocabulary, layers = c("hidden_size"), c("vocab_size"), layers_of(c)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}: its configuration has a value of another kind ({error})"
        ) from None
    if c.missing:
        raise ConfigError(
            f"{name}: the configuration of a {kind} model has no "
            f"{', '.join(dict.fromkeys(c.missing))}"
        )
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    return Model(name, kind, hidden, vocabulary, tied, layers, _bits(config, text))


BITS = {"fp8": 8.0, "mxfp4": 4.25, "gptq": 4.5, "awq": 4.5, "nvfp4": 4.5, "modelopt_fp4": 4.5}
"""Bits a weight, scales included, by the method of quantisation."""


def _bits(config: Mapping[str, Any], text: Mapping[str, Any]) -> float:
    chosen = config.get("quantization_config") or text.get("quantization_config") or {}
    method = str(chosen.get("quant_method", "")) if isinstance(chosen, Mapping) else ""
    return BITS.get(method, 16.0)
