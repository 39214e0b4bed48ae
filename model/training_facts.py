"""Reads the facts about the training of a checkpoint that GET /models returns.

The metadata of a checkpoint is not trusted, and its part `training` has no fixed schema, so every value is checked. A
value that is missing or has another type is left out, because the service does not need it.
"""

from collections.abc import Mapping
from typing import Any

from model.json_fields import MAX_NUMBER
from model.spec import SAMPLERS, Evaluation, TrainingFacts

MAX_CHARACTERS = 200  # of a text
MAX_EVALUATIONS = 16


def training_facts(training: Mapping[str, Any]) -> TrainingFacts:
    """Returns the facts in the metadata of a checkpoint."""
    listed = training.get("evaluation")
    evaluations = [_evaluation(each) for each in listed[:MAX_EVALUATIONS]] if isinstance(listed, list) else []
    epochs = training.get("epochs")
    return TrainingFacts(
        preset=_text(training.get("preset")),
        data=_text(training.get("data")),
        epochs=epochs if type(epochs) is int else None,
        evaluations=tuple(each for each in evaluations if each),
    )


def _evaluation(values: Any) -> Evaluation | None:
    """Returns one evaluation, or None if a value is missing or wrong."""
    try:
        options = values["options"]
        sampler, num_steps, num_images = options["sampler"], options["num_steps"], values["num_images"]
        scale, accuracy, frechet = options["guidance"]["scale"], values["judge"]["accuracy"], values["frechet"]
    except (KeyError, TypeError, IndexError):
        return None
    is_valid = sampler in SAMPLERS and all(type(number) is int for number in (num_steps, num_images))
    if not is_valid or not all(map(_is_number, (scale, accuracy, frechet))):
        return None
    return Evaluation(sampler, num_steps, scale, num_images, accuracy, frechet)


def _text(value: Any) -> str | None:
    """Returns the beginning of a text. Replaces lone surrogates, which UTF-8 cannot encode."""
    return value[:MAX_CHARACTERS].encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER  # False for NaN
