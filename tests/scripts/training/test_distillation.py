from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.noise import normal
from model.pixels import from_pixels, to_pixels
from model.prediction import Prediction, PredictionConfig
from model.sampler import Guidance, sample
from model.schedule import Schedule, ScheduleConfig
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import Drawer
from scripts.common.errors import ScriptError
from scripts.common.progress import Reporter
from scripts.training import distillation
from scripts.training.distillation import (
    IMAGE_SEED,
    READABLE,
    DistillationObjective,
    TeacherImages,
    _ByClass,
    _only_readable,
    _timesteps_of_paths,
    draw_images,
)
from scripts.training.recipe import AdversaryRecipe, DistillationRecipe, Recipe
from tests.scripts.tiny_training import NUM_STEPS, recipe_of
from tests.tiny import tiny_unet

CPU = torch.device("cpu")
DISTILLATION = DistillationRecipe(
    num_steps=(3, 1),
    teacher_steps=6,
    num_images=38,
    num_held_out=2,
    guidance=Guidance(2.0, 3, NUM_STEPS),
    image_weight=1.0,
    recognition_weight=0.0,
)
ADVERSARY = AdversaryRecipe(width=8, lr=1e-3, gradient_weight=0.1)


def recipe_with(**weights: float) -> Recipe:
    return recipe_of(
        "cosine",
        precision="float32",
        prediction=PredictionConfig("v"),
        distillation=DISTILLATION.model_copy(update=weights),
        adversary=ADVERSARY,
        guidance=Guidance(),
        label_drop=0.0,
    )


RECIPE = recipe_with()
SCHEDULE = Schedule(RECIPE.schedule)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generates no more images than the recipe needs."""
    monkeypatch.setattr(distillation, "PART_SIZE", DISTILLATION.num_images + DISTILLATION.num_held_out)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A teacher with large class embeddings, so that guidance has a visible effect on its images."""
    network = tiny_unet(image_size=28, num_steps=NUM_STEPS)
    network.class_embed.weight.mul_(10)
    config = CheckpointConfig(
        unet=network.config,
        schedule=RECIPE.schedule,
        prediction=PredictionConfig("v"),
        guidance=Guidance(1.2),  # not used for the images, which use the guidance of the recipe
        training={"label_drop": 0.1},
    )
    checkpoint.save(tmp_path / "teacher.safetensors", network, config)
    return tmp_path / "teacher.safetensors"


def load_or_draw(
    teacher: Path, folder: Path, recipe: DistillationRecipe = DISTILLATION, seed: int = 0
) -> TeacherImages:
    with Reporter() as reporter:
        images = draw_images(Drawer(checkpoint.load(teacher)), recipe, folder, reporter, seed=seed)
    assert images
    return images


def sampled(teacher: Path, guidance: Guidance, y: Tensor) -> Tensor:
    """Returns 40 images of the offline sampler in float32."""
    return sample(
        checkpoint.load(teacher).network,
        SCHEDULE,
        y,
        seed=torch.full_like(y, IMAGE_SEED),
        index=torch.arange(40),
        image_shape=(1, 28, 28),
        sampler="dpmpp",
        num_steps=6,
        null_label=10,
        guidance=guidance,
        prediction=Prediction(PredictionConfig("v"), SCHEDULE),
    )


