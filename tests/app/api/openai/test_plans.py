from dataclasses import replace
from typing import Any

import pytest

from app.api.openai.plans import plan_edit, plan_generation, scale_of
from app.api.openai.schemas import ImageEditRequest, ImageGenerationRequest
from app.engine.interface import ModelInfo
from app.errors import InvalidRequest
from app.tasks.from_image import has_picture_tasks
from model.schedule import Schedule, ScheduleConfig
from tests.app.fakes import INFO

FAST = replace(INFO, name="fast", steps=(4,), samplers=("ddim",), guidable=False)
BOTH = {"default": INFO, "fast": FAST}
MEDIUM = {"num_steps": 10, "sampler": "dpmpp"}
Models = dict[str, ModelInfo]


def generation(models: Models = BOTH, **fields: Any) -> tuple[str, str, dict[str, Any]]:
    """Returns the model, the quality and the further fields of a request."""
    body = ImageGenerationRequest.model_validate({"prompt": "7", **fields})
    plan = plan_generation(body, models, 64)
    return plan.info.name, plan.quality, dict(plan.fields)


def edit(models: Models = BOTH, **fields: Any) -> tuple[str, str, dict[str, Any]]:
    body = ImageEditRequest.model_validate({"prompt": "7", "image": "", **fields})
    plan = plan_edit(body, models, 64, has_picture_tasks)
    return plan.info.name, plan.quality, dict(plan.fields)


@pytest.mark.parametrize("name", [{}, {"model": "default"}, {"model": "gpt-image-2"}, {"model": "dall-e-3"}], ids=str)
@pytest.mark.parametrize("quality", ["low", "medium", "high", "auto", "standard", "hd", "xhigh", "max", None])
def test_quality_selects_the_model_and_the_steps_of_a_generation(name: dict[str, Any], quality: str | None) -> None:
    expected: tuple[str, str, dict[str, Any]] = ("default", "high", {})
    if quality == "low":
        expected = "fast", "low", {}
    if quality == "medium":
        expected = "default", "medium", MEDIUM
    assert generation(quality=quality, **name) == expected


@pytest.mark.parametrize("quality", ["low", "medium", "high", "auto"])
def test_model_fast_uses_its_defaults_for_every_quality(quality: str) -> None:
    assert generation(quality=quality, model="fast") == ("fast", "low", {})


def test_low_quality_without_the_model_fast_is_a_draft() -> None:
    draft = {"num_steps": 6, "sampler": "dpmpp"}
    assert generation({"default": INFO}, quality="low") == ("default", "low", draft)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"samplers": ("ddpm",)}, {"num_steps": 10, "sampler": "ddpm"}),
        ({"schedule": Schedule(ScheduleConfig(num_steps=9))}, {"num_steps": 9, "sampler": "dpmpp"}),
        ({"steps": (20, 5, 10)}, {"num_steps": 10, "sampler": "ddpm"}),
    ],
    ids=["another sampler", "fewer timesteps", "other steps"],
)
def test_medium_quality_has_a_setting_that_the_model_permits(changed: dict[str, Any], expected: dict[str, Any]) -> None:
    models: Models = {"default": replace(INFO, **changed)}
    assert generation(models, quality="medium") == ("default", "medium", expected)


@pytest.mark.parametrize("quality", ["low", "medium", "high", "auto", "standard", None])
def test_quality_selects_the_steps_of_an_edit_but_not_with_a_mask(quality: str | None) -> None:
    is_medium = quality in ("low", "medium")
    assert edit(quality=quality) == ("default", "medium" if is_medium else "high", MEDIUM if is_medium else {})
    assert edit(quality=quality, mask="") == ("default", "high", {})


def test_seed_is_passed_on_only_if_the_request_has_one() -> None:
    assert generation(seed=5) == ("default", "high", {"seed": 5})
    assert generation(seed=5.0, quality="medium") == ("default", "medium", {"seed": 5, **MEDIUM})
    assert edit(seed=None) == ("default", "high", {})


@pytest.mark.parametrize("name", ["gpt-4o", "slow", "", "dall-e", "GPT-image-1"])
def test_other_models_are_refused(name: str) -> None:
    for plan in (generation, edit):
        assert_refused("model", "'default' or 'fast'", plan, model=name)


def test_edit_with_a_model_without_picture_tasks_is_refused() -> None:
    assert_refused("model", "The model 'fast' does not support edits. Use 'default'", edit, model="fast")
    few_steps: Models = {"default": replace(INFO, steps=(4,))}
    assert_refused("model", "The model 'default' does not support edits", edit, few_steps)


def test_digit_that_the_model_cannot_generate_is_refused() -> None:
    models: Models = {"default": replace(INFO, class_names=tuple("01234"))}
    assert_refused("prompt", "only the digits 0 to 4", generation, models)


def test_more_images_than_the_service_permits_are_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        plan_generation(ImageGenerationRequest.model_validate({"prompt": "7", "n": 5}), BOTH, 4)
    assert refused.value.errors == [{"loc": ["body", "n"], "msg": "Input should be less than or equal to 4"}]


def assert_refused(field: str, reason: str, plan: Any, *arguments: Any, **fields: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        plan(*arguments, **fields)
    assert refused.value.errors[0]["loc"] == ["body", field]
    assert reason in refused.value.errors[0]["msg"]


@pytest.mark.parametrize("side", [28, 32])
def test_every_multiple_up_to_16_is_permitted(side: int) -> None:
    assert [scale_of(f"{side * scale}x{side * scale}", side) for scale in range(1, 17)] == list(range(1, 17))


@pytest.mark.parametrize(("side", "scale"), [(28, 10), (32, 8), (64, 4), (256, 1), (300, 1)])
def test_auto_is_the_largest_multiple_up_to_280_pixels(side: int, scale: int) -> None:
    assert scale_of("auto", side) == scale


def test_large_images_are_enlarged_to_at_most_512_pixels() -> None:
    assert scale_of("512x512", 64) == 8
    with pytest.raises(InvalidRequest, match=r"64 pixels up to 512\. The nearest permitted size is 512x512"):
        scale_of("576x576", 64)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ("512x512", "448x448"),
        ("1024x1024", "448x448"),
        ("1024x1536", "448x448"),
        ("300x300", "280x280 or 308x308"),
        ("280x300", "280x280 or 308x308"),
        ("476x476", "448x448"),
        ("1x1", "28x28"),
        ("27x27", "28x28"),
        ("29x29", "28x28 or 56x56"),
        ("28x84", "56x56"),
        ("999999999x1", "448x448"),
    ],
)
def test_another_size_is_refused_with_the_nearest_permitted_sizes(size: str, nearest: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        scale_of(size, 28)
    assert refused.value.errors[0]["loc"] == ["body", "size"]
    assert refused.value.errors[0]["msg"].endswith(f"The nearest permitted size is {nearest}")


@pytest.mark.parametrize(
    "size",
    ["", "280", "280X280", "280x280 ", "0x0", "-28x28", "28.0x28.0", "028x028", "\u0662x\u0662", "9" * 5000 + "x1"],
)
def test_text_that_is_not_a_size_is_refused_with_the_permitted_sizes(size: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        scale_of(size, 28)
    expected = "Input should be 'auto' or a size from 28x28 to 448x448 in steps of 28 pixels"
    assert refused.value.errors[0]["msg"] == expected
