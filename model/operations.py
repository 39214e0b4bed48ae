"""Group norm, GELU and attention. On a CPU some cases use faster formulas that equal torch's except for rounding.

Compiled group norm: Inductor generates Welford sums over the few channels of a group, which use half of a SIMD vector.
Compiled GELU: Inductor generates tanh, which takes three times as long as exp. Attention in training: the backward pass
of torch's fused attention takes more than ten times as long as the forward pass.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# For bfloat16 inputs in [-5.16, -5.06], torch's CPU kernel returns -0 in its vectorized loop, but -1.5e-7 in its scalar
# loop over the remaining elements of a thread. The result of a row would then depend on its position in the batch.
# Below that range both loops return -0, so gelu() replaces inputs at or below GELU_UNDERFLOW by FAR_NEGATIVE.
GELU_UNDERFLOW, FAR_NEGATIVE = -5.0625, -100.0


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm (Wu & He 2018) with a faster formula when it is compiled for a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x (B, C, H, W) in groups of channels. Returns the same shape and dtype."""
        if _is_compiled_for_cpu(x):
            return group_norm_by_channel(x, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(x)


def gelu(x: Tensor) -> Tensor:
    """Returns GELU in its tanh approximation (Hendrycks & Gimpel 2016, section 2), elementwise."""
    if _is_compiled_for_cpu(x):
        return gelu_by_sigmoid(x)
    if (x.device.type, x.dtype) == ("cpu", torch.bfloat16) and not x.requires_grad:
        x = F.threshold(x, GELU_UNDERFLOW, FAR_NEGATIVE)
    return F.gelu(x, approximate="tanh")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v (Vaswani 2017, eq. 1). q, k, v and the result are (B, heads, N, D)."""
    is_trained = q.requires_grad and torch.is_grad_enabled()
    if is_trained and q.device.type == "cpu":
        return attention_by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def group_norm_by_channel(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns the group norm (Wu & He 2018) of x (B, C, H, W). weight and bias are (C,).

    Sums over each channel first, because a channels_last tensor then fills whole SIMD vectors. Then applies one scale
    and one shift per channel. The variance is E[x^2] - E[x]^2 in float32, as in torch's kernel for channels_last.
    """
    B, C, H, W = x.shape
    per_group = (num_groups, C // num_groups)
    h, count = x.float(), H * W * per_group[1]
    mean = h.sum((2, 3)).view(B, *per_group).sum(-1, keepdim=True) / count  # (B, groups, 1)
    mean_square = (h * h).sum((2, 3)).view(B, *per_group).sum(-1, keepdim=True) / count  # (B, groups, 1)
    rstd = torch.rsqrt((mean_square - mean * mean).clamp(min=0) + eps)  # (B, groups, 1)
    scale = rstd * weight.float().view(per_group)  # (B, groups, C / groups)
    shift = bias.float().view(per_group) - mean * scale  # (B, groups, C / groups)
    return (h * _per_channel(scale) + _per_channel(shift)).to(x.dtype)


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """Returns the tanh approximation of GELU, written with a sigmoid: h (1 + tanh u) / 2 = h sigmoid(2 u)."""
    h = x.float()
    twice_u = 2 * math.sqrt(2 / math.pi) * h * (1 + 0.044715 * h * h)
    return (h * torch.sigmoid(twice_u)).to(x.dtype)


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns `attention` as two matrix products in float32, even under autocast. Its gradient is fast on a CPU."""
    with torch.autocast(q.device.type, enabled=False):
        logits = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, heads, N, N)
        return (logits.softmax(-1) @ v.float()).to(v.dtype)  # (B, heads, N, D)


def _per_channel(values: Tensor) -> Tensor:
    """Reshapes (B, groups, C / groups) to (B, C, 1, 1).

    as_strided makes Inductor store the values in a buffer. Otherwise it would compute them again for each pixel.
    """
    B, C = values.shape[0], values.shape[1] * values.shape[2]
    return values.contiguous().as_strided((B, C), (C, 1))[:, :, None, None]


def _is_compiled_for_cpu(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.device.type == "cpu"
