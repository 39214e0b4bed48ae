"""All figures of one set of digits, beside those of real digits."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from scripts.evaluation.classifiers import NUM_CLASSES, Classifier, Trained, features_of, probabilities_of
from scripts.evaluation.distances import (
    Manifold,
    Nearest,
    compare_manifolds,
    frechet_distance,
    memorised_share,
    nearest_learned,
)
from scripts.evaluation.samples import Digits, References, balanced
from scripts.pictures import to_pixels
from scripts.progress import Reporter


@dataclass(frozen=True, slots=True)
class Recognition:
    """What a classifier sees in digits."""

    accuracy: float  # share recognised as asked
    per_digit: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]  # [asked][seen] -> images
    entropy: float  # mean of the classifier's doubt, in nats

    @property
    def worst_digit(self) -> int:
        """The digit with the smallest share."""
        return self.per_digit.index(min(self.per_digit))


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures of a set of digits; `real_…` is the same figure of real digits that were learned from."""

    num_images: int
    split: str  # the real digits that it is compared with
    judge: Recognition
    extractor: Recognition
    frechet: float
    real_frechet: float  # the floor, at the same number of images
    noise_frechet: float
    manifold: Manifold
    real_manifold: Manifold
    memorised: float
    held_out_memorised: float  # of real digits that were not learned from

    @property
    def frechet_ratio(self) -> float:
        """The Fréchet distance as a multiple of its floor."""
        return self.frechet / self.real_frechet


def recognition(network: Classifier, digits: Digits) -> Recognition:
    """Of digits of which there is at least one of each."""
    probabilities = probabilities_of(network, digits.images)  # (N, 10)
    seen = probabilities.argmax(dim=1)
    pairs = digits.labels * NUM_CLASSES + seen  # (N,)
    confusion = pairs.bincount(minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)
    per_digit = confusion.diagonal().double() / confusion.sum(dim=1)
    return Recognition(
        accuracy=(seen == digits.labels).double().mean().item(),
        per_digit=tuple(per_digit.tolist()),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        entropy=torch.special.entr(probabilities).sum(dim=1).mean().item(),
    )


class Evaluator:
    """Real digits, looked at once, beside which any number of sets is evaluated."""

    def __init__(self, references: References, judge: Trained, extractor: Trained, num_images: int) -> None:
        self.references, self.judge, self.extractor, self.num_images = references, judge, extractor, num_images
        self._real = balanced(references.learned, num_images)
        self._real_features = self._features(self._real.images)  # (N, F)
        self._held_out_features = self._features(references.held_out.images)  # (M, F)
        noise = torch.randn(self._real.images.shape, generator=torch.Generator().manual_seed(0))
        self._floor = frechet_distance(self._real_features, self._held_out_features)
        self._noise = frechet_distance(self._features(to_pixels(noise)), self._held_out_features)
        self._real_manifold = self._manifold(self._real_features, self._real.labels)
        self._held_out_nearest = nearest_learned(references.held_out.images[:num_images], references.learned.images)

    def evaluate(self, digits: Digits, reporter: Reporter) -> tuple[Quality, Nearest]:
        """The figures of these digits, and the learned images that are nearest to them."""
        with reporter.task("evaluating", 3, "parts") as task:
            features = self._features(digits.images)  # (N, F)
            judged = recognition(self.judge.network, digits)
            task.advance(1)
            manifold = self._manifold(features, digits.labels)
            task.advance(1)
            nearest = nearest_learned(digits.images, self.references.learned.images)
            task.advance(1)
        quality = Quality(
            num_images=len(digits.images),
            split=self.references.name,
            judge=judged,
            extractor=recognition(self.extractor.network, digits),
            frechet=frechet_distance(features, self._held_out_features),
            real_frechet=self._floor,
            noise_frechet=self._noise,
            manifold=manifold,
            real_manifold=self._real_manifold,
            memorised=memorised_share(nearest),
            held_out_memorised=memorised_share(self._held_out_nearest),
        )
        return quality, nearest

    def _features(self, images: Tensor) -> Tensor:
        return features_of(self.extractor.network, images)

    def _manifold(self, features: Tensor, labels: Tensor) -> Manifold:
        return compare_manifolds(features, labels, self._held_out_features, self.references.held_out.labels)


def as_json(quality: Quality, evaluator: Evaluator) -> dict[str, Any]:
    """The figures with the networks that they depend on."""
    networks = {"judge": evaluator.judge, "extractor": evaluator.extractor}
    return {
        **asdict(quality),
        "frechet_ratio": quality.frechet_ratio,
        "networks": {name: {"sha256": n.sha256, "test_accuracy": n.accuracy} for name, n in networks.items()},
    }


def as_markdown(quality: Quality, evaluator: Evaluator) -> str:
    """A table: each figure beside that of real digits."""
    judge, real = quality.judge, recognition(evaluator.judge.network, evaluator.references.held_out)
    worst, real_worst = judge.worst_digit, real.worst_digit
    ours, theirs = quality.manifold, quality.real_manifold
    floor = f"{quality.real_frechet:.4f} (noise {quality.noise_frechet:.0f})"
    rows = [
        ("recognised as asked", f"{judge.accuracy:.2%}", f"{real.accuracy:.2%}"),
        ("worst digit", f"{worst}: {judge.per_digit[worst]:.2%}", f"{real_worst}: {real.per_digit[real_worst]:.2%}"),
        ("the judge's doubt, nats", f"{judge.entropy:.3f}", f"{real.entropy:.3f}"),
        ("recognised by the extractor", f"{quality.extractor.accuracy:.2%}", f"{evaluator.extractor.accuracy:.2%}"),
        ("Fréchet distance", f"{quality.frechet:.4f}", floor),
        ("as a multiple of the floor", f"{quality.frechet_ratio:.2f}", "1"),
        ("precision", f"{ours.precision:.3f}", f"{theirs.precision:.3f}"),
        ("recall", f"{ours.recall:.3f}", f"{theirs.recall:.3f}"),
        ("coverage", f"{ours.coverage:.3f}", f"{theirs.coverage:.3f}"),
        ("memorised", f"{quality.memorised:.2%}", f"{quality.held_out_memorised:.2%}"),
    ]
    head = f"| figure | {quality.num_images:,} images | real digits ({quality.split} split) |\n| --- | --- | --- |\n"
    return head + "\n".join(f"| {name} | {value} | {beside} |" for name, value, beside in rows)
