"""The paper's five mixtures of experts as vLLM's engine sees them: their sizes, random weights.

What a step costs depends on sizes and routing, not on what weights say, so nobody need fetch them.
Phi-3.5-MoE is run in Mixtral's architecture and DeepSeek-MoE in Qwen's, each with its own sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
}
_QWEN = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "mlp_only_layers": [],
    "rope_theta": 1e6,
}
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "vocab_size": 50304,
        "rope_theta": 1e4,
    },
    "mixtral": {
        **_MIXTRAL,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_local_experts": 8,
        "vocab_size": 32000,
    },
    "qwen": {
        **_QWEN,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "vocab_size": 151936,
    },
    "deepseek": {
        **_QWEN,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 2816,
        "num_hidden_layers": 28,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "mlp_only_layers": [0],
        "vocab_size": 102400,
    },
    "phi": {
        **_MIXTRAL,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_hidden_layers": 32,
        "num_local_experts": 16,
        "vocab_size": 32064,
    },
}
"""Configurations by name, those first that say most for the time that they take."""

FP8 = ("mixtral", "phi", "olmoe")
"""Run in FP8, as in the paper."""

TINY = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}


def write(name: str, folder: Path, *, tiny: bool) -> Path:
    """Write a folder that holds only a shape's configuration, and return it."""
    config = SHAPES[name] | {
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if tiny:
        config |= {key: value for key, value in TINY.items() if key in config}
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    return place


def spread(model: Any) -> None:
    """Give dummy weights what routing needs: norms of 1, and routers and embeddings that differ.

    vLLM fills all weights with tiny uniform numbers, norms too, so that every token would be routed
    alike. Changed in place, as CUDA graphs go on reading the same memory.
    """
    import torch

    random: Any = None
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.fill_(1)
            elif name.endswith(".gate.weight") or "embed_tokens" in name:
                if random is None or random.device != value.device:
                    random = torch.Generator(value.device).manual_seed(0)
                value.copy_(torch.randn(value.shape, generator=random, device=value.device))
