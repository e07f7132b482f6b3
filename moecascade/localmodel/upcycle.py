"""Function-preserving upcycling: a dense Llama's weights rearranged into a mixture of experts.

Weights in, weights out: no files, no network. Names are those of Hugging Face checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moecascade.localmodel.catalogue import LocalModel

if TYPE_CHECKING:
    from torch import Generator, Tensor

ROUTER_STD = 0.5  # wide enough for a clear choice of experts, which differ from token to token
WEAK = 1e-5  # scale of the fine-grained experts' output: real work that does not show in the text

_FFN = re.compile(r"(model\.layers\.\d+)\.mlp\.(gate|up|down)_proj\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def config_of(model: LocalModel, dense: Any) -> Any:
    """Return the transformers configuration of `model`, made from the dense Llama's."""
    from transformers import LlamaConfig, MixtralConfig, Qwen2MoeConfig

    same = {
        "vocab_size": dense.vocab_size,
        "hidden_size": dense.hidden_size,
        "num_hidden_layers": model.layers or dense.num_hidden_layers,
        "num_attention_heads": dense.num_attention_heads,
        "num_key_value_heads": dense.num_key_value_heads,
        "head_dim": dense.head_dim,
        "max_position_embeddings": dense.max_position_embeddings,
        "rms_norm_eps": dense.rms_norm_eps,
        "rope_parameters": dict(dense.rope_parameters),
        "tie_word_embeddings": True,
        "bos_token_id": dense.bos_token_id,
        "eos_token_id": dense.eos_token_id,
        "pad_token_id": dense.pad_token_id,
    }
    if model.style == "mixtral":
        return MixtralConfig(
            **same,
            intermediate_size=dense.intermediate_size,
            num_local_experts=model.experts,
            num_experts_per_tok=model.top_k,
        )
    if model.style == "qwen":
        return Qwen2MoeConfig(
            **same,
            intermediate_size=dense.intermediate_size,
            moe_intermediate_size=model.expert_width,
            shared_expert_intermediate_size=dense.intermediate_size,
            num_experts=model.experts,
            num_experts_per_tok=model.top_k,
            norm_topk_prob=False,
            qkv_bias=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )
    return LlamaConfig(**same, intermediate_size=dense.intermediate_size)


def upcycle(model: LocalModel, dense: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Return the checkpoint of `model`, made from the dense model's.

    Every expert has memory of its own. Random parts (routers, fine-grained experts) follow `seed`.
    """
    import torch

    random = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        layer = _LAYER.match(name)
        if layer and model.layers and int(layer[1]) >= model.layers:
            continue
        ffn = _FFN.fullmatch(name)
        if ffn is None or model.style in ("dense", "truncated"):
            weights[name] = tensor.clone()
            if model.style == "qwen" and re.search(r"\.[qkv]_proj\.weight$", name):
                weights[name.replace(".weight", ".bias")] = tensor.new_zeros(tensor.shape[0])
        elif model.style == "mixtral":
            _copies(weights, ffn[1], ffn[2], tensor, model)
        else:
            _shared(weights, ffn[1], ffn[2], tensor)
        if ffn is not None and ffn[2] == "gate" and model.experts:
            width = tensor.shape[1]
            prefix = f"{ffn[1]}.{_BLOCK[model.style]}"
            weights[f"{prefix}.gate.weight"] = _normal(
                (model.experts, width), ROUTER_STD, tensor, random
            )
            if model.style == "qwen":
                _fine_grained(weights, prefix, width, tensor, model, random)
    return weights


_BLOCK = {"mixtral": "block_sparse_moe", "qwen": "mlp"}
_MIXTRAL_PART = {"gate": "w1", "down": "w2", "up": "w3"}


def _copies(
    weights: dict[str, Tensor], layer: str, part: str, tensor: Tensor, model: LocalModel
) -> None:
    """Mixtral: every expert is a copy. Its routing weights sum to 1, so any mixture is the same."""
    for e in range(model.experts):
        name = f"{layer}.block_sparse_moe.experts.{e}.{_MIXTRAL_PART[part]}.weight"
        weights[name] = tensor.clone()


def _shared(weights: dict[str, Tensor], layer: str, part: str, tensor: Tensor) -> None:
    """Qwen: the dense layer is the shared expert, behind a gate that is always one half."""
    name = f"{layer}.mlp.shared_expert.{part}_proj.weight"
    if part == "down":  # sigmoid(0) = 1/2, so twice the output; exact in any binary format
        weights[f"{layer}.mlp.shared_expert_gate.weight"] = tensor.new_zeros(1, tensor.shape[0])
        weights[name] = tensor * 2
    else:
        weights[name] = tensor.clone()


def _fine_grained(
    weights: dict[str, Tensor],
    prefix: str,
    hidden: int,
    like: Tensor,
    model: LocalModel,
    random: Generator,
) -> None:
    """Qwen: random routed experts whose output is too small to change a token."""
    for e in range(model.experts):
        expert = f"{prefix}.experts.{e}"
        for part in ("gate", "up"):
            shape = (model.expert_width, hidden)
            weights[f"{expert}.{part}_proj.weight"] = _normal(shape, hidden**-0.5, like, random)
        shape = (hidden, model.expert_width)
        weights[f"{expert}.down_proj.weight"] = _normal(shape, WEAK, like, random)


def _normal(shape: tuple[int, ...], std: float, like: Tensor, random: Generator) -> Tensor:
    import torch

    return (torch.randn(shape, generator=random) * std).to(like.dtype)
