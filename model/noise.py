"""Gaussian noise as a pure function of (seed, index, step), without the state of a random generator.

Each row gets the same noise in every batch and in every process. The random bits come from Philox4x32-10, a
counter-based generator (Salmon 2011). The Box-Muller transform turns them into normal values.
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
    """Returns four random words by Philox4x32-10 (Salmon 2011) for four counter words and two key words.

    Words are 32-bit values in int64 tensors. Their shapes are broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product_0 = c0 * _MULTIPLIERS[0]  # If the product overflows, its upper word is still correct.
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
    """Returns the first counter word of each Philox block of one image, (1, num_blocks) int64.

    A block yields four values of the image.
    """
    num_blocks = -(-math.prod(image_shape) // 4)
    return torch.arange(num_blocks, device=device)[None]


def random_words(seed: Tensor, index: Tensor, step: Tensor, block: Tensor) -> Tensor:
    """Returns uniform 32-bit words (4, B, num_blocks) as int64.

    seed, index and step are (B,) int64, block is (1, num_blocks).
    """
    key = ((seed & _MASK)[:, None], (seed >> 32)[:, None])  # (B, 1) each
    counter = (block, step[:, None], index[:, None], torch.zeros_like(block))
    return torch.stack(torch.broadcast_tensors(*philox(counter, key)))


def normal(
    seed: Tensor, index: Tensor, step: Tensor, image_shape: tuple[int, int, int], block: Tensor | None = None
) -> Tensor:
    """Returns standard normal noise (B, C, H, W) float32, by the Box-Muller transform of Philox words.

    seed, index and step are (B,) int64. `seed` is 0 to 2^53 - 1, `index` is the index of the image in its request, and
    `step` is 0 for x_T and k for the k-th reverse step. `block` is block_counter(image_shape). Code that is compiled
    for a GPU must pass it as a buffer: otherwise Inductor computes arange as an int32 index, and Triton rejects its
    product with a Philox multiplier.
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
