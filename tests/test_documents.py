"""Figures in the documents are those that were measured: each stands in a JSON file beside them."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from model.checkpoint import SHIPPED, SHIPPED_FAST, load
from scripts.evaluation.tables import as_column, as_run, as_setting, as_sweep_row, read_evaluation

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FINAL = [  # the columns of the tables of 10,000 digits
    ("README.md", ("ddpm", "dpmpp", "dpmpp-off", "fast")),
    ("docs/model-card.md", ("ddpm", "dpmpp", "dpmpp-off")),
    ("docs/model-card.md", ("fast",)),
]


def named(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(DOCS)) for path in paths]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("document", "names"), FINAL)
def test_a_final_table_has_the_figures_of_its_evaluations(document: str, names: tuple[str, ...]) -> None:
    evaluations = [read_evaluation(DOCS / "final" / name) for name in names]
    columns = [*map(as_column, evaluations), as_column(evaluations[0], real=True)]
    rows = [cells(line) for line in (ROOT / document).read_text().splitlines() if line.startswith("|")]
    for name in columns[0]:
        assert [name, *(column[name] for column in columns)] in rows


@pytest.mark.parametrize(("shipped", "names"), [(SHIPPED, ("ddpm", "dpmpp", "dpmpp-off")), (SHIPPED_FAST, ("fast",))])
def test_the_final_figures_are_of_what_ships_and_stand_in_it(shipped: Path, names: tuple[str, ...]) -> None:
    loaded = load(shipped)
    evaluations = [read_evaluation(DOCS / "final" / name) for name in names]
    assert loaded.config.training["evaluation"] == evaluations
    for evaluation in evaluations:
        options = evaluation["options"]
        recommended = asdict(loaded.config.guidance_of(options["sampler"]))
        assert evaluation["weights_sha256"] == loaded.weights_sha256
        assert evaluation["num_images"] == 10_000
        assert options["guidance"] == recommended or options["guidance"]["scale"] == 1


@pytest.mark.parametrize("file", named(sorted((DOCS / "ladder").rglob("evaluation.json"))))
def test_each_evaluation_of_the_ladder_has_its_line(file: str) -> None:
    line = as_run("", read_evaluation(DOCS / file))[4:]  # its name and its setting may be said otherwise
    assert f"| {' | '.join(line)} |" in (DOCS / "ladder.md").read_text()


@pytest.mark.parametrize("file", named(sorted({*DOCS.rglob("guidance.json"), *DOCS.rglob("steps.json")})))
def test_each_setting_of_a_sweep_has_its_line(file: str) -> None:
    document = (DOCS / "ladder.md").read_text()
    for figures in json.loads((DOCS / file).read_text())["figures"]:
        assert f"| {' | '.join(as_sweep_row(as_setting(figures['options']), figures))} |" in document
