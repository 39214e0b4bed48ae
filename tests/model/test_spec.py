import pytest

from model.spec import Guidance


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
