import hashlib
import subprocess
import sys

import torch

from scripts.evaluation.sketches import CANVAS, STYLES, draw_sketches


def test_the_sketches_are_the_same_in_every_process() -> None:
    code = (
        "import hashlib; from scripts.evaluation.sketches import draw_sketches;"
        "print(hashlib.sha256(draw_sketches(1)[0].numpy().tobytes()).hexdigest())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == hashlib.sha256(draw_sketches(1)[0].numpy().tobytes()).hexdigest()


def test_a_sketch_does_not_depend_on_the_number_of_sketches() -> None:
    few, labels = draw_sketches(2)
    more, _ = draw_sketches(3)
    assert labels.tolist() == [digit for digit in range(10) for _ in range(2)]
    assert torch.equal(few.view(10, 2, CANVAS, CANVAS), more.view(10, 3, CANVAS, CANVAS)[:, :2])


def test_another_seed_and_another_index_give_other_sketches() -> None:
    per_digit = max(len(styles) for styles in STYLES.values()) + 1  # the last sketch repeats a style
    sketches, _ = draw_sketches(per_digit)
    assert len({sketch.numpy().tobytes() for sketch in sketches}) == len(sketches)
    assert not torch.equal(draw_sketches(1, seed=0)[0], draw_sketches(1, seed=1)[0])


def test_strokes_are_inside_the_canvas_and_have_the_width_of_a_pen() -> None:
    sketches, _ = draw_sketches(4)
    border = torch.ones(CANVAS, CANVAS, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert sketches[:, border].max() == 0
    ones = sketches[[4, 7]] > 127  # ones without a serif: nearly vertical strokes
    width = ones[:, 100:180].sum(dim=2).double().mean(dim=1)  # (2,) in pixels
    assert (width > 15).all()
    assert (width < 32).all()
