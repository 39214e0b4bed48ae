"""Computes all metrics of a set of digits, and the same metrics of real digits for comparison."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.files import write_atomically, write_json
from model.pixels import to_pixels
from scripts.common.figures import save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation import clip
from scripts.evaluation.classifiers import Trained, features_of, load_classifier
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.distances import (
    Manifold,
    Nearest,
    compare_manifolds,
    frechet_distance,
    memorised_share,
    nearest_learned,
)
from scripts.evaluation.pictures import show_confusion, show_nearest
from scripts.evaluation.recognition import Recognition, recognition
from scripts.evaluation.samples import Digits, References, Samples, balanced, load_references
from scripts.evaluation.tables import FRECHET_RATIO, fixed, too_few_images


@dataclass(frozen=True, slots=True)
class Quality:
    """Metrics of a set of digits, and the same metrics of real digits.

    The real digits are the same number of training digits. Both sets are compared with held-out digits. All sets have
    the ten digits equally often, since a different mix would add to the distance. Fréchet distances are None for fewer
    than tables.FEWEST_IMAGES images.
    """

    num_images: int
    num_held_out: int  # held-out digits for distances: equally many of each digit
    split: str  # MNIST split of the held-out digits
    judge: Recognition
    real_judge: Recognition  # metrics of all held-out digits
    extractor: Recognition
    real_extractor: Recognition
    frechet: float | None
    real_frechet: float | None
    noise_frechet: float | None  # Fréchet distance of random noise
    manifold: Manifold
    real_manifold: Manifold
    memorised: float
    held_out_memorised: float  # share of held-out digits that would count as memorised

    @property
    def frechet_ratio(self) -> float | None:
        """The Fréchet distance divided by that of real digits."""
        if self.frechet is None or self.real_frechet is None:
            return None
        return self.frechet / self.real_frechet


class Evaluator:
    """Evaluates sets of digits. The metrics of the real digits are computed only once."""

    def __init__(self, references: References, judge: Trained, extractor: Trained, num_images: int) -> None:
        self.references, self.judge, self.extractor, self.num_images = references, judge, extractor, num_images
        self.real_judge, self.real_extractor = (recognition(n.network, references.held_out) for n in (judge, extractor))
        fewest = min(sum(row) for row in self.real_judge.confusion)
        held_out, real = balanced(references.held_out, NUM_CLASSES * fewest), balanced(references.learned, num_images)
        self._held_out_features, self._held_out_labels = self._features(held_out.images), held_out.labels  # (M, F)
        real_features = self._features(real.images)  # (N, F)
        noise = torch.randn(real.images.shape, generator=torch.Generator().manual_seed(0))
        self.real_frechet = self._distance(real_features)
        self._noise_distance = self._distance(self._features(to_pixels(noise)))
        self.real_manifold = self._manifold(real_features, real.labels)
        self._held_out_nearest = nearest_learned(held_out.images[:num_images], references.learned.images)

    def evaluate(self, digits: Digits, reporter: Reporter) -> tuple[Quality, Nearest]:
        """Returns the metrics of these digits and their nearest training images."""
        with reporter.task("evaluating", 3, "parts") as task:
            features = self._features(digits.images)  # (N, F)
            judged = recognition(self.judge.network, digits)
            task.advance(1)
            manifold = self._manifold(features, digits.labels)
            task.advance(1)
            nearest = nearest_learned(digits.images, self.references.all_learned.images)
            task.advance(1)
        quality = Quality(
            num_images=len(digits.images),
            num_held_out=len(self._held_out_labels),
            split=self.references.name,
            judge=judged,
            real_judge=self.real_judge,
            extractor=recognition(self.extractor.network, digits),
            real_extractor=self.real_extractor,
            frechet=self._distance(features),
            real_frechet=self.real_frechet,
            noise_frechet=self._noise_distance,
            manifold=manifold,
            real_manifold=self.real_manifold,
            memorised=memorised_share(nearest),
            held_out_memorised=memorised_share(self._held_out_nearest),
        )
        return quality, nearest

    @property
    def num_compared(self) -> int:
        """The number of images in the smaller set of a distance."""
        return min(self.num_images, len(self._held_out_labels))

    def _features(self, images: Tensor) -> Tensor:
        return features_of(self.extractor.network, images)

    def _distance(self, features: Tensor) -> float | None:
        """Returns the Fréchet distance to the held-out digits, None if there are too few images."""
        return None if too_few_images(self.num_compared) else frechet_distance(features, self._held_out_features)

    def _manifold(self, features: Tensor, labels: Tensor) -> Manifold:
        return compare_manifolds(features, labels, self._held_out_features, self._held_out_labels)


def as_json(quality: Quality, evaluator: Evaluator) -> dict[str, Any]:
    """Returns the content of evaluation.json: the metrics, the classifiers, and notes about missing metrics."""
    networks = {"judge": evaluator.judge, "extractor": evaluator.extractor}
    return {
        **asdict(quality),
        "frechet_ratio": quality.frechet_ratio,
        "networks": {name: {"sha256": n.sha256, "test_accuracy": n.accuracy} for name, n in networks.items()},
        "notes": notes_of(quality),
    }


def as_markdown(quality: Quality) -> str:
    """Returns a Markdown table of the metrics of these digits and of real digits."""
    ours, theirs = quality.manifold, quality.real_manifold
    real_distance = fixed(quality.real_frechet, 4)
    if quality.noise_frechet is not None:
        real_distance += f" (noise {quality.noise_frechet:.0f})"
    rows = [
        *_recognition_rows("recognised as asked", quality.judge, quality.real_judge),
        ("entropy of the judge, nats", f"{quality.judge.entropy:.3f}", f"{quality.real_judge.entropy:.3f}"),
        *_recognition_rows("recognised by the extractor", quality.extractor, quality.real_extractor)[:1],
        ("Fréchet distance", fixed(quality.frechet, 4), real_distance),
        (FRECHET_RATIO, fixed(quality.frechet_ratio, 2), "1"),
        ("precision", f"{ours.precision:.3f}", f"{theirs.precision:.3f}"),
        ("recall", f"{ours.recall:.3f}", f"{theirs.recall:.3f}"),
        ("coverage", f"{ours.coverage:.3f}", f"{theirs.coverage:.3f}"),
        ("memorised", f"{quality.memorised:.2%}", f"{quality.held_out_memorised:.2%}"),
    ]
    head = f"| metric | {quality.num_images:,} images | real digits ({quality.split} split) |\n| --- | --- | --- |\n"
    return head + "\n".join(f"| {name} | {value} | {of_real} |" for name, value, of_real in rows)


def notes_of(quality: Quality) -> list[str]:
    """Returns a list with a sentence about the metrics that were not computed. It is empty if all were computed."""
    note = too_few_images(min(quality.num_images, quality.num_held_out))
    return [note] if note else []


def _recognition_rows(name: str, ours: Recognition, real: Recognition) -> list[tuple[str, str, str]]:
    """Returns the table rows of a classifier: all digits, the worst digit, each digit."""
    worst, real_worst = (f"{r.worst_digit}: {r.per_digit[r.worst_digit]:.2%}" for r in (ours, real))
    each, real_each = (", ".join(f"{d}: {share:.1%}" for d, share in enumerate(r.per_digit)) for r in (ours, real))
    return [
        (name, f"{ours.accuracy:.2%}", f"{real.accuracy:.2%}"),
        ("worst digit", worst, real_worst),
        ("each digit", each, real_each),
    ]


def evaluate_digits(
    samples: Samples,
    reporter: Reporter,
    *,
    judge: Path | None,
    extractor: Path | None,
    clip_model: str | None,
    split: str,
    data_dir: Path,
    out: Path | None,
) -> None:
    """Computes all metrics of the samples, prints them, and writes them and plots to the folder `out` if given.

    `judge` and `extractor` are files with weights. None means the shipped ones. CLIP scores are computed if
    `clip_model` is given. Models and data are loaded before the images are generated, since loading can fail. Raises
    ScriptError.
    """
    scorer = ClipScorer(clip_model) if clip_model else None
    networks = load_classifier("judge", judge), load_classifier("extractor", extractor)
    references = load_references(split, data_dir)
    evaluator = Evaluator(references, *networks, samples.num_images)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    digits, source = samples.get()
    quality, nearest = evaluator.evaluate(digits, reporter)
    table, content = as_markdown(quality), {**source, **as_json(quality, evaluator)}
    if scorer:
        real = references.held_out
        real_scores = scorer.score(real)
        scores = scorer.score(digits), real_scores, scorer.tells_noise(real, real_scores)
        table, content["clip"] = f"{table}\n{clip.as_markdown(scorer, *scores)}", clip.as_json(scorer, *scores)
    table = "\n\n".join([table, *notes_of(quality)])
    reporter.line(table)
    if out:
        write_json(out / "evaluation.json", content)
        write_atomically(out / "evaluation.md", f"{table}\n".encode())
        save_figure(show_confusion(quality.judge), out / "confusion.png", grey=False)
        save_figure(show_nearest(digits, nearest, references.learned.images), out / "nearest.png", grey=True)
