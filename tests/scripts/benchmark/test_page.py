"""Tests of the page with the results of one machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import main
from scripts.benchmark.page import EXPLANATIONS, page_of
from scripts.benchmark.report import COLUMNS
from scripts.benchmark.training import TRAINING_COLUMNS
from scripts.benchmark.versions import COLUMNS as VERSION_COLUMNS
from scripts.common.errors import ScriptError
from tests.scripts.benchmark.test_report import row

MACHINE = {"processor": "A Processor", "cores": 2, "features": ["avx2"], "gpu": None, "torch": "2.13.0", "threads": 2}
TRAINING = {"limit": 200.0, "images_a_second": {"scripts.train": [50.0, 60.0, 70.0]}}
STEPS = {"rows": 8, "milliseconds": {"compiled": {"copies": 1.5, "whole": 4.0}}, "matrix_shares": [0.5]}


def write(folder: Path, **contents: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps({"machine": MACHINE, **content}))
    return folder


def test_page_has_the_machine_and_a_table_and_plot_of_each_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "there", training=TRAINING, steps=STEPS)
    (folder / "training.answers.json").write_text("[]")
    out = tmp_path / "epyc-7.1.md"
    pictures = tmp_path / "epyc-7.1"
    pictures.mkdir()
    (pictures / "training.png").touch()
    main(["page", str(folder), "--out", str(out)])
    page = out.read_text()
    assert page == page_of(folder, out)
    assert page.startswith("# Measured on epyc-7.1\n")
    assert "A Processor, 2 cores (avx2), no GPU, torch 2.13.0, 2 compute threads." in page
    assert page.index("## steps") < page.index("| copies | 1.50 |") < page.index("## training")
    assert "| scripts.train | 60 (50 - 70) | 30% |" in page
    assert page.index("- share of the limit: ") < page.index("## steps")
    assert "- service: " not in page
    assert "![training](epyc-7.1/training.png)" in page
    assert "answers" not in page
    assert "![steps]" not in page


def test_every_column_of_loads_trainings_and_versions_is_explained() -> None:
    assert {*COLUMNS, *TRAINING_COLUMNS, *VERSION_COLUMNS} <= set(EXPLANATIONS)


def test_page_of_loads_has_their_durations_and_the_matrix_rate(tmp_path: Path) -> None:
    loads = {
        "machine": {**MACHINE, "matrix_rate": 4e11},
        "seconds": {"window": 8, "settle": 2, "objective": 5.0},
        "rows": [row(0, "full", 12.5, one=1.0)],
    }
    page = page_of(write(tmp_path / "there", closed=loads, training=TRAINING), tmp_path / "page.md")
    assert "Each measurement took 8 s, after 2 s of load. Latency limit: 5 s. Matrix rate: 400 GFLOP/s." in page
    assert "| unfog | full | 12.5 | 6.25 | 1 | 2 | 3 | 8 | 5.0% | 300 |" in page


def test_page_has_a_table_of_two_versions(tmp_path: Path) -> None:
    found = {"load": "64 x 1 image", "pair": 0, "unit": "rows/s", "base": 100.0, "new": 95.0, "rows_a_step": [64, 44]}
    page = page_of(
        write(tmp_path / "there", versions={"seconds_in_a_pair": 24.0, "rows": [found]}), tmp_path / "page.md"
    )
    assert "| 64 x 1 image | rows/s | 100 | 95 | 0.95 | 64 and 44 |" in page


@pytest.mark.parametrize(
    "other",
    [
        {**TRAINING, "machine": {**MACHINE, "cores": 4}},
        {"limit": 1.0},
        {"machine": {}, **TRAINING},
        {"seconds": {"window": 8, "settle": 2, "objective": 5.0}, "rows": [row(0, "full", 12.5, one=1.0)]},
        {"minutes": 60.0, "megabytes": [323.1]},
    ],
    ids=["another machine", "no results", "no machine", "an interrupted run", "an hour of load"],
)
def test_files_that_are_not_results_of_one_machine_are_rejected(other: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "there", training=TRAINING, other=other)
    with pytest.raises(ScriptError):
        page_of(folder, tmp_path / "there.md")
    with pytest.raises(SystemExit):
        main(["page", str(folder), "--out", str(tmp_path / "there.md")])
    assert not (tmp_path / "there.md").exists()


def test_empty_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ScriptError):
        page_of(tmp_path, tmp_path / "page.md")
