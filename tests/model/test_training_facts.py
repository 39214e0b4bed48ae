"""Tests of the facts about the training that are read from the metadata of a checkpoint."""

import copy
from typing import Any

import pytest

from model.spec import Evaluation, TrainingFacts
from model.training_facts import MAX_CHARACTERS, training_facts

MEASURED: dict[str, Any] = {
    "options": {"sampler": "ddpm", "num_steps": 100, "guidance": {"scale": 3.0, "start": 20}},
    "num_images": 10_000,
    "judge": {"accuracy": 0.9978, "per_class": [1.0]},
    "frechet": 0.08,
    "seed": 3,
}


def test_facts_of_a_complete_checkpoint_are_read() -> None:
    training = {"preset": "default", "data": "MNIST", "epochs": 30, "seed": 0, "evaluation": [MEASURED]}
    evaluation = Evaluation("ddpm", 100, 3.0, 10_000, 0.9978, 0.08)
    assert training_facts(training) == TrainingFacts("default", "MNIST", 30, (evaluation,))


def test_empty_metadata_has_no_facts() -> None:
    assert training_facts({}) == TrainingFacts()


@pytest.mark.parametrize(
    "training",
    [
        {"preset": 1, "data": ["MNIST"], "epochs": "30", "evaluation": {}},
        {"preset": None, "epochs": True, "evaluation": "abc"},
        {"epochs": 2.5, "evaluation": [None, 1, "a", [], {}]},
    ],
)
def test_facts_of_the_wrong_type_are_left_out(training: dict[str, Any]) -> None:
    assert training_facts(training) == TrainingFacts()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("options", "sampler"), "euler"),
        (("options", "sampler"), ["ddpm"]),
        (("options", "num_steps"), 2.5),
        (("options", "guidance"), 3.0),
        (("options", "guidance", "scale"), "3"),
        (("judge", "accuracy"), float("nan")),
        (("frechet",), float("inf")),
        (("frechet",), 10**400),
        (("num_images",), None),
    ],
)
def test_evaluation_with_a_wrong_value_is_left_out(path: tuple[str, ...], value: Any) -> None:
    wrong = copy.deepcopy(MEASURED)
    inner = wrong
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    assert len(training_facts({"evaluation": [wrong, MEASURED]}).evaluations) == 1


def test_texts_are_short_and_can_be_encoded() -> None:
    facts = training_facts({"preset": "\ud800", "data": "a" * 10_000})
    assert facts.preset == "?"
    assert facts.data == "a" * MAX_CHARACTERS
