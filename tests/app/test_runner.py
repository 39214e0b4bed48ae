"""The real runner on a tiny network: its rows against each other and against the offline sampler."""

import copy
import dataclasses
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from app.config import Settings
from app.device import DeviceLostError, OutOfMemoryError, RunnerError, choose_device, choose_dtype, device_errors
from app.runner import Runner
from app.slots import NOBODY
from app.trajectory import Job, Options, Pixels, Trajectory
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig
from model.precision import fast_dtype
from model.prediction import PredictionConfig
from model.sampler import SAMPLERS, Guidance, Sampler, sample
from model.schedule import ScheduleConfig
from model.step import Stepped
from tests.tiny import tiny_unet

CPU = torch.device("cpu")
GUIDANCE = Guidance(scale=2.0, start=20, stop=80)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    network = tiny_unet(image_channels=request.param)
    for parameter in network.parameters():
        parameter.mul_(0.6)  # so that not all pixels are clipped
    config = CheckpointConfig(
        unet=network.config, schedule=ScheduleConfig(), guidance=GUIDANCE, training={"label_drop": 0.1}
    )
    file = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    checkpoint.save(file, network, config)
    return file


@pytest.fixture
def loaded(path: Path) -> Checkpoint:
    return checkpoint.load(path)


def new_runner(loaded: Checkpoint, dtype: torch.dtype = torch.float32) -> Runner:
    return Runner({"default": loaded}, CPU, dtype)


def rows_of(
    count: int = 1,
    *,
    digit: int = 3,
    seed: int = 1,
    num_steps: int = 5,
    sampler: Sampler = "ddpm",
    guidance_scale: float = 1.0,
    model: str = "default",
) -> list[Trajectory]:
    return Job(Options(digit, seed, num_steps, sampler, guidance_scale, model), count).unfinished


def step(runner: Runner, rows: list[Trajectory]) -> list[bool]:
    """A step as the engine makes it, of jobs as the service makes them."""
    for row in rows:
        row.job.guided_steps = runner.models[row.job.options.model].guided_steps_of(row.job.options)
    finite = runner.step(rows)
    for row in rows:
        row.step += 1
    return finite


def draw(runner: Runner, rows: list[Trajectory], max_batch: int = 64, order: int | None = None) -> list[Pixels]:
    """Every row to its end, `max_batch` at a time; in an order of its own at each step where `order` is a seed."""
    shuffle = random.Random(order)
    while left := [row for row in rows if row.steps_left]:
        if order is not None:
            shuffle.shuffle(left)
        assert all(step(runner, left[:max_batch]))
    images = runner.pixels(rows)
    runner.release(rows)
    return images


