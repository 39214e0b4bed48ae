"""A training recipe, read from a TOML file and checked before anything starts."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.sampler import Guidance
from model.schedule import ScheduleConfig
from model.unet import UNetConfig

PRESETS = Path(__file__).parent / "presets"


class RecipeError(Exception):
    """The recipe cannot be used; one sentence."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerRecipe(_Strict):
    """Adam or AdamW and its constants."""

    name: Literal["adam", "adamw"]
    lr: float = Field(gt=0)
    betas: tuple[float, float]
    weight_decay: float = Field(ge=0)


class LRScheduleRecipe(_Strict):
    """cosine: warm-up, then half a cosine to zero, by step. plateau: lowered by `factor` after `patience` epochs."""

    name: Literal["cosine", "plateau"]
    warmup_steps: int = Field(default=0, ge=0)
    patience: int = Field(default=5, ge=0)
    factor: float = Field(default=0.1, gt=0, lt=1)


class Recipe(_Strict):
    """All that decides a training run but its seed and its machine."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    precision: Literal["float32", "bfloat16"]
    label_drop: float = Field(ge=0, lt=1)
    grad_clip: float = Field(ge=0)
    ema_max_decay: float = Field(ge=0, lt=1)
    optimizer: OptimizerRecipe
    lr_schedule: LRScheduleRecipe
    guidance: Guidance
    schedule: ScheduleConfig
    unet: UNetConfig


def preset_names() -> list[str]:
    """The recipes that the repository brings."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_recipe(preset: str) -> Recipe:
    """The recipe of that name, or of that path when it ends in .toml; RecipeError in one sentence."""
    path = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise RecipeError(f"no preset {preset!r}: {', '.join(preset_names())}, or a path to a .toml file") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path}: {where}: {first['msg']}") from error
