"""One reverse step of a pipeline for a batch of rows, with the arguments and the result of `ReverseStep`."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from model.noise import block_counter
from model.pipelines.folder import PipelineNetwork
from model.pipelines.schedulers import COLUMNS, MIX, PipelinePlan, StepOfPlan, clipped_x_0, pipeline_step
from model.precision import CallRows
from model.prediction import unclipped_x_0
from model.sampler import guide
from model.step import Rows, State, Stepped

# Rows of each network call on a CPU. A call of another size, or with another number of threads, rounds differently.
# For the network of google/ddpm-cifar10-32, a row takes 70 ms in calls of 1 row, 47 ms with 4 and 42 ms with 16 (Zen 5,
# two threads), but an image alone takes the time of a whole call.
CPU_ROWS = 4
MOST_CPU_THREADS = 8
NUM_CHECKS = 3  # of `has_independent_rows`
OF_KNOWN, OF_X_T = COLUMNS.index("of_known"), COLUMNS.index("of_x_t")


def cpu_threads(available: int) -> int:
    """Returns the number of compute threads: a power of two, so that most networks have independent rows.

    torch divides the values of an operation among the threads and computes the end of each part with other code. With a
    power of two, the parts of CPU_ROWS rows end at the same places of a row, for most sizes of images.
    """
    return 1 << (min(available, MOST_CPU_THREADS).bit_length() - 1)


@dataclass(slots=True)
class PipelineState(State):
    """The state of S rows. A row with `has_z` takes the noise of its next step from `z` instead of drawing it."""

    # `zeros` sets both fields. They need a default, because the field before them has one.
    z: Tensor = None  # type: ignore[assignment] # (S, C, H, W) float32
    has_z: Tensor = None  # type: ignore[assignment] # (S,) bool

    @classmethod
    def zeros(cls, count: int, image_shape: tuple[int, int, int], device: torch.device) -> "PipelineState":
        """Returns the state of `count` unused rows."""
        state = State.zeros(count, image_shape, device)
        values = {field.name: getattr(state, field.name) for field in fields(State)}
        z, has_z = torch.zeros_like(state.x_t), torch.zeros(count, dtype=torch.bool, device=device)
        return cls(**values, z=z, has_z=has_z)

    def noise_of(self, slots: Tensor, step: Tensor, image_shape: tuple[int, int, int], block: Tensor) -> Tensor:
        """Returns the noise z (B, C, H, W) of the next step of the rows in slots (B,), as `State.noise_of`."""
        own = State.noise_of(self, slots, step, image_shape, block)  # (B, C, H, W)
        return self.z[slots].where(self.has_z[slots][:, None, None, None], own)


class PipelineStep(nn.Module):
    """Computes x_prev from x_t with the network of one pipeline.

    The state and the update are float32. The network runs in `dtype`. This module moves it to `device` and `dtype`.
    """

    def __init__(
        self,
        network: PipelineNetwork,
        image_shape: tuple[int, int, int],
        labels: list[int],
        architecture: object,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`labels` has the label of the network for each class, and then the label for "no class".

        `architecture` is what the code of a compiled network depends on, besides the shapes and types of its weights.
        """
        super().__init__()
        self.device, self.dtype, self.image_shape, self.architecture = device, dtype, image_shape, architecture
        self.null_label = len(labels) - 1
        self.labels = nn.Buffer(torch.tensor(labels, device=device))  # (num_classes + 1,)
        self.noise_block = nn.Buffer(block_counter(image_shape, device))  # (1, num_blocks)
        network = network.to(device, dtype)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
        self.call_rows = CallRows(CPU_ROWS, CPU_ROWS) if device.type == "cpu" else CallRows()
        self.denoise: Callable[[Tensor, Tensor], Tensor] = self._denoise

    def forward(self, state: State, plans: Tensor, rows: Rows) -> Stepped:
        """Computes one step of `rows`. `plans` (P, 13) has the rows of the plans, with the columns COLUMNS.

        The state is not changed: the caller stores x_prev and x_0.
        """
        slot, plan_row, label, step, second = rows
        slots, B = rows.slots, len(second)
        every_x_t, every_plan = state.x_t[slot], plans[plan_row]  # (N, C, H, W), (N, 13)
        c = torch.stack([every_plan[:, 0], self.labels[label]], dim=1)  # (N, 2): t and y
        output = self.call_rows.call(self.denoise, every_x_t.to(self.dtype), c).float()  # (N, C, H, W)
        x_t, x_0_prev, plan = every_x_t[:B], state.x_0[slots], every_plan[:B]  # (B, C, H, W) twice, (B, 13)
        guided = guide(output[:B], output[second], state.guidance_scale[slots][:, None, None, None])  # (B, C, H, W)
        u, x_0 = clipped_x_0(x_t, guided, plan)  # (B, C, H, W) each
        error = x_0.new_zeros(0)
        if state.known is not None and state.is_known is not None:
            known, is_known = state.known[slot], state.is_known[slot]  # (N, C, H, W) each
            x_0 = known[:B].where(is_known[:B], x_0)  # (B, C, H, W)
            of_known, of_x_t = (every_plan[:, column, None, None, None] for column in (OF_KNOWN, OF_X_T))
            target = of_known * known + of_x_t * every_x_t  # (N, C, H, W)
            error = unclipped_x_0(every_x_t, output, every_plan[:, MIX]) - target  # (N, C, H, W)
            error = error.square().where(is_known, 0.0).sum(dim=(1, 2, 3))  # (N,)
        z = state.noise_of(slots, step, self.image_shape, self.noise_block)  # (B, C, H, W)
        x_prev, image = pipeline_step(x_t, x_0_prev, u, x_0, z, plan)  # (B, C, H, W) each
        return Stepped(x_prev, image, error, guided.isfinite().flatten(1).all(dim=1))

    @torch.inference_mode()
    def has_independent_rows(self) -> bool:
        """Returns True if a row has the same bits at every place of a call, with the present number of threads.

        It rotates the rows of calls with random images. In a network whose sizes do not divide evenly among vectors and
        threads, the bits of a row depend on its place, and almost every value of its output then differs.
        """
        generator, (x_t, c) = torch.Generator().manual_seed(0), self.example_call(CPU_ROWS)
        for number in range(NUM_CHECKS):
            x_t = torch.randn(x_t.shape, generator=generator).to(self.device, self.dtype)
            c[:, 0] = torch.arange(CPU_ROWS) * 10**number
            output = self.denoise(x_t, c)
            for places in range(1, CPU_ROWS):
                rotated = self.denoise(x_t.roll(places, dims=0), c.roll(places, dims=0))
                if not torch.equal(rotated, output.roll(places, dims=0)):
                    return False
        return True

    def use_single_rows(self) -> None:
        """Gives each row a call of its own, without the compiled network. Rows are independent then."""
        self.call_rows, self.denoise = CallRows(1, 1), self._denoise

    def example_plan(self) -> Tensor:
        """Returns a plan of one step, (1, 13)."""
        step = StepOfPlan(100, 0.9, 0.1, 1.0, 0.5, 0.8, s=0.1, of_known=0.8, of_x_t=0.3, clip=1.0)
        return PipelinePlan.of([step]).rows

    def example_call(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns inputs of `denoise` with `count` rows."""
        x_t = torch.zeros(count, *self.image_shape, dtype=self.dtype, device=self.device)
        return x_t, torch.zeros(count, 2, device=self.device)

    def _denoise(self, x_t: Tensor, c: Tensor) -> Tensor:
        return self.network(x_t.contiguous(memory_format=torch.channels_last), c[:, 0], c[:, 1].long())
