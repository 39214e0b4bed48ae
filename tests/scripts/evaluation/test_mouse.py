import random

import numpy as np
import pytest
from scipy import ndimage

from scripts.evaluation.mouse import HEIGHT, STYLES, draw_digit

HOLES = {  # areas of paper that the strokes enclose; None: depends on the jitter
    "mouse-round": (None, 0, 0, 0, None, 0, None, 0, 2, 1),
    "mouse-quick": (None, 0, 1, 0, 1, 0, None, 0, 2, None),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("digit", range(10))
def test_digit_is_in_one_piece_and_has_its_number_of_holes(style: str, digit: int) -> None:
    mask = np.pad(np.asarray(draw_digit(digit, style, random.Random(1))) > 127, 1)
    _, parts = ndimage.label(mask, np.ones((3, 3)))
    enclosed, _ = ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)
    holes = np.bincount(enclosed.ravel())[1:] > 0.005 * mask.size  # smaller ones are gaps between the samples
    assert parts == 1  # all strokes of these digits touch
    assert HOLES[style][digit] in (None, holes.sum())
    assert 0.85 * HEIGHT < mask.shape[0] < 1.25 * HEIGHT


def test_each_digit_is_drawn_differently_and_the_same_generator_draws_it_again() -> None:
    generator = random.Random(3)
    first, second = (draw_digit(5, "mouse-round", generator) for _ in range(2))
    assert first.tobytes() != second.tobytes()
    assert draw_digit(5, "mouse-round", random.Random(3)).tobytes() == first.tobytes()
