"""The classification accuracy score (Ravuri & Vinyals 2019): what a classifier learns from drawn digits alone."""

from pathlib import Path

import torch

from scripts.evaluation.classifiers import Judge, accuracy
from scripts.evaluation.samples import Digits, SamplesError
from scripts.evaluation.training import train_classifier
from scripts.progress import Reporter

EPOCHS = 10


def read_synthetic(folder: Path) -> Digits:
    """What `scripts.make_dataset` left there as IDX files."""
    from torchvision.datasets.mnist import read_image_file, read_label_file

    try:
        images = read_image_file(str(folder / "train-images-idx3-ubyte"))
        labels = read_label_file(str(folder / "train-labels-idx1-ubyte"))
    except (OSError, ValueError, AssertionError, KeyError) as error:
        raise SamplesError(f"{folder} does not hold the IDX files that scripts.make_dataset writes") from error
    return Digits(images[:, None], labels)


def accuracy_learned_from(digits: Digits, test: Digits, reporter: Reporter, *, epochs: int, seed: int) -> float:
    """Trains a judge on these digits alone, always by the same recipe; its accuracy on `test`."""
    torch.manual_seed(seed)
    network = train_classifier(Judge(), digits, reporter, augmented=True, epochs=epochs, seed=seed)
    return accuracy(network, *test)
