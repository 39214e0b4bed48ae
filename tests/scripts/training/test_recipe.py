from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from model.sampler import Guidance
from model.unet import UNet
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.common.data.source import MAX_CLASSES
from scripts.common.errors import ScriptError
from scripts.training.auto import WIDTHS, WIDTHS_OF_THREE_LEVELS
from scripts.training.recipe import Recipe, load_recipe, preset_names
from tests.scripts.tiny_training import COSINE, NUM_STEPS


def error_of(preset: str) -> str:
    with pytest.raises(ScriptError) as caught:
        load_recipe(preset)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_presets_include_baseline_default_and_fast() -> None:
    assert {"baseline", "default"} <= set(preset_names(of_students=False))
    assert preset_names(of_students=True) == ["fast"]
    assert sorted([*preset_names(of_students=False), "fast"]) == preset_names()


@pytest.mark.parametrize("name", preset_names())
def test_preset_networks_generate_mnist_digits_and_are_small(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.schedule.num_steps, recipe.unet.image_size, recipe.unet.num_classes) == (100, 28, 10)
    assert sum(p.numel() for p in UNet(recipe.unet).parameters()) * 4 < 12e6  # the limit in scripts.ship


def test_baseline_is_the_textbook_recipe() -> None:
    recipe = load_recipe("baseline")
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer.name) == (30, 64, "adam")
    assert (recipe.lr_schedule.name, recipe.lr_schedule.patience) == ("plateau", 5)
    assert (recipe.schedule.kind, recipe.unet.conditioning) == ("linear", "bottom")
    assert (recipe.label_drop, recipe.ema_max_decay, recipe.guidance.scale) == (0, 0, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("[schedule]\nnum_steps = 30\n[unet]\nnum_steps = 30\n", "guidance must start at a timestep of the schedule"),
        ("[unet]\nwidths = [64, 2048]\n", "MiB, the limit is 256 MiB"),
    ],
)
def test_recipe_whose_checkpoint_could_not_be_served_is_refused(tmp_path: Path, change: str, reason: str) -> None:
    (tmp_path / "own.toml").write_text(f'base = "default"\n{change}')
    assert reason in error_of(str(tmp_path / "own.toml"))


def differences(one: str, other: str) -> set[str]:
    """Returns the dotted names of the values in which two presets differ."""

    def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, part in value.items():
                yield from leaves(part, f"{place}.{key}".lstrip("."))
        else:
            yield place, value

    a, b = (dict(leaves(load_recipe(name).model_dump(mode="json"))) for name in (one, other))
    return {place for place in a.keys() | b.keys() if a.get(place) != b.get(place)}


GUIDANCE = {  # the values of the guidance, which rung 6 changes
    "guidance.scale",
    "guidance.start",
    "guidance.stop",
    *(f"guidance_by_sampler.ddpm.{field}" for field in ("scale", "start", "stop")),
}


STEM_AND_RECIPE = {  # the values that rung 5 changes
    *("batch_size", "grad_clip", "optimizer.name", "optimizer.lr", "optimizer.betas", "optimizer.weight_decay"),
    *("lr_schedule.name", "lr_schedule.warmup_steps"),
    *("unet.stem_patch", "unet.widths", "unet.num_pairs", "unet.residual", "unet.attention_heads"),
}

HIGH_NOISE = {"epochs", "optimizer.lr", "lr_schedule.warmup_steps", "min_loss_weight", "overshoot_weight"}
STUDENT = {
    *("epochs", "batch_size", "label_drop", "optimizer.lr", "optimizer.betas", "prediction.kind"),
    *(f"distillation.{field}" for field in ("num_steps", "teacher_steps", "num_images", "num_held_out")),
    *("distillation.image_weight", "distillation.recognition_weight"),
    *(f"distillation.guidance.{field}" for field in ("scale", "start", "stop")),
    *(f"adversary.{field}" for field in ("width", "lr", "gradient_weight")),
}


@pytest.mark.parametrize(
    ("below", "rung", "different"),
    [
        ("naive", "baseline", {"schedule.beta_start", "schedule.beta_end"}),
        ("baseline", "baseline-ema", {"ema_max_decay"}),
        ("baseline-ema", "baseline-conditioned", {"label_drop", "unet.conditioning"}),
        ("baseline-conditioned", "baseline-cosine", {"schedule.kind"}),
        ("baseline-cosine", "default-eps", STEM_AND_RECIPE),
        ("default-eps", "fast", STUDENT),
        ("default-eps", "default", {"prediction.kind", "min_snr_gamma", *GUIDANCE}),
        ("default-eps", "default-edm", {"prediction.kind"}),
        ("default", "default-high-noise", HIGH_NOISE),
    ],
)
def test_each_ablation_preset_changes_only_the_expected_values(below: str, rung: str, different: set[str]) -> None:
    assert differences(below, rung) == different


