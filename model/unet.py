"""The class-conditional U-Net. It predicts the noise eps in x_t, or another target, from (x_t, t, y)."""

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
    PatchesToChannels,
    SelfAttention,
    SinusoidalEmbedding,
    UpBlock,
    zero_init,
)
from model.operations import is_on_gpu


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """The architecture of the network. It is stored in the checkpoint. Raises ValueError for invalid values."""

    image_channels: int = 1
    image_size: int = 28
    num_classes: int = 10
    num_steps: int = 100  # the number T of diffusion steps, which scales the time embedding
    stem_patch: int = 2  # the stem moves patches of this edge length into the channels; 1 = off
    widths: tuple[int, ...] = (64, 128)  # channels of each level, from the highest resolution to the lowest
    num_pairs: int = 2  # pairs of convolutions per level
    residual: bool = True
    conditioning: str = "every_block"  # "every_block" (scale and shift) or "bottom" (added after the middle blocks)
    attention_heads: int = 4  # in the middle blocks; 0 = no attention
    time_dim: int = 128
    embed_dim: int = 128

    def __post_init__(self) -> None:
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
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.widths or any(width < 1 or width % NUM_GROUPS for width in self.widths):
            raise ValueError(f"widths must be multiples of {NUM_GROUPS} and not empty")
        if self.attention_heads < 0 or (self.attention_heads and self.widths[-1] % self.attention_heads):
            raise ValueError(
                f"attention_heads must divide the last width {self.widths[-1]}, or be 0, got {self.attention_heads}"
            )
        if self.time_dim < 2 or self.time_dim % 2:
            raise ValueError(f"time_dim must be even and at least 2, got {self.time_dim}")
        smallest_level = self.stem_patch * 2 ** (len(self.widths) - 1)
        if self.image_size % smallest_level:
            raise ValueError(f"image_size must be a multiple of {smallest_level}, got {self.image_size}")
        if self.conditioning not in ("every_block", "bottom"):
            raise ValueError(f"unknown conditioning {self.conditioning!r}: must be every_block or bottom")


class UNet(nn.Module):
    """Predicts eps, or another target (model/prediction.py), from x_t. Each row has its own timestep t and label y.

    The network is a U-Net (Ronneberger 2015), similar to that of DDPM (Ho 2020, appendix B). `forward` is
    `denoise(x_t, condition(t, y))`. The condition is one vector per row that depends on t and y only, so callers can
    compute it once for all t and y with `condition_table`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, modulated = config.widths, config.conditioning == "every_block"
        pairs = {"residual": config.residual, "modulated": modulated}
        stem_channels = config.image_channels * config.stem_patch**2
        self.stem = nn.Sequential(
            PatchesToChannels(config.stem_patch),
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
        self.class_embed = nn.Embedding(config.num_classes + 1, config.embed_dim)  # the last row is the null label
        self._modulated_blocks: list[GELUConvBlock] = []
        condition_dim = self._assign_columns() if modulated else widths[-1]
        self.condition_proj = nn.Linear(config.embed_dim, condition_dim)

    @property
    def null_label(self) -> int:
        """Returns the label that means "no class", for classifier-free guidance."""
        return self.config.num_classes

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Returns the prediction (B, C, H, W) for x_t (B, C, H, W), t (B,) in 1..T and y (B,) in 0..num_classes."""
        return self.denoise(x_t, self.condition(t, y))

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """Returns the conditioning vectors (B, D) for t (B,) and y (B,). This is the only use of t and y."""
        embedding = self.time_embed(t) + self.class_embed(y)  # (B, embed_dim)
        return self.condition_proj(F.silu(embedding))

    @torch.inference_mode()
    def condition_table(self) -> Tensor:
        """Returns `condition` of every t in 0..T and every label, (T + 1, num_classes + 1, D)."""
        t, y = torch.arange(self.config.num_steps + 1), torch.arange(self.config.num_classes + 1)
        pairs = torch.cartesian_prod(t, y).to(self.class_embed.weight.device)  # ((T + 1) * (num_classes + 1), 2)
        return self.condition(*pairs.unbind(dim=1)).unflatten(0, (len(t), len(y)))

    def denoise(self, x_t: Tensor, c: Tensor) -> Tensor:
        """Returns the prediction (B, C, H, W) for x_t (B, C, H, W) and the result c (B, D) of `condition`."""
        if self._modulated_blocks and is_on_gpu(x_t):
            c = self._with_norms(c)
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

    def _assign_columns(self) -> int:
        """Assigns columns of the conditioning vector to each modulated block. Returns the length of the vector."""
        self._modulated_blocks = [module for module in self.modules() if isinstance(module, GELUConvBlock)]
        scale_of: list[int] = []
        is_shift: list[float] = []
        for block in self._modulated_blocks:
            start, channels = len(scale_of), block.num_columns // 2
            block.columns = slice(start, start + block.num_columns)
            scale_of += 2 * [*range(start, start + channels)]
            is_shift += channels * [0.0] + channels * [1.0]
        self._scale_of = nn.Buffer(torch.tensor(scale_of), persistent=False)  # (D,) column of the block's scale
        self._is_shift = nn.Buffer(torch.tensor(is_shift), persistent=False)  # (D,) 1 in the columns of the shift
        return len(scale_of)

    def _with_norms(self, c: Tensor) -> Tensor:  # (B, D) -> (B, D)
        """Multiplies the weights and the biases of the modulated norms into the scales and the shifts in c.

        A block computes (weight n + bias) (1 + scale) + shift, where n is normalised without weight and bias. The new
        scale is weight (1 + scale), and the new shift is bias (1 + scale) + shift. On a GPU, this launches four kernels
        for all blocks together. If each block did this separately, it would launch three kernels for each block.
        """
        norms = [block.norm for block in self._modulated_blocks]
        affine = torch.cat([part for norm in norms for part in (norm.weight, norm.bias)])  # (D,)
        scaled = torch.addcmul(affine, affine, c[:, self._scale_of])  # (B, D): weight (1 + scale), bias (1 + scale)
        return torch.addcmul(scaled, c, self._is_shift)
