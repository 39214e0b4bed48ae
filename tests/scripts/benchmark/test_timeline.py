"""Timelines of batching per step and per request, compared with times computed by hand."""

from pathlib import Path

import pytest

from scripts import plot
from scripts.benchmark.timeline import (
    EXAMPLE,
    Request,
    Span,
    batched_by_request,
    batched_by_step,
    show_timeline,
)


def constant(rows: float) -> float:
    return 1.0


def proportional(rows: float) -> float:
    return rows


def test_a_request_joins_the_running_batch_at_the_next_step() -> None:
    requests = [Request("A", 0, 10), Request("B", 2.5, 3)]
    assert batched_by_step(requests, constant) == [Span(0, 10), Span(3, 6)]


def test_steps_take_longer_while_two_requests_share_them() -> None:
    requests = [Request("A", 0, 4), Request("B", 1, 2)]
    assert batched_by_step(requests, proportional) == [Span(0, 6), Span(1, 5)]


def test_a_request_waits_for_the_end_of_the_batch_before_it() -> None:
    requests = [Request("A", 0, 10), Request("B", 2.5, 3)]
    assert batched_by_request(requests, constant) == [Span(0, 10), Span(10, 13)]


def test_a_short_request_is_answered_with_the_longest_of_its_batch() -> None:
    requests = [Request("A", 0, 2), Request("B", 1, 1), Request("C", 1, 5)]
    assert batched_by_request(requests, proportional) == [Span(0, 2), Span(2, 8), Span(2, 8)]


@pytest.mark.parametrize("simulate", [batched_by_step, batched_by_request])
def test_the_simulation_waits_for_the_first_and_for_later_arrivals(simulate: object) -> None:
    requests = [Request("A", 5, 2), Request("B", 20, 1)]
    assert simulate(requests, constant) == [Span(5, 7), Span(20, 21)]  # type: ignore[operator]


def test_the_figure_has_a_bar_and_a_latency_for_each_request() -> None:
    pytest.importorskip("matplotlib")
    panels = show_timeline(lambda rows: 0.0029).axes
    for axes in panels:
        assert len(axes.patches) == 2 * len(EXAMPLE)
        assert sum(text.get_text().endswith(" ms") for text in axes.texts) == len(EXAMPLE)
    assert [text.get_text() for text in panels[0].texts] == ["290 ms", "30 ms", "292 ms", "31 ms"]
    assert [text.get_text() for text in panels[1].texts].count("waits") == 3


def test_result_without_step_times_gives_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench.json").write_text('{"rows": []}')
    with pytest.raises(SystemExit) as ended:
        plot.main(["timeline", str(tmp_path / "bench.json"), "--out", str(tmp_path / "timeline.png")])
    assert ended.value.code == 2
    assert "has no step times" in capsys.readouterr().err
