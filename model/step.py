"""One reverse step for a batch of rows, as one tensor program that can be compiled.

The program has no branches on tensor values: index tensors select the rows of the step and the rows that need a second
evaluation for guidance. Therefore one compiled program works for every batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.checkpoint import Checkpoint
from model.noise import block_counter, normal
from model.precision import CallRows
from model.prediction import predict_x_0, unclipped_x_0
from model.sampler import guide, reverse_step


@dataclass(slots=True)
class State:
    """State of S rows (images in progress): x_t, the last predicted x_0, and the parameters of each row.

    Known pixels are given by the client. Where `is_known` is True, the value in `known` replaces the predicted x_0.
    Without `known` and `is_known`, no row has known pixels, and a step computes no errors. With `noise`, a step reads
    its noise there instead of drawing it.
    """

    x_t: Tensor  # (S, C, H, W) float32
    x_0: Tensor  # (S, C, H, W) float32
    known: Tensor | None  # (S, C, H, W) float32: pixels of x_0
    is_known: Tensor | None  # (S, C, H, W) bool
    seed: Tensor  # (S,) int64
    index: Tensor  # (S,) int64
    guidance_scale: Tensor  # (S,) float32
    noise: Tensor | None = None  # (S, 1 + K, C, H, W) float32: the noise of x_T, then that of K steps

    @classmethod
    def zeros(cls, count: int, image_shape: tuple[int, int, int], device: torch.device) -> "State":
        """Returns the state of `count` unused rows."""
        x_t, x_0, known = (torch.zeros(count, *image_shape, device=device) for _ in range(3))
        is_known = torch.zeros(count, *image_shape, dtype=torch.bool, device=device)
        seed, index = torch.zeros(2, count, dtype=torch.int64, device=device).unbind()
        return cls(x_t, x_0, known, is_known, seed, index, torch.ones(count, device=device))

    def __iter__(self) -> Iterator[Tensor]:
        """Yields the tensors in the order of the fields, which are inputs of a compiled step."""
        values = (getattr(self, field.name) for field in fields(self))
        return (value for value in values if value is not None)

    def noise_of(self, slots: Tensor, step: Tensor, image_shape: tuple[int, int, int], block: Tensor) -> Tensor:
        """Returns the noise z (B, C, H, W) of the steps with numbers `step` (B,) of the rows in slots (B,).

        `block` is `block_counter(image_shape)`.
        """
        if self.noise is None:
            return normal(self.seed[slots], self.index[slots], step, image_shape, block)
        return self.noise[slots, step]


class Rows(NamedTuple):
    """Selects the B rows that take a step and the N evaluations of the network.

    The first B evaluations are the first ones of all rows. The others are further evaluations of the same rows: the
    unconditional one of a guided row, or those of further classes of a row that compares the classes. Each evaluation
    has the slot and the plan of its row, so that the device does not look them up.
    """

    slot: Tensor  # (N,) int64: for each evaluation, the index of its row in the state
    plan_row: Tensor  # (N,) int64: for each evaluation, the row of the table of plans
    label: Tensor  # (N,) int64: label y of each evaluation
    step: Tensor  # (B,) int64: number of the step of each row, 1 for the first one
    second: Tensor  # (B,) int64: unconditional evaluation of a guided row, first evaluation of any other row

    @property
    def slots(self) -> Tensor:
        """Returns the slot (B,) of each row."""
        return self.slot[: self.second.shape[0]]


class Stepped(NamedTuple):
    """The results of a step."""

    x_prev: Tensor  # (B, C, H, W) float32
    x_0: Tensor  # (B, C, H, W) float32
    # (N,) float32: squared distance of each evaluation's unclipped x_0 from its target, at known pixels. (0,) without
    # known pixels in the state
    error: Tensor
    finite: Tensor  # (B,) bool: True where the output is finite


Step = Callable[[State, Tensor, Rows], Stepped]  # a ReverseStep or a compiled step


class ReverseStep(nn.Module):
    """Computes x_prev from x_t with the network of one checkpoint.

    The state and the update are float32. The network runs in `dtype`. Values that depend only on t and y come from
    tables. The tables and the block counter of the noise are buffers, because a compiled program takes buffers as
    inputs. This module moves the network of the checkpoint to `device` and `dtype`.
    """

    def __init__(self, loaded: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.checkpoint, self.device, self.dtype = loaded, device, dtype
        self.null_label = loaded.network.null_label
        self.mix = nn.Buffer(loaded.prediction.table(device))  # (T + 1, 3)
        condition = loaded.network.condition_table().clone()  # tensors made in inference mode cannot be exported
        self.condition = nn.Buffer(condition.to(device, dtype))  # (T + 1, num_classes + 1, D)
        self.noise_block = nn.Buffer(block_counter(loaded.image_shape, device))  # (1, num_blocks)
        network = loaded.network.to(device, dtype)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
        self.call_rows = CallRows.of(device, dtype)
        self.denoise: Callable[[Tensor, Tensor], Tensor] = self._denoise

    def forward(self, state: State, plans: Tensor, rows: Rows) -> Stepped:
        """Computes one step of `rows`. `plans` (P, 7) has the rows of `Plan.table` for each step of each plan.

        The state is not changed: the caller stores x_prev and x_0.
        """
        slot, plan_row, label, step, second = rows
        slots, B = rows.slots, second.shape[0]  # len() would make B a constant of a compiled step
        every_x_t, every_plan = state.x_t[slot], plans[plan_row]  # (N, C, H, W), (N, 7)
        t = every_plan[:, 0].long()  # (N,)
        c = self.condition[t, label]  # (N, D)
        output = self.call_rows.call(self.denoise, every_x_t.to(self.dtype), c).float()  # (N, C, H, W)
        x_t, x_0_prev, plan = every_x_t[:B], state.x_0[slots], every_plan[:B]  # (B, C, H, W) twice, (B, 7)
        cond, uncond = output[:B], output[second]  # (B, C, H, W) each
        guided = guide(cond, uncond, state.guidance_scale[slots][:, None, None, None])  # (B, C, H, W)
        x_0 = predict_x_0(x_t, guided, self.mix[t[:B]])  # (B, C, H, W)
        error = x_0.new_zeros(0)
        if state.known is not None and state.is_known is not None:
            known, is_known = state.known[slot], state.is_known[slot]  # (N, C, H, W) each
            x_0 = known[:B].where(is_known[:B], x_0)  # (B, C, H, W)
            of_known, of_x_t = every_plan[:, 5:, None, None, None].unbind(dim=1)  # (N, 1, 1, 1) each
            target = of_known * known + of_x_t * every_x_t  # (N, C, H, W)
            error = unclipped_x_0(every_x_t, output, self.mix[t]) - target  # (N, C, H, W)
            error = error.square().where(is_known, 0.0).sum(dim=(1, 2, 3))  # (N,)
        z = state.noise_of(slots, step, self.image_shape, self.noise_block)  # (B, C, H, W)
        x_prev = reverse_step(x_t, x_0, x_0_prev, z, plan[:, 1:5])  # (B, C, H, W)
        return Stepped(x_prev, x_0, error, guided.isfinite().flatten(1).all(dim=1))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.checkpoint.image_shape

    @property
    def architecture(self) -> object:
        """What the code of a compiled step depends on, besides the shapes and types of the weights."""
        return self.checkpoint.architecture

    def example_plan(self) -> Tensor:
        """Returns a plan of one step, (1, 7). At its low noise, predicting x_0 does not amplify rounding errors."""
        return torch.tensor([[self.checkpoint.schedule.num_steps // 4, 0.9, 0.1, 0.0, 0.1, 0.8, 0.3]])

    def example_call(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns inputs of `denoise` with `count` rows."""
        x_t = torch.zeros(count, *self.image_shape, dtype=self.dtype, device=self.device)
        return x_t, torch.zeros(count, self.condition.shape[-1], dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def run_network_once(self) -> None:
        """Calls the network on one row of zeros, so that forward hooks can record the shapes of its layers."""
        x_t, _ = self.example_call(1)
        self._denoise(x_t, self.condition[:1, 0])

    def _denoise(self, x_t: Tensor, c: Tensor) -> Tensor:
        return self.network.denoise(x_t.contiguous(memory_format=torch.channels_last), c)
