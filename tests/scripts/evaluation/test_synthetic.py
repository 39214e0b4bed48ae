import pytest

from scripts.common.data.data_set import ImageSet
from scripts.common.progress import Reporter
from scripts.evaluation import classifier_training
from scripts.evaluation.synthetic import accuracy_learned_from
from tests.scripts.evaluation.bars import bars


def accuracy_after(digits: ImageSet) -> float:
    with Reporter() as reporter:
        return accuracy_learned_from(digits, bars(100, 9), reporter, epochs=3, seed=0)


def test_accuracy_is_high_after_good_digits_and_low_after_wrong_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_training, "BATCH_SIZE", 8)
    good = bars(320, 1)
    assert accuracy_after(good) > 0.9
    assert accuracy_after(ImageSet(good.images, good.labels.roll(3))) < 0.2
