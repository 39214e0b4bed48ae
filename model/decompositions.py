"""Operations in other words for the CPU compiler, equal but for rounding: it makes faster code of them.

Inductor's own words for a group norm are Welford's sums over the few channels of a group, half a vector at a time;
its GELU calls tanh, three times as long as exp. The network's definition stays the one in `model.blocks`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Tensor:
    """x (B, C, H, W) -> the same normed in groups (Wu & He 2018, equations 1 to 7), as x * scale + shift a channel.

    Sums are by channel first, whole vectors in channels_last; the variance is E[x^2] - E[x]^2 in float32, as in
    torch's own kernel for that layout.
    """
    B, C, H, W = x.shape
    per_group = (num_groups, C // num_groups)
    h, count = x.float(), H * W * per_group[1]
    mean = h.sum((2, 3)).view(B, *per_group).sum(-1, keepdim=True) / count  # (B, groups, 1)
    mean_square = (h * h).sum((2, 3)).view(B, *per_group).sum(-1, keepdim=True) / count  # (B, groups, 1)
    rstd = torch.rsqrt((mean_square - mean * mean).clamp(min=0) + eps)  # (B, groups, 1)
    scale = rstd * weight.float().view(per_group)  # (B, groups, C / groups)
    shift = bias.float().view(per_group) - mean * scale  # (B, groups, C / groups)
    return (h * _once_a_channel(scale) + _once_a_channel(shift)).to(x.dtype)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU by tanh (Hendrycks & Gimpel 2016, section 2): h (1 + tanh u) / 2, which is h sigmoid(2 u)."""
    if approximate != "tanh":
        raise NotImplementedError(f"gelu(approximate={approximate!r})")
    h = x.float()
    twice_u = 2 * math.sqrt(2 / math.pi) * h * (1 + 0.044715 * h * h)
    return (h * torch.sigmoid(twice_u)).to(x.dtype)


FOR_CPU: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: group_norm,
    torch.ops.aten.gelu.default: gelu,
}


def _once_a_channel(values: Tensor) -> Tensor:
    """(B, groups, C / groups) -> (B, C, 1, 1); as_strided makes Inductor keep them, not compute them for each pixel."""
    B, C = values.shape[0], values.shape[1] * values.shape[2]
    return values.contiguous().as_strided((B, C), (C, 1))[:, :, None, None]
