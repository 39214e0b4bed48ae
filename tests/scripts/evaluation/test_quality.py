import math

import pytest
import torch

from scripts.evaluation.classifiers import Extractor, Judge
from scripts.evaluation.pictures import show_confusion, show_nearest
from scripts.evaluation.quality import Evaluator, Quality, as_json, as_markdown, recognition
from scripts.evaluation.samples import Digits, References
from scripts.progress import Reporter
from tests.scripts.evaluation.bars import Witness, bars, untrained

LEARNED = bars(300, 1)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    references = References(LEARNED, bars(200, 2), "validation")
    return Evaluator(references, untrained(Judge), untrained(Extractor), num_images=100)


def evaluate(evaluator: Evaluator, digits: Digits) -> Quality:
    with Reporter() as reporter:
        return evaluator.evaluate(digits, reporter)[0]


def test_what_is_seen_is_counted_by_what_was_asked() -> None:
    asked = torch.arange(40) % 10
    seen = asked.clone()
    seen[[4, 14]] = 9
    seen[7] = 1
    judged = recognition(Witness(seen).eval(), Digits(bars(40, 0).images, asked))
    assert judged.accuracy == pytest.approx(37 / 40)
    assert judged.per_digit == pytest.approx((1, 1, 1, 1, 0.5, 1, 1, 0.75, 1, 1))
    assert judged.worst_digit == 4
    assert judged.confusion[4] == (0, 0, 0, 0, 2, 0, 0, 0, 0, 2)
    assert (judged.confusion[7][1], judged.confusion[7][7]) == (1, 3)
    assert judged.entropy == pytest.approx(0, abs=1e-6)


def test_a_judge_that_cannot_tell_doubts_by_the_logarithm_of_ten() -> None:
    judge = untrained(Judge).network
    judge.head.weight.zero_()
    judge.head.bias.zero_()
    assert recognition(judge, bars(20, 0)).entropy == pytest.approx(math.log(10))


def test_real_digits_are_at_the_floor_and_noise_is_far_above(evaluator: Evaluator) -> None:
    real = evaluate(evaluator, Digits(LEARNED.images[:100], LEARNED.labels[:100]))
    assert real.frechet_ratio == pytest.approx(1)
    assert real.manifold == real.real_manifold
    noise = torch.randint(0, 256, (100, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    other = evaluate(evaluator, Digits(noise, LEARNED.labels[:100]))
    assert other.frechet_ratio > 10
    assert other.manifold.coverage < 0.1 < real.manifold.coverage


def test_a_surplus_of_one_digit_among_the_real_ones_is_no_distance(evaluator: Evaluator) -> None:
    held_out, more = bars(200, 2), bars(1000, 6)
    surplus = more.images[more.labels == 0]
    images, labels = torch.cat([held_out.images, surplus]), torch.cat([held_out.labels, torch.zeros(100).long()])
    unequal = References(LEARNED, Digits(images, labels), "validation")
    other = Evaluator(unequal, evaluator.judge, evaluator.extractor, num_images=100)
    ours, theirs = (evaluate(e, bars(100, 5)) for e in (evaluator, other))
    assert (theirs.frechet, theirs.real_frechet) == (ours.frechet, ours.real_frechet)
    assert (theirs.manifold, theirs.real_manifold) == (ours.manifold, ours.real_manifold)
    assert sum(map(sum, theirs.real_judge.confusion)) == 300


def test_copies_are_memorised_and_held_out_digits_are_not(evaluator: Evaluator) -> None:
    quality = evaluate(evaluator, Digits(LEARNED.images[:100], LEARNED.labels[:100]))
    assert (quality.memorised, quality.held_out_memorised) == (1, 0)


def test_table_and_json_say_the_same(evaluator: Evaluator) -> None:
    quality = evaluate(evaluator, bars(100, 5))
    table, content = as_markdown(quality), as_json(quality, evaluator)
    assert f"| recognised as asked | {content['judge']['accuracy']:.2%} |" in table
    real = recognition(evaluator.extractor.network, evaluator.references.held_out).accuracy
    assert f"| recognised by the extractor | {content['extractor']['accuracy']:.2%} | {real:.2%} |" in table
    assert f"| as a multiple of the floor | {content['frechet_ratio']:.2f} | 1 |" in table
    assert content["networks"]["judge"] == {"sha256": "0" * 64, "test_accuracy": 0.125}
    assert len({line.count("|") for line in table.splitlines()}) == 1


def test_pictures_are_drawn_of_perfect_and_of_poor_digits(evaluator: Evaluator) -> None:
    digits = bars(100, 5)
    with Reporter() as reporter:
        quality, nearest = evaluator.evaluate(digits, reporter)
    perfect = recognition(Witness(digits.labels).eval(), digits)
    for judged in (quality.judge, perfect):
        texts = [text.get_text() for text in show_confusion(judged).axes[0].texts]
        assert sum(map(int, texts)) == 100
    figure = show_nearest(digits, nearest, LEARNED.images)
    labels = [float(label.get_text()) for label in figure.axes[0].get_xticklabels()]
    assert labels == sorted(labels)
    assert labels[0] == pytest.approx(nearest.ratio.min().item(), abs=0.006)
