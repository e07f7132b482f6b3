"""Weights in half their size: 8 bits a number, and a scale for each few of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SCALE = ".scale"
GROUP = 64  # numbers of a row that share a scale


def pack(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return matrices as whole numbers with scales; vectors stay as they are."""
    import torch

    packed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.dim() < 2:
            packed[name] = weight.to(torch.float32)
            continue
        groups = weight.float().unflatten(1, (-1, GROUP))
        scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-12) / 127.0
        packed[name] = (groups / scale).round().to(torch.int8).flatten(1)
        packed[name + SCALE] = scale.squeeze(2).to(torch.float16)
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of `pack` in bfloat16."""
    import torch

    weights: dict[str, Tensor] = {}
    for name, value in packed.items():
        if not name.endswith(SCALE):
            whole = value.float()
            if (scale := packed.get(name + SCALE)) is not None:
                whole = (whole.unflatten(1, (-1, GROUP)) * scale.float()[..., None]).flatten(1)
            weights[name] = whole.to(torch.bfloat16)
    return weights
