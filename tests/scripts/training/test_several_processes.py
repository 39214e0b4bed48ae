"""Tests training in several processes: the same curve as in one, and the same bits after a process was killed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.scripts.tiny_training import COSINE, write_idx_files
from tests.scripts.training.together import EVENT_STEP, STEPS_PER_SAVE

ROOT = Path(__file__).parents[3]
EPOCHS, STEPS_PER_EPOCH = 6, 5
BATCH_SIZE = 6  # four processes have 1, 2, 1 and 2 images of it
RECIPE = COSINE.replace("epochs = 3", f"epochs = {EPOCHS}").replace("batch_size = 8", f"batch_size = {BATCH_SIZE}")
# The float32 sums of several processes have another order. Each rounds by up to 6e-8 of its largest part, and the
# training repeats this in 30 steps: 3e-6 was measured. The wrong trainings below differ by 0.2 and more.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, of 2 and 4, wrong ones of 2, and two of 2 that were stopped and resumed."""
    folder = tmp_path_factory.mktemp("several")
    write_idx_files(folder / "data")
    (folder / "recipe.toml").write_text(RECIPE.replace("bfloat16", "float32"))
    jobs = [
        job(folder, "stopped", 2, event="stop", event_rank="0"),
        job(folder, "stopped", 2),
        job(folder, "limited", 2, "--time-limit=10.5", change="clock of first"),
        job(folder, "limited", 3),
        job(folder, "one", 1),
        job(folder, "two", 2),
        job(folder, "four", 4),
        job(folder, "own gradients", 2, change="own gradients"),
        job(folder, "other rows", 2, change="other rows"),
    ]
    done = run([sys.executable, "-m", "tests.scripts.training.together", json.dumps(jobs)])
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def job(
    folder: Path, name: str, count: int, *more: str, change: str = "none", event: str = "", event_rank: str = ""
) -> dict[str, Any]:
    paths = ["--preset", f"{folder / 'recipe.toml'}", "--data-dir", f"{folder / 'data'}", "--out", f"{folder / name}"]
    arguments = [*paths, "--device=cpu", "--compile=off", "--num-threads=1", "--flip", *more]
    return {"count": count, "arguments": arguments, "change": change, "event": event, "event_rank": event_rank}


def run(command: list[str], seconds: float = 250) -> subprocess.CompletedProcess[str]:
    """Runs a command that must succeed. If it takes too long, it is terminated, so that it ends its workers."""
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
        finally:
            process.terminate()
    assert process.returncode == 0, errors
    return subprocess.CompletedProcess(command, 0, out, errors)


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return state


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values in a nested state with their paths."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if parts is None:
        yield place, value
    else:
        for name, part in parts:
            yield from leaves(part, f"{place}/{name}")


def differences(one: Path, other: Path) -> dict[str, float]:
    """Returns the relative differences of the losses, the weights, their averages and the state of the optimizer."""
    a, b = (dict(leaves({key: state_of(run)[key] for key in ("trainer", "results")})) for run in (one, other))
    assert a.keys() == b.keys()
    assert any(place.startswith("/trainer/optimizer/state/0/exp_avg") for place in a)
    return {place: difference(value, b[place]) for place, value in a.items() if is_number(value)}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | Tensor) and not isinstance(value, bool)


def difference(one: float | Tensor, other: float | Tensor) -> float:
    """Returns the largest difference, relative to the largest value."""
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
    return 0.0 if torch.equal(a, b) else ((a - b).abs().max() / a.abs().max()).item()


def steps(folder: Path, rank: int, restart: int = 0) -> list[int]:
    return [int(line) for line in Path(f"{folder}-{rank}-{restart}.steps").read_text().split()]


def first_repeated_step() -> int:
    """Returns the number of the step after the last state that was saved before EVENT_STEP."""
    start_of_epoch = EVENT_STEP - EVENT_STEP % STEPS_PER_EPOCH
    return EVENT_STEP - (EVENT_STEP - start_of_epoch) % STEPS_PER_SAVE


@pytest.mark.parametrize("name", ["two", "four", "limited"])
def test_several_processes_have_the_losses_and_the_weights_of_one(folder: Path, name: str) -> None:
    found = differences(folder / "one", folder / name)
    assert {place: value for place, value in found.items() if value > TOLERANCE} == {}
    assert state_of(folder / name)["trainer"]["epoch"] == EPOCHS


