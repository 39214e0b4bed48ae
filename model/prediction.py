"""The prediction target of the network output F(x_t, t, y): the noise, or another combination of image and noise.

All kinds give x_0 = (skip_t x_t - scale_t F) / signal_t, with coefficients from a table. Therefore samplers do not
depend on the kind, and guidance can be applied to F directly:

    eps  skip 1, scale sqrt(1 - alpha_bar), signal sqrt(alpha_bar)   Ho 2020, eq. 15
    v    skip sqrt(alpha_bar), scale sqrt(1 - alpha_bar), signal 1   Salimans & Ho 2022, section 4
    edm  as v, for data whose standard deviation is sigma_data       Karras 2022, table 1
"""

import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from model.schedule import Schedule

KINDS = ("eps", "v", "edm")


@dataclass(frozen=True, slots=True)
class PredictionConfig:
    """The kind of prediction. It is stored in the checkpoint. Raises ValueError for invalid values."""

    kind: str = "eps"
    sigma_data: float = 0.6162  # edm only: standard deviation of MNIST at 28x28 in [-1, 1]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown prediction kind {self.kind!r}: must be one of {', '.join(KINDS)}")
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be above 0, got {self.sigma_data}")


class Prediction:
    """The coefficients skip, scale and signal of a prediction kind for every t of a schedule."""

    def __init__(self, config: PredictionConfig, schedule: Schedule) -> None:
        self.config = config
        alpha_bar = schedule.alpha_bar  # (T + 1,) float64
        one = torch.ones_like(alpha_bar)
        if config.kind == "eps":
            skip, scale, signal = one, (1 - alpha_bar).sqrt(), alpha_bar.sqrt()
        else:
            variance = float(config.sigma_data) ** 2 if config.kind == "edm" else 1.0  # JSON can have an integer
            total = alpha_bar * variance + 1 - alpha_bar  # the variance of x_t
            skip, scale, signal = alpha_bar.sqrt() * variance / total, ((1 - alpha_bar) * variance / total).sqrt(), one
        self._snr = alpha_bar / (1 - alpha_bar)  # (T + 1,), infinite at t = 0
        self._mix = torch.stack([skip, scale, signal])  # (3, T + 1)
        of_x_0, of_eps = skip * alpha_bar.sqrt() - signal, skip * (1 - alpha_bar).sqrt()
        self._target = (torch.stack([of_x_0, of_eps]) / scale).T.float()  # (T + 1, 2), undefined at t = 0

    def to(self, device: torch.device) -> Self:
        """Returns a copy whose `target` copies no coefficients to the device at each call."""
        moved = copy.copy(self)
        moved._target = self._target.to(device)
        return moved

    def table(self, device: torch.device) -> Tensor:
        """Returns skip, scale and signal for t = 0..T, (T + 1, 3) float32. `predict_x_0` takes rows of this table."""
        return self._mix.T.float().to(device)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Returns the training target of F, (B, C, H, W), for x_0 and eps (B, C, H, W) and t (B,) in 1..T."""
        of_x_0, of_eps = self._target.to(x_0.device)[t][:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
        return of_x_0 * x_0 + of_eps * eps

    def min_snr_weights(self, gamma: float) -> Tensor:
        """Returns the Min-SNR loss weights for t = 0..T, (T + 1,) float32 (Hang 2023).

        With these weights of the squared error of F, the squared error of x_0 has weight min(SNR, gamma).
        """
        _, scale, signal = self._mix
        return (self._snr.clamp(max=gamma) * (scale / signal).square()).float()


def predict_x_0(x_t: Tensor, output: Tensor, mix: Tensor) -> Tensor:
    """Returns the predicted x_0, (B, C, H, W) in [-1, 1], for a network output F (B, C, H, W).

    mix (B, 3) has the rows of `Prediction.table` for each t. The result is clipped, because near t = T the eps kind
    multiplies errors of F by hundreds.
    """
    return unclipped_x_0(x_t, output, mix).clamp(-1, 1)


def unclipped_x_0(x_t: Tensor, output: Tensor, mix: Tensor) -> Tensor:
    """Returns `predict_x_0` before clipping, (B, C, H, W)."""
    skip, scale, signal = mix[:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
    return (skip * x_t - scale * output) / signal
