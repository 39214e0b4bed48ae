"""Training recipes: reads them from TOML files and validates them before training starts.

A recipe with `base = "NAME"` inherits from the preset NAME and contains only the values that differ from it.
"""

import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from model.checkpoint import CheckpointConfig, Probe, check_network
from model.prediction import PredictionConfig
from model.schedule import ScheduleConfig
from model.spec import SAMPLERS, Guidance, Sampler
from model.unet import UNetConfig
from scripts.common.data.data_set import DataSet
from scripts.common.errors import ScriptError
from scripts.training.auto import AUTO, choices_for

PRESETS = Path(__file__).parent / "presets"
MAX_BASES = 10
PROBE_STEPS = 10  # of the image by which the service checks its computation at the start
STUDENT_SAMPLER: Sampler = "ddim"  # its first order is enough for a few steps
TEACHER_SAMPLER: Sampler = "dpmpp"  # deterministic, and accurate in few steps


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerRecipe(_Strict):
    name: Literal["adam", "adamw"]
    lr: float = Field(gt=0)
    betas: tuple[Share, Share]
    weight_decay: float = Field(ge=0)


class LRScheduleRecipe(_Strict):
    """Schedule of the learning rate.

    `cosine` changes it at every step: linear warm-up over `warmup_steps`, then half a cosine down to zero. `plateau`
    multiplies it by `factor` when the validation loss has not improved for more than `patience` epochs.
    """

    name: Literal["cosine", "plateau"]
    warmup_steps: int = Field(default=0, ge=0)
    patience: int = Field(default=5, ge=0)
    factor: float = Field(default=0.1, gt=0, lt=1)


class DistillationRecipe(_Strict):
    """Distillation of a teacher into a student that permits each of `num_steps`."""

    num_steps: tuple[Annotated[int, Field(ge=1, le=100)], ...] = Field(min_length=1)  # the first one is recommended
    teacher_steps: int = Field(ge=1, le=100)
    guidance: Guidance  # guidance of the teacher's images; the student itself needs none
    num_images: int = Field(ge=1)  # number of images for training
    num_held_out: int = Field(ge=1)  # number of images for validation
    image_weight: float = Field(ge=0)  # of the squared error from the image of the teacher
    recognition_weight: float = Field(ge=0)  # of the cross entropy of a classifier; needs MNIST

    @field_validator("num_steps")
    @classmethod
    def _check_distinct(cls, num_steps: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(num_steps)) < len(num_steps):
            raise ValueError("each number of steps must occur once")
        return num_steps


class AdversaryRecipe(_Strict):
    """The discriminator of a distillation, whose loss has weight 1."""

    width: int = Field(ge=1, le=1024)  # channels of its first level
    lr: float = Field(gt=0)
    gradient_weight: float = Field(ge=0)  # of the penalty for scores that noise changes


