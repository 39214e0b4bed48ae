import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.compiled.private_cache import default_cache
from scripts.common.progress import Reporter
from scripts.training.loop import train
from scripts.training.objective import DenoisingObjective
from scripts.training.run import Run
from scripts.training.trainer import EpochResult, Trainer, uses_bfloat16
from tests.scripts.tiny_training import NUM_IMAGES, NUM_VALIDATION, noise_data, recipe_of

STEPS = (NUM_IMAGES - NUM_VALIDATION) // 8
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer() -> MakeTrainer:
    data = noise_data()

    def make(name: str, *, compiled: bool = False, **fields: Any) -> Trainer:
        recipe = recipe_of(name, **fields)
        objective = DenoisingObjective(recipe, data.learn, data.validate, torch.device("cpu"))
        return Trainer(recipe, objective, seed=0, device=torch.device("cpu"), compiled=compiled)

    return make


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_training_uses_a_private_compile_cache(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    calls: list[object] = []
    monkeypatch.setattr("scripts.training.trainer.use_private_compile_cache", calls.append)
    monkeypatch.setattr(torch, "compile", lambda denoise, **options: calls.append("compile") or denoise)
    make_trainer("plateau", compiled=compiled)
    assert calls == ([default_cache(), "compile"] if compiled else [])


def test_cosine_learning_rate_warms_up_and_decreases_to_zero(make_trainer: MakeTrainer) -> None:
    trainer, rates = make_trainer("cosine"), []
    for _ in range(3):
        trainer.run_epoch(lambda step, loss: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    total = 3 * STEPS
    warmup = [1 / 3, 2 / 3] + [1] * (total - 2)
    expected = [1e-2 * w * (1 + math.cos(math.pi * i / total)) / 2 for i, w in enumerate(warmup)]
    assert rates == pytest.approx(expected)


def test_learning_rate_is_lowered_after_a_plateau(make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer("plateau")
    losses = iter([0.5, 0.4, 0.4, 0.3])
    monkeypatch.setattr(trainer.objective, "validation_losses", lambda denoiser: (next(losses), (0.0,) * 4))
    rates = [trainer.run_epoch().learning_rate for _ in range(4)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05])


def test_an_epoch_uses_each_training_image_once_and_no_validation_image(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, seen = make_trainer("plateau"), []
    learn = trainer._learn_from

    def watch(rows: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(rows)
        return learn(rows, *args)

    monkeypatch.setattr(trainer, "_learn_from", watch)
    trainer.run_epoch()
    trainer.run_epoch()
    first, second = torch.cat(seen[:STEPS]), torch.cat(seen[STEPS:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(NUM_IMAGES - NUM_VALIDATION))
    assert first.tolist() != second.tolist()


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.double().clone() for name, tensor in network.state_dict().items()}


def test_averaged_weights_are_the_ema_or_equal_the_network(make_trainer: MakeTrainer) -> None:
    averaging, plain = make_trainer("cosine"), make_trainer("plateau")
    expected, step = weights_of(averaging.network), 0

    def update_expected(*_: object) -> None:
        nonlocal step
        step += 1
        decay = min(0.999, 1 - (1 + step) ** (-2 / 3))
        for name, weights in weights_of(averaging.network).items():
            expected[name] = decay * expected[name] + (1 - decay) * weights

    averaging.run_epoch(update_expected)
    averaging.run_epoch(update_expected)
    average, network = weights_of(averaging.averaged), weights_of(averaging.network)
    assert step == 2 * STEPS
    for name in average:
        torch.testing.assert_close(average[name], expected[name], rtol=1e-5, atol=1e-6)
    assert not any(torch.equal(average[name], network[name]) for name in average)
    plain.run_epoch()
    average, network = weights_of(plain.averaged), weights_of(plain.network)
    assert all(torch.equal(average[name], network[name]) for name in average)


@pytest.mark.parametrize("recipe", ["cosine", "plateau"])
def test_state_of_the_previous_release_can_be_resumed(make_trainer: MakeTrainer, recipe: str) -> None:
    """The previous release stored the average as `step` and `shadow`, and None for a recipe without an average."""
    trainer, again = make_trainer(recipe), make_trainer(recipe)
    trainer.run_epoch()
    state = copy.deepcopy(trainer.state_dict())
    average = {name: tensor.clone() for name, tensor in trainer.averaged.state_dict().items()}
    state["ema"] = {"step": STEPS, "shadow": average} if recipe == "cosine" else None
    again.load_state_dict(state)
    assert trainer.run_epoch() == again.run_epoch()
    one, other = trainer.averaged.state_dict(), again.averaged.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("fastest", "expected"), [(torch.bfloat16, True), (torch.float16, False), (torch.float32, False)]
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trains_in_bfloat16_only_on_a_device_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, device: str, fastest: torch.dtype, expected: bool
) -> None:
    monkeypatch.setattr("scripts.training.trainer.fast_dtype", lambda device: fastest)
    assert uses_bfloat16(recipe_of("cosine"), torch.device(device)) is expected
    assert not uses_bfloat16(recipe_of("plateau"), torch.device(device))  # a recipe in float32


def test_progress_is_reported_with_the_number_of_steps(make_trainer: MakeTrainer) -> None:
    trainer, counts = make_trainer("cosine"), []
    trainer.run_epoch(lambda count, loss: counts.append(count))
    trainer.steps_per_report = 3
    trainer.run_epoch(lambda count, loss: counts.append(count))
    assert counts == [1] * STEPS + [3, STEPS - 3]


def test_training_reduces_the_loss(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer("cosine", epochs=12)
    losses = [trainer.run_epoch().train_loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1


def test_only_a_lower_validation_loss_replaces_the_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer("plateau")
    run = Run(tmp_path, "tiny", trainer.recipe, seed=0, data="")
    result = EpochResult(1, train_loss=0.9, validation_loss=0.5, band_losses=(0.5,) * 4, learning_rate=0.1)
    kept = []
    for epoch, loss in enumerate([0.5, 0.6, 0.5, float("nan"), 0.4], start=1):
        trainer.epoch = epoch
        with torch.no_grad():
            trainer.averaged.stem[1].bias.fill_(epoch)
        best = run.record(trainer, replace(result, epoch=epoch, validation_loss=loss))
        loaded = checkpoint.load(tmp_path / "model.safetensors")
        kept.append((best, loaded.network.stem[1].bias[0].item(), loaded.config.training["epochs"]))
    assert kept == [(True, 1, 1), (False, 1, 1), (False, 1, 1), (False, 1, 1), (True, 5, 5)]


def test_diverged_first_epoch_writes_no_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer("plateau")
    run = Run(tmp_path, "tiny", trainer.recipe, seed=0, data="")
    assert not run.record(trainer, EpochResult(1, float("nan"), float("nan"), (float("nan"),) * 4, 0.1))
    assert not (tmp_path / "model.safetensors").exists()


def test_resuming_in_another_environment_is_reported(
    make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer("plateau", epochs=1)
    with Reporter() as reporter:
        train(trainer, Run(tmp_path, "tiny", trainer.recipe, seed=0, data=""), reporter)
        again = make_trainer("plateau", epochs=1)
        train(again, Run(tmp_path, "tiny", again.recipe, seed=0, data=""), reporter)
        assert "not be identical" not in capsys.readouterr().out
        again.arithmetic += ", compiled"
        train(again, Run(tmp_path, "tiny", again.recipe, seed=0, data=""), reporter)
    assert "not be identical" in capsys.readouterr().out
