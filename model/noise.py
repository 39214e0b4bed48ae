"""Gaussian noise as a pure function of (seed, index, step): no generator, no state, no batch order.

Philox4x32-10 (Salmon 2011), a counter-based generator, gives each row the same bits whatever
stands beside it in the batch and whichever process draws it; Box-Muller makes them normal.
"""

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_NUM_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10: four counter words and two key words, int64 tensors holding 32 bits, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product_0 = c0 * _MULTIPLIERS[0]  # wraps past 63 bits; the masked shift still yields the upper word
        product_1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK) ^ c1 ^ k0,
            product_1 & _MASK,
            ((product_0 >> 32) & _MASK) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def block_counter(image_shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """The first counter word of each Philox block of one image, (1, num_blocks) int64; a block yields four values."""
    num_blocks = -(-math.prod(image_shape) // 4)
    return torch.arange(num_blocks, device=device)[None]


def random_words(seed: Tensor, index: Tensor, step: Tensor, block: Tensor) -> Tensor:
    """Uniform 32-bit words (4, B, num_blocks) as int64 for rows seed, index, step (B,) and blocks (1, num_blocks)."""
    key = ((seed & _MASK)[:, None], (seed >> 32)[:, None])  # (B, 1) each
    counter = (block, step[:, None], index[:, None], torch.zeros_like(block))
    return torch.stack(torch.broadcast_tensors(*philox(counter, key)))


def normal(
    seed: Tensor, index: Tensor, step: Tensor, image_shape: tuple[int, int, int], block: Tensor | None = None
) -> Tensor:
    """Standard normal noise (B, C, H, W) float32 for int64 rows seed, index, step (B,).

    `seed` is 0..2^53 - 1, `index` the image's place in its request, `step` 0 for x_T and
    k for the k-th reverse step. `block` is block_counter(image_shape). A program that is compiled for a GPU must
    pass it as a buffer: Inductor treats arange as an int32 index, and Triton rejects its product with a multiplier.
    """
    if block is None:
        block = block_counter(image_shape, seed.device)  # (1, num_blocks)
    numel = math.prod(image_shape)
    words = random_words(seed, index, step, block)  # (4, B, num_blocks)
    uniform = (words.float() + 0.5) * 2.0**-32  # (4, B, num_blocks) in (0, 1]
    radius = torch.sqrt(-2 * torch.log(uniform[:2]))  # (2, B, num_blocks)
    angle = 2 * math.pi * uniform[2:]  # (2, B, num_blocks)
    z = torch.cat([radius * angle.cos(), radius * angle.sin()])  # (4, B, num_blocks)
    return z.permute(1, 2, 0).flatten(1)[:, :numel].contiguous().unflatten(1, image_shape)
