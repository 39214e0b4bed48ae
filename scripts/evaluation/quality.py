"""Computes all metrics of a set of generated images, and the same metrics of real images for comparison."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.files import check_writable, write_atomically, write_json
from model.pixels import to_pixels
from model.spec import DIGITS
from scripts.common.data.data_set import ImageSet
from scripts.common.figures import save_figure
from scripts.common.progress import Reporter
from scripts.evaluation import clip
from scripts.evaluation.classifiers import Trained, features_of, load_classifier
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.distances import (
    FEWEST_COMPARED,
    Manifold,
    Nearest,
    compare_manifolds,
    frechet_distance,
    memorised_share,
    nearest_learned,
)
from scripts.evaluation.pictures import show_confusion, show_nearest
from scripts.evaluation.recognition import Recognition, recognition_of_features
from scripts.evaluation.samples import (
    References,
    Samples,
    balanced,
    load_references,
)
from scripts.evaluation.spaces import Space, space_of_classifier, spaces_for_digits
from scripts.evaluation.tables import MANIFOLD, SPACES, fixed, too_few_images

FEW_OF_EACH = 100  # with fewer generated images of each class, a note warns about the shares of classes
GOOD_JUDGE = 0.95  # with a lower accuracy on real images, a note warns about the judge
MANY_MEMORISED = 0.01  # share of the generated images
MOST_LISTED = 30  # classes with a share in the table


@dataclass(frozen=True, slots=True)
class Distance:
    """The Fréchet distances of generated and of real images from the held-out ones. None for too few images."""

    frechet: float | None
    real: float | None

    @property
    def ratio(self) -> float | None:
        """The distance of the generated images, divided by that of the real ones."""
        return None if self.frechet is None or not self.real else self.frechet / self.real


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """The held-out images in one feature space, with the distance of the real images from them."""

    space: Space
    features: Tensor  # (N, F)
    real_frechet: float | None


@dataclass(frozen=True, slots=True)
class Quality:
    """Metrics of a set of images, and the same metrics of real images.

    The real images are training images that the extractor has not learned. Fréchet distances and manifolds compare the
    first `num_compared` of both sets with held-out images. All sets have the classes equally often, since a different
    mix would add to the distance. Fréchet distances are None for fewer than tables.FEWEST_IMAGES images, and manifolds
    for fewer than FEWEST_COMPARED images of a class.
    """

    num_images: int
    num_compared: int  # the number of images, or of real ones if these are fewer
    num_held_out: int  # held-out images for distances: equally many of each class
    split: str  # split of the held-out images
    judge: Recognition
    real_judge: Recognition  # metrics of all held-out images
    extractor: Recognition
    real_extractor: Recognition
    frechet: float | None
    real_frechet: float | None
    noise_frechet: float | None  # Fréchet distance of random noise
    in_spaces: dict[str, Distance]  # as `frechet`, in the features of the judge and of further networks
    manifold: Manifold | None
    real_manifold: Manifold | None
    memorised: float
    held_out_memorised: float  # share of held-out images that would count as memorised

    @property
    def frechet_ratio(self) -> float | None:
        """The Fréchet distance divided by that of real images."""
        return Distance(self.frechet, self.real_frechet).ratio


class Evaluator:
    """Evaluates sets of images. The metrics of the real images are computed only once.

    Fréchet distances are also computed in the features of the judge and in `further_spaces`. With `flip`, a generated
    image also counts as memorised if it is nearly the mirror image of a training image: for networks that learned from
    mirrored images.
    """

    def __init__(
        self,
        references: References,
        judge: Trained,
        extractor: Trained,
        num_images: int,
        *,
        further_spaces: Sequence[Space] = (),
        flip: bool = False,
    ) -> None:
        self.references, self.judge, self.extractor, self.num_images = references, judge, extractor, num_images
        self.further_spaces = further_spaces
        self._flip = flip
        all_held_out, num_classes = references.held_out, len(references.class_names)
        all_judged, all_features = (features_of(n.network, all_held_out.images) for n in (judge, extractor))
        self.real_judge, self.real_extractor = (
            recognition_of_features(each.network, features, all_held_out.labels)
            for each, features in ((judge, all_judged), (extractor, all_features))
        )
        fewest = min(sum(row) for row in self.real_judge.confusion)
        # The same rows of the images and of their features.
        held_out, self._held_out, held_out_judged = (
            balanced(ImageSet(values, all_held_out.labels), num_classes * fewest, num_classes)
            for values in (all_held_out.images, all_features, all_judged)
        )
        # A distance depends on the number of images, so the same number of generated and of real images is compared.
        most = num_classes * int(references.real.labels.bincount(minlength=num_classes).min())
        self.num_compared = min(num_images, most)
        real = balanced(references.real, self.num_compared, num_classes)
        real_features = self._features(real.images)  # (N, F)
        noise = torch.randn(real.images.shape, generator=torch.Generator().manual_seed(0))
        self.real_frechet = self._frechet(real_features, self._held_out.images)
        self._noise_frechet = self._frechet(self._features(to_pixels(noise)), self._held_out.images)
        spaces = [(space_of_classifier("judge", judge), held_out_judged.images)]
        spaces += [(space, space.features(held_out.images)) for space in further_spaces]
        self._held_out_in = [
            _HeldOut(space, features, self._frechet(space.features(real.images), features))
            for space, features in spaces
        ]
        self.real_manifold = self._manifold(real_features, real.labels)
        self._held_out_nearest = nearest_learned(held_out.images[:num_images], references.learned.images, flip=flip)

    def evaluate(self, drawn: ImageSet, reporter: Reporter) -> tuple[Quality, Nearest]:
        """Returns the metrics of these images and their nearest training images."""
        compared = slice(self.num_compared)
        with reporter.task("evaluating", 3 + len(self._held_out_in), "parts") as task:
            features, judged = self._features(drawn.images), features_of(self.judge.network, drawn.images)  # (N, F)
            task.advance(1)
            manifold = self._manifold(features[compared], drawn.labels[compared])
            task.advance(1)
            nearest = nearest_learned(drawn.images, self.references.learned.images, flip=self._flip)
            task.advance(1)
            in_spaces = {}
            for held_out in self._held_out_in:
                is_judge = held_out.space.name == "judge"
                theirs = judged[compared] if is_judge else held_out.space.features(drawn.images[compared])
                frechet = self._frechet(theirs, held_out.features)
                in_spaces[held_out.space.name] = Distance(frechet, held_out.real_frechet)
                task.advance(1)
        quality = Quality(
            num_images=len(drawn),
            num_compared=self.num_compared,
            num_held_out=len(self._held_out),
            split=self.references.name,
            judge=recognition_of_features(self.judge.network, judged, drawn.labels),
            real_judge=self.real_judge,
            extractor=recognition_of_features(self.extractor.network, features, drawn.labels),
            real_extractor=self.real_extractor,
            frechet=self._frechet(features[compared], self._held_out.images),
            real_frechet=self.real_frechet,
            noise_frechet=self._noise_frechet,
            in_spaces=in_spaces,
            manifold=manifold,
            real_manifold=self.real_manifold,
            memorised=memorised_share(nearest),
            held_out_memorised=memorised_share(self._held_out_nearest),
        )
        return quality, nearest

    @property
    def smallest_set(self) -> int:
        """The number of images in the smallest set of a distance."""
        return min(self.num_compared, len(self._held_out))

    def _features(self, images: Tensor) -> Tensor:
        return features_of(self.extractor.network, images)

    def _frechet(self, features: Tensor, held_out: Tensor) -> float | None:
        """Returns the Fréchet distance of features (N, F) from (M, F), None if there are too few images."""
        return None if too_few_images(self.smallest_set) else frechet_distance(features, held_out)

    def _manifold(self, features: Tensor, labels: Tensor) -> Manifold | None:
        if self.smallest_set < FEWEST_COMPARED * len(self.references.class_names):
            return None
        return compare_manifolds(features, labels, self._held_out.images, self._held_out.labels)


def as_json(quality: Quality, evaluator: Evaluator) -> dict[str, Any]:
    """Returns the content of evaluation.json: the metrics, the classifiers, and notes about missing metrics."""
    networks = {"judge": evaluator.judge, "extractor": evaluator.extractor}
    content = asdict(quality)
    del content["in_spaces"]
    for name, distance in quality.in_spaces.items():
        of_space = {f"{name}_frechet": distance.frechet, f"real_{name}_frechet": distance.real}
        content |= {**of_space, f"{name}_frechet_ratio": distance.ratio}
    return {
        **content,
        "frechet_ratio": quality.frechet_ratio,
        "class_names": evaluator.references.class_names,
        "networks": {name: {"sha256": n.sha256, "test_accuracy": n.accuracy} for name, n in networks.items()},
        "further_spaces": {space.name: {"sha256": space.sha256} for space in evaluator.further_spaces},
        "notes": notes_of(quality, evaluator.references.class_names),
    }


def as_markdown(quality: Quality, class_names: tuple[str, ...] = DIGITS) -> str:
    """Returns a Markdown table of the metrics of these images and of real images."""
    real_distance = fixed(quality.real_frechet, 4)
    if quality.noise_frechet is not None:
        real_distance += f" (noise {quality.noise_frechet:.0f})"
    rows = [
        *_recognition_rows("recognised as asked", quality.judge, quality.real_judge, class_names),
        ("entropy of the judge, nats", f"{quality.judge.entropy:.3f}", f"{quality.real_judge.entropy:.3f}"),
        *_recognition_rows("recognised by the extractor", quality.extractor, quality.real_extractor, class_names)[:1],
        ("Fréchet distance", fixed(quality.frechet, 4), real_distance),
        ("ratio to real images", fixed(quality.frechet_ratio, 2), "1"),
        *(
            (f"ratio to real images, features of {SPACES[name]}", fixed(distance.ratio, 2), "1")
            for name, distance in quality.in_spaces.items()
        ),
        *((name, _share(quality.manifold, name), _share(quality.real_manifold, name)) for name in MANIFOLD),
        ("memorised", f"{quality.memorised:.2%}", f"{quality.held_out_memorised:.2%}"),
    ]
    head = f"| metric | {quality.num_images:,} images | real images ({quality.split}) |\n| --- | --- | --- |\n"
    return head + "\n".join(f"| {name} | {value} | {of_real} |" for name, value, of_real in rows)


def notes_of(quality: Quality, class_names: tuple[str, ...] = DIGITS) -> list[str]:
    """Returns notes about metrics that are missing or uncertain."""
    num_classes, real = len(class_names), quality.real_judge
    sets = {
        "generated images": quality.num_images,
        "held-out images": quality.num_held_out,
        "training images that the extractor has not learned": quality.num_compared,
    }
    smallest = min(sets, key=sets.__getitem__)
    of_each = sets[smallest] // num_classes
    notes = [too_few_images(sets[smallest], smallest)]
    if num_classes == 1:
        notes.append(
            "With one class, the classifiers have nothing to learn: they recognise every image, and their features are "
            "those of random weights."
        )
    if quality.manifold is None:
        notes.append(
            f"Too few {smallest} for precision, recall and coverage: {of_each} of each class, at least "
            f"{FEWEST_COMPARED} needed."
        )
    if quality.num_compared < quality.num_images and quality.manifold:
        figures = (
            "Precision, recall and coverage" if quality.frechet is None else "Distances, precision, recall and coverage"
        )
        notes.append(
            f"{figures} are those of the first {quality.num_compared:,} images, because there are only as many "
            "training images that the extractor has not learned."
        )
    if quality.num_images < FEW_OF_EACH * num_classes:
        each = quality.num_images // num_classes
        images = "1 generated image" if each == 1 else f"{each} generated images"
        notes.append(
            f"Each class has only {images}, so one image changes the share of its class by "
            f"{100 / each:.1f} percentage points."
        )
    if real.class_mean < GOOD_JUDGE:
        notes.append(
            f"The judge recognises only {real.class_mean:.1%} of the real images, so it also fails to recognise "
            "some good generated images."
        )
    if quality.memorised > MANY_MEMORISED and quality.memorised > 2 * quality.held_out_memorised:
        notes.append(
            f"{quality.memorised:.1%} of the images are nearly copies of a training image. Train with more images "
            "or fewer epochs."
        )
    return [note for note in notes if note]


def _share(manifold: Manifold | None, name: str) -> str:
    return fixed(None if manifold is None else getattr(manifold, name), 3)


def _recognition_rows(
    name: str, ours: Recognition, real: Recognition, class_names: tuple[str, ...]
) -> list[tuple[str, str, str]]:
    """Returns the table rows of a classifier: all classes, the worst class, and each class if they are not many."""

    class_names = tuple(name.replace("|", r"\|") for name in class_names)

    def shares(of: Recognition) -> str:
        return ", ".join(f"{name}: {share:.1%}" for name, share in zip(class_names, of.per_class, strict=True))

    worst, real_worst = (f"{class_names[r.worst_class]}: {r.per_class[r.worst_class]:.2%}" for r in (ours, real))
    rows = [(name, f"{ours.accuracy:.2%}", f"{real.class_mean:.2%}"), ("worst class", worst, real_worst)]
    return [*rows, ("each class", shares(ours), shares(real))] if len(class_names) <= MOST_LISTED else rows


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
    if out:
        check_writable(out)
    scorer = ClipScorer(clip_model) if clip_model else None
    networks = load_classifier("judge", judge), load_classifier("extractor", extractor)
    spaces = spaces_for_digits(samples.num_images, reporter)
    evaluator = Evaluator(load_references(split, data_dir), *networks, samples.num_images, further_spaces=spaces)
    evaluate_samples(samples, evaluator, reporter, out, scorer)


def evaluate_samples(
    samples: Samples, evaluator: Evaluator, reporter: Reporter, out: Path | None, scorer: ClipScorer | None = None
) -> None:
    """Computes all metrics, prints them, and writes them and plots to the folder `out` if given."""
    references, (drawn, source) = evaluator.references, samples.get()
    names = references.class_names
    quality, nearest = evaluator.evaluate(drawn, reporter)
    table, content = as_markdown(quality, names), {**source, **as_json(quality, evaluator)}
    if scorer:
        real = references.held_out
        real_scores = scorer.score(real)
        scores = scorer.score(drawn), real_scores, scorer.tells_noise(real, real_scores)
        table, content["clip"] = f"{table}\n{clip.as_markdown(scorer, *scores)}", clip.as_json(scorer, *scores)
    table = "\n\n".join([table, *notes_of(quality, names)])
    reporter.line(table)
    if out:
        write_json(out / "evaluation.json", content)
        write_atomically(out / "evaluation.md", f"{table}\n".encode())
        save_figure(show_confusion(quality.judge, names), out / "confusion.png", grey=False)
        is_grey = drawn.images.shape[1] == 1
        save_figure(show_nearest(drawn, nearest, references.learned.images), out / "nearest.png", grey=is_grey)
