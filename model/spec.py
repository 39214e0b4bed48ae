"""The facts about models that need no torch: the samplers, the limits, and `ModelSpec`.

This module does not import torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from model.prompts import default_prompt
from model.schedule import Schedule

Sampler = Literal["ddpm", "ddim", "dpmpp", "euler"]
SAMPLERS: tuple[Sampler, ...] = ("ddpm", "ddim", "dpmpp")  # of checkpoints
PIPELINE_SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)  # of pipelines of diffusers (see model/pipelines)
# How noise is drawn: as in model/noise.py, or by torch.Generator("cpu").manual_seed(seed + index), for pipelines only.
Noise = Literal["unfog", "torch"]
Quality = Literal["draft", "balanced", "best"]  # from the fewest to the most evaluations of the network
QUALITIES: tuple[Quality, ...] = get_args(Quality)
# The numbers of steps of the lower qualities, with the sampler that needs the fewest. They were chosen with digits
# (docs/ablations.md).
FEW_STEPS: Mapping[Quality, int] = {"draft": 6, "balanced": 10}
FEW_STEPS_SAMPLER: Sampler = "dpmpp"
Process = Sampler | Literal["forward", "noisy"]
Fit = Literal["auto", "resize", "digit"]  # how a picture becomes an image (see `normalise` in digit_image.py)
Invert = bool | Literal["auto"]  # True: the picture has dark strokes on a light background
MOST_STEPS = 1000  # the limit of num_steps in a request
MOST_DEFAULT_STEPS = 100  # the limit of a default of num_steps
MAX_GUIDANCE_SCALE = 10
MAX_CLIP_GUIDANCE_SCALE = 10
MAX_NAME_LENGTH = 100  # characters of the name of a class
MNIST_SHAPE = (1, 28, 28)  # (C, H, W)
DIGITS = tuple("0123456789")
# Images in one call of CLIP for guidance. Every call has this number of rows, because the number of rows changes the
# order of float32 sums. An image then gets the same gradient in every batch.
CALL_ROWS = 8
SHIPPED = Path(__file__).parent / "weights" / "default.safetensors"
SHIPPED_FAST = SHIPPED.with_name("fast.safetensors")  # distilled from SHIPPED
SHIPPED_LETTERS = SHIPPED.with_name("letters.safetensors")  # capital letters in many fonts
SHIPPED_CIFAR10 = SHIPPED.with_name("cifar10.safetensors")  # photographs of ten things, in colour
SHIPPED_MODELS = {path.stem: path for path in (SHIPPED, SHIPPED_FAST, SHIPPED_LETTERS, SHIPPED_CIFAR10)}  # by name
EMBEDDED = SHIPPED.with_name("clip")  # the CLIP model, in open_clip's format


def looks_like_mnist(image_shape: tuple[int, int, int], class_names: tuple[str, ...]) -> bool:
    """Returns True for grey images of 28 x 28 pixels whose classes are the first digits."""
    return image_shape == MNIST_SHAPE and class_names == DIGITS[: len(class_names)]


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


class Setting(NamedTuple):
    """A sampler and its number of steps."""

    sampler: Sampler
    num_steps: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One measurement of the quality of generated images. It is stored in the checkpoint."""

    sampler: Sampler
    num_steps: int
    guidance_scale: float
    num_images: int
    accuracy: float  # share of the images that a classifier recognises as the requested class
    frechet: float  # Fréchet distance to the test images


@dataclass(frozen=True, slots=True)
class TrainingFacts:
    """Facts about the training of a model. Facts that the checkpoint lacks are None."""

    preset: str | None = None
    data: str | None = None
    epochs: int | None = None
    evaluations: tuple[Evaluation, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The description of a model: what its checkpoint says about the requests that it can answer.

    `CheckpointConfig.spec` builds it. The label y of a class is its place in `class_names`, from 0.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # (C, H, W)
    schedule: Schedule
    steps: tuple[int, ...]  # the permitted values of num_steps; an empty tuple permits 1 to T
    samplers: tuple[Sampler, ...]  # the permitted samplers; the first one is recommended
    guidance: Mapping[Sampler, Guidance]  # the recommended guidance of each permitted sampler
    guidable: bool  # True if guidance is possible: the network was trained with dropped labels
    training: TrainingFacts
    # True if drawings are normalised as in MNIST: light strokes on black, centred by mass (see digit_image.py)
    normalises_drawings: bool
    is_pipeline: bool = False  # True for a pipeline of diffusers
    # False if a sampler has no plan for a num_steps from 1 to T, which is possible for pipelines of diffusers
    has_plan: Callable[[Sampler, int], bool] = field(default=lambda sampler, num_steps: True, compare=False)

    @property
    def num_classes(self) -> int:
        """The number of classes. Their labels are 0 to num_classes - 1."""
        return len(self.class_names)

    @property
    def has_digits(self) -> bool:
        """True if the classes are digits: the name of each class is its number."""
        return self.class_names == DIGITS[: self.num_classes]

    def name_of(self, label: int | None) -> str | None:
        """Returns the name of a class, or None if no class is assumed."""
        return None if label is None else self.class_names[label]

    def digit_of(self, label: int | None) -> int | None:
        """Returns the label of a class that is a digit, otherwise None."""
        return label if self.has_digits else None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The default prompt of each class, for CLIP guidance."""
        return tuple(map(default_prompt, self.class_names))

    @property
    def max_steps(self) -> int:
        """T, the largest possible num_steps."""
        return self.schedule.num_steps

    def nearest_steps(self, sampler: Sampler, num_steps: int) -> int:
        """Returns the largest possible num_steps of a sampler that is not above this number."""
        return next(count for count in range(min(num_steps, self.max_steps), 0, -1) if self.has_plan(sampler, count))

    @property
    def default_steps(self) -> int:
        """The recommended num_steps."""
        return self.steps[0] if self.steps else self.nearest_steps(self.samplers[0], MOST_DEFAULT_STEPS)

    def setting_of(self, quality: Quality) -> Setting:
        """Returns the sampler and the number of steps of a quality.

        `best` is the recommendation of the model. If the model permits only certain numbers of steps, `draft` is the
        smallest one, and `balanced` is in the middle between it and the recommended one.
        """
        if quality == "best":
            return Setting(self.samplers[0], self.default_steps)
        if self.steps:
            numbers = sorted(number for number in self.steps if number <= self.default_steps)
            return Setting(self.samplers[0], numbers[len(numbers) // 2 if quality == "balanced" else 0])
        sampler = FEW_STEPS_SAMPLER if FEW_STEPS_SAMPLER in self.samplers else self.samplers[0]
        return Setting(sampler, self.nearest_steps(sampler, min(FEW_STEPS[quality], self.default_steps)))

    @property
    def guidance_scale(self) -> dict[Sampler, float]:
        """The recommended guidance scale of each permitted sampler."""
        return {sampler: guidance.scale for sampler, guidance in self.guidance.items()}

    @property
    def guidance_interval(self) -> dict[Sampler, tuple[int, int]]:
        """The first and the last timestep in which guidance acts, for each permitted sampler. The last is at most T."""
        return {sampler: (each.start, min(each.stop, self.max_steps)) for sampler, each in self.guidance.items()}
