from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from model.spec import DIGITS
from scripts.common.data.data_set import ImageSet
from scripts.common.figures import save_figure
from scripts.common.progress import Reporter
from scripts.evaluation import tables
from scripts.evaluation.classifiers import Extractor, Judge
from scripts.evaluation.distances import Nearest, frechet_distance
from scripts.evaluation.pictures import show_confusion, show_nearest
from scripts.evaluation.quality import Evaluator, Quality, as_json, as_markdown, evaluate_samples, notes_of
from scripts.evaluation.recognition import Recognition, recognition
from scripts.evaluation.samples import References, Samples
from tests.scripts.evaluation.bars import FixedClassifier, bars, space_of_pixels, untrained

LEARNED = bars(300, 1)


@pytest.fixture(scope="module", autouse=True)
def allow_distances_of_few_images() -> Iterator[None]:
    """Lowers the minimum number of images for a distance, since the sets in these tests are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "FEWEST_IMAGES", 100)
        yield


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    references = References(LEARNED, bars(200, 2), "validation", LEARNED)
    return Evaluator(references, untrained(Judge), untrained(Extractor), num_images=100)


def evaluate(evaluator: Evaluator, digits: ImageSet) -> Quality:
    with Reporter() as reporter:
        return evaluator.evaluate(digits, reporter)[0]


def test_frechet_ratio_is_1_for_real_digits_and_high_for_noise(evaluator: Evaluator) -> None:
    real = evaluate(evaluator, ImageSet(LEARNED.images[:100], LEARNED.labels[:100]))
    assert real.frechet_ratio == pytest.approx(1)
    assert real.manifold == real.real_manifold
    noise = torch.randint(0, 256, (100, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    other = evaluate(evaluator, ImageSet(noise, LEARNED.labels[:100]))
    assert other.frechet_ratio > 10
    assert other.manifold.coverage < 0.1 < real.manifold.coverage


def test_distances_in_further_spaces_are_those_of_their_features(evaluator: Evaluator) -> None:
    space, ours = space_of_pixels(), bars(100, 5)
    other = Evaluator(evaluator.references, evaluator.judge, evaluator.extractor, 100, further_spaces=[space])
    quality = evaluate(other, ours)
    content, table = as_json(quality, other), as_markdown(quality)
    held_out = space.features(evaluator.references.held_out.images)
    distance, floor = (
        frechet_distance(space.features(images), held_out) for images in (ours.images, LEARNED.images[:100])
    )
    assert (content["clip_frechet"], content["real_clip_frechet"]) == (distance, floor)
    assert content["clip_frechet_ratio"] == distance / floor
    assert content["further_spaces"] == {"clip": {"sha256": space.sha256}}
    assert f"| ratio to real images, features of CLIP | {distance / floor:.2f} | 1 |" in table


def test_surplus_of_one_real_digit_does_not_change_the_distance(evaluator: Evaluator) -> None:
    held_out, more = bars(200, 2), bars(1000, 6)
    surplus = more.images[more.labels == 0]
    images, labels = torch.cat([held_out.images, surplus]), torch.cat([held_out.labels, torch.zeros(100).long()])
    unequal = References(LEARNED, ImageSet(images, labels), "validation", LEARNED)
    other = Evaluator(unequal, evaluator.judge, evaluator.extractor, num_images=100)
    ours, theirs = (evaluate(e, bars(100, 5)) for e in (evaluator, other))
    assert (theirs.frechet, theirs.real_frechet) == (ours.frechet, ours.real_frechet)
    assert (theirs.manifold, theirs.real_manifold) == (ours.manifold, ours.real_manifold)
    assert sum(map(sum, theirs.real_judge.confusion)) == 300
    assert theirs.num_held_out == ours.num_held_out == 200


def test_real_images_of_unequal_classes_count_each_class_equally(evaluator: Evaluator) -> None:
    """The generated images have each class equally often, so the shares can be compared only in this way."""
    labels = torch.tensor([0] * 90 + [*range(1, 10)] + [1])
    seen = torch.tensor([0] * 90 + [0] * 9 + [1])  # all zeros and one of two ones are right
    real = recognition(FixedClassifier(seen), ImageSet(bars(100, 3).images, labels))
    assert real.accuracy == pytest.approx(0.91)
    assert real.class_mean == pytest.approx((1 + 0.5) / 10)
    quality = replace(evaluate(evaluator, bars(100, 5)), real_judge=real)
    assert f"| recognised as asked | {quality.judge.accuracy:.2%} | 15.00% |" in as_markdown(quality)
    assert any("The judge recognises only 15.0% of the real images" in note for note in notes_of(quality))


def test_single_class_has_a_note_that_the_classifiers_learn_nothing(evaluator: Evaluator) -> None:
    one = Recognition(accuracy=1.0, per_class=(1.0,), confusion=((100,),), entropy=0.0)
    quality = replace(evaluate(evaluator, bars(100, 5)), judge=one, real_judge=one)
    assert any("With one class, the classifiers have nothing to learn" in note for note in notes_of(quality, ("cup",)))


def test_copies_count_as_memorised_and_held_out_digits_do_not(evaluator: Evaluator) -> None:
    quality = evaluate(evaluator, ImageSet(LEARNED.images[:100], LEARNED.labels[:100]))
    assert (quality.memorised, quality.held_out_memorised) == (1, 0)


def test_copies_of_training_digits_that_are_no_real_digits_count_as_memorised(evaluator: Evaluator) -> None:
    others = bars(200, 7)
    everything = ImageSet(torch.cat([LEARNED.images, others.images]), torch.cat([LEARNED.labels, others.labels]))
    of_all = References(LEARNED, evaluator.references.held_out, "validation", everything)
    other = Evaluator(of_all, evaluator.judge, evaluator.extractor, num_images=100)
    copies = ImageSet(others.images[:100], others.labels[:100])
    assert (evaluate(evaluator, copies).memorised, evaluate(other, copies).memorised) == (0, 1)


def test_picture_of_nearest_digits_shows_training_digits_that_are_no_real_digits_too(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Tensor] = []

    def show(drawn: ImageSet, nearest: Nearest, learned: Tensor) -> Figure:
        shown.append(learned[nearest.indices[:, 0]])
        return show_nearest(drawn, nearest, learned)

    monkeypatch.setattr("scripts.evaluation.quality.show_nearest", show)
    others = bars(200, 7)
    everything = ImageSet(torch.cat([others.images, LEARNED.images]), torch.cat([others.labels, LEARNED.labels]))
    of_all = References(LEARNED, evaluator.references.held_out, "validation", everything)
    other = Evaluator(of_all, evaluator.judge, evaluator.extractor, num_images=100)
    copies = ImageSet(others.images[:100], others.labels[:100])
    with Reporter() as reporter:
        evaluate_samples(Samples(100, lambda: (copies, {})), other, reporter, tmp_path)
    assert torch.equal(shown[0], copies.images)


def test_table_and_json_have_the_same_values(evaluator: Evaluator) -> None:
    quality = evaluate(evaluator, bars(100, 5))
    table, content = as_markdown(quality), as_json(quality, evaluator)
    assert f"| recognised as asked | {content['judge']['accuracy']:.2%} |" in table
    real = recognition(evaluator.extractor.network, evaluator.references.held_out).accuracy
    assert f"| recognised by the extractor | {content['extractor']['accuracy']:.2%} | {real:.2%} |" in table
    assert f"| ratio to real images | {content['frechet_ratio']:.2f} | 1 |" in table
    assert content["networks"]["judge"] == {"sha256": "0" * 64, "test_accuracy": 0.125}
    assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("num_images", "fewest", "kind"), [(100, 101, "generated images"), (290, 201, "held-out images")]
)
def test_small_set_has_a_note_instead_of_a_distance(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch, num_images: int, fewest: int, kind: str
) -> None:
    """There are too few generated images, or too few held-out images (200)."""
    monkeypatch.setattr(tables, "FEWEST_IMAGES", fewest)
    other = Evaluator(evaluator.references, evaluator.judge, evaluator.extractor, num_images)
    quality = evaluate(other, bars(num_images, 5))
    content, table = as_json(quality, other), as_markdown(quality)
    for name in ("frechet", "real_frechet", "noise_frechet", "frechet_ratio"):
        assert content[name] is None
    note = f"Too few {kind} for a Fréchet distance: {min(num_images, 200)}, at least {fewest} needed."
    assert content["notes"] == notes_of(quality)
    assert note in content["notes"]
    assert "| Fréchet distance | - | - |" in table
    assert f"| recall | {quality.manifold.recall:.3f} |" in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    enough = Evaluator(evaluator.references, evaluator.judge, evaluator.extractor, 100)
    monkeypatch.setattr(tables, "FEWEST_IMAGES", 100)
    assert not any("Fréchet" in each for each in as_json(evaluate(enough, bars(100, 5)), enough)["notes"])


def test_images_after_those_that_are_compared_do_not_change_the_distances(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are 100 real images, and 150 generated ones, of which the last 50 are noise."""
    monkeypatch.setattr(tables, "FEWEST_IMAGES", 50)
    first, real = bars(100, 5), evaluator.references.real.rows(slice(100))
    noise = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    longer = ImageSet(torch.cat([first.images, noise]), torch.cat([first.labels, first.labels[:50]]))
    few, space = replace(evaluator.references, real=real), space_of_pixels()
    qualities = [
        evaluate(Evaluator(few, evaluator.judge, evaluator.extractor, len(images), further_spaces=[space]), images)
        for images in (first, longer)
    ]
    alone, together = qualities
    assert (together.num_images, together.num_compared) == (150, 100)
    assert (together.frechet, together.in_spaces, together.manifold) == (
        alone.frechet,
        alone.in_spaces,
        alone.manifold,
    )
    assert together.judge != alone.judge


