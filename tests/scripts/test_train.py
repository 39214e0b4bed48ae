import csv
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from model import checkpoint
from scripts import distil, train
from scripts.training import loop
from scripts.training.loop import should_compile
from tests.scripts.tiny_training import NUM_STEPS, RECIPES, trust_idx_files, write_idx_files

ROOT = Path(__file__).parents[2]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with made-up data and recipes, trusted as if they were MNIST's."""
    folder = tmp_path_factory.mktemp("training")
    write_idx_files(folder / "data")
    for name, text in RECIPES.items():
        (folder / f"{name}.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        trust_idx_files(patch)
        yield folder


def arguments(workplace: Path, recipe: str, out: Path, *more: str) -> list[str]:
    fixed = ["--device", "cpu", "--compile", "off", "--num-threads", "1"]
    paths = ["--preset", str(workplace / f"{recipe}.toml"), "--data-dir", str(workplace / "data"), "--out", str(out)]
    return [*paths, *fixed, *more]


@pytest.fixture(scope="module")
def unbroken(workplace: Path) -> dict[str, Path]:
    """A whole run of each recipe."""
    for recipe in RECIPES:
        train.main(arguments(workplace, recipe, workplace / f"unbroken-{recipe}"))
    return {recipe: workplace / f"unbroken-{recipe}" for recipe in RECIPES}


def state_of(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "state.pt", weights_only=True)
    return state


def bits(value: Any, place: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of a nested state with its place; tensors down to their bits."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from bits(part, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from bits(part, f"{place}/{i}")
    elif isinstance(value, torch.Tensor):
        yield place, (value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist())
    else:
        yield place, value


def differences(one: Path, other: Path) -> list[str]:
    """Where the states of two runs differ in a bit, and which of their other files do."""
    a, b = dict(bits(state_of(one))), dict(bits(state_of(other)))
    assert any(place.startswith("/trainer/optimizer/state/0/exp_avg") for place in a)
    states = [place for place in sorted(a.keys() | b.keys()) if a.get(place) != b.get(place)]
    names = ["losses.csv", "model.safetensors", *(f"epochs/{epoch:02d}.png" for epoch in (1, 2, 3))]
    return states + [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


@pytest.mark.parametrize("script", [train, distil])
def test_compiling_without_a_compiler_is_one_sentence(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not should_compile("auto", torch.device("cpu"))
    with pytest.raises(SystemExit) as exit_:
        script.main(["--compile=on", "--device=cpu", f"--out={tmp_path}"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no 'no-such-compiler'" in line


@pytest.mark.parametrize(("recipe", "where"), [("cosine", "epoch"), ("plateau", "epoch"), ("cosine", "write")])
def test_a_run_that_was_killed_goes_on_bit_by_bit_as_if_never_stopped(
    workplace: Path, unbroken: dict[str, Path], recipe: str, where: str
) -> None:
    out = workplace / f"killed-{recipe}-{where}"
    argv = arguments(workplace, recipe, out)
    command = [sys.executable, "-m", "tests.scripts.tiny_training", where, "SIGKILL", *argv]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert state_of(out)["trainer"]["epoch"] == 1
    train.main(argv)
    assert state_of(out)["trainer"]["epoch"] == 3
    assert differences(out, unbroken[recipe]) == []


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_run_that_is_told_to_stop_says_how_it_goes_on(workplace: Path, number: str, status: int) -> None:
    out = workplace / f"stopped-{number}"
    command = [sys.executable, "-m", "tests.scripts.tiny_training", "epoch", number]
    stopped = subprocess.run(
        [*command, *arguments(workplace, "cosine", out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(getattr(signal, number), signal.SIG_DFL),  # these tests may run under nohup
    )
    assert stopped.returncode == status, stopped.stderr
    assert stopped.stderr.strip().splitlines() == ["train: stopped; start again to go on after the last whole epoch"]
    assert state_of(out)["trainer"]["epoch"] == 1


def test_a_state_of_another_release_is_one_sentence(workplace: Path, unbroken: dict[str, Path]) -> None:
    out = workplace / "older"
    out.mkdir()
    state = state_of(unbroken["cosine"])
    del state["trainer"]["optimizer"]
    torch.save(state, out / "state.pt")
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments(workplace, "cosine", out))
    assert exit_.value.code == 2


def test_the_same_seed_gives_the_same_run_and_another_seed_another(workplace: Path, unbroken: dict[str, Path]) -> None:
    train.main(arguments(workplace, "cosine", workplace / "again"))
    assert differences(workplace / "again", unbroken["cosine"]) == []
    train.main(arguments(workplace, "cosine", workplace / "other", "--seed", "1"))
    networks = [state_of(run)["trainer"]["network"] for run in (workplace / "other", unbroken["cosine"])]
    assert not any(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_a_time_limit_stops_between_epochs_and_the_next_start_goes_on(
    workplace: Path, unbroken: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that a reading moves on by a minute: the third epoch would begin in time and end too late."""
    minutes = iter(range(1000))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: 60.0 * next(minutes)))
    argv = arguments(workplace, "cosine", workplace / "limited", "--time-limit", "5")
    train.main(argv)
    assert state_of(workplace / "limited")["trainer"]["epoch"] == 2
    assert "the time limit is near: stopped after epoch 2" in capsys.readouterr().out
    train.main(argv)
    assert "going on after epoch 2" in capsys.readouterr().out
    assert differences(workplace / "limited", unbroken["cosine"]) == []


def test_a_finished_run_is_left_as_it_is(workplace: Path, unbroken: dict[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken["cosine"].rglob("*")}
    train.main(arguments(workplace, "cosine", unbroken["cosine"]))
    assert {path: path.stat().st_mtime_ns for path in unbroken["cosine"].rglob("*")} == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_leaves_losses_pictures_and_a_checkpoint(unbroken: dict[str, Path], recipe: str) -> None:
    run = unbroken[recipe]
    with (run / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["validation_loss"]) for row in rows]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:  # 20 images over 12 steps: the bands of three steps hold 6, 5, 6, 3 or so each
        bands = [float(row[f"validation_loss_band_{i}"]) for i in (1, 2, 3, 4)]
        assert min(bands) <= float(row["validation_loss"]) <= max(bands)
    for epoch in (1, 2, 3):
        with Image.open(run / f"epochs/{epoch:02d}.png") as image:
            assert (image.mode, image.size) == ("L", (10 * 28 * 2, 28 * 2))
    loaded = checkpoint.load(run / "model.safetensors")
    training, best = loaded.config.training, losses.index(min(losses)) + 1
    assert (training["preset"], training["seed"], training["epochs"]) == (recipe, 0, best)
    assert training["final_losses"]["validation"] == pytest.approx(min(losses), abs=1e-6)
    assert loaded.config.schedule.num_steps == NUM_STEPS


def test_fewer_epochs_than_the_presets_can_be_asked_for(workplace: Path) -> None:
    train.main(arguments(workplace, "plateau", workplace / "short", "--epochs", "1"))
    assert state_of(workplace / "short")["trainer"]["epoch"] == 1


def sentence(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said on stderr by a start that is refused with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        train.main(argv)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "nonsense"], "no preset 'nonsense'"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--time-limit", "0"], "--time-limit"),
        (["--time-limit", "nan"], "--time-limit"),
        (["--time-limit", "soon"], "--time-limit"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "--device meta"),
        (["--compile", "maybe"], "--compile"),
        (["--num-threads", "0"], "--num-threads"),
        (["--verbose"], "--verbose"),
        (["--out", "/dev/null"], "/dev/null"),
        (["--out", "/dev/null/run"], "/dev/null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_sentence(
    workplace: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert message in sentence(arguments(workplace, "cosine", workplace / "never", *more), capsys)
    assert not (workplace / "never").exists()


def test_a_run_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out" in sentence([], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what must be missing")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_gpu_that_is_not_there_is_one_sentence(
    workplace: Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    argv = arguments(workplace, "cosine", workplace / "never", "--device", device)
    assert f"--device {device}: no CUDA device is there" in sentence(argv, capsys)


def test_a_damaged_data_file_is_one_sentence(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_idx_files(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"damaged")
    argv = arguments(workplace, "cosine", workplace / "never", "--data-dir", str(tmp_path))
    assert "train-labels-idx1-ubyte is damaged" in sentence(argv, capsys)


@pytest.mark.parametrize("folder", ["cosine.toml", "missing"])
def test_a_data_folder_that_cannot_be_read_is_one_sentence(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    argv = arguments(workplace, "cosine", workplace / "never", "--data-dir", str(workplace / folder))
    assert f"no MNIST files in {workplace / folder}" in sentence(argv, capsys)


@pytest.mark.parametrize("recipe", ["cosine", "plateau"])
def test_the_folder_of_another_run_is_refused_and_kept(
    workplace: Path, unbroken: dict[str, Path], capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    before = (unbroken["cosine"] / "state.pt").read_bytes()
    argv = arguments(workplace, recipe, unbroken["cosine"], "--seed", "1")
    assert "holds a run of another recipe, seed or data" in sentence(argv, capsys)
    assert (unbroken["cosine"] / "state.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "a list"])
def test_a_damaged_state_is_one_sentence(
    workplace: Path, unbroken: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    state = tmp_path / "state.pt"
    content = (unbroken["cosine"] / "state.pt").read_bytes()
    state.write_bytes({"truncated": content[:-500], "empty": b""}.get(damage, b""))
    if damage == "foreign":
        torch.save({"weight": torch.ones(3)}, state)
    if damage == "a list":
        torch.save([1, 2], state)
    assert f"{state} cannot be read" in sentence(arguments(workplace, "cosine", tmp_path), capsys)
