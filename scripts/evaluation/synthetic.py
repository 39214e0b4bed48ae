"""The classification accuracy score (Ravuri & Vinyals 2019): what a classifier learns from drawn digits alone."""

import torch

from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import Judge, accuracy
from scripts.evaluation.samples import Digits
from scripts.evaluation.training import train_classifier

EPOCHS = 10


def accuracy_learned_from(
    digits: Digits, test: Digits, reporter: Reporter, *, epochs: int, seed: int, title: str = "training a classifier"
) -> float:
    """Trains a judge on these digits alone, always by the same recipe; its accuracy on `test`."""
    torch.manual_seed(seed)
    network = train_classifier(Judge(), digits, reporter, augmented=True, epochs=epochs, seed=seed, title=title)
    return accuracy(network, *test)
