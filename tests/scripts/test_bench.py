import json
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from model.step import Rows, State, Stepped
from scripts import bench
from scripts.benchmark import batches, endurance, loads, memory, modes, services, simulation, training, versions
from scripts.benchmark.alternatives.painter import Painter
from scripts.benchmark.loads import Load
from scripts.benchmark.measurement import Times
from scripts.benchmark.services import Contestant, started, this_service
from scripts.benchmark.simulation import SimulatedRequest
from scripts.common.errors import ScriptError
from tests.scripts.forked_service import ForkedService
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.scripts.tiny_training import RECIPES, trust_idx_files, write_idx_files

OPEN_LOAD = "70% of the slower service's capacity"
LITSERVE = [" ".join(["litserve", *options]) for options in modes.LITSERVE]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the measured service use a tiny checkpoint."""
    path = save_tiny_checkpoint(tmp_path / "tiny.safetensors")
    variables = {"CHECKPOINT": str(path), "CLIP": "off", "COMPILE": "off", "NUM_THREADS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"UNFOG_{name}", value)
    monkeypatch.setattr(loads, "UNGUIDED", {"digit": 7, "guidance_scale": 1, "num_steps": 3})
    monkeypatch.setattr(loads, "LARGEST_REQUEST", 2)
    monkeypatch.setattr(modes, "matrix_rate", lambda device: 1e12)
    return path


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the measured services forks. Other tests of this file start them as a user does."""
    monkeypatch.setattr(services.subprocess, "Popen", ForkedService)


def test_memory_is_that_of_a_loaded_service(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "SETTINGS", {"without CLIP": "off"})
    monkeypatch.setattr(memory, "NUM_STEPS", 3)
    monkeypatch.setattr(memory, "SAMPLE_SECONDS", 0.001)
    bench.main(["memory", f"--out={tmp_path / 'memory.json'}"])
    found = json.loads((tmp_path / "memory.json").read_text())["mebibytes"]["without CLIP"]
    assert 50 < found["service"] == found["sum"] < 2000
    assert found["child"] == 0
    assert f"without CLIP: service {found['service']} MiB, child process 0 MiB" in capsys.readouterr().out


def test_closed_measures_a_real_service(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    bench.main(["closed", "--repeats=1", "--seconds=1", "--settle=0", "--clients", "1", "3", f"--out={out}"])
    content = json.loads(out.read_text())
    assert [found["load"] for found in content["rows"]] == [
        "1 x 1 image",
        "3 x 1 image",
        "2 x 2 images",
        "1 x 1 image with 1 x 2",
        "1 x 1 image, guided",
        "1 x 1 image with 1 x 2, guided",
        "2 x 2 images, guided",
        "2 x 2 images, another process on one core",
        "2 x 2 images, a flood of GET /livez",
    ]
    assert all(found["images_a_second"] > 0 and found["resident_megabytes"] > 50 for found in content["rows"])
    assert all(1 <= found["rows_a_step"] <= 4 for found in content["rows"])
    assert all(0 < found["outside_network"] < 1 for found in content["rows"])
    assert content["machine"]["flop_a_call"] > 1e8
    assert content["machine"]["matrix_rate"] == 1e12
    assert all(found["adjacent"] == [{"matrix_rate": 1e12}] * 2 for found in content["rows"])
    assert [("matrix_share" in found) for found in content["rows"]] == [True] * 4 + [False] * 3 + [True] * 2
    answers = json.loads(out.with_suffix(".answers.json").read_text())
    assert [load for _, load, *_ in answers] == [found["load"] for found in content["rows"]]
    assert capsys.readouterr().out.count("| unfog |") == 9 + 2  # two loads have two kinds of requests


@pytest.mark.slow  # it measures two services
@pytest.mark.usefixtures("forks")
def test_versions_compares_two_services(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(versions, "SPREAD_SECONDS", 0.2)
    out = tmp_path / "versions.json"
    setting = "--setting=UNFOG_MAX_BATCH=1"
    bench.main(["versions", f"--base={Path.cwd()}", setting, "--pairs=1", "--seconds=2", f"--out={out}"])
    found = json.loads(out.read_text())["rows"]
    base_rows, new_rows = found[0]["rows_a_step"]
    assert base_rows > 1
    assert new_rows == 1
    assert [row["load"] for row in found] == ["64 x 1 image", "2 x 2 images", "1 x 1 image", "1 x 1 image and 1 x 2"]
    assert all(row["base"] > 0 and row["new"] > 0 for row in found)
    assert "| load | unit | base | new | ratio | rows per step |" in capsys.readouterr().out


@pytest.mark.slow  # it measures a real service
@pytest.mark.usefixtures("forks")
def test_batches_measures_requests_alone_and_while_a_batch_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batches, "SETTLE_SECONDS", 0.0)
    out = tmp_path / "batches.json"
    bench.main(["batches", "--repeats=1", "--seconds=1.5", f"--out={out}"])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["batch_rows"] > 0
    assert row["alone"] > 0
    for client in row["clients"].values():
        assert 0 < client["busy"] < 1
        assert min(client["alone"] + client["with_batch"]) > 0
    assert "| client | p95 alone, s | p95 with a batch, s | ratio |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_streams_compares_previews_and_batch_events_with_plain_requests(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(versions, "SPREAD_SECONDS", 0.2)
    out = tmp_path / "streams.json"
    bench.main(["streams", "--pairs=1", "--seconds=2", f"--out={out}"])
    assert [row["load"] for row in json.loads(out.read_text())["rows"]] == [
        "16 x 1 image, 10 previews",
        "2 x 2 images, 10 previews",
        "16 x 1 image, batch events",
        "2 x 2 images, batch events",
    ]
    assert "| load | unit | base | new | ratio | rows per step |" in capsys.readouterr().out


def test_setting_without_a_name_of_the_service_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["versions", f"--base={tmp_path}", "--setting=8", f"--out={tmp_path / 'versions.json'}"])
    assert "'8' is not a setting" in capsys.readouterr().err


