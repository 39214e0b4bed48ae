from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.prediction import Prediction, PredictionConfig
from model.sampler import Guidance, sample
from model.schedule import Schedule
from scripts.distillation import DistillationObjective, draw_paths, teacher_timesteps
from scripts.drawing import Drawer
from scripts.progress import Reporter
from scripts.recipe import DistillationRecipe
from tests.scripts.tiny_training import NUM_STEPS, recipe_of
from tests.tiny import tiny_unet

DISTILLATION = DistillationRecipe(num_steps=3, teacher_steps=6, num_trajectories=40)
RECIPE = recipe_of("cosine", prediction=PredictionConfig("v"), distillation=DISTILLATION)
SCHEDULE = Schedule(RECIPE.schedule)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    network = tiny_unet(image_size=28, num_steps=NUM_STEPS)
    for parameter in network.parameters():
        parameter.mul_(0.5)
    config = CheckpointConfig(
        unet=network.config,
        schedule=RECIPE.schedule,
        prediction=PredictionConfig("v"),
        guidance=Guidance(2.0, 3, NUM_STEPS),
        training={"label_drop": 0.1},
    )
    checkpoint.save(tmp_path / "teacher.safetensors", network, config)
    return tmp_path / "teacher.safetensors"


def paths_of(teacher: Path, folder: Path, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    with Reporter() as reporter:
        return draw_paths(Drawer(checkpoint.load(teacher)), DISTILLATION, folder, reporter, seed=seed)


def test_the_teacher_goes_through_the_students_timesteps() -> None:
    timesteps = teacher_timesteps(SCHEDULE, DISTILLATION)
    assert {12, 8, 4, 0} <= set(timesteps)
    assert set(SCHEDULE.log_snr_timesteps(6)) <= set(timesteps)
    assert timesteps == sorted(set(timesteps), reverse=True)


def test_a_path_begins_in_its_noise_and_ends_in_the_guided_image(teacher: Path, tmp_path: Path) -> None:
    states, y = paths_of(teacher, tmp_path)
    assert states.shape == (40, 4, 1, 28, 28)
    assert y.tolist() == [i % 10 for i in range(40)]
    loaded = checkpoint.load(teacher)
    seen: dict[int, torch.Tensor] = {}
    x_0 = sample(
        loaded.network,
        SCHEDULE,
        y,
        seed=torch.zeros_like(y),
        index=torch.arange(40),
        image_shape=(1, 28, 28),
        sampler="dpmpp",
        timesteps=teacher_timesteps(SCHEDULE, DISTILLATION),
        guidance=Guidance(2.0, 3, NUM_STEPS),
        prediction=Prediction(PredictionConfig("v"), SCHEDULE),
        on_step=lambda t, x_t, _: seen.update({t: x_t}),
    )
    expected = torch.stack([seen[12], seen[8], seen[4], x_0], dim=1)
    assert (states.float() - expected).abs().mean() < 0.05  # drawn in bfloat16 where that is fast


def test_paths_that_lie_there_are_kept_and_those_of_another_seed_are_not(teacher: Path, tmp_path: Path) -> None:
    first, _ = paths_of(teacher, tmp_path)
    (file,) = tmp_path.rglob("000.safetensors")
    written = file.stat().st_mtime_ns
    again, _ = paths_of(teacher, tmp_path)
    other, _ = paths_of(teacher, tmp_path, seed=1)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Perfect:
    """Knows every path: gives the output that leads from a state to the next one."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states.float()  # (N, K + 1, 1, 28, 28)
        self.calls = 0

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        outputs = []
        for x, step in zip(x_t, t.tolist(), strict=True):
            k = [12, 8, 4].index(step)
            path = (self.states[:, k] - x).abs().sum(dim=(1, 2, 3)).argmin()
            alpha_bar, alpha_bar_prev = SCHEDULE.alpha_bar[step], SCHEDULE.alpha_bar[step - 4]
            # v = (alpha x_t - x_0) / sigma, and x_0 from Song 2021, eq. 12, solved for it
            ratio = ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
            x_0 = (self.states[path, k + 1] - ratio * x) / (alpha_bar_prev.sqrt() - ratio * alpha_bar.sqrt())
            outputs.append((alpha_bar.sqrt() * x - x_0.clamp(-1, 1)) / (1 - alpha_bar).sqrt())
        return torch.stack(outputs).float()


@pytest.fixture
def states() -> torch.Tensor:
    """Paths whose images never leave [-1, 1], along which noise and image are mixed as the schedule says."""
    generator = torch.Generator().manual_seed(3)
    x_0 = 2 * torch.rand(40, 1, 28, 28, generator=generator) - 1
    eps = torch.randn(x_0.shape, generator=generator)
    mixed = [SCHEDULE.alpha_bar[t].sqrt() * x_0 + (1 - SCHEDULE.alpha_bar[t]).sqrt() * eps for t in (12, 8, 4, 0)]
    return torch.stack(mixed, dim=1).float()


def test_a_student_that_lands_on_every_state_loses_nothing_and_draws_the_teachers_images(states: torch.Tensor) -> None:
    y = torch.arange(40) % 10
    objective = DistillationObjective(RECIPE, states, y, torch.device("cpu"))
    assert objective.num_examples == 38
    perfect = Perfect(states)
    loss = objective.loss_of(torch.Generator().manual_seed(0))(perfect, torch.arange(38))
    assert loss < 1e-8
    assert objective.validation_losses(perfect)[0] < 1e-8
    zero = lambda x_t, t, y: torch.zeros_like(x_t)  # noqa: E731
    assert objective.validation_losses(zero)[0] > 0.1
    assert objective.loss_of(torch.Generator().manual_seed(0))(zero, torch.arange(38)) > 0.1


def test_every_stride_of_every_path_is_learned_from(states: torch.Tensor) -> None:
    objective = DistillationObjective(RECIPE, states, torch.arange(40) % 10, torch.device("cpu"))
    seen: set[tuple[int, int]] = set()

    def watch(x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        paths = (x_t[:, None] - states[None, :, [12, 8, 4].index(int(t[0]))]).abs().sum(dim=(2, 3, 4)).argmin(dim=1)
        seen.update(zip(paths.tolist(), t.tolist(), strict=True))
        return torch.zeros_like(x_t)

    loss_of = objective.loss_of(torch.Generator().manual_seed(0))
    for row in torch.arange(38).repeat(40):
        loss_of(watch, row[None])
    assert seen == {(path, t) for path in range(38) for t in (12, 8, 4)}