def test_images_are_those_of_the_sampler_with_their_noise_and_guidance(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # makes this machine compute in float32
    images = load_or_draw(teacher, tmp_path)
    assert images.images.shape == (40, 1, 28, 28)
    assert images.y.tolist() == [i % 10 for i in range(40)]
    own = Guidance(2.0, 3, NUM_STEPS)
    x_0 = from_pixels(images.images)
    assert (x_0 - sampled(teacher, own, images.y)).abs().max() < 0.01  # the images are rounded to 8 bits
    for guidance, y in ((Guidance(), images.y), (Guidance(2.0, 1, 2), images.y), (own, (images.y + 1) % 10)):
        assert (x_0 - sampled(teacher, guidance, y)).abs().mean() > 0.01
    rows = torch.tensor([3, 0, 39])
    expected = normal(torch.full((3,), IMAGE_SEED), rows, torch.zeros(3, dtype=torch.int64), (1, 28, 28))
    assert torch.equal(images.noise(rows), expected)


@pytest.mark.parametrize("seed_of_digits", [0, 1, 2, 3])
def test_images_of_the_teacher_and_evaluated_digits_use_different_noise(seed_of_digits: int) -> None:
    seed, index = torch.zeros(20, dtype=torch.int64), torch.arange(20)
    seeds = (IMAGE_SEED, seed_of_digits)
    images, digits = (normal(seed + base, index, torch.zeros_like(seed), (1, 28, 28)) for base in seeds)
    assert (images[:, None] - digits[None]).abs().amax(dim=(2, 3, 4)).min() > 1


def test_existing_images_are_not_generated_again(teacher: Path, tmp_path: Path) -> None:
    first = load_or_draw(teacher, tmp_path)
    (file,) = tmp_path.glob("0*.safetensors")
    written = file.stat().st_mtime_ns
    again = load_or_draw(teacher, tmp_path)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first.images, again.images)


def test_more_images_are_added_to_existing_ones(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "PART_SIZE", 16)
    few = load_or_draw(teacher, tmp_path)
    more = load_or_draw(teacher, tmp_path, DISTILLATION.model_copy(update={"num_images": 60}))
    assert (len(few), len(more)) == (40, 62)
    assert torch.equal(more.images[:40], few.images)
    assert len({image.numpy().tobytes() for image in more.images}) == 62


@pytest.mark.parametrize("field", ["seed", "teacher", "steps", "guidance"])
def test_images_of_another_seed_teacher_or_recipe_are_rejected(teacher: Path, tmp_path: Path, field: str) -> None:
    load_or_draw(teacher, tmp_path / "images")
    changed = {"steps": {"teacher_steps": 9}, "guidance": {"guidance": Guidance(3.0)}}.get(field, {})
    recipe = DISTILLATION.model_copy(update=changed)
    if field == "teacher":
        loaded = checkpoint.load(teacher)
        loaded.network.class_embed.weight.mul_(1.5)
        checkpoint.save(teacher, loaded.network, loaded.config)
    with pytest.raises(ScriptError, match="another teacher, recipe, seed, device or dtype"):
        load_or_draw(teacher, tmp_path / "images", recipe, seed=int(field == "seed"))


def test_damaged_images_give_a_one_line_error(teacher: Path, tmp_path: Path) -> None:
    load_or_draw(teacher, tmp_path / "images")
    (file,) = (tmp_path / "images").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ScriptError, match="is damaged"):
        load_or_draw(teacher, tmp_path / "images")


