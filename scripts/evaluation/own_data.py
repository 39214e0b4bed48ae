"""Evaluates a network of your own data, with classifiers that are trained on the same data and cached."""

import hashlib
import json
from pathlib import Path

from model.spec import DIGITS
from scripts.common.data.data_set import DataSet, load_data
from scripts.common.drawing import DrawingRequest, open_drawer, step_cache
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation.classifier_training import recipe_for, train_and_save
from scripts.evaluation.classifiers import Trained, load_classifier
from scripts.evaluation.quality import Evaluator, evaluate_samples
from scripts.evaluation.samples import NUM_IMAGES, generated_images, references_of, samples_of_drawer

RELEASE = 1  # a higher number ignores the classifiers that an earlier release has cached


def evaluate_pictures(
    request: DrawingRequest,
    reporter: Reporter,
    *,
    data: Path,
    num_images: int | None,
    judge: Path | None,
    extractor: Path | None,
    flip: bool,
    out: Path | None,
) -> None:
    """Computes all metrics of a checkpoint on the data of its training, as `evaluate_digits` does for MNIST.

    Trains the classifiers on the data if `judge` and `extractor` name no files. Raises ScriptError if the checkpoint is
    not for the data.
    """
    drawer = open_drawer(request)
    pictures = load_data(data, reporter, drawer.checkpoint.image_shape[1])
    if (pictures.class_names, pictures.image_shape) != (drawer.class_names, drawer.checkpoint.image_shape):
        shape = "x".join(map(str, pictures.image_shape))
        raise ScriptError(
            f"The checkpoint must be trained on --data, {len(pictures.class_names)} classes of {shape} images from "
            f"{pictures.class_names[0]!a} to {pictures.class_names[-1]!a}, {generated_images(drawer)} from "
            f"{drawer.class_names[0]!a} to {drawer.class_names[-1]!a}"
        )
    num_classes = len(pictures.class_names)
    most = num_classes * int(pictures.learn.labels.bincount(minlength=num_classes).min())
    count = max(min(num_images or NUM_IMAGES, most) // num_classes, 1) * num_classes
    if num_images and count < num_images:
        reporter.line(f"{count:,} images, because the smallest class has {most // num_classes:,} training images")
    samples = samples_of_drawer(drawer, request, count, reporter)
    judges = own_classifier("judge", pictures, judge, reporter, flip=flip)
    extracts = own_classifier("extractor", pictures, extractor, reporter, flip=flip)
    evaluate_samples(samples, Evaluator(references_of(pictures), judges, extracts, count), reporter, out)


def own_classifier(kind: str, data: DataSet, path: Path | None, reporter: Reporter, *, flip: bool) -> Trained:
    """Loads the classifier from the file `path`. For None, trains one on the data, or loads it from the cache.

    Raises ScriptError if the classifier of the file is for other classes or images.
    """
    if path:
        trained = load_classifier(kind, path)
        check_classes(trained, data, path)
        return trained
    recipe = recipe_for(kind, data, flip=flip)
    key = json.dumps([RELEASE, kind, recipe, data.class_names, data.digest])
    cached = step_cache() / "classifiers" / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not cached.exists():
        train_and_save(kind, cached, data, reporter, recipe)
    return load_classifier(kind, cached)


def check_classes(trained: Trained, data: DataSet, path: Path) -> None:
    """Raises ScriptError if the classifier cannot judge images of the data."""
    names = tuple(trained.facts.get("class_names", DIGITS))
    if trained.network.shape.image != data.image_shape or names != data.class_names:
        shape = "x".join(map(str, trained.network.shape.image))
        raise ScriptError(
            f"{path} recognises {len(names)} classes of {shape} images, from {names[0]!a} to {names[-1]!a}. It cannot "
            "judge these images. Train one on the data with python -m scripts.train_classifiers --data"
        )
