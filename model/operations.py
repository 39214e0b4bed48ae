"""Group norm, 1x1 convolution, GELU and attention. Their results differ from those of torch only by rounding.

On a GPU (`is_on_gpu`), group norm and 1x1 convolutions use operations that launch fewer kernels. On a CPU, three
operations use faster formulas:
- compiled group norm, because Inductor generates Welford sums over the few channels of a group, which fill only half
  of a SIMD vector,
- compiled GELU, because Inductor generates tanh, which takes three times as long as exp,
- attention in training, because the backward pass of torch's fused attention takes more than ten times as long as the
  forward pass.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# For bfloat16 inputs in [-5.16, -5.06], torch's CPU kernel returns -0 in its vectorized loop, but -1.5e-7 in its scalar
# loop over the remaining elements of a thread. The result of a row would then depend on its position in the batch.
# Below that range both loops return -0, so gelu() replaces inputs at or below GELU_UNDERFLOW by FAR_NEGATIVE.
GELU_UNDERFLOW, FAR_NEGATIVE = -5.0625, -100.0


def is_on_gpu(x: Tensor) -> bool:
    """Returns True for every device except a CPU."""
    return x.device.type != "cpu"


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm (Wu & He 2018) with faster formulas on a GPU and in compiled code for a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x (B, C, H, W) in groups of channels. Returns the same shape and dtype."""
        if is_on_gpu(x):
            return self.scaled(x, self.weight, self.bias)
        if torch.compiler.is_compiling():
            return group_norm_by_channel(x, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(x)

    def scaled(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Normalises x (B, C, H, W) with scale and shift, (B, C) or (C,), in place of the weight and the bias."""
        return scaled_group_norm(x, self.num_groups, scale, shift, self.eps)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution. On a GPU it is a matrix product, because a convolution adds its bias in a second kernel."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, C_out, H, W) for x (B, C_in, H, W)."""
        if is_on_gpu(x):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return super().forward(x)


def gelu(x: Tensor) -> Tensor:
    """Returns GELU in its tanh approximation (Hendrycks & Gimpel 2016, section 2), elementwise."""
    if not is_on_gpu(x):
        if torch.compiler.is_compiling():
            return gelu_by_sigmoid(x)
        if x.dtype == torch.bfloat16 and not x.requires_grad:
            x = F.threshold(x, GELU_UNDERFLOW, FAR_NEGATIVE)
    return F.gelu(x, approximate="tanh")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q k^T / sqrt(D)) v (Vaswani 2017, eq. 1). q, k, v and the result are (B, heads, N, D)."""
    is_trained = q.requires_grad and torch.is_grad_enabled()
    if is_trained and not is_on_gpu(q):
        return attention_by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def scaled_group_norm(x: Tensor, num_groups: int, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Returns the group norm (Wu & He 2018) of x (B, C, H, W) in channels_last. scale and shift are (B, C) or (C,).

    They replace the weight and the bias. On a GPU, torch's group norm of a channels_last tensor launches four kernels.
    Its result has another layout, so the next convolution launches a fifth. This function launches three kernels. The
    first one copies the values of each group next to each other. The second one is torch's layer norm, which computes
    mean and variance in float32. The third one scales, shifts, and writes the result in channels_last. The layer norm
    uses one block of threads for each group, so a row has the same bits in every batch.
    """
    B, C, H, W = x.shape
    D = C // num_groups  # channels in a group
    h = x.permute(0, 2, 3, 1).reshape(B, H * W, num_groups, D)  # a view if x is in channels_last
    h = h.transpose(1, 2).contiguous()  # (B, groups, H W, D)
    h = F.layer_norm(h, h.shape[2:], eps=eps).transpose(1, 2)  # (B, H W, groups, D)
    scale, shift = (part.reshape(-1, 1, num_groups, D) for part in (scale, shift))  # (B or 1, 1, groups, D) each
    # Without `out`, addcmul returns the layout of h. Autograd does not support `out`, and Inductor does not need it.
    is_inference = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    out = torch.empty(h.shape, dtype=h.dtype, device=h.device) if is_inference else None
    h = torch.addcmul(shift, h, scale, out=out)  # (B, H W, groups, D)
    return h.reshape(B, H, W, C).permute(0, 3, 1, 2)


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
