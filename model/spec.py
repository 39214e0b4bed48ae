"""What the service needs to know about models before it computes with them: samplers, limits and guidance.

This module does not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Sampler = Literal["ddpm", "ddim", "dpmpp"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
Process = Sampler | Literal["forward", "noisy"]
MOST_STEPS = 100  # the limit of num_steps in a request
MAX_GUIDANCE_SCALE = 10
MAX_CLIP_GUIDANCE_SCALE = 10
# Images in one call of CLIP for guidance. Every call has this number of rows, because the number of rows changes the
# order of float32 sums. An image then gets the same gradient in every batch.
CALL_ROWS = 8
SHIPPED = Path(__file__).parent / "weights" / "default.safetensors"
SHIPPED_FAST = SHIPPED.with_name("fast.safetensors")  # distilled from SHIPPED


@dataclass(frozen=True, slots=True)
class Guidance:
    """Scale of classifier-free guidance (Ho & Salimans 2022) and the interval of timesteps in which it is applied.

    A scale of 1 turns guidance off. Outside start..stop (inclusive) only the conditional prediction is used
    (Kynkäänniemi 2024): at low noise levels guidance has no benefit, at high ones it reduces diversity. Raises
    ValueError for invalid values.
    """

    scale: float = 1.0
    start: int = 1
    stop: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= MAX_GUIDANCE_SCALE:
            raise ValueError(f"guidance.scale must be 1 to {MAX_GUIDANCE_SCALE}, got {self.scale}")
        if not 1 <= self.start <= self.stop:
            raise ValueError(
                f"guidance.start must be at least 1 and not above guidance.stop, got {self.start} and {self.stop}"
            )

    def acts_at(self, t: int) -> bool:
        """Returns True if a step at timestep t needs a second, unconditional evaluation of the network."""
        return self.scale != 1.0 and self.start <= t <= self.stop

    def steps_within(self, timesteps: Sequence[int]) -> frozenset[int]:
        """Returns the indices of the timesteps within start..stop."""
        return frozenset(k for k, t in enumerate(timesteps) if self.start <= t <= self.stop)
