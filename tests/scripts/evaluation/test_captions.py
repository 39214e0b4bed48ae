import math

import pytest
import torch
from torch import Tensor

from model.diffusion import Diffusion
from model.prompts import digit_prompt
from model.schedule import Schedule, ScheduleConfig
from scripts.evaluation.captions import CAPTIONS, CLEAR, NOISY, Scene, boldness, lean, make_scene, truth
from tests.scripts.evaluation.bars import bars

BOLD, FINE, SLANTED, UPRIGHT = "a thick digit", "a thin digit", "a slanted digit", "an upright digit"


def scene(digit: int = 7, t: int = 0, *, blurred: bool = False, bold: float = 0.5, leaning: float = 0.0) -> Scene:
    """Returns one picture in a known state. Its pixels do not matter."""
    rows = torch.tensor([digit]), torch.tensor([t]), torch.tensor([blurred])
    return Scene(torch.zeros(1, 1, 28, 28), *rows, torch.tensor([bold]), torch.tensor([leaning]))


def truth_by_caption(of: Scene) -> dict[str, float]:
    return dict(zip(CAPTIONS, truth(of)[0].tolist(), strict=True))


def test_captions_are_unique_and_contain_the_prompts() -> None:
    assert len(set(CAPTIONS)) == len(CAPTIONS)
    assert {CLEAR, NOISY, *map(digit_prompt, range(10))} <= set(CAPTIONS)


def test_captions_of_other_digits_are_false_for_a_clear_seven() -> None:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for caption, holds in truth_by_caption(scene(7)).items():
        named = {d for d in range(10) if words[d] in caption.split() or str(d) in caption.replace(",", "").split()}
        if named:
            assert holds == (1 if named == {7} and "noisy" not in caption else -1), caption


@pytest.mark.parametrize(
    ("state", "true", "false"),
    [
        (
            scene(),
            [CLEAR, "a sharp picture", "handwriting"],
            [NOISY, "a noisy picture", "a blurry picture", "pure static"],
        ),
        (scene(t=30), [NOISY, "a noisy picture", "handwriting"], [CLEAR, "random noise"]),
        (scene(blurred=True), [NOISY, "a blurry picture", "handwriting"], [CLEAR, "a noisy picture", "random noise"]),
        (scene(t=95), [NOISY, "random noise"], [CLEAR, "handwriting", "a handwritten digit seven", "the digit 7"]),
        (scene(bold=0.9), [BOLD], [FINE]),
        (scene(bold=0.1), [FINE], [BOLD]),
        (scene(leaning=-0.5), [SLANTED], [UPRIGHT]),
        (scene(leaning=0.01), [UPRIGHT], [SLANTED]),
    ],
)
def test_captions_are_true_or_false_by_state(state: Scene, true: list[str], false: list[str]) -> None:
    holds = truth_by_caption(state)
    assert {caption: holds[caption] for caption in true} == dict.fromkeys(true, 1)
    assert {caption: holds[caption] for caption in false} == dict.fromkeys(false, -1)


@pytest.mark.parametrize(
    ("state", "undecided"),
    [
        (scene(t=8), [CLEAR, NOISY, "a noisy picture"]),
        (scene(t=75), ["handwriting", "random noise", "a handwritten digit seven"]),
        (scene(t=50), ["a blurry picture"]),
        (scene(t=50, bold=0.9), [BOLD, FINE, SLANTED]),
        (scene(bold=0.5, leaning=0.2), [BOLD, FINE, SLANTED, UPRIGHT]),
    ],
)
def test_captions_are_undecided_between_two_states(state: Scene, undecided: list[str]) -> None:
    holds = truth_by_caption(state)
    assert [holds[caption] for caption in undecided] == [0] * len(undecided)


def test_captions_with_a_digit_or_writing_are_not_true_for_pure_noise() -> None:
    for caption, holds in truth_by_caption(scene(7, t=100)).items():
        if any(word in caption for word in ("digit", "writ", "number", "stroke")):
            assert holds in (-1, 0), caption
    assert truth_by_caption(scene(7, t=100))["a noisy, blurry picture of a handwritten digit"] == -1


def stroke(width: float, slope: float) -> Tensor:
    """Returns a line through the middle, `width` pixels wide, with a slant of `slope` pixels per row."""
    row, column = torch.arange(28.0)[:, None], torch.arange(28.0)
    distance = (column - 13.5 - slope * (13.5 - row)).abs() / math.hypot(1, slope)
    inside = (distance < width / 2) & ((row - 13.5).abs() < 9)
    return inside.float()[None, None]


def test_boldness_grows_with_the_stroke_width() -> None:
    widths = [boldness(stroke(width, 0)).item() for width in (2, 4, 8)]
    assert widths == pytest.approx([16 / 36 * 17 / 16, 3 / 4 * 17 / 18, 7 / 8 * 17 / 18], abs=0.04)


@pytest.mark.parametrize("slope", [-0.5, -0.2, 0.0, 0.3, 0.6])
def test_lean_equals_the_slope_of_a_line(slope: float) -> None:
    assert lean(stroke(3, slope)).item() == pytest.approx(slope, abs=0.03)


def test_pictures_have_the_states_of_their_scene() -> None:
    digits = bars(2_000, 0)
    diffusion = Diffusion(Schedule(ScheduleConfig(kind="cosine")), torch.Generator().manual_seed(0))
    made = make_scene(digits.images, digits.labels, diffusion)
    assert torch.equal(made.digit, digits.labels)
    assert torch.equal(made.pictures * 255, (made.pictures * 255).round())
    fogged, blurred = made.t > 0, made.blurred
    assert 0.35 < fogged.double().mean() < 0.45
    assert 0.07 < blurred.double().mean() < 0.13
    assert not (fogged & blurred).any()
    roughness = (made.pictures[..., 1:] - made.pictures[..., :-1]).square().mean(dim=(1, 2, 3))  # (B,)
    static, clear = roughness[made.t > 90], roughness[~fogged & ~blurred]
    assert static.min() > clear.max() > clear.median() > roughness[blurred].median()