def equal(left: Iterable[Pixels], right: Iterable[Pixels]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def company() -> list[Trajectory]:
    """Rows that have nothing in common."""
    choose = random.Random(7)
    jobs = [
        rows_of(
            choose.randint(1, 3),
            digit=choose.randrange(10),
            seed=choose.randrange(2**53),
            num_steps=choose.choice([1, 2, 7, 12]),
            sampler=choose.choice(SAMPLERS),
            guidance_scale=choose.choice([1.0, 1.5, 4.0]),
        )
        for _ in range(12)
    ]
    return [row for rows in jobs for row in rows]


@DTYPES
def test_a_row_has_the_same_pixels_alone_and_in_any_company(loaded: Checkpoint, dtype: torch.dtype) -> None:
    runner = new_runner(loaded, dtype)
    alone = [draw(runner, [row])[0] for row in company()]
    assert len({image.tobytes() for image in alone}) == len(alone)
    for max_batch, order in [(64, None), (64, 1), (16, 2), (7, 3), (3, 4), (2, 5), (1, 6)]:
        assert equal(draw(runner, company(), max_batch, order), alone)


@pytest.fixture
def other(loaded: Checkpoint, tmp_path: Path) -> Checkpoint:
    """Another network, which predicts v for another schedule and draws in four steps only."""
    torch.manual_seed(5)
    network = tiny_unet(image_channels=loaded.config.unet.image_channels, widths=(8, 24), seed=5)
    config = CheckpointConfig(
        unet=network.config,
        schedule=ScheduleConfig(kind="cosine"),
        prediction=PredictionConfig("v"),
        samplers=("ddim",),
        steps=(4,),
    )
    checkpoint.save(tmp_path / "other.safetensors", network, config)
    return checkpoint.load(tmp_path / "other.safetensors")


@DTYPES
def test_two_models_in_one_loop_draw_what_each_draws_alone(
    loaded: Checkpoint, other: Checkpoint, dtype: torch.dtype
) -> None:
    def fast_rows(model: str) -> list[Trajectory]:
        return rows_of(5, seed=9, num_steps=4, sampler="ddim", model=model)

    expected = draw(new_runner(copy.deepcopy(other), dtype), fast_rows("default"))
    beside = draw(new_runner(copy.deepcopy(loaded), dtype), company())
    both = Runner({"default": loaded, "fast": other}, CPU, dtype)
    both.warm_up(lambda: False)
    assert equal(draw(both, fast_rows("fast")), expected)
    for max_batch, order in [(64, None), (64, 1), (7, 2), (3, 3)]:
        images = draw(both, [*fast_rows("fast"), *company()], max_batch, order)
        assert equal(images[:5], expected)
        assert equal(images[5:], beside)


def test_the_picture_that_is_known_of_each_model_is_drawn_by_that_model(loaded: Checkpoint, other: Checkpoint) -> None:
    wrong = dataclasses.replace(other, probe_image=-other.probe_image)
    with pytest.raises(RunnerError, match="known picture of model 'fast'"):
        Runner({"default": loaded, "fast": wrong}, CPU, torch.float32).warm_up(lambda: True)


@DTYPES
def test_a_row_that_joins_later_has_the_same_pixels(loaded: Checkpoint, dtype: torch.dtype) -> None:
    runner = new_runner(loaded, dtype)
    alone = draw(runner, rows_of(num_steps=6, guidance_scale=1.5))
    crowd, late = company(), rows_of(num_steps=6, guidance_scale=1.5)
    for _ in range(3):
        step(runner, [row for row in crowd if row.steps_left])
    assert equal(draw(runner, [*crowd, *late])[-1:], alone)


def test_another_runner_draws_the_same(path: Path) -> None:
    first, second = (draw(new_runner(checkpoint.load(path)), company()) for _ in range(2))
    assert equal(first, second)


def test_an_image_does_not_depend_on_how_many_are_asked_for(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    assert equal(draw(runner, rows_of(5))[:2], draw(runner, rows_of(2)))


@pytest.mark.parametrize("num_steps", [1, 9, 30])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.0), GUIDANCE], ids=["off", "everywhere", "interval"])
def test_rows_are_what_the_offline_sampler_draws(
    loaded: Checkpoint, sampler: Sampler, guidance: Guidance, num_steps: int
) -> None:
    y, index = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 0, 1, 0])
    seed = torch.tensor([5, 2**53 - 1, 2**53 - 1, 0])
    x_0 = sample(
        loaded.network,
        loaded.schedule,
        y,
        seed=seed,
        index=index,
        image_shape=loaded.image_shape,
        sampler=sampler,
        num_steps=num_steps,
        guidance=guidance,
        null_label=loaded.network.null_label,
    )  # (4, C, H, W)
    assert x_0.std() > 0.1
    runner = new_runner(dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, guidance=guidance)))
    options = {"num_steps": num_steps, "sampler": sampler, "guidance_scale": guidance.scale}
    rows = [
        *rows_of(1, digit=0, seed=5, **options),  # type: ignore[arg-type] # they are what rows_of takes
        *rows_of(2, digit=4, seed=2**53 - 1, **options),  # type: ignore[arg-type]
        *rows_of(1, digit=9, seed=0, **options),  # type: ignore[arg-type]
    ]
    drawn = torch.stack([torch.from_numpy(image).float() for image in draw(runner, rows)])
    offline = ((x_0 + 1) * 127.5).permute(0, 2, 3, 1).reshape(drawn.shape)
    torch.testing.assert_close(drawn, offline, rtol=0, atol=0.51)  # the rounding, and float32's own


class Counting:
    """The network, and how many rows it was given at each call."""

    def __init__(self, runner: Runner) -> None:
        self.rows: list[int] = []
        self._denoise = runner._networks["default"].program.denoise
        runner._networks["default"].program.denoise = self

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        self.rows.append(len(x))
        assert len(x) == len(c)
        eps: Tensor = self._denoise(x, c)
        return eps


def test_a_row_pays_for_guidance_only_where_it_acts(loaded: Checkpoint) -> None:
    runner = new_runner(loaded, torch.bfloat16)  # which is never padded
    network = Counting(runner)
    free, guided = rows_of(8, num_steps=10), rows_of(3, num_steps=10, guidance_scale=2.0)  # t = 100, 90, ... 10
    for _ in range(10):
        step(runner, [*free, *guided])
    assert network.rows == [11, 11] + [14] * 7 + [11]


