from itertools import pairwise
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.noise import normal
from model.prediction import Prediction, PredictionConfig, predict_x_0
from model.sampler import Guidance, make_plan, reverse_step, sample
from model.schedule import Schedule, ScheduleConfig
from scripts.common.drawing import Drawer
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.training import distillation
from scripts.training.distillation import PATH_SEED, DistillationObjective, draw_paths, teacher_timesteps
from scripts.training.recipe import DistillationRecipe
from tests.scripts.tiny_training import NUM_STEPS, recipe_of
from tests.tiny import tiny_unet

DISTILLATION = DistillationRecipe(
    num_steps=3, teacher_steps=6, num_paths=38, num_held_out=2, guidance=Guidance(2.0, 3, NUM_STEPS)
)
RECIPE = recipe_of(
    "cosine",
    prediction=PredictionConfig("v"),
    distillation=DISTILLATION,
    guidance=Guidance(),
    label_drop=0.0,
)
SCHEDULE = Schedule(RECIPE.schedule)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generates no more paths than the recipe needs."""
    monkeypatch.setattr(distillation, "PART_SIZE", DISTILLATION.num_paths + DISTILLATION.num_held_out)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A teacher with large class embeddings, so that guidance has a visible effect on its images."""
    network = tiny_unet(image_size=28, num_steps=NUM_STEPS)
    network.class_embed.weight.mul_(10)
    config = CheckpointConfig(
        unet=network.config,
        schedule=RECIPE.schedule,
        prediction=PredictionConfig("v"),
        guidance=Guidance(1.2),  # not used for the paths, which use the guidance of the recipe
        training={"label_drop": 0.1},
    )
    checkpoint.save(tmp_path / "teacher.safetensors", network, config)
    return tmp_path / "teacher.safetensors"


def load_or_draw_paths(
    teacher: Path, folder: Path, recipe: DistillationRecipe = DISTILLATION, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    with Reporter() as reporter:
        paths = draw_paths(Drawer(checkpoint.load(teacher)), recipe, folder, reporter, seed=seed)
    assert paths
    return paths


@pytest.mark.parametrize("teacher_steps", [8, 12, 16])
def test_teacher_timesteps_include_the_students_and_are_evenly_spaced(teacher_steps: int) -> None:
    schedule = Schedule(ScheduleConfig(kind="cosine"))
    recipe = DISTILLATION.model_copy(update={"num_steps": 4, "teacher_steps": teacher_steps})
    timesteps = teacher_timesteps(schedule, recipe)
    assert {100, 75, 50, 25, 1, 0} <= set(timesteps)
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert teacher_steps - 2 <= len(timesteps) - 1 <= teacher_steps + 2
    half_log_snr = schedule.half_log_snr.tolist()
    lengths = [half_log_snr[t_prev] - half_log_snr[t] for t, t_prev in pairwise(timesteps[:-1])]
    assert max(after / before for before, after in pairwise(lengths)) < 2  # keeps a second-order sampler accurate


def sample_paths(teacher: Path, guidance: Guidance, y: torch.Tensor) -> torch.Tensor:
    """Returns the states of 40 paths from the offline sampler in float32."""
    seen: dict[int, torch.Tensor] = {}
    x_0 = sample(
        checkpoint.load(teacher).network,
        SCHEDULE,
        y,
        seed=torch.full_like(y, PATH_SEED),
        index=torch.arange(40),
        image_shape=(1, 28, 28),
        sampler="dpmpp",
        timesteps=teacher_timesteps(SCHEDULE, DISTILLATION),
        null_label=10,
        guidance=guidance,
        prediction=Prediction(PredictionConfig("v"), SCHEDULE),
        on_step=lambda t, x_t, _: seen.update({t: x_t}),
    )
    return torch.stack([seen[12], seen[8], seen[4], x_0], dim=1)


def test_a_path_leads_from_its_noise_to_the_guided_image(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # makes this machine compute in float32
    states, y = load_or_draw_paths(teacher, tmp_path)
    assert states.shape == (40, 4, 1, 28, 28)
    assert y.tolist() == [i % 10 for i in range(40)]
    own = Guidance(2.0, 3, NUM_STEPS)
    assert (states.float() - sample_paths(teacher, own, y)).abs().mean() < 1e-3  # the paths are rounded to float16
    for guidance, digits in ((Guidance(), y), (Guidance(2.0, 1, 2), y), (own, (y + 1) % 10)):
        assert (states.float() - sample_paths(teacher, guidance, digits)).abs().mean() > 1e-2


@pytest.mark.parametrize("seed_of_digits", [0, 1, 2, 3])
def test_paths_and_evaluated_digits_use_different_noise(seed_of_digits: int) -> None:
    seed, index = torch.zeros(20, dtype=torch.int64), torch.arange(20)
    seeds = (PATH_SEED, seed_of_digits)
    paths, digits = (normal(seed + base, index, torch.zeros_like(seed), (1, 28, 28)) for base in seeds)
    assert (paths[:, None] - digits[None]).abs().amax(dim=(2, 3, 4)).min() > 1


def test_existing_paths_are_not_generated_again(teacher: Path, tmp_path: Path) -> None:
    first, _ = load_or_draw_paths(teacher, tmp_path)
    (file,) = tmp_path.glob("0*.safetensors")
    written = file.stat().st_mtime_ns
    again, _ = load_or_draw_paths(teacher, tmp_path)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first, again)


def test_more_paths_are_added_to_existing_paths(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "PART_SIZE", 16)
    few, _ = load_or_draw_paths(teacher, tmp_path)
    more, y = load_or_draw_paths(teacher, tmp_path, DISTILLATION.model_copy(update={"num_paths": 60}))
    assert (len(few), len(more), len(y)) == (40, 62, 62)
    assert torch.equal(more[:40], few)
    assert len({state.numpy().tobytes() for state in more[:, 0]}) == 62


@pytest.mark.parametrize("field", ["seed", "teacher", "steps", "guidance"])
def test_paths_of_another_seed_teacher_or_recipe_are_rejected(teacher: Path, tmp_path: Path, field: str) -> None:
    load_or_draw_paths(teacher, tmp_path / "paths")
    changed = {"steps": {"teacher_steps": 9}, "guidance": {"guidance": Guidance(3.0)}}.get(field, {})
    recipe = DISTILLATION.model_copy(update=changed)
    if field == "teacher":
        loaded = checkpoint.load(teacher)
        loaded.network.class_embed.weight.mul_(1.5)
        checkpoint.save(teacher, loaded.network, loaded.config)
    with pytest.raises(ScriptError, match="another teacher, recipe, seed, device or dtype"):
        load_or_draw_paths(teacher, tmp_path / "paths", recipe, seed=int(field == "seed"))


def test_damaged_paths_give_a_one_line_error(teacher: Path, tmp_path: Path) -> None:
    load_or_draw_paths(teacher, tmp_path / "paths")
    (file,) = (tmp_path / "paths").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ScriptError, match="is damaged"):
        load_or_draw_paths(teacher, tmp_path / "paths")