class Recipe(_Strict):
    """All settings of a training run except the seed, the device and the training data."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, le=10_000)
    precision: Literal["float32", "bfloat16"]
    label_drop: Share
    grad_clip: float = Field(ge=0)
    ema_max_decay: Share
    optimizer: OptimizerRecipe
    lr_schedule: LRScheduleRecipe
    flip: bool = False  # mirror each training image with probability 0.5; wrong for digits and letters
    min_snr_gamma: float = Field(default=0.0, ge=0)  # loss weight min(SNR, gamma) (Hang 2023); 0 = off
    min_loss_weight: float = Field(default=0.0, ge=0)  # no weight is smaller, so that the network also learns near T
    overshoot_weight: float = Field(default=1.0, gt=0, le=1)  # weight of errors beyond black and white in such pixels
    guidance: Guidance
    guidance_by_sampler: dict[Sampler, Guidance] = {}  # replaces `guidance` for these samplers
    schedule: ScheduleConfig
    prediction: PredictionConfig = PredictionConfig()
    distillation: DistillationRecipe | None = None
    adversary: AdversaryRecipe | None = None  # of a distillation
    unet: UNetConfig

    def checkpoint_config(self, class_names: tuple[str, ...], training: dict[str, Any]) -> CheckpointConfig:
        """Returns the configuration of a checkpoint of this recipe. `training` is for its metadata."""
        student = self.distillation
        return CheckpointConfig(
            unet=self.unet,
            class_names=class_names,
            schedule=self.schedule,
            prediction=self.prediction,
            guidance=self.guidance,
            guidance_by_sampler=self.guidance_by_sampler,
            samplers=(STUDENT_SAMPLER,) if student else SAMPLERS,
            steps=student.num_steps if student else (),
            probe=Probe(
                digit=min(Probe().digit, len(class_names) - 1),
                num_steps=student.num_steps[0] if student else min(PROBE_STEPS, self.schedule.num_steps),
            ),
            training=training,
        )

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.unet.num_steps != self.schedule.num_steps:
            raise ValueError("unet.num_steps and schedule.num_steps must be equal")
        check_network(self.unet)
        if (self.distillation is None) != (self.adversary is None):
            raise ValueError("the tables [distillation] and [adversary] need each other")
        if self.distillation:
            self._check_distillation(self.distillation)
        if not self.label_drop and any(g.scale != 1 for g in (self.guidance, *self.guidance_by_sampler.values())):
            raise ValueError("guidance needs label_drop above 0. Set label_drop, or set the guidance scale to 1")
        names = tuple(map(str, range(self.unet.num_classes)))
        self.checkpoint_config(names, {"label_drop": self.label_drop})  # raises ValueError if it is not valid
        return self

    def _check_distillation(self, distillation: DistillationRecipe) -> None:
        if self.prediction.kind == "eps":
            # At t = T, x_t is pure noise, so the predicted eps says nothing about the image.
            raise ValueError("distillation does not support prediction.kind eps. Use v or edm")
        if self.label_drop or self.guidance.scale != 1 or self.min_snr_gamma:
            raise ValueError("distillation needs label_drop = 0, guidance.scale = 1 and min_snr_gamma = 0")
        if self.min_loss_weight or self.overshoot_weight != 1:
            raise ValueError("distillation needs min_loss_weight = 0 and overshoot_weight = 1")
        if max(*distillation.num_steps, distillation.teacher_steps) > self.schedule.num_steps:
            raise ValueError(
                "distillation.num_steps and distillation.teacher_steps must be at most schedule.num_steps, "
                f"{self.schedule.num_steps}"
            )
        if distillation.num_images < self.batch_size:
            raise ValueError(
                f"distillation.num_images is {distillation.num_images}. It must be at least batch_size, "
                f"{self.batch_size}"
            )


def preset_names(*, of_students: bool | None = None) -> list[str]:
    """Returns the sorted names of the presets.

    `of_students` True selects the presets for distillation, False the others, None all.
    """
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    return [name for name in names if of_students in (None, is_for_distillation(name))]


def is_for_distillation(preset: str) -> bool:
    """Returns True if a preset has a table `distillation`. Raises ScriptError.

    The other values are not checked, because some are valid only for images of the size of the data.
    """
    return preset != AUTO and "distillation" in _read(preset, depth=0)


def load_recipe(
    preset: str, data: DataSet | None = None, epochs: int | None = None, teacher: CheckpointConfig | None = None
) -> Recipe:
    """Returns the recipe of a preset, or of a file if `preset` ends in .toml. AUTO chooses it for the data.

    The size, the colours and the number of classes are those of the data if it is given. The network, the schedule and
    the prediction are those of `teacher` if it is given. `epochs` replaces the number of epochs. Raises ScriptError if
    the recipe is invalid, or does not fit the data.
    """
    if preset == AUTO and data:
        values = _merge(_read("default", depth=0), choices_for(data, epochs))
    else:
        values = {**_read(preset, depth=0), **({"epochs": epochs} if epochs else {})}
    if data:
        channels, size, _ = data.image_shape
        fields = {"image_channels": channels, "image_size": size, "num_classes": len(data.class_names)}
        own = values.get("unet", {})
        for name, value in fields.items():
            if own.get(name, value) != value:
                wrong = f"unet.{name} is {own[name]}, but the data has {value}"
                raise ScriptError(f"{_path(preset)}: {wrong}. Remove unet.{name} from the recipe")
        values = {**values, "unet": {**own, **fields}}
    if teacher:
        values = {**values, **{part: asdict(getattr(teacher, part)) for part in ("unet", "schedule", "prediction")}}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ScriptError(f"{_path(preset)}: {where or 'recipe'}: {reason}") from error


def _path(preset: str) -> Path:
    return Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"


def _read(preset: str, depth: int) -> dict[str, Any]:
    """Returns the values of a recipe, merged over those of its base."""
    path = _path(preset)
    try:
        own = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ScriptError(
            f"unknown preset {preset!r}. Use a path to a .toml file, or one of: {', '.join(preset_names())}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScriptError(f"{path} is not valid TOML: {error}") from error
    base = own.pop("base", None)
    if base is None:
        return own
    if not isinstance(base, str) or depth == MAX_BASES:
        raise ScriptError(f"{path}: base: must be the name of a preset, and bases must not form a cycle")
    return _merge(_read(base, depth + 1), own)


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Merges nested tables. A value in `own` replaces the value of the same key in `base`."""
    merged = dict(base)
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = _merge(base[name], value) if both else value
    return merged
