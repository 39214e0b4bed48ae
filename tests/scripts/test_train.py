import csv
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from scripts import distil, train
from scripts.common.data.data_set import DataSet, ImageSet
from scripts.common.mnist import load_mnist, split_validation
from scripts.training import loop
from scripts.training.loop import should_compile
from scripts.training.recipe import load_recipe
from scripts.training.run import stop_message
from scripts.training.trainer import Trainer
from tests.scripts.common.data.samples import NAMES, SIZE, write_folder
from tests.scripts.tiny_training import NUM_STEPS, RECIPES, trust_idx_files, write_idx_files

ROOT = Path(__file__).parents[2]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with recipes and generated IDX files, which replace MNIST."""
    folder = tmp_path_factory.mktemp("training")
    write_idx_files(folder / "data")
    for name, text in RECIPES.items():
        (folder / f"{name}.toml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        trust_idx_files(patch)
        yield folder


def arguments(data_folder: Path, recipe: str, out: Path, *more: str) -> list[str]:
    fixed = ["--device", "cpu", "--compile", "off", "--num-threads", "1"]
    paths = [
        "--preset",
        str(data_folder / f"{recipe}.toml"),
        "--data-dir",
        str(data_folder / "data"),
        "--out",
        str(out),
    ]
    return [*paths, *fixed, *more]


@pytest.fixture(scope="module")
def complete_runs(data_folder: Path) -> dict[str, Path]:
    """An uninterrupted run of each recipe."""
    for recipe in RECIPES:
        train.main(arguments(data_folder, recipe, data_folder / f"complete_runs-{recipe}"))
    return {recipe: data_folder / f"complete_runs-{recipe}" for recipe in RECIPES}


def state_of(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "state.pt", weights_only=True)
    return state


def bits(value: Any, place: str = "") -> Iterator[tuple[str, object]]:
    """Yields every leaf of a nested state with its path. Tensors are converted to bytes."""
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
    """Returns the state entries and the files in which two runs differ."""
    a, b = dict(bits(state_of(one))), dict(bits(state_of(other)))
    assert any(place.startswith("/trainer/optimizer/state/0/exp_avg") for place in a)
    states = [place for place in sorted(a.keys() | b.keys()) if a.get(place) != b.get(place)]
    names = ["losses.csv", "model.safetensors", *(f"epochs/{epoch:02d}.png" for epoch in (1, 2, 3))]
    return states + [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


@pytest.mark.parametrize("script", [train, distil])
def test_compile_on_without_a_compiler_gives_a_one_line_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not should_compile("auto", torch.device("cpu"))
    with pytest.raises(SystemExit) as exit_:
        script.main(["--compile=on", "--device=cpu", f"--out={tmp_path}"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs a C++ compiler, but 'no-such-compiler' was not found" in line


@pytest.mark.parametrize(("wanted", "expected"), [("auto", False), ("off", False), ("on", True)])
def test_step_is_compiled_on_a_gpu_only_on_request(
    monkeypatch: pytest.MonkeyPatch, wanted: str, expected: bool
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert should_compile(wanted, torch.device("cuda")) is expected


def test_run_killed_while_it_writes_resumes_with_the_same_bits_as_an_uninterrupted_run(
    data_folder: Path, complete_runs: dict[str, Path]
) -> None:
    out = data_folder / "killed"
    argv = arguments(data_folder, "cosine", out)
    command = [sys.executable, "-m", "tests.scripts.tiny_training", "write", "SIGKILL", *argv]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert state_of(out)["trainer"]["epoch"] == 1
    train.main(argv)
    assert state_of(out)["trainer"]["epoch"] == 3
    assert differences(out, complete_runs["cosine"]) == []


def stop_training(
    data_folder: Path, out: Path, where: str, number: str, recipe: str = "cosine"
) -> subprocess.CompletedProcess[str]:
    """Trains until the signal. `where` is that of tiny_training.end_at."""
    command = [sys.executable, "-m", "tests.scripts.tiny_training", where, number]
    compiled = "--compile=on" if where == "compile" else "--compile=off"
    return subprocess.run(
        [*command, *arguments(data_folder, recipe, out, compiled)],
        cwd=ROOT,
        env=os.environ | {"CXX": sys.executable},  # a program that exists
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(getattr(signal, number), signal.SIG_DFL),  # nohup ignores SIGHUP
        timeout=100,
    )


@pytest.mark.parametrize(("number", "status", "recipe"), [("SIGINT", 130, "cosine"), ("SIGHUP", 129, "plateau")])
def test_stopped_run_prints_how_to_resume_and_resumes_with_the_same_bits(
    data_folder: Path, complete_runs: dict[str, Path], number: str, status: int, recipe: str
) -> None:
    """test_stopping.py sends SIGTERM."""
    out = data_folder / f"stopped-{number}"
    stopped = stop_training(data_folder, out, "epoch", number, recipe)
    assert stopped.returncode == status, stopped.stderr
    assert stopped.stderr.strip().splitlines() == [
        "train: stopped; run the same command again to resume from the last saved state"
    ]
    assert state_of(out)["trainer"]["epoch"] == 1
    train.main(arguments(data_folder, recipe, out))
    assert differences(out, complete_runs[recipe]) == []


def test_run_stopped_while_compiling_ends_without_a_promise_to_resume(data_folder: Path) -> None:
    out = data_folder / "stopped-compile"
    stopped = stop_training(data_folder, out, "compile", "SIGINT")
    assert (
        stopped.stderr.strip() == "train: stopped before a state was saved; the same command starts from the beginning"
    )
    assert stopped.returncode == 130
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (None, "stopped before a state was saved; the same command starts from the beginning"),
        ("model.safetensors", "stopped before a state was saved; the same command starts from the beginning"),
        (
            "teacher/0000000.safetensors",
            "stopped; run the same command again to resume with the images that are complete",
        ),
        ("state.pt", "stopped; run the same command again to resume from the last saved state"),
    ],
)
def test_message_of_a_stopped_run_depends_on_its_files(tmp_path: Path, file: str | None, message: str) -> None:
    if file:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert stop_message("distil", tmp_path) == f"distil: {message}"


def test_state_of_another_release_exits_with_status_2(data_folder: Path, complete_runs: dict[str, Path]) -> None:
    out = data_folder / "older"
    out.mkdir()
    state = state_of(complete_runs["cosine"])
    del state["trainer"]["optimizer"]
    torch.save(state, out / "state.pt")
    with pytest.raises(SystemExit) as exit_:
        train.main(arguments(data_folder, "cosine", out))
    assert exit_.value.code == 2


def test_same_seed_gives_the_same_run_and_another_seed_does_not(
    data_folder: Path, complete_runs: dict[str, Path]
) -> None:
    train.main(arguments(data_folder, "cosine", data_folder / "again"))
    assert differences(data_folder / "again", complete_runs["cosine"]) == []
    train.main(arguments(data_folder, "cosine", data_folder / "other", "--seed", "1"))
    networks = [state_of(run)["trainer"]["network"] for run in (data_folder / "other", complete_runs["cosine"])]
    assert not any(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


@pytest.mark.parametrize(("minutes", "epoch", "num_done"), [(0.5, 1, 1), (10.5, 2, 2)])
def test_time_limit_stops_within_an_epoch_after_the_first_and_the_run_resumes(
    data_folder: Path,
    complete_runs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    minutes: float,
    epoch: int,
    num_done: int,
) -> None:
    """Each reading of the fake clock takes a minute. It is read at the start, and at the beginning and end of an epoch.

    After the first epoch it is also read in each of the four steps: the third epoch begins at minute 9.
    """
    now = iter(range(1000))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: 60.0 * next(now), monotonic=time.monotonic))
    out = data_folder / f"limited-{minutes}"
    argv = arguments(data_folder, "cosine", out, "--time-limit", str(minutes))
    train.main(argv)
    state = state_of(out)["trainer"]
    assert (state["epoch"], state["within_epoch"]["num_done"]) == (epoch, num_done)
    assert f"time limit: stopped in epoch {epoch + 1}" in capsys.readouterr().out
    train.main(arguments(data_folder, "cosine", out))
    done = f"; epochs done: {epoch}, images of the next epoch: {8 * num_done}"
    assert done in capsys.readouterr().out
    assert differences(out, complete_runs["cosine"]) == []


def test_full_disk_leaves_the_last_state_and_the_run_resumes(
    data_folder: Path,
    complete_runs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each epoch writes four files. The disk is full when the second epoch writes its checkpoint."""
    out, sync, calls = data_folder / "full", os.fsync, iter(range(1000))

    def fail_later(descriptor: int) -> None:
        if next(calls) >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_later)
        with pytest.raises(SystemExit):
            train.main(arguments(data_folder, "cosine", out))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"train: [Errno 28] No space left on device: '{out / 'model.safetensors'}'"
    assert checkpoint.load(out / "model.safetensors").config.training["epochs"] == 1
    train.main(arguments(data_folder, "cosine", out))
    assert differences(out, complete_runs["cosine"]) == []


