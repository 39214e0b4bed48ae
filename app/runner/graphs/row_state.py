"""The state of the rows on a device that runs CUDA graphs. Graphs read and write these tensors at fixed addresses."""

from dataclasses import replace

import torch
from torch import Tensor

from app.runner.device_state import Slots
from app.runner.graphs.device import GraphDevice
from app.runner.transfers import Transfers
from model.noise import normal
from model.pixels import to_pixels
from model.step import State, Stepped


class GraphSlots(Slots):
    """The slots, the noise of their next steps, and the 8-bit pixels of their last predicted x_0."""

    def __init__(
        self, count: int, image_shape: tuple[int, int, int], gpu: GraphDevice, num_labels: int, noise_steps: int
    ) -> None:
        """Each slot has the noise of `noise_steps` steps."""
        device, self._gpu = gpu.device, gpu
        super().__init__(count, image_shape, device, Transfers(device), num_labels)
        self.finite = torch.ones(1 + count, dtype=torch.bool, device=device)  # (S,) True while all values are finite
        self.noise_steps, self.version = noise_steps, 0  # the version increases when the tensors are replaced
        self.pixels = torch.zeros(1 + count, *image_shape, dtype=torch.uint8, device=device)  # (S, C, H, W)
        self.state.noise = torch.zeros(1 + count, 1 + noise_steps, *image_shape, device=device)

    @property
    def plain_state(self) -> State:
        """Returns the state for steps in which no row has known pixels or compares the classes."""
        return replace(self.state, known=None, is_known=None)

    def store(self, slots: Tensor, stepped: Stepped) -> None:
        """Writes the results of a step to the slots (B,)."""
        finite = self.finite[slots] & stepped.finite  # (B,)
        self.write(slots, x_t=stepped.x_prev, x_0=stepped.x_0)
        self.finite.index_copy_(0, slots, finite)
        self.pixels.index_copy_(0, slots, to_pixels(stepped.x_0, is_clipped=True))

    def draw(self, seed: Tensor, index: Tensor, step: Tensor, place: Tensor) -> None:
        """Draws noise (D, C, H, W) and writes it to places (D,) of the noise, counted over all slots.

        seed, index and step are (D,) int64.
        """
        assert self.state.noise is not None, "the constructor makes the noise"
        z = normal(seed, index, step, self.state.noise.shape[2:])  # type: ignore[arg-type] # (C, H, W)
        self.state.noise.flatten(0, 1).index_copy_(0, place, z)

    def start(self, slots: Tensor, guidance_scale: Tensor) -> None:
        """Writes the first state of rows that start from noise, with slots (B,) and guidance_scale (B,)."""
        state = self.state
        assert state.is_known is not None, "the constructor makes is_known"
        self.write(slots, x_t=self._first_noise(slots), guidance_scale=guidance_scale)
        state.x_0.index_fill_(0, slots, 0)
        state.is_known.index_fill_(0, slots, value=False)
        self.pixels.index_fill_(0, slots, 0)
        self.finite.index_fill_(0, slots, value=True)

    def start_from(self, slots: Tensor, image: Tensor, is_known: Tensor, factors: Tensor) -> None:
        """Changes the first state of rows that start from an image (B, C, H, W). Call it after `start`.

        is_known is (B, C, H, W). factors (B, 2) has the factors of the image and of the noise in the first x_t.
        """
        signal, noise = factors[:, :, None, None, None].unbind(dim=1)  # (B, 1, 1, 1) each
        x_t = signal * image + noise * self._first_noise(slots)  # (B, C, H, W)
        self.write(slots, x_t=x_t, known=image, is_known=is_known)

    def read(self, slots: Tensor) -> Tensor:
        """Returns the finite flag and the pixels of the slots (B,), (B, 1 + C H W) uint8."""
        return torch.cat([self.finite[slots, None], self.pixels[slots].flatten(1)], dim=1)

    def read_with_x_t(self, slots: Tensor) -> Tensor:
        """Returns `read` with the pixels of x_t appended, (B, 1 + 2 C H W) uint8."""
        return torch.cat([self.read(slots), to_pixels(self.state.x_t[slots]).flatten(1)], dim=1)

    def _first_noise(self, slots: Tensor) -> Tensor:
        """Returns the noise z (B, C, H, W) of x_T."""
        assert self.state.noise is not None, "the constructor makes the noise"
        return self.state.noise[slots, 0]

    def _grow(self) -> None:
        self._gpu.synchronize()  # the enqueued work uses the old tensors
        pixels = torch.cat([self.pixels, torch.zeros_like(self.pixels)])
        finite = torch.cat([self.finite, torch.ones_like(self.finite)])
        super()._grow()
        self.pixels, self.finite, self.version = pixels, finite, self.version + 1
