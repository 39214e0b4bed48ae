"""Plots show the values of their rows."""

from pathlib import Path
from typing import Any

import pytest

from model.files import write_json
from scripts import plot
from scripts.benchmark.figures import show_bench


def row(repeat: int, contestant: str, load: str, images: float, **more: Any) -> dict[str, Any]:
    latencies = {"one": {"p50": 1 / images, "p95": 2 / images, "p99": 3 / images}}
    return {
        "repeat": repeat,
        "contestant": contestant,
        "load": load,
        "images_a_second": images + repeat,
        "goodput": images / 2,
        "latencies": latencies,
        **more,
    }


BARS = [row(k, name, "64 x 1 image", rate) for k in range(3) for name, rate in (("unfog", 9.0), ("other", 3.0))]
LINES = [row(k, "unfog", f"{rate}", rate, rate=rate, predicted_p95=1.5) for k in range(3) for rate in (2.0, 5.0, 8.0)]


def test_facets_show_the_median_of_each_service_under_each_load() -> None:
    arrivals = [
        row(k, name, "0.7", rate, rate=5.0) for k in range(3) for name, rate in (("unfog", 8.0), ("other", 4.0))
    ]
    throughput, latency = show_bench([*BARS, *arrivals]).axes
    assert [label.get_text() for label in throughput.get_yticklabels()] == ["unfog", "other"]
    assert [bar.get_width() for bar in throughput.patches] == [10.0, 4.0]
    assert [bar.get_width() for bar in latency.patches] == [0.25, 0.5]
    assert (throughput.get_xlabel(), latency.get_xlabel()) == ("images/s", "p95 latency, s")


def test_loads_of_one_service_are_split_into_throughput_and_latency() -> None:
    loads = (("64 x 1 image", 8.0), ("1 x 1 image", 4.0), ("1 x 1 image with 1 x 64", 2.0))
    throughput, latency = show_bench([row(k, "unfog", load, rate) for k in range(3) for load, rate in loads]).axes
    assert [bar.get_width() for bar in throughput.patches] == [9.0]
    assert [bar.get_width() for bar in latency.patches] == [0.25, 0.5]
    assert [label.get_text() for label in latency.get_yticklabels()] == ["1 x 1 image", "1 x 1 image with 1 x 64"]


def test_open_loop_is_plotted_as_lines_with_the_simulation() -> None:
    saturated = row(0, "unfog", "64 x 1 image", 9.0)  # the measurement of the capacity is not plotted
    latency, rate = show_bench([saturated, *LINES]).axes
    lines = {line.get_label(): line for line in latency.lines}
    assert set(lines) == {"p50", "p95", "p95, simulated"}
    assert lines["p95"].get_xdata().tolist() == [2.0, 5.0, 8.0]
    assert lines["p95"].get_ydata().tolist() == pytest.approx([1.0, 0.4, 0.25])
    assert {line.get_label() for line in rate.lines} == {"answered", "answered in time", "requested"}


@pytest.mark.parametrize("rows", [BARS, LINES], ids=["bars", "lines"])
def test_plot_bench_writes_a_png(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_json(tmp_path / "bench.json", {"rows": rows})
    plot.main(["bench", str(tmp_path / "bench.json"), "--out", str(tmp_path / "bench.png")])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"rows": [{}]}'])
def test_other_file_gives_an_error_of_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        plot.main(["bench", str(tmp_path / "bench.json"), "--out", str(tmp_path / "bench.png")])
    assert ended.value.code == 2
    assert "is not a result file of scripts.bench" in capsys.readouterr().err
