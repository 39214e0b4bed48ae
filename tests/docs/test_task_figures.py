"""The tables in docs/tasks.md equal the results in docs/results/tasks."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import load
from model.recognition import DEFAULT_NUM_PAIRS, SHIPPED_READOUT
from model.spec import SHIPPED
from scripts.evaluation.denoising import as_row
from scripts.evaluation.noise_search import as_search_row
from tests.docs.document import tables_in

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/results/tasks"
PAGE = (ROOT / "docs/tasks.md").read_text("utf-8")

Table = list[list[str]]


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def recognition_rows() -> Table:
    """One row for each number of pairs, with all classes (up to 10 pairs) and with pruning."""
    every = {row["num_pairs"]: f"{row['accuracy']:.2%}" for row in read("recognize")["rows"] if not row["pruned"]}
    return [
        [
            str(row["num_pairs"]),
            every.get(row["num_pairs"], "-"),
            f"{row['accuracy']:.2%}",
            f"{row['evaluations_an_image']:.1f}",
            f"{row['share_of_calls']:.1%}",
            f"{row['calibration_error']:.2%}",
        ]
        for row in read("recognize-pruned")["rows"]
    ]


def rejection_rows() -> Table:
    """One row for each kind of picture that shows no digit."""
    kinds = read("recognize")["not_a_digit"].items()
    return [[name, f"{kind['missed']:.1%}", f"{kind['area']:.3f}"] for name, kind in kinds if name != "false alarms"]


def handwriting_rows() -> Table:
    """One row for each font or mouse style, and for each variant."""
    content = read("handwriting")
    return [[name, f"{share:.1%}"] for group in ("of_font", "of_variant") for name, share in content[group].items()]


def denoising_rows() -> Table:
    """One row for each noise level."""
    return [as_row(row) for row in read("denoise")["levels"]]


def noise_search_rows() -> Table:
    """One row for each noise level at which the digit is searched."""
    return [as_search_row(row) for row in read("denoise")["searches"]]


def inpainting_rows() -> Table:
    """One row for each mask, with and without the class."""
    return [
        [
            row["mask"],
            "given" if row["class_given"] else f"found: {row['guessed']:.1%}",
            f"{row['recognised']:.1%}",
            f"{row['border_ratio']:.2f}",
            f"{row['calls']:.0f}",
        ]
        for row in read("inpaint")["masks"]
    ]


def editing_rows() -> Table:
    """One row for each strength. The first half of the rows in the file has the class given."""
    rows = read("edit")["strengths"]
    given, found = ([row for row in rows if row["class_given"] == kind] for kind in (True, False))
    return [
        [
            f"{row['strength']:g}",
            str(row["t"]),
            f"{row['recognised']:.1%}",
            f"{other['recognised']:.1%}",
            f"{row['distance']:.2f}",
            f"{row['distance_from_real']:.2f}",
        ]
        for row, other in zip(given, found, strict=True)
    ]


TABLES = {  # first column of a table -> rows
    "pairs": recognition_rows,
    "picture": rejection_rows,
    "font, style or variant": handwriting_rows,
    "t": denoising_rows,
    "noise": noise_search_rows,
    "missing": inpainting_rows,
    "strength": editing_rows,
}


@pytest.mark.parametrize("column", TABLES)
def test_table_equals_the_results(column: str) -> None:
    (table,) = (table for table in tables_in(PAGE) if next(iter(table[0])) == column)
    assert [list(row.values()) for row in table] == TABLES[column]()


def test_results_are_those_of_the_shipped_weights_on_the_test_split() -> None:
    shipped = load(SHIPPED).weights_sha256
    for name in ("recognize", "recognize-pruned", "handwriting", "denoise", "inpaint", "edit"):
        content = read(name)
        assert content["weights_sha256"] == shipped, name
        assert content["split"] == "test", name
    assert len(read("recognize")["rows"][0]["confusion"]) == 10
    assert {read(name)["num_images"] for name in ("recognize", "recognize-pruned")} == {10_000}
    assert {read(name)["num_images"] for name in ("denoise", "inpaint")} == {1_000}


def test_pruned_results_are_the_same_as_those_of_the_errors_of_all_classes() -> None:
    after, before = (
        {row["num_pairs"]: row["wrong"] for row in read(name)["rows"] if row["pruned"]}
        for name in ("recognize", "recognize-pruned")
    )
    assert after == {pairs: wrong for pairs, wrong in before.items() if pairs <= max(after)}
    assert len(after) > 3


def test_known_pixels_never_change() -> None:
    assert {row["changed"] for row in read("inpaint")["masks"]} == {0}


def test_readme_states_the_recognition_with_the_default_number_of_pairs() -> None:
    (row,) = (row for row in read("recognize-pruned")["rows"] if row["num_pairs"] == DEFAULT_NUM_PAIRS)
    assert f"recognises digits ({row['accuracy']:.1%} correct)" in (ROOT / "README.md").read_text("utf-8")


def test_api_document_states_the_share_of_digits_that_are_taken_for_no_digit() -> None:
    share = read("recognize")["not_a_digit"]["false alarms"]
    stated = f"wrong for about {share:.1%} of MNIST's test digits"
    assert stated in (ROOT / "docs/api.md").read_text("utf-8")
    assert stated in (ROOT / "docs/openapi.json").read_text("utf-8")
    assert f"On the test split, {share:.1%} exceed it" in PAGE


def test_page_states_the_number_of_constants_that_recognition_needs() -> None:
    constants = json.loads(SHIPPED_READOUT.read_text())
    del constants["weights_sha256"]
    assert f"{num_numbers(list(constants.values())):,} constants that were fitted" in PAGE


def num_numbers(value: Any) -> int:
    """Returns the number of numbers in nested lists."""
    return sum(map(num_numbers, value)) if isinstance(value, list) else 1


def test_web_page_names_what_the_shipped_network_predicts() -> None:
    kind = load(SHIPPED).config.prediction.kind
    assert f"it predicts <i>{kind}</i>" in (ROOT / "app/api/web/index.html").read_text("utf-8")
    assert f"the network predicts {kind}, a mix of image and noise" in PAGE
