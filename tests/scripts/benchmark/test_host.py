"""Tests of the comparison of host costs."""

from pathlib import Path

import pytest

from scripts import bench
from scripts.benchmark import host
from scripts.benchmark.host import host_table
from scripts.benchmark.page import table_in
from scripts.common.errors import ScriptError


def figures(milliseconds: float) -> host.Figures:
    return {"engine": {"step": milliseconds / 1e3}, "requests": {"one": 100.0}}


def test_table_has_medians_and_the_ratio_of_each_repeat() -> None:
    found = {"base": [figures(2), figures(4), figures(6)], "new": [figures(1), figures(1), figures(6)]}
    assert host_table(found) == [
        ["step", "ms", "4 (2 - 6)", "1 (1 - 6)", "0.5 (0.25 - 1)"],
        ["one", "1/s", "100 (100 - 100)", "100 (100 - 100)", "1 (1 - 1)"],
    ]


def test_page_shows_a_measurement_without_a_base() -> None:
    columns, lines = table_in({"host": {"new": [figures(1)]}})
    assert columns == ("figure", "unit", "new")
    assert lines == [["step", "ms", "1"], ["one", "1/s", "100"]]


def test_base_without_the_check_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        bench.main(["host", f"--base={tmp_path}", f"--out={tmp_path / 'host.json'}"])


@pytest.mark.parametrize("module", host.MODULES)
def test_failing_check_is_reported(tmp_path: Path, module: str) -> None:
    file = (tmp_path / module.replace(".", "/")).with_suffix(".py")
    file.parent.mkdir(parents=True)
    (tmp_path / module.partition(".")[0] / "__init__.py").touch()
    file.write_text("raise RuntimeError('out of order')")
    with pytest.raises(ScriptError, match=r"engine in .* failed: RuntimeError: out of order"):
        host._run("engine", tmp_path)


def test_service_of_the_check_answers_both_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CLIENTS", 2)
    monkeypatch.setattr(host, "LARGE_CLIENTS", 1)
    monkeypatch.setattr(host, "SETTLE_SECONDS", 0.0)
    rates = host._requests(Path.cwd(), 0.5)
    assert all(rate > 1 for rate in rates.values())
