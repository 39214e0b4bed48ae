import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointConfig, Probe
from model.schedule import Schedule, ScheduleConfig
from scripts import plot, sample
from scripts.common import plots
from scripts.common.errors import ScriptError
from scripts.common.figures import RESOLUTION, Panel, draw_panels, label_lines, new_figure, save_figure
from scripts.common.pictures import save_grid
from tests.scripts.extras import hide
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.tiny import tiny_unet


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors")


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(
            image.height, image.width
        )


def contains(picture: Tensor, part: Tensor) -> bool:
    """True if `part` occurs in the picture with exactly the same pixels."""
    height, width = part.shape
    starts = (picture[: picture.shape[0] - height + 1, : picture.shape[1] - width + 1] == part[0, 0]).nonzero()
    return any(torch.equal(picture[y : y + height, x : x + width], part) for y, x in starts.tolist())


def enlarged(image: Tensor, scale: int) -> Tensor:
    return image.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def test_image_pixels_are_enlarged_exactly_in_the_figure(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randint(0, 256, (2, 20, 30), generator=generator, dtype=torch.uint8)
    figure = draw_panels([Panel(left[..., None], ["a", "b"], ["row"], "left"), Panel(right[..., None], ["c"])], scale=3)
    save_figure(figure, tmp_path / "figure.png", grey=True)
    picture = pixels(tmp_path / "figure.png")
    assert contains(picture, enlarged(left, 3 * RESOLUTION))
    assert contains(picture, enlarged(right, 3 * RESOLUTION))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_noise_progression_goes_from_the_image_to_noise(kind: str) -> None:
    x_0 = torch.full((1, 28, 28), -1.0)
    x_0[0, 6:22, 12:16] = 1.0
    figure = plots.show_noise_progression(x_0, Schedule(ScheduleConfig(kind)), seed=1)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"t = {t}" for t in range(0, 101, 10)]
    cells = torch.tensor(axes.images[0].get_array())[..., 0].float().split(28, dim=1)
    assert len(cells) == 11
    assert torch.equal(cells[0] / 127.5 - 1, x_0[0])
    clean = cells[0].flatten()
    likeness = [torch.corrcoef(torch.stack([cell.flatten(), clean]))[0, 1].item() for cell in cells]
    assert all(earlier > later - 0.01 for earlier, later in pairwise(likeness))
    assert abs(likeness[-1]) < 0.1


def test_noise_progression_of_a_generated_digit_starts_with_that_digit(tiny: Path, tmp_path: Path) -> None:
    common = ["--checkpoint", str(tiny), "--digit", "3", "--seed", "9", "--num-steps", "3"]
    plot.main(["noise", *common, "--out", str(tmp_path / "noise.png")])
    sample.main([*common, "--scale", "3", "--out", str(tmp_path / "digit.png")])
    assert contains(pixels(tmp_path / "noise.png"), enlarged(pixels(tmp_path / "digit.png"), RESOLUTION))


def test_noise_progression_with_data_dir_shows_a_real_digit(tiny: Path, tmp_path: Path, mnist_dir: Path) -> None:
    path = tmp_path / "noise.png"
    plot.main(["noise", "--checkpoint", str(tiny), "--data-dir", str(mnist_dir), "--out", str(path)])
    first_seven = 0  # the first test image is a 7
    raw = plots.load_mnist("test", mnist_dir)[0][first_seven, 0]
    assert contains(pixels(path), enlarged(raw, 3 * RESOLUTION))


