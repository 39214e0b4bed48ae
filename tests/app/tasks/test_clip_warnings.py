import numpy as np
import pytest

from app.engine.clip_worker import Scores
from app.engine.job import Timings
from app.tasks.clip_warnings import prompt_warning, score_warning

TYPICAL = 0.26


def scores(*similarities: list[float]) -> Scores:
    return Scores(np.array(similarities, np.float32), np.zeros((2, 10), np.float32), 100, TYPICAL, Timings())


@pytest.mark.parametrize("similarities", [None, (0.25, TYPICAL), (0.066, TYPICAL), (0.9, TYPICAL)], ids=str)
def test_prompt_of_known_words_that_describes_the_digit_gets_no_warning(
    similarities: tuple[float, float] | None,
) -> None:
    assert prompt_warning([], 7, similarities) is None


@pytest.mark.parametrize("best", [0.064, 0.0, -0.3])
def test_prompt_below_a_quarter_of_the_typical_similarity_gets_a_warning_with_both_values(best: float) -> None:
    warning = prompt_warning([], 7, (best, TYPICAL))
    assert warning is not None
    assert "does not describe the digit 7" in warning
    assert f"at most {best:.2f}. The mean for real digits and their own prompts is 0.26" in warning


def test_unknown_words_are_named_up_to_five() -> None:
    named = "The CLIP model has not learned these words: "
    assert prompt_warning(["cat"], 7, None) == named + "cat"
    assert prompt_warning(["cat"], 7, (0.25, TYPICAL)) == named + "cat"
    assert prompt_warning(list("abcdefg"), 7, None) == named + "a, b, c, d, e and 2 more"
    both = prompt_warning(["cat"], 7, (-0.3, TYPICAL))
    assert both and both.startswith(named + "cat. The prompt does not describe the digit 7")


def test_pictures_that_one_of_the_prompts_describes_get_no_warning() -> None:
    assert score_warning(scores([0.25, -0.3], [-0.3, 0.066]), []) is None


def test_pictures_that_no_prompt_describes_are_named_by_position() -> None:
    warning = score_warning(scores([0.064, -0.3], [0.25, -0.3], [-0.3, -0.2]), ["cat"])
    assert warning is not None
    assert warning.startswith("The CLIP model has not learned these words: cat. None of the prompts describes these ")
    assert "(by position, from 0): 0, 2. Their highest similarity is below 0.07." in warning