def test_each_samplers_rows_are_guided_in_its_own_interval(loaded: Checkpoint) -> None:
    config = dataclasses.replace(loaded.config, guidance_by_sampler={"ddim": Guidance(3.0, 15, 35)})
    runner = new_runner(dataclasses.replace(loaded, config=config), torch.bfloat16)
    network = Counting(runner)
    assert [runner.models["default"].guidance_scale[sampler] for sampler in ("ddpm", "ddim")] == [2.0, 3.0]
    rows = [
        *rows_of(2, num_steps=10, guidance_scale=2.0),
        *rows_of(3, num_steps=10, guidance_scale=2.0, sampler="ddim"),
    ]
    for _ in range(10):  # t = 100, 90, ... 10: 80 to 20 are guided, 30 and 20 of ddim's
        step(runner, rows)
    assert network.rows == [5, 5] + [7] * 5 + [10] * 2 + [5]


@pytest.mark.parametrize(("sampler", "num_steps"), [("ddpm", 10), ("ddim", 7), ("dpmpp", 10), ("ddpm", 1)])
def test_the_evaluations_that_are_forecast_are_those_that_are_made(
    loaded: Checkpoint, sampler: Sampler, num_steps: int
) -> None:
    runner = new_runner(loaded, torch.bfloat16)
    network = Counting(runner)
    guided_steps = runner.models["default"].guided_steps(sampler, num_steps)
    job = Job(Options(1, 0, num_steps, sampler, 2.0), 3, guided_steps=guided_steps)
    forecast = []
    for _ in range(num_steps):
        forecast.append(sum(row.evaluations for row in job.unfinished))
        step(runner, job.unfinished)
    assert network.rows == forecast
    assert sum(forecast) == pytest.approx(3 * num_steps * job.evaluations_a_step)


def test_without_guidance_there_is_one_evaluation_a_row(loaded: Checkpoint) -> None:
    runner = new_runner(loaded, torch.bfloat16)
    network = Counting(runner)
    draw(runner, rows_of(20, num_steps=4))
    assert network.rows == [20] * 4


