import numpy as np
import pytest
import torch

from app.tasks.score import read_real_digits
from model.prompts import LEAST_SHARE, digit_prompt
from scripts.common.data.data_set import ImageSet
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.clip_prompts import as_markdown, measure, read_compared_digits

pytest.importorskip("open_clip")


def test_compared_digits_are_those_of_the_service() -> None:
    found, expected = np.stack([digits.numpy()[:, 0] for digits in read_compared_digits()]), read_real_digits()
    assert np.array_equal(found, np.array(expected))


def test_groups_have_the_similarities_and_warnings_of_their_pairs() -> None:
    scorer, own = ClipScorer(), read_compared_digits()
    real = ImageSet(torch.cat(own), torch.arange(10).repeat_interleave(10))
    drawn = ImageSet(torch.zeros(10, 1, 28, 28, dtype=torch.uint8), torch.arange(10))
    typical, groups = measure(scorer, real, drawn)
    similarities = scorer.similarities(real.images, [digit_prompt(digit) for digit in range(10)])
    of_own = similarities[torch.arange(100), real.labels]
    assert typical == pytest.approx(of_own.mean().item(), rel=1e-5)
    named = {group.name: group for group in groups}
    assert named["real digits and their prompts"].quantiles[1] == pytest.approx(of_own.median().item(), abs=0.01)
    few = (of_own < LEAST_SHARE * of_own.mean()).double().mean().item()
    assert few < 0.02
    assert [named[f"{kind} digits and their prompts"].low for kind in ("real", "generated")] == [few, 1]
    assert named["real digits and the prompt of the next digit"].low == 1
    assert named["unrelated prompts"].unknown == named["unrelated prompts"].warned == 1
    assert all(group.warned >= max(group.low, group.unknown) for group in groups)
    assert len(as_markdown(groups).splitlines()) == len(groups) + 2