@pytest.mark.parametrize("name", ["own gradients", "other rows"])
def test_wrong_gradients_or_rows_of_a_process_are_noticed(folder: Path, name: str) -> None:
    """Tests the test above."""
    found = differences(folder / "one", folder / name)
    losses = [found[f"/results/{epoch}/{kind}_loss"] for epoch in range(EPOCHS) for kind in ("train", "validation")]
    weights = [value for place, value in found.items() if place.startswith("/trainer/network")]
    assert max(losses) > 1000 * TOLERANCE
    assert max(weights) > 1000 * TOLERANCE


def test_only_the_first_process_prints(folder: Path) -> None:
    said, errors = (folder / "stdout").read_text().splitlines(), (folder / "stderr").read_text()
    assert [line for line in said if line.startswith("finished: ")] == [
        f"finished: {folder / name}/model.safetensors"
        for name in ("stopped", "limited", "one", "two", "four", "own gradients", "other rows")
    ]
    stopped = "train: stopped; run the same command again to resume from the last saved state"
    assert errors.count("train: ") == errors.count(stopped) == 1


def test_killed_process_costs_the_steps_since_the_last_saved_state(folder: Path) -> None:
    """torchrun restarts all processes, and the result has the bits of an unbroken run."""
    killed, two, resumed = folder / "killed", folder / "two", first_repeated_step()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    worker = json.dumps(job(folder, "killed", 2, event="kill", event_rank="1"))
    said = run([*command, "-m", "tests.scripts.training.together", worker]).stdout
    assert resumed < EVENT_STEP
    assert steps(killed, 1) == list(range(EVENT_STEP))
    assert steps(killed, 0, restart=1) == steps(killed, 1, restart=1) == list(range(resumed, EPOCHS * STEPS_PER_EPOCH))
    assert f"epochs done: 2, images of the next epoch: {resumed % STEPS_PER_EPOCH * BATCH_SIZE}" in said
    assert set(differences(killed, two).values()) == {0.0}
    assert (killed / "losses.csv").read_bytes() == (two / "losses.csv").read_bytes()


def test_run_stopped_by_sigterm_resumes_with_the_same_bits(folder: Path) -> None:
    before, after = range(EVENT_STEP), range(first_repeated_step(), EPOCHS * STEPS_PER_EPOCH)
    assert steps(folder / "stopped", 0) == [*before, *after]
    assert set(differences(folder / "stopped", folder / "two").values()) == {0.0}


def test_time_limit_stops_all_processes_after_the_same_step(folder: Path) -> None:
    """The first process reads its clock at the start, at both ends of an epoch, and after each step of the second."""
    stop, end = 2 * STEPS_PER_EPOCH + 1, EPOCHS * STEPS_PER_EPOCH
    assert steps(folder / "limited", 0) == steps(folder / "limited", 1) == list(range(end))
    assert steps(folder / "limited", 2) == list(range(stop, end))  # of the third process, with which it was resumed
    assert "time limit: stopped in epoch 3" in (folder / "stdout").read_text()


def test_resuming_with_another_number_of_processes_is_reported(folder: Path) -> None:
    (line,) = (line for line in (folder / "stdout").read_text().splitlines() if "not be identical" in line)
    before, now = line.rpartition(": ")[2].removesuffix(" now").split(" before, ")
    assert now == before.replace("2 processes", "3 processes") != before


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_curve_of_four_processes_on_digits_is_within_the_noise_between_seeds(mnist_dir: Path, tmp_path: Path) -> None:
    """With the usual eps of Adam, the weights move apart, but the losses stay together."""
    fixed = [
        "--preset=default",
        "--limit=100",
        "--epochs=6",
        "--device=cpu",
        "--compile=off",
        f"--data-dir={mnist_dir}",
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    starts: dict[str, tuple[list[str], int]] = {"one": ([], 0), "four": (launcher, 0), "other seed": ([], 1)}
    losses = {}
    for name, (start, seed) in starts.items():
        options = [f"--seed={seed}", f"--out={tmp_path / name}"]
        run([sys.executable, *start, "-m", "scripts.train", *fixed, *options], seconds=1100)
        results = state_of(tmp_path / name)["results"]
        losses[name] = torch.tensor([[each["train_loss"], each["validation_loss"]] for each in results])  # (epochs, 2)
    spread = (losses["one"] - losses["other seed"]).abs().mean(dim=0)
    assert ((losses["one"] - losses["four"]).abs().mean(dim=0) < spread / 3).all(), losses
    assert (losses["four"][-1] < losses["four"][0]).all()