@pytest.mark.parametrize("preset", preset_names())
def test_presets_without_guidance_have_the_default_interval(preset: str) -> None:
    recipe = load_recipe(preset)
    off = [g for g in (recipe.guidance, *recipe.guidance_by_sampler.values()) if g.scale == 1]
    assert off in ([], [Guidance()])


@pytest.mark.parametrize("base", ['"circle"', "7", '"nonsense"'])
def test_invalid_or_cyclic_base_is_rejected(tmp_path: Path, base: str) -> None:
    path = tmp_path / "circle.toml"
    path.write_text(f"base = {base}".replace("circle", str(path)))
    assert error_of(str(path))


def test_recipe_is_loaded_from_a_toml_path(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(COSINE)
    recipe = load_recipe(str(path))
    assert recipe.unet.widths == (8, 16)
    assert recipe.guidance.scale == 1.3
    assert recipe.optimizer.betas == (0.9, 0.99)


@pytest.mark.parametrize("preset", ["nonsense", "../presets/none", "missing.toml", ""])
def test_unknown_preset_is_rejected_and_the_error_lists_the_presets(preset: str) -> None:
    assert f"unknown preset {preset!r}. Use a path to a .toml file, or one of: baseline, baseline-" in error_of(preset)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 3", "epochs = 0", "epochs: "),
        ("epochs = 3", "epoch = 3", "epoch"),
        ("epochs = 3", 'epochs = "many"', "epochs: "),
        ("epochs = 3", "epochs = 3\nmomentum = 1", "momentum: "),
        ("batch_size = 8", "batch_size = 1_000_000", "batch_size: "),
        ("label_drop = 0.2", "label_drop = 1.0", "label_drop: "),
        ("lr = 1e-2", "lr = inf", "optimizer.lr: "),
        ("lr = 1e-2", "lr = -1e-2", "optimizer.lr: "),
        ("betas = [0.9, 0.99]", "betas = [0.9, 1.0]", "optimizer.betas.1: "),
        ('name = "adamw"', 'name = "sgd"', "optimizer.name: "),
        ("scale = 1.3", "scale = nan", "guidance"),
        ("scale = 1.3", "scale = 0.5", "guidance.scale must be 1 to 10"),
        ("scale = 1.3", "scale = 1.3\nend = 9", "guidance.end: "),
        ("scale = 1.3", "scale = 1.3\nstart = 90\nstop = 20", "not above guidance.stop"),
        ("label_drop = 0.2", "label_drop = 0.0", "guidance needs label_drop"),
        ('kind = "cosine"', 'kind = "sigmoid"', "unknown schedule kind 'sigmoid'"),
        ("widths = [8, 16]", "withs = [8, 16]", "unet.withs: "),
        ("widths = [8, 16]", "widths = [8, 20]", "widths must be multiples of 8"),
        (f"[unet]\nnum_steps = {NUM_STEPS}", "[unet]\nnum_steps = 99", "num_steps must be equal"),
        ("[unet]", "[unet", "is not valid TOML"),
    ],
)
def test_invalid_recipe_is_rejected_with_the_path_and_the_field(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in COSINE
    path = tmp_path / "wrong.toml"
    path.write_text(COSINE.replace(old, new, 1))
    assert message in error_of(str(path))
    assert str(path) in error_of(str(path))


def test_recipe_that_is_not_text_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "is not valid TOML" in error_of(str(tmp_path / "binary.toml"))


def many(num_classes: int, size: int) -> DataSet:
    images = ImageSet(torch.zeros(1, 3, size, size).expand(num_classes, -1, -1, -1), torch.arange(num_classes))
    return DataSet("many", tuple(f"class {label}" for label in range(num_classes)), images, images, images)


def test_more_classes_than_the_service_can_load_are_refused_before_the_training() -> None:
    assert load_recipe("default", many(323, 32)).unet.num_classes == 323
    with pytest.raises(ScriptError, match="At most 323 classes are possible with these widths"):
        load_recipe("default", many(324, 32))


@pytest.mark.parametrize("size", [28, 64])
def test_network_is_as_wide_as_the_number_of_classes_permits(size: int) -> None:
    widths = WIDTHS_OF_THREE_LEVELS if size == 64 else WIDTHS
    for most, (first, *others) in widths.items():
        recipe = load_recipe("auto", many(most, size))
        assert recipe.unet.widths == (first, *others)
        if most < MAX_CLASSES:
            assert load_recipe("auto", many(most + 1, size)).unet.widths[0] < first
            with pytest.raises(ValidationError, match=f"At most {most} classes"):
                Recipe.model_validate(recipe.model_dump() | {"unet": asdict(recipe.unet) | {"num_classes": most + 1}})
