import pytest

from scripts.common.progress import Reporter
from scripts.evaluation import classifier_training
from scripts.evaluation.samples import Digits
from scripts.evaluation.synthetic import accuracy_learned_from
from tests.scripts.evaluation.bars import bars


def learned_from(digits: Digits) -> float:
    with Reporter() as reporter:
        return accuracy_learned_from(digits, bars(100, 9), reporter, epochs=3, seed=0)


def test_what_tells_the_digits_apart_teaches_and_what_does_not_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier_training, "BATCH_SIZE", 8)
    good = bars(512, 1)
    assert learned_from(good) > 0.9
    assert learned_from(Digits(good.images, good.labels.roll(3))) < 0.2
