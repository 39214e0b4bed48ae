"""One reverse step of any rows as one tensor program: what is compiled, and then called once a step.

No branch depends on a value, so that one compilation serves every batch: which rows take part, and which
of them the network sees a second time, come in as indices.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.checkpoint import Checkpoint
from model.noise import block_counter, normal
from model.precision import CallRows
from model.prediction import predict_x_0
from model.sampler import guide, reverse_step


@dataclass(slots=True)
class State:
    """S rows: x_t, the last predicted x_0, and what each row was asked to be."""

    x_t: Tensor  # (S, C, H, W) float32
    x_0: Tensor  # (S, C, H, W) float32
    seed: Tensor  # (S,) int64, as all below
    index: Tensor
    y: Tensor
    plan_row: Tensor  # where in the table of plans the row's own starts
    guidance_scale: Tensor  # (S,) float32

    @classmethod
    def zeros(cls, count: int, image_shape: tuple[int, int, int], device: torch.device) -> "State":
        """Rows that nobody has asked for."""
        x_t, x_0 = (torch.zeros(count, *image_shape, device=device) for _ in range(2))
        seed, index, y, plan_row = torch.zeros(4, count, dtype=torch.int64, device=device).unbind()
        return cls(x_t, x_0, seed, index, y, plan_row, torch.ones(count, device=device))

    def __iter__(self) -> Iterator[Tensor]:
        """In the order in which the step takes them."""
        return iter((self.x_t, self.x_0, self.seed, self.index, self.y, self.plan_row, self.guidance_scale))


class Rows(NamedTuple):
    """Which rows of the state take a step, and what the network sees: each of them, then the guided ones once more."""

    slots: Tensor  # (B,) int64: their places in the state
    step: Tensor  # (B,) int64: reverse steps that each has done
    source: Tensor  # (N,) int64: whose each evaluation is, 0..B-1 and then the guided rows again
    second: Tensor  # (B,) int64: which evaluation is the row's without label; its first one where it is not guided


Stepped = tuple[Tensor, Tensor, Tensor]  # x_prev and x_0 (B, C, H, W), whether the row is finite (B,)
Step = Callable[[State, Tensor, Rows], Stepped]  # a ReverseStep or a compiled step


class ReverseStep(nn.Module):
    """Computes x_t -> x_prev with one checkpoint's network.

    State and update are float32; the network has its own precision. Values that depend only on t and y come from
    tables. Those tables and the noise's block counter are buffers, so that a compiled program receives them.
    """

    def __init__(self, loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.checkpoint, self.device, self.dtype = loaded, device, dtype
        self.null_label = loaded.network.null_label
        self.mix = nn.Buffer(loaded.prediction.table(device))  # (T + 1, 3)
        condition = loaded.network.condition_table().clone()  # a tensor of inference mode cannot be exported
        self.condition = nn.Buffer(condition.to(device, dtype))  # (T + 1, num_classes + 1, D)
        self.noise_block = nn.Buffer(block_counter(loaded.image_shape, device))  # (1, num_blocks)
        network = loaded.network.to(device, dtype)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
        self.call_rows = CallRows.of(device, dtype)
        self.denoise: Callable[[Tensor, Tensor], Tensor] = self._denoise

    def forward(self, state: State, plans: Tensor, rows: Rows) -> Stepped:
        """Makes a step of `rows`. `plans` (P, 5) has t, a, b, c and s of each step of each plan."""
        slots, step, source, second = rows
        x_t, x_0_prev, y = state.x_t[slots], state.x_0[slots], state.y[slots]  # (B, ...) each
        plan = plans[state.plan_row[slots] + step]  # (B, 5)
        t = plan[:, 0].long()  # (B,)
        is_first = torch.arange(source.shape[0], device=source.device) < slots.shape[0]  # (N,)
        label = y[source].where(is_first, self.null_label)  # (N,)
        c = self.condition[t[source], label]  # (N, D)
        output = self.call_rows.call(self.denoise, x_t[source].to(self.dtype), c).float()  # (N, C, H, W)
        cond, uncond = output[: slots.shape[0]], output[second]  # (B, C, H, W) each
        output = guide(cond, uncond, state.guidance_scale[slots][:, None, None, None])  # (B, C, H, W)
        x_0 = predict_x_0(x_t, output, self.mix[t])  # (B, C, H, W)
        image_shape = self.checkpoint.image_shape
        z = normal(state.seed[slots], state.index[slots], step + 1, image_shape, self.noise_block)  # (B, C, H, W)
        x_prev = reverse_step(x_t, x_0, x_0_prev, z, plan[:, 1:])  # (B, C, H, W)
        return x_prev, x_0, output.isfinite().flatten(1).all(dim=1)

    @torch.inference_mode()
    def see_network(self) -> None:
        """One call of it, for whoever wants to see its parts at work."""
        x_t = torch.zeros(1, *self.checkpoint.image_shape, dtype=self.dtype, device=self.device)
        self._denoise(x_t, self.condition[:1, 0])

    def _denoise(self, x_t: Tensor, c: Tensor) -> Tensor:
        return self.network.denoise(x_t.contiguous(memory_format=torch.channels_last), c)
