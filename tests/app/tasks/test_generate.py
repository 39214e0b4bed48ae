from dataclasses import replace
from typing import Any

import pytest

from app.errors import FieldError
from app.tasks.generate import GenerateFields, generate
from model.spec import QUALITIES
from tests.app.fakes import INFO

FAST = replace(INFO, name="fast", steps=(4, 1, 2), samplers=("ddim",), guidable=False)


def options_with(info: Any = INFO, **fields: Any) -> Any:
    return generate(info, GenerateFields(digit=3, seed=1, **fields)).options


@pytest.mark.parametrize("quality", QUALITIES)
def test_quality_has_the_options_of_a_request_with_its_sampler_and_steps(quality: str) -> None:
    sampler, num_steps = INFO.setting_of(quality)
    assert options_with(quality=quality) == options_with(sampler=sampler, num_steps=num_steps)
    one, other = (generate(INFO, GenerateFields(labels=[1, 2], quality=each)) for each in (quality, "best"))
    assert (one.num_steps, other.num_steps) == (num_steps, 100)


def test_best_quality_is_the_default_of_the_model() -> None:
    assert options_with(quality="best") == options_with()
    assert options_with(FAST, quality="best") == options_with(FAST, num_steps=4)


def test_guidance_can_be_chosen_together_with_the_quality() -> None:
    assert options_with(quality="draft", guidance_scale=2.5).guidance_scale == 2.5


@pytest.mark.parametrize("field", [{"sampler": "ddim"}, {"num_steps": 10}])
def test_sampler_and_steps_cannot_be_combined_with_the_quality(field: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match="cannot be combined with quality") as refused:
        options_with(quality="draft", **field)
    assert [refused.value.field] == [*field]
