from pathlib import Path

import pytest

from scripts import bench
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint


def test_the_table_has_the_median_and_the_range_of_each_figure() -> None:
    assert bench.table({"speed": [3.0, 1.0, 2.0], "memory": [400.0]}).splitlines()[2:] == [
        "| speed | 2 | 1 - 3 |",
        "| memory | 400 | 400 - 400 |",
    ]


def test_a_real_service_is_started_measured_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LARGEST_REQUEST", 2)
    monkeypatch.setattr(bench, "BODY", {"digit": 7, "num_steps": 3})
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny.safetensors")
    figures = bench.measure(1, 2, {"UNFOG_CHECKPOINT": str(checkpoint), "UNFOG_NUM_THREADS": "1"})
    assert len(figures) == 7
    assert all(len(values) == 1 and values[0] > 0 for values in figures.values())


def test_a_service_is_gone_when_its_measurement_is_over_even_by_an_error(tmp_path: Path) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny.safetensors")
    with pytest.raises(KeyError), bench.started({"UNFOG_CHECKPOINT": str(checkpoint)}) as service:
        assert Path(f"/proc/{service.pid}").exists()
        raise KeyError
    assert not Path(f"/proc/{service.pid}").exists()


def test_a_service_that_does_not_start_is_one_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--repeats", "1", "--checkpoint", str(tmp_path / "missing.safetensors")])
    assert ended.value.code == 2
    assert "did not become ready" in capsys.readouterr().err