def test_slots_grow_with_the_rows_and_are_given_back(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    rows = rows_of(150, num_steps=3)
    expected = draw(runner, rows_of(150, num_steps=3), max_batch=8)
    step(runner, rows[:50])
    step(runner, rows[50:])  # the state of the first fifty moves to a larger place
    assert len({row.slot for row in rows}) == 150
    assert equal(draw(runner, rows), expected)
    assert all(row.slot is None for row in rows)
    size = len(runner._slots.state.seed)
    for _ in range(5):
        draw(runner, rows_of(150, num_steps=1))
    assert len(runner._slots.state.seed) == size


def test_releasing_twice_gives_one_slot_back(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    row = rows_of()
    step(runner, row)
    runner.release(row)
    runner.release(row)
    others = rows_of(64)
    step(runner, others)
    assert len({other.slot for other in others}) == 64


def test_a_row_of_nan_leaves_the_others_alone(loaded: Checkpoint) -> None:
    healthy = draw(new_runner(loaded), [*rows_of(digit=2), *rows_of(digit=4, guidance_scale=1.5)])
    broken = dataclasses.replace(loaded)
    broken.network.class_embed.weight[3] = torch.nan
    runner = new_runner(broken)
    rows = [*rows_of(digit=2), *rows_of(digit=3), *rows_of(digit=4, guidance_scale=1.5)]
    for _ in range(5):
        assert step(runner, rows) == [True, False, True]
    images = runner.pixels([rows[0], rows[2]])
    assert equal(images, healthy)


def test_a_step_that_raises_has_changed_nothing(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    expected = draw(runner, rows_of(3, num_steps=4))
    rows = rows_of(3, num_steps=4)
    step(runner, rows[:2])
    program = runner._networks["default"].program
    denoise = program.denoise

    def fail(x: Tensor, c: Tensor) -> Tensor:
        raise RuntimeError

    program.denoise = fail
    with pytest.raises(RuntimeError):
        runner.step(rows)
    program.denoise = denoise
    assert equal(draw(runner, rows), expected)


def test_an_image_that_has_not_begun_is_black(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    rows = rows_of(3)
    step(runner, rows[1:2])
    images = runner.pixels(rows)
    assert not images[0].any()
    assert images[1].any()
    assert not images[2].any()
    channels, size = loaded.image_shape[:2]
    assert images[0].shape == images[1].shape == ((size, size) if channels == 1 else (size, size, channels))


def test_warming_up_measures_steps_and_leaves_nothing_behind(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    before = len(runner._slots._free)
    pace = runner.warm_up(lambda: False)
    assert pace.step_seconds(64) > 0
    assert len(runner._slots._free) == before


def test_warming_up_stops_when_asked(loaded: Checkpoint) -> None:
    runner = new_runner(loaded)
    network = Counting(runner)
    runner.warm_up(lambda: True)
    assert len(network.rows) == loaded.config.probe.num_steps  # the probe alone


@DTYPES
def test_a_machine_that_draws_the_known_picture_wrong_does_not_serve(loaded: Checkpoint, dtype: torch.dtype) -> None:
    wrong = dataclasses.replace(loaded, probe_image=-loaded.probe_image)
    with pytest.raises(RunnerError, match="known picture"):
        new_runner(wrong, dtype).warm_up(lambda: True)


def test_a_known_picture_of_nan_is_wrong(loaded: Checkpoint) -> None:
    loaded.network.final_conv[0].bias[:] = torch.nan  # type: ignore[operator] # it is a Conv2d
    with pytest.raises(RunnerError, match="known picture"):
        new_runner(loaded).warm_up(lambda: True)


def test_it_says_what_is_served(path: Path, loaded: Checkpoint) -> None:
    info = Runner.load(Settings(checkpoint=path, device="cpu", dtype="bfloat16", compile="off")).models["default"]
    assert (info.name, info.sha256, info.device, info.dtype) == ("default", loaded.sha256, "cpu", "bfloat16")
    assert (info.max_steps, info.samplers, info.guidance_scale, info.guidable) == (
        100,
        SAMPLERS,
        dict.fromkeys(SAMPLERS, 2.0),
        True,
    )
    assert info.num_parameters == sum(parameter.numel() for parameter in loaded.network.parameters())


def test_what_could_not_be_compiled_has_no_more_threads_than_keep_its_bits(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.compiler.can_compile", lambda: False)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        Runner.load(Settings(checkpoint=path, device="cpu", dtype="bfloat16", cache_dir=tmp_path))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_model_that_draws_in_few_steps_says_so(other: Checkpoint) -> None:
    info = Runner({"default": other}, CPU, torch.float32).models["default"]
    assert (info.steps, info.default_steps, info.samplers, info.guidable) == ((4,), 4, ("ddim",), False)


def test_without_dropped_labels_there_is_nothing_to_guide_by(loaded: Checkpoint) -> None:
    config = dataclasses.replace(loaded.config, training={}, guidance=Guidance())
    assert not new_runner(dataclasses.replace(loaded, config=config)).models["default"].guidable


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"nothing\.safetensors cannot be read"):
        Runner.load(Settings(checkpoint=tmp_path / "nothing.safetensors"))


def test_a_second_checkpoint_is_served_beside_the_first(path: Path) -> None:
    models = Runner.load(Settings(checkpoint=path, fast_checkpoint=path, device="cpu", compile="off")).models
    assert list(models) == ["default", "fast"]
    assert models["fast"].name == "fast"


@pytest.mark.parametrize("size", [16, 32])
def test_a_second_checkpoint_of_another_size_is_one_sentence(path: Path, tmp_path: Path, size: int) -> None:
    network = tiny_unet(image_size=size)
    file = tmp_path / "larger.safetensors"
    checkpoint.save(file, network, CheckpointConfig(unet=network.config, schedule=ScheduleConfig()))
    with pytest.raises(RunnerError, match="UNFOG_FAST_CHECKPOINT draws images of another size"):
        Runner.load(Settings(checkpoint=path, fast_checkpoint=file, device="cpu"))


def test_a_missing_second_checkpoint_names_its_own_variable(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"UNFOG_FAST_CHECKPOINT: .*nothing\.safetensors cannot be read"):
        Runner.load(Settings(checkpoint=path, fast_checkpoint=tmp_path / "nothing.safetensors"))


def test_a_device_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(RunnerError, match="UNFOG_DEVICE=cuda:99"):
        choose_device("cuda:99")


def test_a_precision_that_is_named_is_the_one_that_serves() -> None:
    assert choose_dtype("float32", CPU) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    assert choose_dtype("auto", CPU) is fast_dtype(CPU)


@pytest.mark.parametrize(
    ("raised", "understood"),
    [
        (torch.OutOfMemoryError("x"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (torch.AcceleratorError("a\nb"), DeviceLostError),
        (RuntimeError("x"), RuntimeError),
    ],
)
def test_what_the_device_raises_is_translated(raised: Exception, understood: type[Exception]) -> None:
    with pytest.raises(understood), device_errors():
        raise raised


def test_a_row_whose_beginning_failed_begins_anew(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot may hold what another image left there."""
    runner = new_runner(loaded)
    expected = draw(runner, rows_of(4, seed=5))
    rows, write = rows_of(4, seed=5), runner._slots.write

    def fail(*args: object, **named: object) -> None:
        monkeypatch.setattr(runner._slots, "write", write)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runner._slots, "write", fail)
    with pytest.raises(OutOfMemoryError):
        runner.step(rows)
    assert all(row.slot is None for row in rows)
    assert all(np.array_equal(a, b) for a, b in zip(draw(runner, rows), expected, strict=True))


def test_a_step_that_was_written_in_part_is_never_run_again(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, rows = new_runner(loaded), rows_of(2)
    step(runner, rows)

    def fail(*args: object, **named: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(runner._slots, "write", fail)
    with pytest.raises(DeviceLostError):
        runner.step(rows)


def test_the_service_draws_only_the_classes_that_the_checkpoint_has(loaded: Checkpoint) -> None:
    assert new_runner(loaded).models["default"].num_classes == loaded.config.unet.num_classes


def ahead(loaded: Checkpoint, dtype: torch.dtype = torch.float32) -> Runner:
    """A runner that works as on a GPU, but on a CPU."""
    return Runner({"default": loaded}, CPU, dtype, runs_ahead=True)


@pytest.mark.parametrize("max_batch", [64, 7, 3, 1])
def test_where_steps_are_not_waited_for_the_images_are_the_same(loaded: Checkpoint, max_batch: int) -> None:
    assert equal(draw(ahead(loaded), company(), max_batch), draw(new_runner(loaded), company()))


def test_where_steps_are_not_waited_for_shapes_are_few(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, shapes = ahead(loaded), set[tuple[int, int]]()
    network = runner._networks["default"]
    step = network.step

    def note(*inputs: Tensor) -> Stepped:
        *_, slots, _, source, second = inputs
        assert len(slots) == len(second)
        shapes.add((len(slots), len(source)))
        return step(*inputs)

    network.step = note
    for count in (1, 3, 5, 7, 8):
        draw(runner, rows_of(count, num_steps=2))
        draw(runner, rows_of(count, num_steps=2, guidance_scale=1.5))
    assert shapes == {(1, 1), (1, 2), (4, 4), (4, 8), (8, 8), (8, 16)}


def test_where_steps_are_not_waited_for_a_row_of_nan_is_known_when_it_ends(loaded: Checkpoint) -> None:
    loaded.network.class_embed.weight[3] = torch.nan
    runner = ahead(loaded)
    rows = [*rows_of(digit=2, num_steps=3), *rows_of(digit=3, num_steps=3), *rows_of(digit=4, num_steps=4)]
    assert [step(runner, rows) for _ in range(3)] == [[True] * 3, [True] * 3, [True, False, True]]
    runner.release(rows)
    healthy = rows_of(3, digit=2, num_steps=1)  # in slots of which one was not finite
    assert step(runner, healthy) == [True] * 3


def test_what_fills_up_a_step_has_changed_nobody(loaded: Checkpoint) -> None:
    runner = ahead(loaded)
    before = [part[NOBODY].clone() for part in runner._slots.state]
    draw(runner, rows_of(5, num_steps=3))
    assert all(torch.equal(part[NOBODY], was) for part, was in zip(runner._slots.state, before, strict=True))


def test_warming_up_as_on_a_gpu_sees_every_shape(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.runner.BATCHES_AHEAD", (1, 2, 8))
    runner, shapes = ahead(loaded), set[tuple[int, int]]()
    network = runner._networks["default"]
    step = network.step

    def note(*inputs: Tensor) -> Stepped:
        shapes.add((len(inputs[-3]), len(inputs[-2])))
        return step(*inputs)

    network.step = note
    free = len(runner._slots._free)
    runner.warm_up(lambda: False)
    assert shapes == {(1, 1), (1, 2), (2, 2), (2, 4), (8, 8), (8, 16)}
    assert len(runner._slots._free) == free


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_a_row_has_the_same_bits_in_any_company(loaded: Checkpoint, tmp_path: Path, compiled: bool) -> None:
    runner = Runner({"default": loaded}, torch.device("cuda"), torch.bfloat16)
    if compiled:
        runner.compile(tmp_path, must=True)
    alone = [image for row in company() for image in draw(runner, [row])]
    for max_batch, order in [(64, None), (64, 1), (7, 3), (2, 5)]:
        assert equal(draw(runner, company(), max_batch, order), alone)
