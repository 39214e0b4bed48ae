"""Computes all figures of one set of digits, and those of real digits for comparison."""

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
from scripts.evaluation.tables import fixed, too_few_images


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures of a set of digits, and the same figures of real digits.

    The real digits are as many training digits; both are compared with the held-out digits. Every set holds the ten
    digits equally often, since a different mix would count as a distance. Fréchet distances are None if there are
    fewer than tables.FEWEST_IMAGES images.
    """

    num_images: int
    num_held_out: int  # real digits that distances are measured to: as many of each as of the scarcest
    split: str  # where they are from
    judge: Recognition
    real_judge: Recognition  # of all that are held out
    extractor: Recognition
    real_extractor: Recognition
    frechet: float | None
    real_frechet: float | None  # the floor
    noise_frechet: float | None
    manifold: Manifold
    real_manifold: Manifold
    memorised: float
    held_out_memorised: float  # of real digits that were not learned from

    @property
    def frechet_ratio(self) -> float | None:
        """The Fréchet distance as a multiple of its floor."""
        if self.frechet is None or self.real_frechet is None:
            return None
        return self.frechet / self.real_frechet


class Evaluator:
    """Evaluates sets of digits. The figures of the real digits are computed once."""

    def __init__(self, references: References, judge: Trained, extractor: Trained, num_images: int) -> None:
        self.references, self.judge, self.extractor, self.num_images = references, judge, extractor, num_images
        self.real_judge, self.real_extractor = (recognition(n.network, references.held_out) for n in (judge, extractor))
        fewest = min(sum(row) for row in self.real_judge.confusion)
        held_out, real = balanced(references.held_out, NUM_CLASSES * fewest), balanced(references.learned, num_images)
        self._held_out_features, self._held_out_labels = self._features(held_out.images), held_out.labels  # (M, F)
        real_features = self._features(real.images)  # (N, F)
        noise = torch.randn(real.images.shape, generator=torch.Generator().manual_seed(0))
        self._floor = self._distance(real_features)
        self._noise = self._distance(self._features(to_pixels(noise)))
        self.real_manifold = self._manifold(real_features, real.labels)
        self._held_out_nearest = nearest_learned(held_out.images[:num_images], references.learned.images)

    def evaluate(self, digits: Digits, reporter: Reporter) -> tuple[Quality, Nearest]:
        """Returns the figures of these digits and the training images nearest to them."""
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
            real_frechet=self._floor,
            noise_frechet=self._noise,
            manifold=manifold,
            real_manifold=self.real_manifold,
            memorised=memorised_share(nearest),
            held_out_memorised=memorised_share(self._held_out_nearest),
        )
        return quality, nearest

    @property
    def num_compared(self) -> int:
        """Images on the smaller side of a distance."""
        return min(self.num_images, len(self._held_out_labels))

    def _features(self, images: Tensor) -> Tensor:
        return features_of(self.extractor.network, images)

    def _distance(self, features: Tensor) -> float | None:
        """Returns the Fréchet distance to the held-out digits, None if there are too few images."""
        return None if too_few_images(self.num_compared) else frechet_distance(features, self._held_out_features)

    def _manifold(self, features: Tensor, labels: Tensor) -> Manifold:
        return compare_manifolds(features, labels, self._held_out_features, self._held_out_labels)


def as_json(quality: Quality, evaluator: Evaluator) -> dict[str, Any]:
    """Returns the figures and the networks they depend on; `notes` say which figures are missing and why."""
    networks = {"judge": evaluator.judge, "extractor": evaluator.extractor}
    return {
        **asdict(quality),
        "frechet_ratio": quality.frechet_ratio,
        "networks": {name: {"sha256": n.sha256, "test_accuracy": n.accuracy} for name, n in networks.items()},
        "notes": notes_of(quality),
    }


def as_markdown(quality: Quality) -> str:
    """Returns a table of the figures next to those of real digits."""
    ours, theirs = quality.manifold, quality.real_manifold
    floor = fixed(quality.real_frechet, 4)
    if quality.noise_frechet is not None:
        floor += f" (noise {quality.noise_frechet:.0f})"
    rows = [
        *_beside("recognised as asked", quality.judge, quality.real_judge),
        ("entropy of the judge, nats", f"{quality.judge.entropy:.3f}", f"{quality.real_judge.entropy:.3f}"),
        *_beside("recognised by the extractor", quality.extractor, quality.real_extractor)[:1],
        ("Fréchet distance", fixed(quality.frechet, 4), floor),
        ("as a multiple of the floor", fixed(quality.frechet_ratio, 2), "1"),
        ("precision", f"{ours.precision:.3f}", f"{theirs.precision:.3f}"),
        ("recall", f"{ours.recall:.3f}", f"{theirs.recall:.3f}"),
        ("coverage", f"{ours.coverage:.3f}", f"{theirs.coverage:.3f}"),
        ("memorised", f"{quality.memorised:.2%}", f"{quality.held_out_memorised:.2%}"),
    ]
    head = f"| figure | {quality.num_images:,} images | real digits ({quality.split} split) |\n| --- | --- | --- |\n"
    return head + "\n".join(f"| {name} | {value} | {beside} |" for name, value, beside in rows)


def notes_of(quality: Quality) -> list[str]:
    """Returns a sentence for each figure that was not computed."""
    note = too_few_images(min(quality.num_images, quality.num_held_out))
    return [note] if note else []


def _beside(name: str, ours: Recognition, real: Recognition) -> list[tuple[str, str, str]]:
    """Returns the rows of one classifier: all digits, the worst digit, each digit."""
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
    """Computes all figures of the samples, prints them, and writes them with pictures to the folder `out`.

    `judge` and `extractor` are files of weights; None means the shipped ones. CLIP scores are computed if a model is
    named. Everything that can fail is loaded before the samples are drawn. Raises ScriptError.
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
        of_real = scorer.score(real)
        seen = scorer.score(digits), of_real, scorer.tells_noise(real, of_real)
        table, content["clip"] = f"{table}\n{clip.as_markdown(scorer, *seen)}", clip.as_json(scorer, *seen)
    table = "\n\n".join([table, *notes_of(quality)])
    reporter.line(table)
    if out:
        write_json(out / "evaluation.json", content)
        write_atomically(out / "evaluation.md", f"{table}\n".encode())
        save_figure(show_confusion(quality.judge), out / "confusion.png", grey=False)
        save_figure(show_nearest(digits, nearest, references.learned.images), out / "nearest.png", grey=True)
