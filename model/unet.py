"""The class-conditional U-Net: (x_t, t, y) -> the noise in x_t."""

from dataclasses import dataclass

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from model.blocks import (
    NUM_GROUPS,
    ConvPair,
    DownBlock,
    GELUConvBlock,
    SelfAttention,
    SinusoidalEmbedding,
    UpBlock,
    zero_init,
)


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Everything that decides the network's shape; travels inside the checkpoint."""

    image_channels: int = 1
    image_size: int = 28
    num_classes: int = 10
    num_steps: int = 100  # T, stretches the time embedding
    stem_patch: int = 2  # edge of the patches that the stem folds into channels; 1 = none
    widths: tuple[int, ...] = (64, 128)  # channels of each level, the largest image first
    num_pairs: int = 2  # pairs of convolutions a level
    residual: bool = True
    conditioning: str = "every_block"  # "every_block" (scale and shift) or "bottom" (added after the middle)
    attention_heads: int = 4  # in the middle; 0 = no attention
    time_dim: int = 128
    embed_dim: int = 128

    def __post_init__(self) -> None:
        """ValueError for a shape that no network has."""
        for name in (
            "image_channels",
            "image_size",
            "num_classes",
            "num_steps",
            "stem_patch",
            "num_pairs",
            "embed_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not self.widths or any(width < 1 or width % NUM_GROUPS for width in self.widths):
            raise ValueError(f"widths must be multiples of {NUM_GROUPS}")
        if self.attention_heads < 0 or (self.attention_heads and self.widths[-1] % self.attention_heads):
            raise ValueError("attention_heads must divide the last width, or be 0")
        if self.time_dim < 2 or self.time_dim % 2:
            raise ValueError("time_dim must be even")
        smallest_level = self.stem_patch * 2 ** (len(self.widths) - 1)
        if self.image_size % smallest_level:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {smallest_level}")
        if self.conditioning not in ("every_block", "bottom"):
            raise ValueError(f"unknown conditioning {self.conditioning!r}: every_block or bottom")


class UNet(nn.Module):
    """Predicts eps, or what else its training asked for, from x_t, for each row's own timestep t and label y.

    `forward` is `denoise(x_t, condition(t, y))`: what depends on t and y alone is one vector a row,
    which whoever calls the network often can keep in a table.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, modulated = config.widths, config.conditioning == "every_block"
        pairs = {"residual": config.residual, "modulated": modulated}
        stem_channels = config.image_channels * config.stem_patch**2
        self.stem = nn.Sequential(
            Rearrange("b c (h p1) (w p2) -> b (c p1 p2) h w", p1=config.stem_patch, p2=config.stem_patch),
            nn.Conv2d(stem_channels, widths[0], 3, padding=1),
        )
        self.downs = nn.ModuleList(
            DownBlock(width, pool_to, num_pairs=config.num_pairs, **pairs)
            for width, pool_to in zip(widths, [*widths[1:], None], strict=True)
        )
        middle: list[nn.Module] = [ConvPair(widths[-1], widths[-1], **pairs)]
        if config.attention_heads:
            middle += [SelfAttention(widths[-1], config.attention_heads), ConvPair(widths[-1], widths[-1], **pairs)]
        self.mids = nn.ModuleList(middle)
        self.ups = nn.ModuleList(
            UpBlock(width, enlarge_to, num_pairs=config.num_pairs, **pairs)
            for width, enlarge_to in zip(widths[::-1], [*widths[-2::-1], None], strict=True)
        )
        self.final_conv = nn.Sequential(
            zero_init(nn.Conv2d(widths[0], stem_channels, 3, padding=1)),
            Rearrange("b (c p1 p2) h w -> b c (h p1) (w p2)", p1=config.stem_patch, p2=config.stem_patch),
        )
        self.time_embed = nn.Sequential(
            SinusoidalEmbedding(config.time_dim, config.num_steps),
            nn.Linear(config.time_dim, config.embed_dim),
            nn.SiLU(),
            nn.Linear(config.embed_dim, config.embed_dim),
        )
        self.class_embed = nn.Embedding(config.num_classes + 1, config.embed_dim)  # the last is "no class"
        condition_dim = self._deal_columns() if modulated else widths[-1]
        self.condition_proj = nn.Linear(config.embed_dim, condition_dim)

    @property
    def null_label(self) -> int:
        """The label that means "no class"."""
        return self.config.num_classes

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x_t (B, C, H, W) in float, t (B,) in 1..T, y (B,) in 0..num_classes -> eps (B, C, H, W)."""
        return self.denoise(x_t, self.condition(t, y))

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """t (B,), y (B,) -> all that the network hears of them, (B, D)."""
        embedding = self.time_embed(t) + self.class_embed(y)  # (B, embed_dim)
        return self.condition_proj(F.silu(embedding))

    @torch.inference_mode()
    def condition_table(self) -> Tensor:
        """`condition` for every t in 0..T and every label, (T + 1, num_classes + 1, D): it depends on nothing else."""
        t, y = torch.arange(self.config.num_steps + 1), torch.arange(self.config.num_classes + 1)
        pairs = torch.cartesian_prod(t, y).to(self.class_embed.weight.device)  # ((T + 1) * (num_classes + 1), 2)
        return self.condition(*pairs.unbind(dim=1)).unflatten(0, (len(t), len(y)))

    def denoise(self, x_t: Tensor, c: Tensor) -> Tensor:
        """x_t (B, C, H, W), c (B, D) from `condition` -> eps (B, C, H, W)."""
        h = self.stem(x_t)  # (B, widths[0], H / stem_patch, W / stem_patch)
        skips = []
        for down in self.downs:
            h, skip = down(h, c)
            skips.append(skip)
        for mid in self.mids:
            h = mid(h, c)
        if self.config.conditioning == "bottom":
            h = h + c[:, :, None, None]
        for up in self.ups:
            h = up(h, skips.pop(), c)
        return self.final_conv(h)

    def _deal_columns(self) -> int:
        """Gives each modulated block its columns of the conditioning vector; returns the vector's length."""
        start = 0
        for module in self.modules():
            if isinstance(module, GELUConvBlock):
                module.columns = slice(start, start + module.num_columns)
                start += module.num_columns
        return start