def test_folder_without_a_version_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["versions", f"--base={tmp_path}", f"--out={tmp_path / 'versions.json'}"])
    assert "is not a version of the service" in capsys.readouterr().err


@pytest.mark.usefixtures("forks")
def test_quick_measures_three_loads_on_one_start(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(modes, "QUICK_SECONDS", 1)
    starts: list[str] = []

    def start(contestant: Contestant) -> Any:
        starts.append(contestant.name)
        return started(contestant)

    monkeypatch.setattr(modes, "started", start)
    bench.main(["--quick"])
    output = capsys.readouterr().out
    assert starts == ["unfog"]
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["1 x 1 image", "8 x 1 image", "1 x 2 images"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])
    assert "not compiled" in output
    assert "not comparable with the published figures" in output


@pytest.mark.slow
def test_quick_takes_less_than_a_minute(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Needs an idle machine that generates at least four images per second with a compiled step."""
    monkeypatch.setenv("UNFOG_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    command = [sys.executable, "-m", "scripts.bench", "--quick"]
    subprocess.run([sys.executable, "-m", "app", "--compile"], check=True, capture_output=True)
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    "arguments", [[], ["--quick", "closed", "--out=x.json"], ["closed", "--quick", "--out=x.json"]]
)
def test_quick_and_a_mode_exclude_each_other_and_one_is_required(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("mode", "absent"),
    [
        ("--quick", "psutil"),
        ("closed", "psutil"),
        ("open", "psutil"),
        ("endurance", "psutil"),
        ("endurance", "scipy"),
        ("alternatives", "litserve"),
        ("alternatives --requests=large", "diffusers"),
    ],
)
def test_missing_package_gives_an_error_before_the_measurement(
    mode: str, absent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("psutil", "scipy", "litserve", "diffusers"):
        present = types.ModuleType(name)
        present.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, None if name == absent else present)
    monkeypatch.setattr(modes, "matrix_rate", lambda device: pytest.fail("measured"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(SystemExit) as exit_:
        bench.main([*mode.split(), *(["--out=x.json"] if mode != "--quick" else [])])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"{absent} is not installed. Install with: pip install -e '.[bench]'\n"


@pytest.mark.usefixtures("forks")
def test_open_has_predictions_of_a_simulation(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FastPainter:
        """A painter whose steps take almost no time."""

        def measure_steps(self, rows: Sequence[int]) -> dict[int, float]:
            return dict.fromkeys(rows, 1e-9)

    out = tmp_path / "bench.json"
    monkeypatch.setattr(modes, "SATURATING", 4)
    monkeypatch.setattr(simulation, "NUM_STEPS", 3)
    monkeypatch.setattr(modes, "Painter", FastPainter)
    monkeypatch.setattr(simulation, "simulate_batches", lambda *_: [SimulatedRequest(0.5, 7.5)])
    bench.main(["open", "--repeats=1", "--seconds=2", "--settle=0", "--shares", "0.5", f"--out={out}"])
    saturated, half = json.loads(out.read_text())["rows"]
    assert half["rate"] == pytest.approx(0.5 * saturated["images_a_second"])
    assert half["predicted_p95"] == pytest.approx(3e-9)  # no two requests overlap
    assert half["replayed_p95"] > 1000 * half["predicted_p95"]  # the replay uses the step times of the service
    assert half["latencies"]["one"]["p95"] > half["predicted_p95"]
    assert half["batched_p95"] == 7.0
    *_, moments = json.loads(out.with_suffix(".answers.json").read_text())[1]
    assert all(first < last for first, last in zip(moments[0], moments[-1], strict=True))


def test_measure_steps_measures_each_number_of_rows(tiny: Path) -> None:
    painter, calls = Painter(tiny, compiled=False), list[int]()
    step = painter._step

    def slow_step(state: State, plans: Tensor, rows: Rows) -> Stepped:
        calls.append(len(rows.slots))
        time.sleep(0.0001 * calls[-1])
        return step(state, plans, rows)

    painter._step = slow_step
    seconds = painter.measure_steps((1, 64))
    assert calls == [1, 64] * (len(calls) // 2)
    assert all(seconds[rows] >= 0.0001 * rows for rows in (1, 64))


@pytest.mark.slow  # it measures a real service
@pytest.mark.usefixtures("forks")
def test_endurance_measures_a_service_under_mixed_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_tiny_checkpoint(tmp_path / "tiny.safetensors", num_steps=100)
    variables = {"CHECKPOINT": str(path), "CLIP": "off", "COMPILE": "off", "NUM_THREADS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"UNFOG_{name}", value)
    monkeypatch.setattr(endurance, "SAMPLE_SECONDS", 1.0)
    monkeypatch.setattr(endurance, "REST_SECONDS", 3.0)
    monkeypatch.setenv("UNFOG_READ_TIMEOUT", "1")
    out = tmp_path / "endurance.json"
    bench.main(["endurance", "--minutes=0.1", f"--out={out}"])
    found = json.loads(out.read_text())
    assert set(found["answers"]) <= {"0", "200", "422", "429"}
    assert found["answers"]["200"]
    assert found["pictures"] == 1
    assert min(found["megabytes"]) > 50
    assert min(found["descriptors"]) > 5
    assert min(found["threads"]) > 1
    assert "Growth per hour in the second half" in capsys.readouterr().out


def test_training_measures_both_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_idx_files(tmp_path / "data")
    trust_idx_files(monkeypatch)
    (tmp_path / "tiny.toml").write_text(RECIPES["cosine"])
    uncompiled = ("scripts.train, not compiled", "a plain loop")
    monkeypatch.setattr(training, "CONTESTANTS", uncompiled)
    monkeypatch.setattr(training, "matrix_rate", lambda device: 1e12)
    out, preset, data = tmp_path / "out.json", f"--preset={tmp_path / 'tiny.toml'}", f"--data-dir={tmp_path / 'data'}"
    bench.main(["training", "--repeats=2", "--steps=6", preset, data, f"--out={out}"])
    content = json.loads(out.read_text())
    assert set(content["images_a_second"]) == set(uncompiled)
    assert all(len(rates) == 2 and min(rates) > 0 for rates in content["images_a_second"].values())
    assert capsys.readouterr().out.count("%") == 2


def test_requests_are_unguided_by_default() -> None:
    assert loads.one(13).body == {"digit": 3, "seed": 13, "guidance_scale": 1}
    assert loads.guided(loads.many)(13).body == {"digit": 3, "seed": 13, "count": 64}
    assert [loads.mixed(k).kind for k in range(2)] == ["100 steps", "10 steps"]


def test_service_is_stopped_after_an_error_in_the_measurement(tiny: Path) -> None:
    with pytest.raises(KeyError), started(this_service()) as running:
        assert psutil.pid_exists(running.pid)
        raise KeyError
    assert not psutil.pid_exists(running.pid)


def test_service_that_does_not_start_gives_an_error_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNFOG_CHECKPOINT", str(tmp_path / "missing.safetensors"))
    with pytest.raises(SystemExit) as ended:
        bench.main(["closed", "--repeats=1", f"--out={tmp_path / 'bench.json'}"])
    assert ended.value.code == 2
    assert "did not become ready" in capsys.readouterr().err


def test_service_that_never_listens_gives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "START_SECONDS", 0.5)
    sleeper = Contestant("sleeper", ("-c", "import time; time.sleep(60)"))
    with pytest.raises(ScriptError, match="sleeper did not become ready"), started(sleeper):
        pass


def test_turns_of_a_start_count_as_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[list[int]] = []

    def take_turns(
        contestants: object, loads: object, times: object, repeats: range, measure_machine: object
    ) -> Iterator[Any]:
        starts.append(list(repeats))
        if len(starts) == 2:
            raise ScriptError("enough")
        yield from ()

    monkeypatch.setattr(modes, "take_turns", take_turns)
    with pytest.raises(SystemExit):
        bench.main(["closed", "--repeats=2", "--turns=3", f"--out={tmp_path / 'bench.json'}"])
    assert starts == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "wrong",
    [["open", "--shares", "0"], ["open", "--shares=-0.5"], ["endurance", "--minutes=0"], ["closed", "--objective=nan"]],
)
def test_number_out_of_range_gives_an_error(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main([*wrong, f"--out={tmp_path / 'out.json'}"])
    assert "is not a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("requests", "others", "open_loads"),
    [
        ("small", {"batched", *LITSERVE}, {OPEN_LOAD, f"{OPEN_LOAD}, half with 10 steps"}),
        ("large", {*LITSERVE, "diffusers", "diffusers-tuned", "diffusers-compiled"}, set[str]()),
    ],
)
def test_alternatives_are_measured_under_the_same_loads(
    requests: str, others: set[str], open_loads: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {"unfog": 20.0, "unfog, 8 rows": 90.0, "locked": 1.0, "batched": 5.0, LITSERVE[0]: 30.0, LITSERVE[1]: 10.0}

    def take_turns(
        contestants: Sequence[Contestant], loads: Sequence[Load], times: Times, repeats: range, measure_machine: object
    ) -> Iterator[dict[str, Any]]:
        for repeat, load, contestant in product(repeats, loads, contestants):
            yield {
                "contestant": contestant.name,
                "load": load.name,
                "repeat": repeat,
                "rate": load.rate,
                "is_plain": True,
                "images_a_second": speed.get(contestant.name, 2.0),
                "latencies": {"one": {"p50": 1.0, "p95": 2.0, "p99": 3.0}},
                "adjacent": [{"matrix_rate": 1e12}],
                "answers": [],
                "moments": [],
            }

    monkeypatch.setattr(modes, "take_turns", take_turns)
    monkeypatch.setattr(bench, "require_installed", lambda *packages, extra: None)  # nothing is started here
    out = tmp_path / "bench.json"
    bench.main(["alternatives", f"--requests={requests}", "--repeats=2", "--max-batch=8", f"--out={out}"])
    rows = json.loads(out.read_text())["rows"]
    named = {load: {row["contestant"] for row in rows if row["load"] == load} for load in {row["load"] for row in rows}}
    own = {"unfog", "unfog, 8 rows"}
    saturating = "2 x 64 images" if requests == "large" else "64 x 1 image"
    assert named.pop(saturating) == own | others | ({"locked"} if requests == "small" else set())
    assert named == dict.fromkeys(open_loads, own | others)
    assert {row["rate"] for row in rows} - {0.0} == ({0.7 * 20.0} if open_loads else set())
