import math

import pytest
import torch

from scripts.common.data.data_set import ImageSet
from scripts.evaluation.classifiers import Judge
from scripts.evaluation.recognition import recognition
from tests.scripts.evaluation.bars import FixedClassifier, bars, untrained


def test_recognition_counts_answers_by_requested_digit() -> None:
    requested = torch.arange(40) % 10
    answers = requested.clone()
    answers[[4, 14]] = 9
    answers[7] = 1
    judged = recognition(FixedClassifier(answers).eval(), ImageSet(bars(40, 0).images, requested))
    assert judged.accuracy == pytest.approx(37 / 40)
    assert judged.per_class == pytest.approx((1, 1, 1, 1, 0.5, 1, 1, 0.75, 1, 1))
    assert judged.worst_class == 4
    assert judged.confusion[4] == (0, 0, 0, 0, 2, 0, 0, 0, 0, 2)
    assert (judged.confusion[7][1], judged.confusion[7][7]) == (1, 3)
    assert judged.entropy == pytest.approx(0, abs=1e-6)


def test_entropy_of_equal_probabilities_is_the_logarithm_of_ten() -> None:
    judge = untrained(Judge).network
    judge.head.weight.zero_()
    judge.head.bias.zero_()
    assert recognition(judge, bars(20, 0)).entropy == pytest.approx(math.log(10))