class Perfect:
    """A student without errors: its output leads from each state to the next state of the path."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states.float()  # (N, K + 1, 1, 28, 28)

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        outputs = []
        for x, step in zip(x_t, t.tolist(), strict=True):
            k = [12, 8, 4].index(step)
            path = (self.states[:, k] - x).abs().sum(dim=(1, 2, 3)).argmin()
            alpha_bar, alpha_bar_prev = SCHEDULE.alpha_bar[step], SCHEDULE.alpha_bar[step - 4]
            # v = (alpha x_t - x_0) / sigma. x_0 is Song 2021, eq. 12, solved for x_0.
            ratio = ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
            x_0 = (self.states[path, k + 1] - ratio * x) / (alpha_bar_prev.sqrt() - ratio * alpha_bar.sqrt())
            outputs.append((alpha_bar.sqrt() * x - x_0.clamp(-1, 1)) / (1 - alpha_bar).sqrt())
        return torch.stack(outputs).float()


@pytest.fixture
def states() -> torch.Tensor:
    """Paths of random images in [-1, 1], with noise and image mixed by the schedule."""
    generator = torch.Generator().manual_seed(3)
    x_0 = 2 * torch.rand(40, 1, 28, 28, generator=generator) - 1
    eps = torch.randn(x_0.shape, generator=generator)
    mixed = [SCHEDULE.alpha_bar[t].sqrt() * x_0 + (1 - SCHEDULE.alpha_bar[t]).sqrt() * eps for t in (12, 8, 4, 0)]
    return torch.stack(mixed, dim=1).float()


def test_loss_is_zero_for_a_student_that_reaches_every_state(states: torch.Tensor) -> None:
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


def test_target_output_moves_the_sampler_to_the_next_state(states: torch.Tensor) -> None:
    """Uses the reverse step of the service from noise to image, with the targets as the network output."""
    objective = DistillationObjective(RECIPE, states, torch.arange(40) % 10, torch.device("cpu"))
    plan, mix = make_plan(SCHEDULE, "ddim", 3), objective.prediction.table(torch.device("cpu"))
    x_t = states[:, 0]
    for k, t in enumerate(plan.timesteps[:-1]):
        _, target = objective._step_target(x_t, states[:, k + 1], torch.full((40,), k))
        x_0 = predict_x_0(x_t, target, mix[t].expand(40, 3))
        x_t = reverse_step(x_t, x_0, x_0, x_0, plan.coefficients[k].expand(40, 4))
        torch.testing.assert_close(x_t, states[:, k + 1], rtol=0, atol=1e-4)


def test_target_is_clipped_if_no_image_leads_to_the_next_state(states: torch.Tensor) -> None:
    objective = DistillationObjective(RECIPE, states, torch.arange(40) % 10, torch.device("cpu"))
    k = torch.zeros(40, dtype=torch.int64)
    _, target = objective._step_target(states[:, 0], states[:, 1] + 100, k)
    x_0 = predict_x_0(states[:, 0], target, objective.prediction.table(torch.device("cpu"))[12].expand(40, 3))
    torch.testing.assert_close(x_0, torch.ones_like(x_0))


def test_each_step_has_its_own_validation_loss(states: torch.Tensor) -> None:
    objective = DistillationObjective(RECIPE, states, torch.arange(40) % 10, torch.device("cpu"))
    perfect = Perfect(states)
    wrong_at_8 = lambda x_t, t, y: perfect(x_t, t, y) + 2.0 * (t == 8)[:, None, None, None]  # noqa: E731
    loss, bands = objective.validation_losses(wrong_at_8)
    assert bands == pytest.approx((0, 4, 0), abs=1e-6)  # the losses begin with the last step
    assert loss == pytest.approx(4 / 3)


def test_every_step_of_every_path_is_used_for_training(states: torch.Tensor) -> None:
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
