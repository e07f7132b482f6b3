"""Tiny models for tests of the engine: a target, and a drafter of every kind that vLLM has.

A step takes a millisecond or two, so that a whole engine, with all that a test wants of it, runs in
seconds. Text means nothing, but drafts are right for some tokens and wrong for others: the target's
next token is mostly a fixed successor of its last one, which every drafter knows, and sometimes
another, for what came before, which no drafter knows exactly.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

VOCABULARY = 2048  # the first tokens of the local model's tokenizer, all single characters included
WIDTH = 64
LAYERS = 4
HEADS = 2
MLP = 128
END = 2  # the token that ends a text
CIRCLE = 8  # tokens that follow one another in a circle
CIRCLES = "circles.json"
MAX_K = 4
LOUDNESS = 0.5  # of the head: at a temperature of 0.8 text is neither certain nor noise
CONFUSION = 1.05  # how much the target's layers add to its last token
NOISE = 0.04  # on the draft model's copy of the target


def build(folder: Path, tokenizer: Path) -> None:
    """Write all models below a folder, with the tokenizer of a model."""
    import torch

    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return scale * torch.randn(*shape, generator=random)

    embedding = normal(VOCABULARY, WIDTH)
    circles = torch.randperm(VOCABULARY, generator=random).reshape(-1, CIRCLE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CIRCLES).write_text(json.dumps(circles.tolist()))
    successor = torch.empty(VOCABULARY, dtype=torch.long)
    successor[circles.flatten()] = circles.roll(-1, 1).flatten()
    head = torch.empty_like(embedding)
    head[successor] = LOUDNESS * embedding
    ends = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}

    def layer(name: str, scale: float, inputs: int = WIDTH, bias: bool = False) -> dict[str, Any]:
        into, out = scale / inputs**0.5, scale / MLP**0.5
        weights = {
            f"{name}.self_attn.q_proj.weight": normal(WIDTH, inputs, scale=into),
            f"{name}.self_attn.k_proj.weight": normal(WIDTH // HEADS, inputs, scale=into),
            f"{name}.self_attn.v_proj.weight": normal(WIDTH // HEADS, inputs, scale=into),
            f"{name}.self_attn.o_proj.weight": normal(WIDTH, WIDTH, scale=into),
            f"{name}.mlp.gate_proj.weight": normal(MLP, WIDTH, scale=into),
            f"{name}.mlp.up_proj.weight": normal(MLP, WIDTH, scale=into),
            f"{name}.mlp.down_proj.weight": normal(WIDTH, MLP, scale=out),
            f"{name}.input_layernorm.weight": torch.ones(WIDTH),
            f"{name}.post_attention_layernorm.weight": torch.ones(WIDTH),
        }
        if bias:
            for part, width in (("q", WIDTH), ("k", WIDTH // HEADS), ("v", WIDTH // HEADS)):
                weights[f"{name}.self_attn.{part}_proj.bias"] = torch.zeros(width)
        return weights

    def layers(bias: bool) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for i in range(LAYERS):
            made |= layer(f"model.layers.{i}", CONFUSION, bias=bias)
        return made

    identity, nothing = torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)
    norm = {"model.norm.weight": torch.ones(WIDTH)}
    target = ends | norm | layers(bias=False)
    _save(folder / "target", tokenizer, "LlamaForCausalLM", target)

    noisy = {
        name: weight + normal(*weight.shape, scale=NOISE) if ".layers." in name else weight
        for name, weight in target.items()
    }
    _save(folder / "draft_model", tokenizer, "LlamaForCausalLM", noisy)

    # The part of the input that is the last token's embedding goes through, the rest is small.
    small = layer("layers.0", CONFUSION / 4)
    del small["layers.0.input_layernorm.weight"]
    eagle = {"fc.weight": torch.cat([identity, CONFUSION / 4 * identity], 1), **small}
    _save(folder / "eagle", tokenizer, "LlamaForCausalLM", eagle, num_hidden_layers=1)

    copying = layer("midlayer", CONFUSION / 4, 2 * WIDTH) | _looking_at_itself("midlayer")
    eagle3 = {
        **copying,
        "midlayer.hidden_norm.weight": torch.ones(WIDTH),
        "fc.weight": torch.cat([0.1 * identity, nothing, nothing], 1),
        "norm.weight": torch.ones(WIDTH),
        "lm_head.weight": head,
        "embed_tokens.weight": embedding,
    }
    _save(
        folder / "eagle3",
        tokenizer,
        "LlamaForCausalLMEagle3",
        eagle3,
        num_hidden_layers=1,
        draft_vocab_size=VOCABULARY,
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
    )

    mtp = "model.mtp_layers.0"
    module = {
        f"{mtp}.token_layernorm.weight": torch.ones(WIDTH),
        f"{mtp}.hidden_layernorm.weight": torch.ones(WIDTH),
        f"{mtp}.final_layernorm.weight": torch.ones(WIDTH),
        f"{mtp}.input_proj.weight": torch.cat([CONFUSION / 4 * identity, identity], 1),
        **layer(mtp, CONFUSION / 4, bias=True),
    }
    _save(
        folder / "mtp",
        tokenizer,
        "MiMoForCausalLM",
        ends | norm | layers(bias=True) | module,
        model_type="qwen2",
        num_nextn_predict_layers=1,
    )

    medusa = {f"medusa_heads.blocks.{i}.layers.0.weight": nothing for i in range(MAX_K)}
    power = head
    for i in range(MAX_K):
        step = torch.empty_like(power)
        step[successor] = power  # one token further on
        power = step
        medusa[f"medusa_heads.lm_heads.{i}.weight"] = power
    _save(
        folder / "medusa",
        tokenizer,
        "MedusaModel",
        medusa,
        model_type="medusa",
        num_heads=MAX_K,
        num_hidden_layers=1,
        truncated_vocab_size=VOCABULARY,
    )


def _looking_at_itself(name: str) -> dict[str, Any]:
    """Return attention weights by which a position sees its own embedding, the first half."""
    import torch

    half = WIDTH // HEADS
    first, both = torch.eye(half, 2 * WIDTH), torch.zeros(WIDTH, 2 * WIDTH)
    both[:half, :half] = both[half:, :half] = torch.eye(half)
    spread = torch.zeros(WIDTH, WIDTH)
    spread[:half, :half] = torch.eye(half)
    return {
        f"{name}.self_attn.q_proj.weight": 2.0 * both,
        f"{name}.self_attn.k_proj.weight": 2.0 * first,
        f"{name}.self_attn.v_proj.weight": first,
        f"{name}.self_attn.o_proj.weight": spread,
    }


def _first_tokens(tokenizer: Path) -> dict[str, Any]:
    """Return a tokenizer with the first `VOCABULARY` tokens of another, of the kind BPE."""
    made: dict[str, Any] = json.loads((tokenizer / "tokenizer.json").read_text())
    kept = {token: i for token, i in made["model"]["vocab"].items() if i < VOCABULARY}
    merges = made["model"]["merges"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    made["model"]["vocab"] = kept
    made["model"]["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= kept.keys()]
    return made


def _save(
    folder: Path, tokenizer: Path, architecture: str, weights: dict[str, Any], **config: Any
) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    shutil.copy(tokenizer / "tokenizer_config.json", folder)
    (folder / "tokenizer.json").write_text(json.dumps(_first_tokens(tokenizer)))
    settings = {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": WIDTH // HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": END,
        "torch_dtype": "float32",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {name: weight.contiguous().clone() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
