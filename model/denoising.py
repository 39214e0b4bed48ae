"""Removes noise from an image with the diffusion model: the noise level, the clipped pixels, and the start.

A noisy image in grey levels is y = clip(x + noise_std z) with standard normal z, clipped to 0..255 and rounded to
integers. In [-1, 1] and without clipping, sqrt(alpha_bar_t) y is x_t at the timestep t where the forward process has
the same ratio of noise to signal. The reverse process can therefore start there:

    noise_std = estimate_noise_std(pixels)              if it is not known
    t         = matching_timestep(schedule, noise_std)
    x_t       = sqrt(alpha_bar_t) restored_image(pixels, noise_std)
    mean      = predicted x_0 at t, the estimate of E[x_0 | x_t], which has the smallest squared error (Efron 2011)
    sample    = reverse process from t to 0

A sample should have the class. If it is not given, `NoisyComparison` recognises it first, unless the noise is too
strong (`can_compare`): the sample then uses the null label. `mean` uses the null label, because its prediction is the
mean over all classes.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from model.noisy_image import WHITE

MAX_NOISE_STD = 1000.0
LEAST_NOISE_STD = 0.5  # an estimate below half a grey level is 0, because rounding hides such noise
NEIGHBOURHOOD = 5  # side of the square around a pixel that decides whether the pixel is background
BACKGROUND = 0.5  # share of the pixels that are taken as background
NOT_BACKGROUND = 0.01  # assumed share of these pixels whose clean value is not 0 but any grey level
NORMAL_MEDIAN = 0.6745  # median of |z| for a standard normal z
NUM_LEVELS = 320  # noise levels in the table of the estimator, 2.7% apart


def estimate_noise_std(pixels: Tensor) -> Tensor:
    """Returns the standard deviation of the noise in grey levels, (B,) float64, for pixels (B, 1, H, W) of 0 to 255.

    The background must be black. Half of its noisy pixels are clipped at 0, so the noise is a censored normal variable
    (Tobin 1958). The pixels with the darkest neighbourhoods are taken as background. The pixel itself is not part of
    its neighbourhood, so this choice does not depend on its own noise. The result is the posterior mean of
    log(noise_std) for a prior that is flat in it. It is 0 for an image without noise.
    """
    values = pixels.flatten(1).long()  # (B, N)
    order = _neighbourhood_means(pixels.double()).flatten(1).argsort(dim=1, stable=True)  # (B, N)
    background = values.gather(1, order[:, : round(BACKGROUND * values.shape[1])])  # (B, n)
    ones = torch.ones_like(background, dtype=torch.float64)  # (B, n)
    counts = torch.zeros(len(values), WHITE + 1, dtype=torch.float64).scatter_add_(1, background, ones)  # (B, 256)
    levels, log_likelihood = _log_likelihood_table()  # (L,), (L, 256)
    posterior = (counts @ log_likelihood.T).softmax(dim=1)  # (B, L)
    noise_std = (posterior @ levels.log()).exp()  # (B,)
    return noise_std.where(noise_std >= LEAST_NOISE_STD, 0.0).clamp(max=MAX_NOISE_STD)


def estimate_noise_std_of_photo(pixels: Tensor) -> Tensor:
    """Returns the standard deviation of the noise in grey levels, (B,) float64, for pixels (B, C, H, W) of 0 to 255.

    Nothing is assumed about what the image shows, except that it is smooth in most places. The finest diagonal
    coefficients d of the Haar wavelet then are almost only noise, and their median is robust against the others
    (Donoho & Johnstone 1994): noise_std = median(|d|) / 0.6745. It is 0 for an image without noise.
    """
    x = pixels.double()  # (B, C, H, W)
    if min(x.shape[2:]) == 1:
        return x.new_zeros(len(x))
    height, width = (2 * (side // 2) for side in x.shape[2:])
    a, b, c, d = (x[:, :, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))  # (B, C, H / 2, W / 2) each
    diagonal = (a - b - c + d) / 2
    noise_std = diagonal.abs().flatten(1).median(dim=1).values / NORMAL_MEDIAN  # (B,)
    return noise_std.where(noise_std >= LEAST_NOISE_STD, 0.0).clamp(max=MAX_NOISE_STD)


def restore_clipped(pixels: Tensor, noise_std: Tensor) -> Tensor:
    """Returns the pixels (B, C, H, W), float32, with clipped values replaced by their conditional mean.

    noise_std is (B,). A pixel of 0 has a value v below 1/2 before clipping and rounding. Its clean value is assumed to
    be 0, and that of a pixel of 255 to be 255. For v = m + noise_std z (Johnson & Kotz 1970, section 13.7.1):

        E[v | v < l] = m - noise_std phi(u) / Phi(u),  u = (l - m) / noise_std

    For large noise this is 0.8 noise_std below black, or above white. Without this replacement, the input of
    the network has a brighter background and weaker noise than x_t at any timestep.
    """
    v = pixels.double()  # (B, C, H, W)
    std = noise_std.double()[:, None, None, None]  # (B, 1, 1, 1)
    u = 0.5 / std  # (B, 1, 1, 1), infinite for 0
    log_phi = -u.square() / 2 - math.log(2 * math.pi) / 2
    beyond = (std * (log_phi - torch.special.log_ndtr(u)).exp()).nan_to_num()  # (B, 1, 1, 1)
    v = torch.where(pixels <= 0, v - beyond, v)
    v = torch.where(pixels >= WHITE, v + beyond, v)
    return v.float()


def restored_image(pixels: Tensor, noise_std: Tensor | Sequence[float]) -> Tensor:
    """Returns noisy pixels (B, C, H, W) in [-1, 1], float32, with restored clipped values. noise_std has B values."""
    return restore_clipped(pixels, torch.as_tensor(noise_std)) / (WHITE / 2) - 1


def _neighbourhood_means(values: Tensor) -> Tensor:
    """Returns the mean of each pixel's neighbours, (B, 1, H, W), without the pixel itself."""
    size = NEIGHBOURHOOD
    kernel = values.new_ones(1, 1, size, size)
    kernel[0, 0, size // 2, size // 2] = 0
    count = F.conv2d(torch.ones_like(values[:1]), kernel, padding=size // 2)  # (1, 1, H, W)
    return F.conv2d(values, kernel, padding=size // 2) / count  # (B, 1, H, W)


@cache
def _log_likelihood_table() -> tuple[Tensor, Tensor]:
    """Returns noise levels (L,) and the log-probability (L, 256) of each grey level of a background pixel.

    A share of NOT_BACKGROUND has a clean value that is uniform in 0..255. The levels extend above MAX_NOISE_STD, so
    that the posterior of an image with this noise is not cut off.
    """
    levels = torch.logspace(math.log10(0.25), math.log10(1.2 * MAX_NOISE_STD), NUM_LEVELS, dtype=torch.float64)  # (L,)
    edges = torch.arange(1, WHITE + 1, dtype=torch.float64) - 0.5  # (255,) between two grey levels
    s = levels[:, None]  # (L, 1)
    below_black = torch.special.ndtr(edges / s)  # (L, 255) P(v < edge) for a clean value of 0
    below_any = (_integral_of_ndtr(edges / s) - _integral_of_ndtr((edges - WHITE) / s)) * s / WHITE  # (L, 255) uniform
    below = (1 - NOT_BACKGROUND) * below_black + NOT_BACKGROUND * below_any  # (L, 255)
    zero, one = below.new_zeros(len(levels), 1), below.new_ones(len(levels), 1)
    return levels, torch.cat([zero, below, one], dim=1).diff(dim=1).clamp(min=1e-300).log()


def _integral_of_ndtr(u: Tensor) -> Tensor:
    """Returns the integral of the normal distribution function from minus infinity to u."""
    return u * torch.special.ndtr(u) + (-u.square() / 2).exp() / math.sqrt(2 * math.pi)
