import json
from pathlib import Path
from typing import Any

import pytest

from scripts.common.errors import ScriptError
from scripts.evaluation.tables import across, as_run, check_comparable, read_evaluation

SEEN = {"accuracy": 0.99625, "per_class": [1.0] * 7 + [0.994, 1.0, 1.0]}
REAL_SEEN = {"accuracy": 0.997, "per_class": [1.0] * 6 + [0.9937, 1.0, 1.0, 1.0]}
EVALUATION: dict[str, Any] = {
    "options": {"sampler": "ddpm", "num_steps": 100, "guidance": {"scale": 3.0, "start": 20, "stop": 65}},
    "num_images": 10_000,
    "split": "test",
    "networks": {"judge": {"sha256": "0" * 64}},
    "judge": SEEN,
    "real_judge": REAL_SEEN,
    "extractor": {"accuracy": 0.9951, "per_class": [0.9951] * 10},
    "frechet": 0.07833,
    "real_frechet": 0.0467,
    "noise_frechet": 98.2,
    "frechet_ratio": 1.677,
    "manifold": {"precision": 0.8026, "recall": 0.7771, "coverage": 0.9228},
    "real_manifold": {"precision": 0.797, "recall": 0.817, "coverage": 0.944},
    "memorised": 0.0,
    "held_out_memorised": 0.0002,
}


def test_row_has_the_settings_and_the_metrics() -> None:
    line = as_run("mine", EVALUATION)
    assert line[:4] == ["mine", "ddpm", "100", "3 in 20-65"]
    assert line[4:] == ["99.51%", "99.62%", "99.4% (7)", "1.68", "0.803", "0.777", "0.923"]


def test_row_of_a_folder_has_unknown_settings() -> None:
    folder = {name: value for name, value in EVALUATION.items() if name != "options"}
    assert as_run("folder", folder)[1:4] == ["?", "?", "?"]


def test_across_has_a_column_per_evaluation_and_one_for_real_digits() -> None:
    lines = [line.strip("| ").split(" | ") for line in across({"one": EVALUATION, "two": EVALUATION}).splitlines()]
    assert lines[0] == ["one", "two", "real digits"]
    assert lines[2:] == [
        ["recognised as asked", "99.62%", "99.62%", "99.70%"],
        ["worst digit", "7: 99.4%", "7: 99.4%", "6: 99.4%"],
        ["Fréchet distance", "0.0783", "0.0783", "0.0467 (noise 98)"],
        ["ratio to real digits", "1.68", "1.68", "1"],
        ["precision", "0.803", "0.803", "0.797"],
        ["recall", "0.777", "0.777", "0.817"],
        ["coverage", "0.923", "0.923", "0.944"],
        ["memorised", "0.00%", "0.00%", "0.02%"],
    ]


def test_missing_distance_is_shown_as_a_dash(tmp_path: Path) -> None:
    missing = dict.fromkeys(("frechet", "real_frechet", "noise_frechet", "frechet_ratio"))
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION | missing))
    evaluation = read_evaluation(tmp_path)
    assert as_run("mine", evaluation)[7] == "-"
    lines = [line.strip("| ").split(" | ") for line in across({"one": evaluation}).splitlines()]
    assert ["Fréchet distance", "-", "-"] in lines
    assert ["ratio to real digits", "-", "1"] in lines


@pytest.mark.parametrize("field", ["num_images", "split", "networks"])
def test_evaluations_with_different_conditions_are_rejected(field: str) -> None:
    check_comparable([EVALUATION, EVALUATION])
    with pytest.raises(ScriptError, match=f"differ in {field}"):
        check_comparable([EVALUATION, {**EVALUATION, field: "other"}])


def test_ratios_in_further_spaces_have_rows_if_all_evaluations_have_them() -> None:
    newer = {**EVALUATION, "further_spaces": {"clip": {}}, "clip_frechet_ratio": 1.234, "judge_frechet_ratio": 5.0}
    check_comparable([EVALUATION, newer])
    assert "| ratio to real digits, CLIP | 1.23 | 1.23 | 1 |" in across({"one": newer, "two": newer})
    assert "CLIP" not in across({"one": newer, "two": EVALUATION})
    assert "judge" not in across({"one": newer})


@pytest.mark.parametrize("missing", ["judge", "real_manifold", "networks", "memorised"])
def test_evaluation_without_a_metric_is_rejected(tmp_path: Path, missing: str) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert read_evaluation(tmp_path) == EVALUATION
    short = {name: value for name, value in EVALUATION.items() if name != missing}
    (tmp_path / "evaluation.json").write_text(json.dumps(short))
    with pytest.raises(ScriptError, match="is not an evaluation"):
        read_evaluation(tmp_path)
