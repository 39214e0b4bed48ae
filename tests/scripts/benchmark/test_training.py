"""Tests that the measured loops train the network."""

import itertools
from pathlib import Path

import pytest
import torch

from scripts.benchmark import training
from scripts.benchmark.training import WARM_UP_STEPS, images_a_second, of_trainer, plain_loop
from scripts.common.data.data_set import DataSet
from scripts.common.mnist import mnist_data
from tests.scripts.tiny_training import recipe_of, trust_idx_files, write_idx_files

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    write_idx_files(tmp_path)
    trust_idx_files(monkeypatch)
    return mnist_data(tmp_path)


def test_plain_loop_reduces_the_loss(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    mse_loss = torch.nn.functional.mse_loss

    def record(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = mse_loss(output, target)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(training.nn.functional, "mse_loss", record)
    torch.manual_seed(0)
    times = list(itertools.islice(plain_loop(recipe_of("cosine"), data.learn, CPU), 60))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert times == sorted(times)


def test_trainer_is_timed_at_each_step_over_several_epochs(
    data: DataSet,
) -> None:
    times = of_trainer(recipe_of("cosine"), data, CPU, num_steps=9, compiled=False)  # four steps per epoch
    assert len(times) == WARM_UP_STEPS + 9 + 1
    assert times == sorted(times)


def test_images_a_second_ignores_the_warm_up_steps(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [100.0 * k for k in range(WARM_UP_STEPS)] + [1000.0 + 0.5 * k for k in range(5)]
    monkeypatch.setattr(training, "of_trainer", lambda *args, compiled: times)
    assert images_a_second("scripts.train", recipe_of("cosine"), data, CPU, 4) == 8 / 0.5
