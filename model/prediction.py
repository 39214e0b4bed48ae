"""What the network's output F(x_t, t, y) means: the noise, or another affine mix of image and noise.

Every kind is one line, x_0 = (skip_t x_t - scale_t F) / signal_t, so that samplers know no kinds, and
guidance may be applied to F itself:

    eps  skip 1, scale sqrt(1 - alpha_bar), signal sqrt(alpha_bar)   Ho 2020, eq. 15
    v    skip sqrt(alpha_bar), scale sqrt(1 - alpha_bar), signal 1   Salimans & Ho 2022, section 4
    edm  as v, for data whose standard deviation is sigma_data       Karras 2022, table 1
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.schedule import Schedule

KINDS = ("eps", "v", "edm")


@dataclass(frozen=True, slots=True)
class PredictionConfig:
    """What the network predicts; travels inside the checkpoint."""

    kind: str = "eps"
    sigma_data: float = 0.6162  # edm only: of MNIST at 28x28 in [-1, 1]

    def __post_init__(self) -> None:
        """ValueError for what no network predicts."""
        if self.kind not in KINDS:
            raise ValueError(f"unknown prediction kind {self.kind!r}: {', '.join(KINDS)}")
        if not self.sigma_data > 0:
            raise ValueError("sigma_data must be above 0")


class Prediction:
    """The mix for every t of a schedule."""

    def __init__(self, config: PredictionConfig, schedule: Schedule) -> None:
        self.config = config
        alpha_bar = schedule.alpha_bar  # (T + 1,) float64
        one = torch.ones_like(alpha_bar)
        if config.kind == "eps":
            skip, scale, signal = one, (1 - alpha_bar).sqrt(), alpha_bar.sqrt()
        else:
            variance = config.sigma_data**2 if config.kind == "edm" else 1.0
            total = alpha_bar * variance + 1 - alpha_bar  # the variance of x_t
            skip, scale, signal = alpha_bar.sqrt() * variance / total, ((1 - alpha_bar) * variance / total).sqrt(), one
        self._snr = alpha_bar / (1 - alpha_bar)  # (T + 1,), infinite at t = 0
        self._mix = torch.stack([skip, scale, signal])  # (3, T + 1)
        of_x_0, of_eps = skip * alpha_bar.sqrt() - signal, skip * (1 - alpha_bar).sqrt()
        self._target = (torch.stack([of_x_0, of_eps]) / scale).T.float()  # (T + 1, 2), undefined at t = 0

    def table(self, device: torch.device) -> Tensor:
        """skip, scale and signal of every t, (T + 1, 3) float32: what `predict_x_0` takes rows of."""
        return self._mix.T.float().to(device)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What F should be: x_0 and eps (B, C, H, W), t (B,) in 1..T -> (B, C, H, W)."""
        of_x_0, of_eps = self._target.to(x_0.device)[t][:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
        return of_x_0 * x_0 + of_eps * eps

    def min_snr_weights(self, gamma: float) -> Tensor:
        """Weights of F's squared error so that x_0's counts min(SNR, gamma) times (Hang 2023); (T + 1,) float32."""
        _, scale, signal = self._mix
        return (self._snr.clamp(max=gamma) * (scale / signal).square()).float()


def predict_x_0(x_t: Tensor, output: Tensor, mix: Tensor) -> Tensor:
    """The image that F implies, clipped, as for eps near t = T an error is multiplied by hundreds; mix (B, 3)."""
    skip, scale, signal = mix[:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
    return ((skip * x_t - scale * output) / signal).clamp(-1, 1)
