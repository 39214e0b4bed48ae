from dataclasses import replace
from typing import Any

import pytest

from model.schedule import Schedule, ScheduleConfig
from model.spec import QUALITIES, Guidance, ModelSpec, TrainingFacts

SPEC = ModelSpec(
    class_names=("7", "truck"),
    normalises_drawings=False,
    image_shape=(3, 32, 32),
    schedule=Schedule(ScheduleConfig(num_steps=50)),
    steps=(),
    samplers=("ddim", "ddpm"),
    guidance={"ddim": Guidance(2.0, 10, 100), "ddpm": Guidance(1.5, 20, 40)},
    guidable=True,
    training=TrainingFacts(),
)


def test_classes_have_labels_and_default_prompts() -> None:
    assert SPEC.num_classes == 2
    assert SPEC.prompts == ("a handwritten digit seven", "a photo of a truck")


@pytest.mark.parametrize(
    ("changed", "default_steps"),
    [
        ({}, 50),
        ({"schedule": Schedule(ScheduleConfig(num_steps=400))}, 100),
        ({"steps": (4, 2)}, 4),
    ],
    ids=["all timesteps", "at most 100", "the first one permitted"],
)
def test_default_steps_are_permitted(changed: dict[str, Any], default_steps: int) -> None:
    assert replace(SPEC, **changed).default_steps == default_steps


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"samplers": ("ddpm", "dpmpp")}, [("dpmpp", 6), ("dpmpp", 10), ("ddpm", 50)]),
        ({"samplers": ("ddim",)}, [("ddim", 6), ("ddim", 10), ("ddim", 50)]),
        ({"samplers": ("ddim",), "steps": (4,)}, [("ddim", 4)] * 3),
        ({"samplers": ("ddim",), "steps": (4, 1, 2)}, [("ddim", 1), ("ddim", 2), ("ddim", 4)]),
        ({"samplers": ("ddim",), "steps": (4, 2)}, [("ddim", 2), ("ddim", 4), ("ddim", 4)]),
        ({"samplers": ("ddim",), "steps": (10, 20, 5)}, [("ddim", 5), ("ddim", 10), ("ddim", 10)]),
        (
            {"samplers": ("dpmpp",), "schedule": Schedule(ScheduleConfig(num_steps=8))},
            [("dpmpp", 6), ("dpmpp", 8), ("dpmpp", 8)],
        ),
    ],
    ids=[
        "few steps",
        "another sampler",
        "one number of steps",
        "three numbers of steps",
        "two numbers of steps",
        "more than recommended",
        "a short schedule",
    ],
)
def test_qualities_are_permitted_and_do_not_fall(changed: dict[str, Any], expected: list[tuple[str, int]]) -> None:
    spec = replace(SPEC, **changed)
    settings = [spec.setting_of(quality) for quality in QUALITIES]
    assert settings == expected
    assert [steps for _, steps in settings] == sorted(steps for _, steps in settings)
    assert all(sampler in spec.samplers and (not spec.steps or steps in spec.steps) for sampler, steps in settings)


def test_guidance_interval_ends_at_the_last_timestep_of_the_schedule() -> None:
    assert SPEC.guidance_scale == {"ddim": 2.0, "ddpm": 1.5}
    assert SPEC.guidance_interval == {"ddim": (10, 50), "ddpm": (20, 40)}


def test_specs_with_equal_schedules_are_equal() -> None:
    assert replace(SPEC, schedule=Schedule(ScheduleConfig(num_steps=50))) == SPEC
    assert replace(SPEC, schedule=Schedule(ScheduleConfig("linear", 50))) != SPEC


@pytest.mark.parametrize(
    ("start", "stop", "steps"),
    [(1, 100, [0, 1, 2, 3, 4]), (40, 80, [1, 2, 3]), (41, 59, []), (100, 100, [0]), (1, 20, [4])],
)
def test_steps_within_returns_the_steps_in_the_interval(start: int, stop: int, steps: list[int]) -> None:
    assert sorted(Guidance(2.0, start, stop).steps_within([100, 80, 60, 40, 20])) == steps


@pytest.mark.parametrize("wrong", [(0.5, 1, 100), (11.0, 1, 100), (2.0, 0, 100), (2.0, 50, 49)])
def test_invalid_guidance_is_rejected(wrong: tuple[float, int, int]) -> None:
    with pytest.raises(ValueError, match=r"guidance\.(scale|start)"):
        Guidance(*wrong)
