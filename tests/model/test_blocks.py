import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.blocks import (
    ConvPair,
    DownBlock,
    GELUConvBlock,
    RearrangePoolBlock,
    SelfAttention,
    SinusoidalEmbedding,
    UpBlock,
    zero_init,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of Hendrycks & Gimpel 2016, section 2."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_gelu_conv_block_applies_convolution_norm_and_gelu() -> None:
    block, x = GELUConvBlock(3, 16, modulated=False), torch.randn(2, 3, 6, 6)
    h = F.conv2d(x, block.conv.weight, padding=1)  # (2, 16, 6, 6)
    groups = h.reshape(2, 8, 2, 6, 6)
    mean = groups.mean(dim=(2, 3, 4), keepdim=True)
    std = (groups.var(dim=(2, 3, 4), keepdim=True, unbiased=False) + 1e-5).sqrt()
    normed = ((groups - mean) / std).reshape(2, 16, 6, 6)
    torch.testing.assert_close(block(x, torch.empty(2, 0)), gelu(normed))


def test_modulated_block_scales_and_shifts_each_row_by_its_columns() -> None:
    block, x, c = GELUConvBlock(3, 8, modulated=True), torch.randn(2, 3, 6, 6), torch.randn(2, 40)
    block.columns = slice(20, 36)
    scale, shift = c[:, 20:28], c[:, 28:36]  # (2, 8) each
    normed = block.norm(block.conv(x))
    expected = gelu(normed * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    torch.testing.assert_close(block(x, c), expected)


def test_modulated_block_with_zero_conditioning_equals_unmodulated_block() -> None:
    block, x = GELUConvBlock(3, 8, modulated=True), torch.randn(2, 3, 6, 6)
    block.columns = slice(0, 16)
    torch.testing.assert_close(block(x, torch.zeros(2, 16)), gelu(block.norm(block.conv(x))))


@pytest.mark.parametrize("modulated", [True, False])
def test_untrained_residual_pair_is_the_identity(modulated: bool) -> None:
    pair, x = ConvPair(8, 8, residual=True, modulated=modulated), torch.randn(2, 8, 6, 6)
    pair.first.columns = slice(0, pair.first.num_columns)
    assert torch.equal(pair(x, torch.randn(2, 16)), x)


def test_untrained_residual_pair_that_changes_width_is_its_shortcut() -> None:
    pair, x = ConvPair(16, 8, residual=True, modulated=False), torch.randn(2, 16, 6, 6)
    assert torch.equal(pair(x, torch.empty(2, 0)), pair.shortcut(x))


def test_plain_pair_applies_two_blocks_in_sequence() -> None:
    pair, x, c = ConvPair(8, 16, residual=False, modulated=False), torch.randn(2, 8, 6, 6), torch.empty(2, 0)
    assert torch.equal(pair(x, c), pair.second(pair.first(x, c), c))


def test_pool_moves_each_2x2_patch_into_the_channels() -> None:
    pool, x = RearrangePoolBlock(3, 5), torch.randn(2, 3, 6, 4)
    h = pool.rearrange(x)
    assert h.shape == (2, 12, 3, 2)
    for channel in range(3):
        for row in range(6):
            for column in range(4):
                target = channel * 4 + (row % 2) * 2 + column % 2
                assert torch.equal(h[:, target, row // 2, column // 2], x[:, channel, row, column])
    assert pool(x).shape == (2, 5, 3, 2)


def test_down_block_returns_the_skip_before_pooling() -> None:
    block, x, c = (
        DownBlock(8, 16, num_pairs=2, residual=False, modulated=False),
        torch.randn(2, 8, 6, 6),
        torch.empty(2, 0),
    )
    pooled, skip = block(x, c)
    assert skip.shape == x.shape
    assert torch.equal(skip, block.pairs[1](block.pairs[0](x, c), c))
    assert torch.equal(pooled, block.pool(skip))
    assert pooled.shape == (2, 16, 3, 3)


def test_lowest_down_block_does_not_pool() -> None:
    block = DownBlock(8, None, num_pairs=1, residual=False, modulated=False)
    pooled, skip = block(torch.randn(2, 8, 6, 6), torch.empty(2, 0))
    assert torch.equal(pooled, skip)


def test_up_block_uses_the_skip_and_doubles_the_resolution() -> None:
    block, c = UpBlock(8, 16, num_pairs=1, residual=False, modulated=False), torch.empty(2, 0)
    x, skip = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    enlarged = block(x, skip, c)
    assert enlarged.shape == (2, 16, 6, 6)
    for row in (0, 1):
        for column in (0, 1):
            assert torch.equal(enlarged[:, :, row::2, column::2], enlarged[:, :, ::2, ::2])
    assert not torch.allclose(enlarged, block(x, torch.zeros_like(skip), c))


def test_untrained_attention_is_the_identity() -> None:
    attention, x = SelfAttention(16, num_heads=4), torch.randn(2, 16, 3, 3)
    assert torch.equal(attention(x, torch.empty(2, 0)), x)


def test_attention_is_softmax_of_scaled_products_per_head() -> None:
    attention, x = SelfAttention(16, num_heads=4), torch.randn(2, 16, 3, 5)
    nn.init.normal_(attention.proj.weight)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).split(16, dim=1)  # (2, 16, 15) each
    heads = []
    for head in range(4):
        d = slice(4 * head, 4 * head + 4)
        weights = (q[:, d].transpose(1, 2) @ k[:, d] / 4**0.5).softmax(dim=2)  # (2, 15, 15)
        heads.append(v[:, d] @ weights.transpose(1, 2))  # (2, 4, 15)
    expected = x + attention.proj(torch.cat(heads, dim=1).reshape(x.shape))
    torch.testing.assert_close(attention(x, torch.empty(2, 0)), expected)


def test_time_embedding_is_sines_and_cosines_of_t_scaled_to_1000() -> None:
    embedded = SinusoidalEmbedding(8, num_steps=100)(torch.tensor([0, 1, 37, 100]))
    for row, t in zip(embedded, (0, 10, 370, 1000), strict=True):
        angles = [t / 10_000 ** (i / 4) for i in range(4)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-4, rtol=0)


def test_time_embeddings_of_different_timesteps_are_far_apart() -> None:
    embedded = SinusoidalEmbedding(128, num_steps=100)(torch.arange(1, 101))
    distances = torch.cdist(embedded, embedded).fill_diagonal_(torch.inf)
    assert distances.min() > 1


def test_zero_init_sets_weights_and_bias_to_zero() -> None:
    conv = zero_init(nn.Conv2d(3, 4, 3))
    assert not conv(torch.randn(1, 3, 5, 5)).any()