def test_finished_run_is_not_changed(data_folder: Path, complete_runs: dict[str, Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in complete_runs["cosine"].rglob("*")}
    train.main(arguments(data_folder, "cosine", complete_runs["cosine"]))
    assert {path: path.stat().st_mtime_ns for path in complete_runs["cosine"].rglob("*")} == before


@pytest.mark.parametrize("recipe", RECIPES)
def test_run_writes_losses_images_and_a_checkpoint(complete_runs: dict[str, Path], recipe: str) -> None:
    run = complete_runs[recipe]
    with (run / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["validation_loss"]) for row in rows]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:  # 20 images with t from 1 to 12: each band of three timesteps has at least 3 images
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


def test_epochs_option_overrides_the_preset(data_folder: Path) -> None:
    train.main(arguments(data_folder, "plateau", data_folder / "short", "--epochs", "1"))
    assert state_of(data_folder / "short")["trainer"]["epoch"] == 1


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "model.safetensors").network.state_dict()


def test_training_starts_from_the_weights_of_a_checkpoint(data_folder: Path, complete_runs: dict[str, Path]) -> None:
    """With a learning rate of nearly zero, the weights stay those of the start."""
    recipe = data_folder / "standstill.toml"
    recipe.write_text(RECIPES["cosine"].replace("lr = 1e-2", "lr = 1e-12"))
    start = complete_runs["cosine"] / "model.safetensors"
    out = data_folder / "standstill-run"
    argv = arguments(data_folder, "standstill", out, "--start-from", str(start))
    train.main(argv)
    before, after = weights_of(complete_runs["cosine"]), weights_of(out)
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-9) for name in before)
    facts = checkpoint.load(out / "model.safetensors").config.training
    assert facts["start"] == checkpoint.load(start).weights_sha256
    assert f"the weights whose SHA-256 is {facts['start']}" in (out / "README.md").read_text("utf-8")
    train.main(argv)  # the finished run is resumed


