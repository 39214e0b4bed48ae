"""Classification accuracy score (Ravuri & Vinyals 2019): a classifier is trained only on generated digits."""

from pathlib import Path

import torch

from model.files import write_json
from scripts.common.data.data_set import ImageSet
from scripts.common.progress import Reporter
from scripts.evaluation.classifier_training import train_classifier
from scripts.evaluation.classifiers import Judge, accuracy
from scripts.evaluation.samples import load_references, read_facts, read_samples

EPOCHS = 10
KINDS = {"drawn": "generated", "real": "real"}  # JSON key -> word in the output


def evaluate_synthetic(
    folder: Path, out: Path | None, reporter: Reporter, *, epochs: int, seed: int, split: str, data_dir: Path
) -> None:
    """Trains one classifier on the digits of a folder and one on real digits. Writes their accuracies to `out`.

    Raises ScriptError if the folder or the data cannot be read.
    """
    references, drawn = load_references(split, data_dir), read_samples(folder)
    learned = {}
    for name, digits in (("drawn", drawn), ("real", references.learned)):
        kind = KINDS[name]
        title = f"training a classifier on {kind} digits"
        share = accuracy_learned_from(digits, references.held_out, reporter, epochs=epochs, seed=seed, title=title)
        learned[name] = {"num_images": len(digits.labels), "accuracy": share}
        reporter.line(f"Trained on {len(digits.labels)} {kind} digits: {share:.2%} of the {split} split recognised")
    if out:
        facts = {"split": split, "epochs": epochs, "seed": seed}
        write_json(out, {**facts, **learned, "drawn_with": read_facts(folder)})


def accuracy_learned_from(
    digits: ImageSet,
    test: ImageSet,
    reporter: Reporter,
    *,
    epochs: int,
    seed: int,
    title: str = "training a classifier",
) -> float:
    """Trains a judge on these digits, with a fixed recipe. Returns its accuracy on `test`."""
    torch.manual_seed(seed)
    network = train_classifier(Judge(), digits, reporter, augmented=True, epochs=epochs, seed=seed, title=title)
    return accuracy(network, test.images, test.labels)
