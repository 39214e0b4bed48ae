"""Building blocks of the U-Net. Features are (B, C, H, W). The conditioning is one vector per row of the batch."""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from model.operations import Conv1x1, GroupNorm, attention, gelu, is_on_gpu

NUM_GROUPS = 8


class GELUConvBlock(nn.Module):
    """Applies Conv2d, GroupNorm and GELU. A modulated block scales and shifts each row between GroupNorm and GELU.

    The scale and the shift are columns of the conditioning vector (adaptive group normalization, Dhariwal & Nichol
    2021, section 3). The U-Net assigns the columns to the blocks. On a GPU the U-Net also multiplies the weight and the
    bias of the norm into these columns (UNet._with_norms).
    """

    def __init__(self, in_channels: int, out_channels: int, *, modulated: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)  # GroupNorm adds a bias
        self.norm = GroupNorm(NUM_GROUPS, out_channels)
        self.num_columns = 2 * out_channels if modulated else 0
        self.columns = slice(0, 0)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # x (B, C_in, H, W), c (B, D) -> (B, C_out, H, W)
        h = self.conv(x)  # (B, C_out, H, W)
        if self.num_columns and is_on_gpu(h):
            scale, shift = c[:, self.columns].chunk(2, dim=1)  # (B, C_out) each
            return gelu(self.norm.scaled(h, scale, shift))
        h = self.norm(h)
        if self.num_columns:
            scale, shift = c[:, self.columns, None, None].chunk(2, dim=1)  # (B, C_out, 1, 1) each
            h = h * (1 + scale) + shift
        return gelu(h)


class ConvPair(nn.Module):
    """Two convolutions. Each level of the U-Net is a sequence of such pairs.

    A plain pair is two GELUConvBlocks. A residual pair adds its input to the output of a GELUConvBlock and a
    convolution. The weights of that convolution are initialized to zero, so the untrained pair is the identity, or
    its 1x1 shortcut convolution if the number of channels changes.
    """

    def __init__(self, in_channels: int, out_channels: int, *, residual: bool, modulated: bool) -> None:
        super().__init__()
        self.residual = residual
        self.first = GELUConvBlock(in_channels, out_channels, modulated=modulated)
        if residual:
            self.second: nn.Module = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        else:
            self.second = GELUConvBlock(out_channels, out_channels, modulated=modulated)
        widens = residual and in_channels != out_channels
        self.shortcut = Conv1x1(in_channels, out_channels) if widens else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (B, C_in, H, W), (B, D) -> (B, C_out, H, W)
        h = self.first(x, c)
        if self.residual:
            return self.shortcut(x) + self.second(h)
        return self.second(h, c)


class PatchesToChannels(nn.Module):
    """Moves each square of patch x patch pixels into the channels. On a GPU the result is in channels_last."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C * patch^2, H / patch, W / patch)
        size = {"p1": self.patch, "p2": self.patch}
        if is_on_gpu(x):
            return rearrange(x, "b c (h p1) (w p2) -> b h w (c p1 p2)", **size).permute(0, 3, 1, 2)
        return rearrange(x, "b c (h p1) (w p2) -> b (c p1 p2) h w", **size)


class RearrangePoolBlock(nn.Module):
    """Halves the resolution: moves each 2x2 patch into the channels, so no value is lost, then a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.rearrange = PatchesToChannels(2)
        self.conv = Conv1x1(4 * in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H/2, W/2)
        return self.conv(self.rearrange(x))


class EnlargeBlock(nn.Module):
    """Doubles the resolution: a 1x1 convolution, then nearest-neighbour upsampling. This avoids checkerboard patterns.

    nn.Upsample would compute the same. It is not used because its gradient is zero if it is compiled in bfloat16 on a
    CPU (torch 2.13).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, 2H, 2W)
        h = self.conv(x)  # (B, C_out, H, W)
        if is_on_gpu(h):
            return repeat(h, "b c h w -> b (h p1) (w p2) c", p1=2, p2=2).permute(0, 3, 1, 2)
        return repeat(h, "b c h w -> b c (h p1) (w p2)", p1=2, p2=2)


class DownBlock(nn.Module):
    """One level of the encoder: pairs of convolutions, then pooling. Returns the pooled features and the skip."""

    def __init__(self, channels: int, pool_to: int | None, *, num_pairs: int, residual: bool, modulated: bool) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(
            ConvPair(channels, channels, residual=residual, modulated=modulated) for _ in range(num_pairs)
        )
        self.pool = RearrangePoolBlock(channels, pool_to) if pool_to else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:  # -> (B, pool_to, H/2, W/2), (B, C, H, W)
        for pair in self.pairs:
            x = pair(x, c)
        return self.pool(x), x


class UpBlock(nn.Module):
    """One level of the decoder: concatenates the skip, applies pairs of convolutions, then doubles the resolution."""

    def __init__(
        self, channels: int, enlarge_to: int | None, *, num_pairs: int, residual: bool, modulated: bool
    ) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(
            ConvPair(2 * channels if i == 0 else channels, channels, residual=residual, modulated=modulated)
            for i in range(num_pairs)
        )
        self.enlarge = EnlargeBlock(channels, enlarge_to) if enlarge_to else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor, c: Tensor) -> Tensor:  # -> (B, enlarge_to, 2H, 2W)
        x = torch.cat([x, skip], dim=1)  # (B, 2C, H, W)
        for pair in self.pairs:
            x = pair(x, c)
        return self.enlarge(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions, with a residual connection (Vaswani 2017, section 3.2).

    The output projection is initialized to zero, so the untrained module is the identity.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(NUM_GROUPS, channels)
        self.qkv = Conv1x1(channels, 3 * channels)
        self.proj = zero_init(Conv1x1(channels, channels))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (B, C, H, W), (B, D) -> (B, C, H, W)
        qkv = self.qkv(self.norm(x))  # (B, 3C, H, W)
        q, k, v = rearrange(qkv, "b (three n d) h w -> three b n (h w) d", three=3, n=self.num_heads)
        h = attention(q, k, v)  # (B, heads, H*W, C/heads)
        h = rearrange(h, "b n (h w) d -> b (n d) h w", h=x.shape[2])  # (B, C, H, W)
        return x + self.proj(h)


class SinusoidalEmbedding(nn.Module):
    """Encodes t as sines and cosines (Vaswani 2017, section 3.5). t is scaled from 0..num_steps to 0..1000."""

    frequency: Tensor

    def __init__(self, dim: int, num_steps: int) -> None:
        super().__init__()
        frequency = torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2))  # (dim / 2,)
        self.register_buffer("frequency", frequency * (1000 / num_steps), persistent=False)

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, dim)
        angle = t[:, None].float() * self.frequency  # (B, dim / 2)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def zero_init(conv: nn.Conv2d) -> nn.Conv2d:
    """Sets all parameters of the convolution to zero, and returns it."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