def test_run_with_another_starting_checkpoint_is_rejected(
    data_folder: Path, complete_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = shutil.copy(complete_runs["cosine"] / "model.safetensors", tmp_path)
    argv = arguments(data_folder, "cosine", complete_runs["cosine"], "--start-from", start)
    assert "starting checkpoint. Use another --out folder" in error_line(argv, capsys)


def test_checkpoint_that_the_training_would_replace_is_refused_as_its_start(
    data_folder: Path, complete_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = complete_runs["cosine"]
    before = (run / "model.safetensors").read_bytes()
    argv = arguments(data_folder, "cosine", run, "--start-from", str(run / "epochs" / ".." / "model.safetensors"))
    assert "--start-from is in" in error_line(argv, capsys)
    assert (run / "model.safetensors").read_bytes() == before


def test_finished_run_without_its_state_is_not_replaced(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(data_folder, "cosine", tmp_path / "run")
    train.main(argv)
    (tmp_path / "run" / "state.pt").unlink()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert "has a finished run without its state. Use another --out folder" in error_line(argv, capsys)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_training_from_a_checkpoint_of_other_pictures_says_so_and_stores_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "pets")
    train.main(own(tmp_path / "first", data))
    first = checkpoint.load(tmp_path / "first" / "model.safetensors").config.training["data"]
    (data / NAMES[0] / "0.png").unlink()
    (data / NAMES[1]).rename(data / "zebra")
    train.main(own(tmp_path / "second", data, f"--start-from={tmp_path / 'first' / 'model.safetensors'}"))
    said = capsys.readouterr().out
    assert f"note: the checkpoint of --start-from learned from other pictures ({first})" in said
    assert f"note: the classes of --start-from have other names: {', '.join(NAMES)} before, " in said
    assert f"had learned from: {first}." in (tmp_path / "second" / "README.md").read_text("utf-8")
    train.main(own(tmp_path / "third", data, f"--start-from={tmp_path / 'second' / 'model.safetensors'}"))
    second, third = (
        checkpoint.load(tmp_path / run / "model.safetensors").config.training for run in ("second", "third")
    )
    assert second["earlier_data"] == [first]
    assert third["earlier_data"] == [first, second["data"]]
    card = (tmp_path / "third" / "README.md").read_text("utf-8")
    assert f"had learned from: {first}; {second['data']}." in card


def test_start_from_another_network_gives_a_one_line_error(
    data_folder: Path, complete_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    start = complete_runs["plateau"] / "model.safetensors"
    argv = arguments(data_folder, "cosine", data_folder / "never", "--start-from", str(start))
    assert f"the recipe and {start} differ: unet." in error_line(argv, capsys)
    assert not (data_folder / "never").exists()


def error_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs scripts.train, which must exit with status 2. Returns the line on stderr."""
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
        (["--preset", "nonsense"], "unknown preset 'nonsense'"),
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
        (["--start-from", "/no/model.safetensors"], "/no/model.safetensors"),
        (["--verbose"], "--verbose"),
        (["--out", "/dev/null"], "/dev/null"),
        (["--out", "/dev/null/run"], "/dev/null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_argument_gives_a_one_line_error(
    data_folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert message in error_line(arguments(data_folder, "cosine", data_folder / "never", *more), capsys)
    assert not (data_folder / "never").exists()


def test_out_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--out" in error_line([], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_missing_gpu_gives_a_one_line_error(data_folder: Path, capsys: pytest.CaptureFixture[str], device: str) -> None:
    argv = arguments(data_folder, "cosine", data_folder / "never", "--device", device)
    assert f"--device {device}: no CUDA device found" in error_line(argv, capsys)


def test_damaged_data_file_gives_a_one_line_error(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_idx_files(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"damaged")
    argv = arguments(data_folder, "cosine", data_folder / "never", "--data-dir", str(tmp_path))
    assert "train-labels-idx1-ubyte is damaged" in error_line(argv, capsys)


@pytest.mark.parametrize("folder", ["cosine.toml", "missing"])
def test_unreadable_data_folder_gives_a_one_line_error(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    argv = arguments(data_folder, "cosine", data_folder / "never", "--data-dir", str(data_folder / folder))
    assert f"no MNIST files in {data_folder / folder}" in error_line(argv, capsys)


@pytest.mark.parametrize("recipe", ["cosine", "plateau"])
def test_folder_of_another_run_is_rejected_and_not_changed(
    data_folder: Path, complete_runs: dict[str, Path], capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    before = (complete_runs["cosine"] / "state.pt").read_bytes()
    argv = arguments(data_folder, recipe, complete_runs["cosine"], "--seed", "1")
    assert "has a run with another recipe, seed, data or starting checkpoint" in error_line(argv, capsys)
    assert (complete_runs["cosine"] / "state.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "a list"])
def test_damaged_state_gives_a_one_line_error(
    data_folder: Path, complete_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    state = tmp_path / "state.pt"
    content = (complete_runs["cosine"] / "state.pt").read_bytes()
    state.write_bytes({"truncated": content[:-500], "empty": b""}.get(damage, b""))
    if damage == "foreign":
        torch.save({"weight": torch.ones(3)}, state)
    if damage == "a list":
        torch.save([1, 2], state)
    assert f"{state} cannot be read" in error_line(arguments(data_folder, "cosine", tmp_path), capsys)


def own(out: Path, data: Path, *more: str) -> list[str]:
    """Arguments of a short training on own pictures."""
    fixed = ["--device=cpu", "--compile=off", "--num-threads=1", "--epochs=2"]
    return [f"--data={data}", f"--out={out}", *fixed, *more]


def test_own_pictures_give_a_checkpoint_with_their_names_colours_and_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "animals"
    train.main(own(out, write_folder(tmp_path / "data")))
    loaded = checkpoint.load(out / "model.safetensors")
    assert (loaded.config.class_names, loaded.image_shape) == (NAMES, (3, SIZE, SIZE))
    assert not loaded.config.normalises_drawings
    said = capsys.readouterr().out
    assert "data: 3 classes, 21 images for training, 3 for validation, 12x12 pixels, colour" in said
    assert "warning: the class 'cat' has only 7 images" in said
    assert "chosen for this data: epochs = 2, batch_size = 16" in said
    assert said.splitlines()[-1] == f"serve it: scripts/serve --model animals={out}/model.safetensors"
    with Image.open(out / "epochs" / "02.png") as grid:
        assert (grid.mode, grid.size) == ("RGB", (3 * 2 * SIZE, 2 * SIZE))
    with Image.open(out / "data.png") as sheet:
        assert sheet.mode == "RGB"


def test_preset_gets_the_size_and_the_classes_of_the_data(data_folder: Path, tmp_path: Path) -> None:
    preset = f"--preset={data_folder / 'cosine.toml'}"
    train.main(own(tmp_path / "out", write_folder(tmp_path / "data", grey=True), preset))
    assert checkpoint.load(tmp_path / "out" / "model.safetensors").image_shape == (1, SIZE, SIZE)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ("image_size = 28", "unet.image_size is 28, but the data has 12. Remove unet.image_size from the recipe"),
        (
            "image_channels = 1",
            "unet.image_channels is 1, but the data has 3. Remove unet.image_channels from the recipe",
        ),
        ("num_classes = 10", "unet.num_classes is 10, but the data has 3. Remove unet.num_classes from the recipe"),
    ],
)
def test_preset_that_contradicts_the_data_is_refused(
    tmp_path: Path, unet: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(f'base = "default"\n[unet]\n{unet}\n')
    with pytest.raises(SystemExit):
        train.main(own(tmp_path / "out", write_folder(tmp_path / "data"), f"--preset={recipe}"))
    assert message in capsys.readouterr().err


def test_run_in_the_folder_of_the_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "data")
    with pytest.raises(SystemExit):
        train.main(own(root / "run", root))
    assert "is in the folder of the data. Choose another one" in capsys.readouterr().err
    assert not (root / "run").exists()


def test_other_data_does_not_resume_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_folder(tmp_path / "data"), tmp_path / "out"
    train.main(own(out, root))
    (root / "cat" / "0.png").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        train.main(own(out, root, "--tensorboard"))
    assert (
        "has a run with another recipe, seed, data or starting checkpoint. Use another --out folder"
        in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_run_that_was_stopped_before_its_first_state_starts_again(tmp_path: Path) -> None:
    out, data = tmp_path / "out", write_folder(tmp_path / "data")
    train.main(own(out, data))
    expected = (out / "losses.csv").read_bytes()
    for name in ("state.pt", "README.md", "losses.csv"):  # the model is written before them
        (out / name).unlink()
    train.main(own(out, data))
    assert (out / "losses.csv").read_bytes() == expected


def test_folder_with_a_file_of_the_user_is_not_a_finished_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("my notes")
    train.main(own(out, write_folder(tmp_path / "data")))
    assert (out / "model.safetensors").exists()
    assert (out / "README.md").read_text() == "my notes"


def test_resumed_run_removes_what_a_killed_process_has_left(tmp_path: Path) -> None:
    out, data = tmp_path / "out", write_folder(tmp_path / "data")
    train.main(own(out, data))
    files = sorted(path.name for path in out.iterdir())
    for name in (".state.pt.abc", ".model.safetensors.abc"):
        (out / name).write_bytes(b"x")
    train.main(own(out, data))
    assert sorted(path.name for path in out.iterdir()) == files


def test_second_process_in_the_same_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "out", write_folder(tmp_path / "data")
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(SystemExit):
        train.main(own(out, data))
    assert capsys.readouterr().err == f"train: another process trains in {out}. Use another --out folder\n"
    assert list(out.iterdir()) == []
    os.close(other)
    train.main(own(out, data))


def test_folder_that_the_service_cannot_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(own(tmp_path / "a,b", write_folder(tmp_path / "data")))
    assert "a,b: the path must not have a comma, because the service cannot load it" in capsys.readouterr().err
    assert not (tmp_path / "a,b").exists()


@pytest.mark.slow  # it trains twice
def test_printed_choices_are_a_recipe_with_the_same_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "data")
    train.main(own(tmp_path / "auto", data, "--image-size=40", "--epochs=1"))
    printed = capsys.readouterr().out.partition("chosen for this data: ")[2].splitlines()[0]
    assert "unet.widths = [64, 96, 128]" in printed  # images of 28x28 pixels, as those of MNIST, cannot have them
    lines = re.sub(r", (?=[a-z_.]+ = )", "\n", printed)
    (tmp_path / "mine.toml").write_text(f'base = "default"\n{lines}\n')
    preset = f"--preset={tmp_path / 'mine.toml'}"
    train.main(own(tmp_path / "mine", data, "--image-size=40", "--epochs=1", preset))
    mine, auto = (tmp_path / name / "losses.csv" for name in ("mine", "auto"))
    assert mine.read_text() == auto.read_text()


def test_run_folder_can_have_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"r\xe9n")
    train.main(own(out, write_folder(tmp_path / "data")))
    assert "r\\udce9n/model.safetensors" in (out / "README.md").read_text("utf-8")
    assert (out / "losses.png").exists()


def test_run_continues_after_its_data_was_moved_but_not_after_a_class_was_renamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    train.main(own(out, write_folder(tmp_path / "data")))
    (tmp_path / "data").rename(tmp_path / "moved")
    train.main(own(out, tmp_path / "moved"))
    assert f"resuming {out}; epochs done: 2\n" in capsys.readouterr().out
    (tmp_path / "moved" / "cat").rename(tmp_path / "moved" / "beta")
    with pytest.raises(SystemExit):
        train.main(own(out, tmp_path / "moved"))
    assert "has a run with another recipe, seed, data or starting checkpoint" in capsys.readouterr().err


def test_file_that_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    root, out = write_folder(tmp_path / "data"), tmp_path / "out"
    out.mkdir()
    (out / ".state.pt.abc123").write_bytes(b"half of a state")
    train.main(own(out, root))
    assert not list(out.glob(".*"))


def test_limit_is_part_of_the_first_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(own(tmp_path / "out", write_folder(tmp_path / "data"), "--limit=2"))
    assert "data: 3 classes, 6 images for training, 3 for validation" in capsys.readouterr().out


def test_diverged_run_ends_with_an_error_and_does_not_say_that_it_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('base = "default"\nbatch_size = 8\ngrad_clip = 0.0\n[optimizer]\nlr = 1e30\n')
    with pytest.raises(SystemExit):
        train.main(own(tmp_path / "out", write_folder(tmp_path / "data"), f"--preset={recipe}"))
    said = capsys.readouterr()
    assert "the training loss of epoch 1 is nan. Use a lower learning rate, optimizer.lr" in said.err
    assert "finished" not in said.out


@pytest.mark.parametrize("recipe", RECIPES)
def test_run_stopped_within_an_epoch_resumes_there_with_the_same_bits(
    data_folder: Path, complete_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    out, learn, steps = data_folder / f"within-{recipe}", Trainer._learn_from, list[int]()

    def learn_or_stop(trainer: Trainer, rows: torch.Tensor, step: int) -> torch.Tensor:
        if step == 6:  # in the second epoch, after two of its four steps
            raise KeyboardInterrupt
        return learn(trainer, rows, step)

    def record(trainer: Trainer, rows: torch.Tensor, step: int) -> torch.Tensor:
        steps.append(step)
        return learn(trainer, rows, step)

    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)  # after each step
    monkeypatch.setattr(Trainer, "_learn_from", learn_or_stop)
    with pytest.raises(SystemExit):
        train.main(arguments(data_folder, recipe, out))
    monkeypatch.setattr(Trainer, "_learn_from", record)
    train.main(arguments(data_folder, recipe, out))
    assert steps == list(range(6, 12))
    assert differences(out, complete_runs[recipe]) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_mnist_as_own_pictures_trains_the_same_bits_as_the_built_in_mnist(
    data_folder: Path, complete_runs: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    learn, validate = split_validation(*load_mnist("train", data_folder / "data"))
    splits = {"train": learn, "val": validate, "test": load_mnist("test", data_folder / "data")}
    arrays = {f"{split}_images": images[:, 0].numpy() for split, (images, _) in splits.items()}
    arrays |= {f"{split}_labels": labels[:, None].numpy() for split, (_, labels) in splits.items()}
    np.savez(tmp_path / "mnist.npz", **arrays)
    preset = f"--preset={data_folder / recipe}.toml"
    train.main(own(tmp_path / "out", tmp_path / "mnist.npz", preset, "--epochs=3"))
    new, old = (dict(bits(state_of(run)["trainer"])) for run in (tmp_path / "out", complete_runs[recipe]))
    assert [place for place in new.keys() | old.keys() if new.get(place) != old.get(place)] == []
    weights = [
        checkpoint.load(run / "model.safetensors").weights_sha256 for run in (tmp_path / "out", complete_runs[recipe])
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-size=30", "--data=x"], "30 is not a multiple of 4"),
        (["--image-size=32"], "--image-size needs --data"),
    ],
)
def test_image_size_that_cannot_be_used_is_refused_before_the_data_is_read(
    tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main([f"--out={tmp_path}", *more])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("size", "levels"), [(8, 2), (28, 2), (36, 2), (48, 3), (64, 3)])
def test_recipe_for_own_pictures_is_valid_for_every_size(size: int, levels: int) -> None:
    images = ImageSet(torch.zeros(300, 3, size, size, dtype=torch.uint8), torch.arange(300) % 2)
    recipe = load_recipe("auto", DataSet("x", ("a", "b"), images, images, images))
    assert (recipe.unet.image_size, len(recipe.unet.widths)) == (size, levels)


@pytest.mark.parametrize(
    ("num_images", "epochs", "batch_size"),
    [(50_000, None, 64), (5400, 20, 64), (5400, 10, 32), (1000, None, 64), (200, None, 16), (10, 1, 10)],
)
def test_recipe_for_own_pictures_has_enough_steps_for_few_images(
    num_images: int, epochs: int | None, batch_size: int
) -> None:
    images = ImageSet(torch.zeros(1, 1, 28, 28).expand(num_images, -1, -1, -1), torch.zeros(num_images).long())
    recipe = load_recipe("auto", DataSet("x", ("a",), images, images, images), epochs)
    assert recipe.batch_size == batch_size


def test_recipe_for_one_class_has_no_guidance() -> None:
    images = ImageSet(torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64))
    recipe = load_recipe("auto", DataSet("x", ("a",), images, images, images))
    assert (recipe.label_drop, recipe.guidance.scale) == (0, 1)
