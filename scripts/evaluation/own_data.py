"""Evaluates a model of your own pictures, with classifiers that are trained on these pictures and cached."""

import hashlib
import json
from pathlib import Path

from model.files import check_writable
from model.spec import DIGITS
from scripts.common.arguments import check_outside
from scripts.common.data.data_set import DataSet, digest_in, load_data
from scripts.common.data.first_look import repeated_images
from scripts.common.drawing import DrawingRequest, open_drawer, step_cache
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.evaluation.classifier_training import own_data_for, recipe_for, train_and_save
from scripts.evaluation.classifiers import Trained, load_classifier
from scripts.evaluation.quality import Evaluator, evaluate_samples
from scripts.evaluation.samples import NUM_IMAGES, references_of, samples_of_drawer
from scripts.evaluation.spaces import spaces_for_pictures
from scripts.training.run import earlier_data

RELEASE = 5  # part of the cache key; increase it when the training changes, to discard cached classifiers


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
    """Computes all metrics of a checkpoint on its training data, like `evaluate_digits` for MNIST.

    Trains the classifiers if no files are given. Raises ScriptError if the checkpoint does not match the data.
    """
    if out:
        check_outside(out, data)
        check_writable(out)
    drawer = open_drawer(request)
    pictures = load_data(data, reporter, drawer.checkpoint.image_shape[1])
    if (pictures.class_names, pictures.image_shape) != (drawer.class_names, drawer.checkpoint.image_shape):
        own, learned = (
            f"{len(names)} classes ({names[0]!a} to {names[-1]!a}) and images of {'x'.join(map(str, shape))}"
            for names, shape in (
                (pictures.class_names, pictures.image_shape),
                (drawer.class_names, drawer.checkpoint.image_shape),
            )
        )
        pairs = zip(pictures.class_names, drawer.class_names, strict=False)
        first = next((f". The class {mine!a} is {its!a} there" for mine, its in pairs if mine != its), "")
        raise ScriptError(
            f"--data has {own}, but the checkpoint has {learned}{first}. Give the data on which the checkpoint was "
            "trained"
        )
    for warning in repeated_images(pictures):
        reporter.line(warning)
    facts = drawer.checkpoint.config.training
    trained_on = [facts.get("data"), *earlier_data(facts)]
    if any(isinstance(each, str) and digest_in(each) != digest_in(pictures.description) for each in trained_on):
        reporter.line(
            "note: the checkpoint was not trained with exactly the pictures of --data. The held-out pictures may be "
            "among those from which it learned, unless only --limit was different"
        )
    count, references = count_for(pictures, num_images, reporter), references_of(pictures)
    spaces = spaces_for_pictures(min(count, len(references.real), len(references.held_out)), reporter)
    samples = samples_of_drawer(drawer, request, count, reporter)
    judges = own_classifier("judge", pictures, judge, reporter, flip=flip)
    extracts = own_classifier("extractor", pictures, extractor, reporter, flip=flip)
    if digest_in(str(extracts.facts.get("data"))) == digest_in(pictures.description):
        reporter.line(
            "note: the extractor has learned all training pictures, also those of the floor, so the ratios in its "
            "features are too low. Train it again with scripts.train_classifiers"
        )
    evaluator = Evaluator(references, judges, extracts, count, further_spaces=spaces, flip=flip)
    evaluate_samples(samples, evaluator, reporter, out)


def count_for(data: DataSet, wanted: int | None, reporter: Reporter) -> int:
    """Returns the number of images to generate: equally many of each class.

    The default, None, is at most NUM_IMAGES, and as many of each class as the smallest class has training images.
    Raises ScriptError for fewer images than classes, and if a class has no held-out image.
    """
    names = data.class_names
    learned, held_out = (each.labels.bincount(minlength=len(names)) for each in (data.learn, data.test))
    if not held_out.min():
        raise ScriptError(
            f"the class {names[int(held_out.argmin())]!a} has no test image to compare with. Add at least one"
        )
    if wanted is None:
        each = min(NUM_IMAGES // len(names), int(learned.min()))
    elif wanted < len(names):
        raise ScriptError(f"--num-images {wanted} is too small: each of the {len(names)} classes needs an image")
    else:
        each = wanted // len(names)
    count = each * len(names)
    if count != (wanted or NUM_IMAGES):
        reporter.line(f"Generating {count:,} images, {each:,} of each class")
    return count


def own_classifier(kind: str, data: DataSet, path: Path | None, reporter: Reporter, *, flip: bool) -> Trained:
    """Loads the classifier from `path`. Without a path, loads it from the cache, or trains it on the data.

    Raises ScriptError if the classifier of the file is for other classes or images.
    """
    if path:
        trained = load_classifier(kind, path)
        check_classes(trained, data, path)
        return trained
    to_learn = own_data_for(kind, data)
    recipe = recipe_for(kind, to_learn, flip=flip)
    key = json.dumps([RELEASE, kind, recipe, data.class_names, data.digest])
    cached = step_cache() / "classifiers" / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    try:
        trained = load_classifier(kind, cached)
        check_classes(trained, data, cached)
        return trained
    except ScriptError:  # It is missing, damaged, or the file of other data.
        train_and_save(kind, cached, to_learn, reporter, recipe)
        return load_classifier(kind, cached)


def check_classes(trained: Trained, data: DataSet, path: Path) -> None:
    """Raises ScriptError if the classifier cannot judge images of the data."""
    names = tuple(trained.facts.get("class_names", DIGITS))
    if trained.network.shape.image != data.image_shape or names != data.class_names:
        shape = "x".join(map(str, trained.network.shape.image))
        raise ScriptError(
            f"{path} recognises {len(names)} classes of {shape} images, from {names[0]!a} to {names[-1]!a}, so it "
            "cannot judge the images of --data. Train another classifier with scripts.train_classifiers --data"
        )