@pytest.fixture
def images() -> TeacherImages:
    pixels = torch.randint(0, 256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return TeacherImages(pixels, torch.arange(40) % 10, torch.arange(40), IMAGE_SEED)


REAL = ImageSet(torch.full((100, 1, 28, 28), 200, dtype=torch.uint8), torch.arange(100) % 10)


def objective_of(images: TeacherImages, recipe: Recipe = RECIPE, **options: Any) -> DistillationObjective:
    return DistillationObjective(recipe, images, REAL, CPU, **options)


def output_for(x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Returns the output v with which x_0 is predicted (Salimans & Ho 2022, section 4)."""
    alpha_bar = SCHEDULE.alpha_bar[t].float()[:, None, None, None]
    return (alpha_bar.sqrt() * x_t - x_0) / (1 - alpha_bar).sqrt()


class Watched:
    """A student that predicts the same image for each row, and remembers its inputs."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value, requires_grad=True)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((x_t.detach(), t, y))
        return output_for(self.value.expand(x_t.shape), x_t, t)


def test_a_student_learns_at_each_timestep_of_its_paths_from_its_own_prediction(images: TeacherImages) -> None:
    student, rows = Watched(0.25), torch.arange(38)
    objective_of(images).loss_of(torch.Generator().manual_seed(0))(student, rows)
    (first_x, first_t, first_y), (x_t, t, y) = student.calls
    assert t[:25].tolist() == [NUM_STEPS] * 25  # 2/3 of 38 rows: the mean of 1/3 of the steps of a path, and of all
    assert set(t[25:].tolist()) == {8, 4}
    assert torch.equal(y, images.y[:38])
    noise = images.noise(rows)
    assert torch.equal(x_t[:25], noise[:25])
    assert torch.equal(first_x, noise[25:])
    assert (first_t == NUM_STEPS).all()
    assert torch.equal(first_y, y[25:])
    # The step from T to t of Song 2021, eq. 12, with eps = (x_T - sqrt(alpha_bar_T) x_0) / sqrt(1 - alpha_bar_T).
    alpha_bar, alpha_bar_T = SCHEDULE.alpha_bar[t[25:]].float()[:, None, None, None], SCHEDULE.alpha_bar[-1].float()
    eps = (noise[25:] - alpha_bar_T.sqrt() * 0.25) / (1 - alpha_bar_T).sqrt()
    expected = alpha_bar.sqrt() * 0.25 + (1 - alpha_bar).sqrt() * eps
    torch.testing.assert_close(x_t[25:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("num_steps", "first", "later"),
    [((1,), 1, {}), ((4,), 1 / 4, {75: 1, 50: 1, 25: 1}), ((4, 2, 1), 7 / 12, {75: 1, 50: 3, 25: 1})],
)
def test_each_number_of_steps_is_as_frequent(num_steps: tuple[int, ...], first: float, later: dict[int, int]) -> None:
    found, share = _timesteps_of_paths(Schedule(ScheduleConfig()), num_steps)
    assert share == pytest.approx(first)
    assert {t: found.tolist().count(t) for t in set(found.tolist())} == later


def test_loss_is_the_sum_of_the_weighted_parts(images: TeacherImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adversary's part is a constant here. tests/scripts/training/test_adversary.py has its own tests."""
    monkeypatch.setattr(distillation.Adversary, "learn", lambda *args: None)
    monkeypatch.setattr(distillation.Adversary, "loss", lambda *args: torch.tensor(7.0))
    rows = torch.arange(38)
    of_image = (0.25 - from_pixels(images.images[:38])).square().mean().item()
    logits = torch.zeros(38, 10)
    logits[:19, :] = 50 * torch.nn.functional.one_hot(images.y[:19], 10)  # half of the images are certain
    of_reading = 0.5 * (torch.tensor(10.0).log().item() - READABLE)
    for weights in ((0.0, 0.0), (2.0, 0.0), (0.0, 3.0), (2.0, 3.0)):
        recipe = recipe_with(image_weight=weights[0], recognition_weight=weights[1])
        objective = objective_of(images, recipe, classify=lambda x_0: logits)
        loss = objective.loss_of(torch.Generator().manual_seed(0))(Watched(0.25), rows)
        assert loss.item() == pytest.approx(7 + weights[0] * of_image + weights[1] * of_reading, rel=1e-4)


def test_the_adversary_sees_real_images_of_the_same_classes_and_clipped_predictions(
    images: TeacherImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(distillation.Adversary, "learn", lambda self, *args: seen.append(args))
    real = ImageSet(
        (torch.arange(100) % 10 * 20).to(torch.uint8)[:, None, None, None].expand(100, 1, 28, 28), REAL.labels
    )
    objective = DistillationObjective(RECIPE, images, real, CPU)
    objective.loss_of(torch.Generator().manual_seed(0))(Watched(1.25), torch.arange(38))
    ((shown, generated, t, y),) = seen
    assert torch.equal(to_pixels(shown)[:, 0, 0, 0] // 20, y)
    assert torch.equal(generated, torch.ones_like(generated))
    assert t.shape == y.shape == (38,)


@pytest.mark.parametrize(("value", "learns"), [(0.3, True), (1.3, True), (1.6, False)])
def test_a_prediction_a_little_beyond_white_still_has_a_gradient(
    images: TeacherImages, value: float, learns: bool
) -> None:
    student = Watched(value)
    objective_of(images).loss_of(torch.Generator().manual_seed(0))(student, torch.arange(38)).backward()
    assert bool(student.value.grad) == learns


def test_real_images_are_drawn_evenly_from_their_class() -> None:
    labels = torch.tensor([2, 0, 1, 2, 2, 0])
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None]
    y = torch.tensor([2] * 900 + [1] * 10 + [0] * 600)
    drawn = to_pixels(_ByClass(ImageSet(images, labels), 3, CPU).draw(y, torch.Generator().manual_seed(0))).flatten()
    assert torch.equal(labels[drawn.long()], y)
    counts = drawn.bincount(minlength=6)
    assert counts[2] == 10
    assert ((counts[[0, 3, 4, 1, 5]] - 300).abs() < 60).all()


def test_validation_loss_is_the_squared_error_at_each_timestep(images: TeacherImages) -> None:
    held_out = from_pixels(images.images[38:])

    def perfect(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert y.tolist() == [8, 9] * 3
        return output_for(held_out.repeat(3, 1, 1, 1), x_t, t)

    def black_at_8(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        wrong = output_for(-torch.ones_like(x_t), x_t, t)
        return torch.where((t == 8)[:, None, None, None], wrong, perfect(x_t, t, y))

    objective = objective_of(images)
    assert objective.num_examples == 38
    assert objective.validation_losses(perfect)[0] == pytest.approx(0, abs=1e-8)
    loss, of_timesteps = objective.validation_losses(black_at_8)
    expected = (held_out + 1).square().mean().item()
    assert of_timesteps == pytest.approx((0, expected, 0), abs=1e-6)  # t = 4, 8 and 12
    assert loss == pytest.approx(expected / 3)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_small_batches_have_the_first_step_and_if_possible_a_later_one(images: TeacherImages, num_rows: int) -> None:
    student = Watched(0.25)
    objective_of(images).loss_of(torch.Generator().manual_seed(0))(student, torch.arange(num_rows))
    assert student.calls[-1][1][0] == NUM_STEPS
    assert len(set(student.calls[-1][1].tolist())) == num_rows


def test_real_images_are_mirrored_if_those_of_the_teachers_training_were(
    images: TeacherImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(distillation.Adversary, "learn", lambda self, *args: seen.append(args))
    bright_left = REAL.images.clone()
    bright_left[..., 14:] = 0
    for flip in (False, True):
        recipe = RECIPE.model_copy(update={"flip": flip})
        objective = DistillationObjective(recipe, images, ImageSet(bright_left, REAL.labels), CPU)
        objective.loss_of(torch.Generator().manual_seed(0))(Watched(0.25), torch.arange(38))
    plain, flipped = (real[..., 0].mean(dim=(1, 2)) > real[..., -1].mean(dim=(1, 2)) for real, *_ in seen)
    assert plain.all()
    assert 0.2 < flipped.double().mean() < 0.8


def test_images_that_cannot_be_read_are_left_out(images: TeacherImages, capsys: pytest.CaptureFixture[str]) -> None:
    seen = images.y.clone()
    seen[[3, 17]] += 1
    with Reporter() as reporter:
        kept = _only_readable(images, lambda x_0: torch.nn.functional.one_hot(seen, 11).float(), CPU, reporter)
    assert kept.index.tolist() == [i for i in range(40) if i not in (3, 17)]
    assert "2 of 40 images of the teacher cannot be read" in capsys.readouterr().out
