import json
from pathlib import Path
from typing import Any

import pytest

from scripts.common.errors import ScriptError
from scripts.evaluation.tables import across, as_run, check_comparable, read_evaluation

SEEN = {"accuracy": 0.99625, "per_digit": [1.0] * 7 + [0.994, 1.0, 1.0]}
REAL_SEEN = {"accuracy": 0.997, "per_digit": [1.0] * 6 + [0.9937, 1.0, 1.0, 1.0]}
EVALUATION: dict[str, Any] = {
    "options": {"sampler": "ddpm", "num_steps": 100, "guidance": {"scale": 3.0, "start": 20, "stop": 65}},
    "num_images": 10_000,
    "split": "test",
    "networks": {"judge": {"sha256": "0" * 64}},
    "judge": SEEN,
    "real_judge": REAL_SEEN,
    "extractor": {"accuracy": 0.9951, "per_digit": [0.9951] * 10},
    "frechet": 0.07833,
    "real_frechet": 0.0467,
    "noise_frechet": 98.2,
    "frechet_ratio": 1.677,
    "manifold": {"precision": 0.8026, "recall": 0.7771, "coverage": 0.9228},
    "real_manifold": {"precision": 0.797, "recall": 0.817, "coverage": 0.944},
    "memorised": 0.0,
    "held_out_memorised": 0.0002,
}


def test_a_line_says_what_was_drawn_with_and_what_came_of_it() -> None:
    line = as_run("mine", EVALUATION)
    assert line[:4] == ["mine", "ddpm", "100", "3 in 20-65"]
    assert line[4:] == ["99.51%", "99.62%", "99.4% (7)", "1.68", "0.803", "0.777", "0.923"]


def test_a_folder_of_pictures_does_not_say_how_it_was_drawn() -> None:
    pictures = {name: value for name, value in EVALUATION.items() if name != "options"}
    assert as_run("pictures", pictures)[1:4] == ["?", "?", "?"]


def test_columns_stand_beside_real_digits() -> None:
    lines = [line.strip("| ").split(" | ") for line in across({"one": EVALUATION, "two": EVALUATION}).splitlines()]
    assert lines[0] == ["one", "two", "real digits"]
    assert lines[2:] == [
        ["recognised as asked", "99.62%", "99.62%", "99.70%"],
        ["worst digit", "7: 99.4%", "7: 99.4%", "6: 99.4%"],
        ["Fréchet distance", "0.0783", "0.0783", "0.0467 (noise 98)"],
        ["as a multiple of real digits'", "1.68", "1.68", "1"],
        ["precision", "0.803", "0.803", "0.797"],
        ["recall", "0.777", "0.777", "0.817"],
        ["coverage", "0.923", "0.923", "0.944"],
        ["memorised", "0.00%", "0.00%", "0.02%"],
    ]


def test_an_evaluation_without_a_distance_has_a_dash_for_it(tmp_path: Path) -> None:
    missing = dict.fromkeys(("frechet", "real_frechet", "noise_frechet", "frechet_ratio"))
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION | missing))
    evaluation = read_evaluation(tmp_path)
    assert as_run("mine", evaluation)[7] == "-"
    lines = [line.strip("| ").split(" | ") for line in across({"one": evaluation}).splitlines()]
    assert ["Fréchet distance", "-", "-"] in lines
    assert ["as a multiple of real digits'", "-", "1"] in lines


@pytest.mark.parametrize("field", ["num_images", "split", "networks"])
def test_what_was_measured_otherwise_does_not_compare(field: str) -> None:
    check_comparable([EVALUATION, EVALUATION])
    with pytest.raises(ScriptError, match=f"differ in {field}"):
        check_comparable([EVALUATION, {**EVALUATION, field: "other"}])


@pytest.mark.parametrize("missing", ["judge", "real_manifold", "networks", "memorised"])
def test_a_file_in_which_a_figure_is_missing_is_no_evaluation(tmp_path: Path, missing: str) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert read_evaluation(tmp_path) == EVALUATION
    short = {name: value for name, value in EVALUATION.items() if name != missing}
    (tmp_path / "evaluation.json").write_text(json.dumps(short))
    with pytest.raises(ScriptError, match="is not what"):
        read_evaluation(tmp_path)
