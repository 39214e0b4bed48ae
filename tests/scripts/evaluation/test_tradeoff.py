"""Tests that the plot of quality against latency shows the values in its input files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scripts import plot
from scripts.evaluation.tradeoff import MARKERS, NAMES, Setting, show_tradeoff

FINAL = Path(__file__).parents[3] / "docs" / "results" / "final"


def result(**milliseconds: float) -> dict[str, Any]:
    latencies = [(name, value * factor) for name, value in milliseconds.items() for factor in (0.9, 1, 1.2)]
    return {"rows": [{"load": name, "latencies": {"one": {"p50": value / 1000}}} for name, value in latencies]}


RATIOS = {"": 1.2, "clip": 0.9, "efficientnet": 1.5}


def test_markers_are_at_the_median_latency_and_the_ratio_of_each_space() -> None:
    settings = [Setting("ddpm", [210, 200, 260], 0.99, RATIOS), Setting("fast-1", [9, 8, 10], 0.98, {**RATIOS, "": 2})]
    (axes,) = show_tradeoff(settings).axes
    points = {
        tuple(map(float, line.get_xydata()[0]))
        for line in axes.lines
        if line.get_marker() in MARKERS.values() and len(line.get_xydata())
    }
    assert points == {(210, 1.2), (210, 0.9), (210, 1.5), (9, 2), (9, 0.9), (9, 1.5)}
    assert "default\n100 steps\n210 ms\n99.0%" in [text.get_text() for text in axes.texts]


def test_plot_reads_the_benchmark_and_the_evaluations(tmp_path: Path) -> None:
    file, out = tmp_path / "models.json", tmp_path / "tradeoff.png"
    file.write_text(json.dumps(result(**dict.fromkeys(NAMES, 50.0))))
    plot.main(["tradeoff", str(file), "--evaluations", str(FINAL), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")


def test_result_without_a_setting_and_other_files_give_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(FINAL / "ddpm" / "evaluation.json", tmp_path / "other.json")
    (tmp_path / "models.json").write_text(json.dumps(result(ddpm=50.0)))
    for name, message in (("other", "is not a result file"), ("models", "has no measurement of dpmpp-20")):
        with pytest.raises(SystemExit) as ended:
            plot.main(["tradeoff", str(tmp_path / f"{name}.json"), "--out", str(tmp_path / "out.png")])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
