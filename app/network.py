"""One checkpoint's network on its device: what it predicts for rows of any step, digit and guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from app import VERSION
from model.checkpoint import Checkpoint
from model.precision import CallRows
from model.prediction import predict_x_0
from model.sampler import Sampler, guide, timesteps_of


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served under a name, in words and numbers."""

    name: str
    sha256: str
    num_parameters: int
    device: str
    dtype: str
    version: str
    num_classes: int
    max_steps: int
    steps: tuple[int, ...]  # the only numbers of steps that it draws in; () = all of 1..max_steps
    default_steps: int  # the recommended number
    samplers: tuple[Sampler, ...]  # the recommended one first
    guidance_scale: dict[Sampler, float]  # the recommended one of each
    guided_steps: Callable[[Sampler, int], range]  # (sampler, num_steps) -> the steps in which guidance acts
    guidable: bool  # whether labels were dropped in training: without it guidance has nothing to lean on


class Network:
    """The network in the precision that serves it; what depends on t and y alone is looked up."""

    def __init__(
        self, name: str, loaded: Checkpoint, device: torch.device, dtype: torch.dtype, *, compiled: bool
    ) -> None:
        self.checkpoint, self.dtype = loaded, dtype
        self.info = _describe(name, loaded, device, dtype)
        self._null_label = loaded.network.null_label
        self._mix = loaded.prediction.table(device)  # (T + 1, 3)
        self._condition = loaded.network.condition_table().to(device, dtype)  # (T + 1, num_classes + 1, D)
        network = loaded.network.to(device, dtype)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
        self._rows = CallRows.of(device, dtype, compiled=compiled)
        self._denoise = torch.compile(network.denoise, dynamic=True) if compiled else network.denoise

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor, guidance_scale: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (B, C, H, W), the others (B,) -> x_0 (B, C, H, W), and which rows' outputs are finite (B,).

        Rows that are guided (guidance_scale is not 1) are evaluated a second time, without label, in the same call.
        """
        guided = (guidance_scale != 1).nonzero()[:, 0]  # (G,)
        null = torch.full_like(guided, self._null_label)
        output = self._call(torch.cat([x_t, x_t[guided]]), torch.cat([t, t[guided]]), torch.cat([y, null]))
        cond, uncond = output.split([len(x_t), len(guided)])
        scale = guidance_scale[guided][:, None, None, None]  # (G, 1, 1, 1)
        output = cond.index_copy(0, guided, guide(cond[guided], uncond, scale))  # (B, C, H, W)
        return predict_x_0(x_t, output, self._mix[t]), output.isfinite().flatten(1).all(dim=1)

    def _call(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(N, C, H, W), (N,), (N,) -> (N, C, H, W) float32, in as few calls of the network as may be."""

        def denoise(x: Tensor, c: Tensor) -> Tensor:
            return self._denoise(x.contiguous(memory_format=torch.channels_last), c)

        return self._rows.call(denoise, x_t.to(self.dtype), self._condition[t, y]).float()


def _describe(name: str, loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> ModelInfo:
    config = loaded.config
    return ModelInfo(
        name=name,
        sha256=loaded.sha256,
        num_parameters=sum(p.numel() for p in loaded.network.parameters()),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        version=VERSION,
        num_classes=config.unet.num_classes,
        max_steps=config.schedule.num_steps,
        steps=config.steps,
        default_steps=config.recommended_steps,
        samplers=config.samplers,
        guidance_scale={sampler: config.guidance_of(sampler).scale for sampler in config.samplers},
        guided_steps=_guided_steps(loaded),
        guidable=config.guidable,
    )


def _guided_steps(loaded: Checkpoint) -> Callable[[Sampler, int], range]:
    @cache
    def guided_steps(sampler: Sampler, num_steps: int) -> range:
        timesteps = timesteps_of(loaded.schedule, sampler, num_steps)
        return loaded.config.guidance_of(sampler).interval_of(timesteps[:-1])

    return guided_steps
