import json
from pathlib import Path
from typing import Any

import pytest

from scripts import bench
from scripts.benchmark import contestants
from scripts.benchmark.contestants import BenchError, started, this_service
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The service that is measured draws with a tiny checkpoint."""
    path = save_tiny_checkpoint(tmp_path / "tiny.safetensors")
    for name, value in {"CHECKPOINT": str(path), "COMPILE": "off", "NUM_THREADS": "1"}.items():
        monkeypatch.setenv(f"UNFOG_{name}", value)
    monkeypatch.setattr(bench, "UNGUIDED", {"digit": 7, "guidance_scale": 1, "num_steps": 3})
    monkeypatch.setattr(bench, "LARGEST_REQUEST", 2)
    monkeypatch.setattr(bench, "matrix_rate", lambda device: 1e12)
    return path


def row(repeat: int, load: str, rate: float, **kinds: float) -> dict[str, Any]:
    latencies = {kind: {"p50": p50, "p95": 2 * p50, "p99": 3 * p50} for kind, p50 in kinds.items()}
    known = {"repeat": repeat, "contestant": "unfog", "load": load, "images_a_second": rate, "latencies": latencies}
    return {**known, "rows_a_step": 8.0, "resident_megabytes": 300.0, "ready_seconds": 2.0}


def test_the_table_has_the_median_and_the_range_over_repeats_a_line_a_kind_of_request() -> None:
    rows = [row(k, "mix", rate, short=rate / 10, long=rate) for k, rate in enumerate([3.0, 1.0, 2.0])]
    short, long = bench.table_of(rows)
    assert short[:4] == ["unfog", "mix: short", "2 (1 - 3)", "0.2 (0.1 - 0.3)"]
    assert long[1:6] == ["mix: long", "2 (1 - 3)", "2 (1 - 3)", "4 (2 - 6)", "6 (3 - 9)"]
    assert len(short) == len(bench.COLUMNS)


def test_a_real_service_is_started_measured_and_stopped(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    bench.main(["closed", "--repeats=2", "--seconds=1", "--clients", "1", "3", f"--out={out}"])
    content = json.loads(out.read_text())
    assert [found["load"] for found in content["rows"]] == 2 * [
        "clients: 1",
        "clients: 3",
        "clients: 2, of 64 images",
        "clients: 1, guided",
        "clients: 2, of 64 images, guided",
    ]
    assert all(found["images_a_second"] > 0 and found["resident_megabytes"] > 50 for found in content["rows"])
    assert all(1 <= found["rows_a_step"] <= 4 for found in content["rows"])
    assert content["machine"]["flop_a_call"] > 1e8
    assert capsys.readouterr().out.count("| unfog |") == 5


def test_what_is_not_asked_for_otherwise_is_unguided() -> None:
    assert bench.one(13).body == {"digit": 3, "seed": 13, "guidance_scale": 1}
    assert bench.guided(bench.many)(13).body == {"digit": 3, "seed": 13, "count": 64}
    assert [bench.mixed(k).kind for k in range(2)] == ["100 steps", "10 steps"]


def test_a_service_is_gone_when_its_measurement_is_over_even_by_an_error(tiny: Path) -> None:
    with pytest.raises(KeyError), started(this_service()) as running:
        assert Path(f"/proc/{running.pid}").exists()
        raise KeyError
    assert not Path(f"/proc/{running.pid}").exists()


def test_a_service_that_does_not_start_is_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNFOG_CHECKPOINT", str(tmp_path / "missing.safetensors"))
    with pytest.raises(SystemExit) as ended:
        bench.main(["closed", "--repeats=1", f"--out={tmp_path / 'bench.json'}"])
    assert ended.value.code == 2
    assert "did not become ready" in capsys.readouterr().err


def test_one_that_never_listens_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "START_SECONDS", 0.5)
    sleeper = contestants.Contestant("sleeper", ("-c", "import time; time.sleep(60)"))
    with pytest.raises(BenchError, match="sleeper did not become ready"), started(sleeper):
        pass