def test_reverse_process_ends_with_the_digits_of_scripts_sample(tiny: Path, tmp_path: Path) -> None:
    common = ["--checkpoint", str(tiny), "--seed", "4"]
    plot.main(["reverse", *common, "--out", str(tmp_path / "reverse.png")])
    sample.main([*common, "--digit", "all", "--batch-size", "10", "--out", str(tmp_path / "digits")])
    column = torch.cat([pixels(tmp_path / "digits" / f"digit-{digit}-seed-4-0.png") for digit in range(10)])
    column = enlarged(column, 2 * RESOLUTION)
    picture = pixels(tmp_path / "reverse.png")
    assert contains(picture[:, : picture.shape[1] // 2], column)  # x_t at t = 0
    assert contains(picture[:, picture.shape[1] // 2 :], column)  # predicted x_0
    assert (tmp_path / "reverse.png").stat().st_size < 150_000


@pytest.mark.parametrize(
    "count, wanted, chosen",
    [(101, 6, [0, 20, 40, 60, 80, 100]), (3, 6, [0, 1, 2]), (1, 6, [0]), (11, 6, [0, 2, 4, 6, 8, 10])],
)
def test_columns_are_spread_evenly(count: int, wanted: int, chosen: list[int]) -> None:
    assert plots.spread(count, wanted) == chosen


def test_sheet_has_a_row_of_ten_images_per_digit(tiny: Path, tmp_path: Path) -> None:
    common = ["--checkpoint", str(tiny), "--seed", "2", "--num-steps", "2"]
    plot.main(["sheet", *common, "--out", str(tmp_path / "sheet.png")])
    sample.main([*common, "--digit", "all", "--count", "10", "--scale", "2", "--out", str(tmp_path / "same.png")])
    sheet = pixels(tmp_path / "sheet.png")
    assert sheet.shape == (560, 560)
    assert torch.equal(sheet, pixels(tmp_path / "same.png"))


def test_sheet_with_data_dir_shows_real_digits_next_to_the_generated_ones(
    tiny: Path, tmp_path: Path, mnist_dir: Path
) -> None:
    common = ["--checkpoint", str(tiny), "--seed", "2", "--num-steps", "2"]
    plot.main(["sheet", *common, "--data-dir", str(mnist_dir), "--out", str(tmp_path / "sheet.png")])
    sample.main([*common, "--digit", "all", "--count", "10", "--scale", "1", "--out", str(tmp_path / "same.png")])
    sheet = pixels(tmp_path / "sheet.png")
    assert contains(sheet, enlarged(pixels(tmp_path / "same.png"), RESOLUTION))
    first_seven = plots.load_mnist("test", mnist_dir)[0][0, 0]  # the first test image is a 7
    assert contains(sheet[:, sheet.shape[1] // 2 :], enlarged(first_seven, RESOLUTION))


def test_guidance_figure_has_a_column_per_scale_from_the_same_noise(tiny: Path, tmp_path: Path) -> None:
    common = ["--checkpoint", str(tiny), "--seed", "2", "--num-steps", "3"]
    plot.main(["guidance", *common, "--out", str(tmp_path / "guidance.png")])
    picture = pixels(tmp_path / "guidance.png")
    for scale in (1, 10):
        digits = tmp_path / str(scale)
        sample.main([*common, "--digit", "4", "--guidance-scale", str(scale), "--scale", "1", "--out", f"{digits}.png"])
        assert contains(picture, enlarged(pixels(Path(f"{digits}.png")), RESOLUTION))


def test_animation_ends_with_the_digits_of_scripts_sample(tiny: Path, tmp_path: Path) -> None:
    common = ["--checkpoint", str(tiny), "--seed", "4", "--num-steps", "5"]
    plot.main(["animation", *common, "--out", str(tmp_path / "animation.webp")])
    sample.main([*common, "--digit", "all", "--batch-size", "10", "--scale", "3", "--out", str(tmp_path / "digits")])
    line = torch.cat([pixels(tmp_path / "digits" / f"digit-{digit}-seed-4-0.png") for digit in range(10)], dim=1)
    with Image.open(tmp_path / "animation.webp") as animation:
        animation.seek(animation.n_frames - 1)
        last = torch.frombuffer(bytearray(animation.convert("L").tobytes()), dtype=torch.uint8)
    assert torch.equal(last.view(line.shape), line)


def test_labels_of_lines_with_the_same_end_do_not_overlap() -> None:
    figure = new_figure(400, 300)
    axes = figure.add_subplot()
    for name in ("first", "second", "third"):
        axes.plot([0, 1], [0, 1], label=name)
    axes.plot([0, 0.5], [0, 0.5], label="elsewhere")
    label_lines(axes)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["elsewhere", "first", "second", "third"]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def write_losses(folder: Path, rows: list[tuple[int, float, float]]) -> Path:
    folder.mkdir()
    lines = [f"{epoch},{train},{validation},1e-3" for epoch, train, validation in rows]
    (folder / "losses.csv").write_text("\n".join(["epoch,train_loss,validation_loss,learning_rate", *lines]) + "\n")
    return folder


def test_loss_curves_show_the_losses_of_the_runs(tmp_path: Path) -> None:
    first = write_losses(tmp_path / "first", [(1, 0.2, 0.1), (2, 0.06, 0.05), (3, 0.05, 0.04)])
    second = write_losses(tmp_path / "second", [(1, 0.3, 0.2)])
    figure = plots.show_losses({"first": plots.read_losses(first), "second": plots.read_losses(second / "losses.csv")})
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
    assert curves == {
        "first, training": ([1, 2, 3], [0.2, 0.06, 0.05]),
        "first, validation": ([1, 2, 3], [0.1, 0.05, 0.04]),
        "second, training": ([1], [0.3]),
        "second, validation": ([1], [0.2]),
    }
    plot.main(["losses", str(first), str(second), "--out", str(tmp_path / "losses.png")])
    assert 2_000 < (tmp_path / "losses.png").stat().st_size < 150_000


@pytest.mark.parametrize(
    "content",
    [
        "",
        "epoch,train_loss\n1,0.2\n",
        "epoch,train_loss,validation_loss\n",
        "epoch,train_loss,validation_loss\n1,a,b\n",
    ],
)
def test_invalid_losses_csv_is_rejected(tmp_path: Path, content: str) -> None:
    path = tmp_path / "losses.csv"
    path.write_text(content)
    with pytest.raises(ScriptError, match=r"is not the losses\.csv|has no epoch"):
        plots.read_losses(path)


def test_epochs_are_shown_as_rows_in_the_given_order(tmp_path: Path) -> None:
    grids = torch.rand(3, 10, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for epoch, x_0 in zip((1, 5, 15), grids, strict=True):
        save_grid(x_0, tmp_path / "epochs" / f"{epoch:02d}.png", columns=10)
    plot.main(["epochs", str(tmp_path), "--epochs", "1", "15", "5", "--out", str(tmp_path / "out.png")])
    rows = [pixels(tmp_path / "epochs" / name) for name in ("01.png", "15.png", "05.png")]
    gap = torch.full((plots.ROW_GAP, 560), 255, dtype=torch.uint8)
    expected = torch.cat([rows[0], gap, rows[1], gap, rows[2]])
    assert contains(pixels(tmp_path / "out.png"), enlarged(expected, RESOLUTION))


def test_epochs_of_own_pictures_keep_their_colours_and_have_the_names_of_the_classes(tmp_path: Path) -> None:
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])[:, :, None, None].expand(3, 3, 12, 12)
    save_grid(colours, tmp_path / "epochs" / "01.png", columns=3)
    network = tiny_unet(image_channels=3, image_size=12, num_classes=3, num_steps=10, widths=(8, 8))
    names, schedule = ("cup", "fish", "star"), ScheduleConfig(num_steps=10)
    config = CheckpointConfig(network.config, schedule, class_names=names, probe=Probe(digit=0))
    checkpoint.save(tmp_path / "model.safetensors", network, config)
    (axes,) = plots.show_epochs(tmp_path).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == list(names)
    assert axes.images[0].get_array()[5, ::24].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_missing_epoch_is_named_in_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_grid(torch.zeros(10, 1, 28, 28), tmp_path / "epochs" / "01.png", columns=10)
    with pytest.raises(SystemExit) as exit_:
        plot.main(["epochs", str(tmp_path), "--epochs", "1", "5", "--out", str(tmp_path / "out.png")])
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "epoch 5" in sentence


@pytest.mark.parametrize(
    ("there", "shown"),
    [([1], [1]), ([1, 2, 3], [1, 3]), (range(1, 19), [1, 5, 15, 18]), (range(1, 41), [1, 5, 15, 30])],
)
def test_default_epochs_are_1_5_15_30_or_the_last(tmp_path: Path, there: Sequence[int], shown: list[int]) -> None:
    for epoch in there:
        level = torch.full((10, 1, 28, 28), epoch / 50)
        save_grid(level, tmp_path / "epochs" / f"{epoch:02d}.png", columns=10)
    plot.main(["epochs", str(tmp_path), "--out", str(tmp_path / "usual.png")])
    plot.main(["epochs", str(tmp_path), "--epochs", *map(str, shown), "--out", str(tmp_path / "asked.png")])
    assert torch.equal(pixels(tmp_path / "usual.png"), pixels(tmp_path / "asked.png"))


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["portrait"],
        ["noise"],
        ["noise", "--out", "picture.jpg"],
        ["noise", "--digit", "10", "--out", "x.png"],
        ["sheet", "--checkpoint", "nowhere.safetensors", "--out", "x.png"],
        ["losses", "nowhere", "--out", "x.png"],
        ["losses", "--out", "x.png"],
        ["epochs", "nowhere", "--out", "x.png"],
        ["noise", "--data-dir", "nowhere", "--digit", "seven", "--out", "x.png"],
        ["noise", "--data-dir", "nowhere", "--sampler", "ddim", "--out", "x.png"],
        ["noise", "--batch-size", "8", "--out", "x.png"],
        ["reverse", "--batch-size", "8", "--out", "x.png"],
    ],
    ids=lambda wrong: " ".join(wrong) or "nothing",
)
def test_wrong_argument_exits_with_status_2_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        plot.main(wrong)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_missing_extra_is_reported_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_losses(tmp_path / "run", [(1, 0.2, 0.1)])
    hide("matplotlib", monkeypatch)
    with pytest.raises(SystemExit) as exit_:
        plot.main(["losses", str(run), "--out", str(tmp_path / "losses.png")])
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "matplotlib" in sentence and "pip install -e '.[train]'" in sentence


def test_help_works_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hide("matplotlib", monkeypatch)
    with pytest.raises(SystemExit) as exit_:
        plot.main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for figure in ("noise", "reverse", "animation", "guidance", "sheet", "losses", "epochs", "steps", "tradeoff"):
        assert re.search(rf"^    {figure}\b", shown, re.MULTILINE)


@pytest.mark.parametrize(
    "command",
    [
        "noise",
        "reverse",
        "losses runs",
        "epochs run",
        "bench bench.json",
        "guidance",
        "sheet --data-dir=data",
        "steps steps.json",
    ],
)
def test_missing_matplotlib_is_reported_before_any_work(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("plot_drawn_noise", "plot_reverse", "plot_losses", "plot_epochs", "plot_bench"):
        monkeypatch.setattr(plot, name, lambda *_: pytest.fail("begun"))
    with pytest.raises(SystemExit) as exit_:
        plot.main([*command.split(), "--out=x.png"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "matplotlib is not installed. Install with: pip install -e '.[train]'\n"
