"""Group norm, GELU and attention, on a CPU in other words where those are faster. Equal but for rounding.

Compiled: Inductor's own words for a group norm are Welford's sums over the few channels of a group, half a vector at a
time; its GELU calls tanh, which takes three times as long as exp. Trained: the gradient of torch's fused attention
takes more than ten times as long as the attention.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# In bfloat16 torch's kernel makes -0 of x in [-5.16, -5.06] within a vector and -1.5e-7 outside of one, at the end of
# a thread's share: of a row that would depend on its place. Of what lies further left it makes -0 in both.
GELU_VANISHES, FURTHER_LEFT = -5.0625, -100.0


class GroupNorm(nn.GroupNorm):
    """torch's own (Wu & He 2018), with its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        if _is_compiled_for_cpu(x):
            return group_norm_by_channel(x, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(x)


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh (Hendrycks & Gimpel 2016, section 2), elementwise."""
    if _is_compiled_for_cpu(x):
        return gelu_by_sigmoid(x)
    if (x.device.type, x.dtype) == ("cpu", torch.bfloat16) and not x.requires_grad:
        x = F.threshold(x, GELU_VANISHES, FURTHER_LEFT)
    return F.gelu(x, approximate="tanh")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v (Vaswani 2017, eq. 1); q, k and v (B, heads, N, D) -> (B, heads, N, D)."""
    is_trained = q.requires_grad and torch.is_grad_enabled()
    if is_trained and q.device.type == "cpu":
        return attention_by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def group_norm_by_channel(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (B, C, H, W) -> the same normed in groups, as x * scale + shift a channel; weight and bias (C,).

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


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """h (1 + tanh u) / 2 is h sigmoid(2 u)."""
    h = x.float()
    twice_u = 2 * math.sqrt(2 / math.pi) * h * (1 + 0.044715 * h * h)
    return (h * torch.sigmoid(twice_u)).to(x.dtype)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same attention, in float32 whatever autocast says."""
    with torch.autocast(q.device.type, enabled=False):
        logits = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, N, N)
        return (logits.softmax(-1) @ v.float()).to(v.dtype)  # (B, heads, N, D)


def _once_a_channel(values: Tensor) -> Tensor:
    """(B, groups, C / groups) -> (B, C, 1, 1); as_strided makes Inductor keep them, not compute them for each pixel."""
    B, C = values.shape[0], values.shape[1] * values.shape[2]
    return values.contiguous().as_strided((B, C), (C, 1))[:, :, None, None]


def _is_compiled_for_cpu(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.device.type == "cpu"
