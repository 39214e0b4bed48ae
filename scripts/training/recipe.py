"""A training recipe, read from a TOML file and checked before anything starts.

A recipe may say `base = "another"`, a preset's name: then it states only what is different.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.prediction import PredictionConfig
from model.sampler import Guidance, Sampler
from model.schedule import ScheduleConfig
from model.unet import UNetConfig
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES

PRESETS = Path(__file__).parent / "presets"
MAX_BASES = 10
STUDENT_SAMPLER: Sampler = "ddim"  # a stride of it is one line: the image that leads to a state is known
TEACHER_SAMPLER: Sampler = "dpmpp"  # good in few steps, and deterministic


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerRecipe(_Strict):
    """Adam or AdamW and its constants."""

    name: Literal["adam", "adamw"]
    lr: float = Field(gt=0)
    betas: tuple[Share, Share]
    weight_decay: float = Field(ge=0)


class LRScheduleRecipe(_Strict):
    """cosine: warm-up, then half a cosine to zero, by step. plateau: lowered by `factor` after `patience` epochs."""

    name: Literal["cosine", "plateau"]
    warmup_steps: int = Field(default=0, ge=0)
    patience: int = Field(default=5, ge=0)
    factor: float = Field(default=0.1, gt=0, lt=1)


class DistillationRecipe(_Strict):
    """A student that goes in `num_steps` steps where its teacher goes in more."""

    num_steps: int = Field(ge=1, le=100)
    teacher_steps: int = Field(ge=1, le=100)  # or about so many: the student's lie among them
    guidance: Guidance  # of the paths: the student has it inside
    num_paths: int = Field(ge=1)  # of the teacher, to learn from
    num_held_out: int = Field(ge=1)  # and to validate on


class Recipe(_Strict):
    """All that decides a training run but its seed and its machine."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1, le=10_000)
    precision: Literal["float32", "bfloat16"]
    label_drop: Share
    grad_clip: float = Field(ge=0)
    ema_max_decay: Share
    optimizer: OptimizerRecipe
    lr_schedule: LRScheduleRecipe
    min_snr_gamma: float = Field(default=0.0, ge=0)  # weights the loss; 0 = not
    guidance: Guidance
    guidance_by_sampler: dict[Sampler, Guidance] = {}  # of those that want another
    schedule: ScheduleConfig
    prediction: PredictionConfig = PredictionConfig()
    distillation: DistillationRecipe | None = None
    unet: UNetConfig

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.unet.num_steps != self.schedule.num_steps:
            raise ValueError("unet.num_steps and schedule.num_steps must be equal")
        if self.distillation:
            self._distillation_fits(self.distillation)
        if not self.label_drop and any(g.scale != 1 for g in (self.guidance, *self.guidance_by_sampler.values())):
            raise ValueError("guidance needs label_drop above 0")
        if self.unet.num_classes != NUM_CLASSES:
            raise ValueError(f"unet.num_classes must be {NUM_CLASSES}: that is what is trained on")
        return self

    def _distillation_fits(self, distillation: DistillationRecipe) -> None:
        if self.prediction.kind == "eps":
            raise ValueError("a student cannot predict eps: at t = T that tells nothing of the image")
        if self.label_drop or self.guidance.scale != 1 or self.min_snr_gamma:
            raise ValueError("a student drops no label, is not guided and weights no loss: set these to 0, 1 and 0")
        if max(distillation.num_steps, distillation.teacher_steps) > self.schedule.num_steps:
            raise ValueError("distillation has more steps than the schedule")
        if distillation.num_paths < self.batch_size:
            raise ValueError("distillation.num_paths must fill a batch")


def preset_names(*, of_students: bool | None = None) -> list[str]:
    """The recipes that the repository brings: all, or those that train a student, or those that do not."""
    names = sorted(path.stem for path in PRESETS.glob("*.toml"))
    return [name for name in names if of_students in (None, load_recipe(name).distillation is not None)]


def load_recipe(preset: str) -> Recipe:
    """Returns the recipe of this name, or of this path if it ends in .toml; ScriptError, with one sentence."""
    try:
        return Recipe.model_validate(_read(preset, depth=0))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ScriptError(f"{_path(preset)}: {where or 'recipe'}: {reason}") from error


def _path(preset: str) -> Path:
    return Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"


def _read(preset: str, depth: int) -> dict[str, Any]:
    """The tables of a recipe over those of its base."""
    path = _path(preset)
    try:
        own = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ScriptError(f"no preset {preset!r}: {', '.join(preset_names())}, or a path to a .toml file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScriptError(f"{path} is not TOML: {error}") from error
    base = own.pop("base", None)
    if base is None:
        return own
    if not isinstance(base, str) or depth == MAX_BASES:
        raise ScriptError(f"{path}: base: must name a recipe, and bases must come to an end")
    return _over(_read(base, depth + 1), own)


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Table by table: what is named in `own` replaces what `base` says."""
    merged = dict(base)
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = _over(base[name], value) if both else value
    return merged