@pytest.mark.filterwarnings("error")
def test_class_whose_name_the_font_cannot_draw_is_shown_by_its_number(tmp_path: Path) -> None:
    digits = bars(100, 5)
    names = ("\u732b", "Gr\u00f6\u00dfe", *DIGITS[2:])
    figure = show_confusion(recognition(FixedClassifier(digits.labels).eval(), digits), names)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "class 0",
        "Gr\u00f6\u00dfe",
        *DIGITS[2:],
    ]
    save_figure(figure, tmp_path / "confusion.png", grey=False)


def test_plots_work_for_perfect_and_for_poor_digits(evaluator: Evaluator) -> None:
    digits = bars(100, 5)
    with Reporter() as reporter:
        quality, nearest = evaluator.evaluate(digits, reporter)
    perfect = recognition(FixedClassifier(digits.labels).eval(), digits)
    for judged in (quality.judge, perfect):
        texts = [text.get_text() for text in show_confusion(judged).axes[0].texts]
        assert sum(map(int, texts)) == 100
    figure = show_nearest(digits, nearest, LEARNED.images)
    labels = [float(label.get_text()) for label in figure.axes[0].get_xticklabels()]
    assert labels == sorted(labels)
    assert labels[0] == pytest.approx(nearest.ratio.min().item(), abs=0.006)
