import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from model.recognition import CYCLE, Readout, Recognition
from scripts import evaluate
from scripts.evaluation import recognize
from scripts.evaluation.recognize import figures_of, leads_at, rejection, replayed, show_errors, show_leads
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint
from tests.scripts.tiny_training import trust_idx_files, write_idx_files

CONSTANTS = Readout(
    "", (1.0,) * 10, ((0.0,) * 10,) * 100, 10.0, 5.0, ((1.0, 0.0),) * 10, (1.0,) * 10, bias=-1.0, limit=0.5
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("recognition")
    write_idx_files(folder / "data", num_images=60)
    save_tiny_checkpoint(folder / "tiny.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        trust_idx_files(patch, 60)
        patch.setattr(recognize, "NUM_PLOTTED", 12)
        patch.setattr(recognize, "CHUNK", 4)
        yield folder


def arguments(inputs: Path, out: Path, *more: str) -> list[str]:
    files = [f"--data-dir={inputs / 'data'}", f"--checkpoint={inputs / 'tiny.safetensors'}", f"--out={out}"]
    return ["recognize", *files, "--split=validation", "--num-non-digits=0", "--num-pairs=3", *more]


def result(out: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(out.with_suffix(".json").read_text())
    return content


def answered(*rows: list[float]) -> Recognition:
    answer = Recognition(CONSTANTS, 0.0, len(rows), prune=False)
    for row in rows:
        answer.add(row)
    return answer


def test_command_writes_results_and_two_plots(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "recognised.png"
    evaluate.main(arguments(inputs, out, "--no-prune", "--num-images=10"))
    rows = result(out)["rows"]
    assert isinstance(rows, list)
    assert [(row["num_pairs"], row["pruned"]) for row in rows] == [(n, pruned) for n in (1, 2, 3) for pruned in (0, 1)]
    assert rows[4]["evaluations_an_image"] == 30
    assert rows[5]["evaluations_an_image"] <= 30
    for picture in (out, out.with_name("recognised-digit.png")):
        with Image.open(picture) as image:
            assert image.size == (1520, 840)


def test_stopped_run_continues_with_the_images_that_are_missing(inputs: Path, tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped.png", tmp_path / "whole.png"
    evaluate.main(arguments(inputs, stopped, "--num-images=5"))
    first = result(stopped)["new_evaluations"]
    evaluate.main(arguments(inputs, stopped, "--num-images=10"))
    evaluate.main(arguments(inputs, whole, "--num-images=10"))
    assert result(stopped)["rows"] == result(whole)["rows"]
    assert result(stopped)["new_evaluations"] == result(whole)["new_evaluations"] - first  # type: ignore[operator]


def test_errors_of_other_options_are_not_used(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "recognised.png"
    evaluate.main(arguments(inputs, out, "--num-images=4"))
    with pytest.raises(SystemExit):
        evaluate.main([*arguments(inputs, out, "--num-images=4"), "--no-prune"])
    assert "another prune. Delete it, or change --out" in capsys.readouterr().err


def test_figures_count_right_answers_and_evaluations() -> None:
    near_3 = [1.0 if y == 3 else 25.0 for y in range(10)]
    figures = figures_of([answered(near_3), answered(near_3)], torch.tensor([3, 5]))
    assert (figures["accuracy"], figures["wrong"]) == (0.5, 1)
    assert (figures["evaluations_an_image"], figures["share_of_calls"]) == (10, 1)
    assert figures["confusion"][5][3] == figures["confusion"][3][3] == 1


def test_class_without_errors_is_dropped() -> None:
    errors = torch.full((4, 10), 25.0)
    errors[:, 2] = 9.0
    errors[1:, 5:] = torch.nan
    answer = replayed(errors, 0.0, replace(CONSTANTS, margin=3.0), 4, prune=True)
    assert answer.label == 2
    assert len(answer.errors) == 4
    assert replayed(errors, 0.0, CONSTANTS, 4, prune=True).probabilities[7] < 0.1


def test_rejection_counts_digits_and_other_images_by_the_limit() -> None:
    digits = [answered([1.0] * 10), answered([2.0] * 10)]
    others = [answered([1.5] * 10), answered([1_000.0] * 10)]
    found = rejection(digits, {"letters": others})
    assert found == {"false alarms": 0, "letters": {"missed": 0.5, "area": 0.75, "count": 2}}


def test_leads_are_shares_of_the_distance_of_the_true_class() -> None:
    errors = torch.full((10, len(CYCLE), 10), 9.0)
    errors[range(10), :, range(10)] = 4.0
    assert leads_at(errors, torch.arange(10)).flatten().tolist() == pytest.approx([0.5] * 100)


def test_plots_have_a_line_for_each_digit_from_low_to_high_t() -> None:
    leads = torch.arange(100).view(10, 10) / 100
    (axes,) = show_leads(leads).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    order = sorted(range(len(CYCLE)), key=CYCLE.__getitem__)
    assert list(lines["4"].get_xdata()) == sorted(CYCLE)
    assert list(lines["4"].get_ydata()) == pytest.approx(leads[4, order].tolist())
    (axes,) = show_errors(torch.tensor([[float((y + 1) ** 2) for y in range(10)]] * len(CYCLE))).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["3"].get_ydata()) == pytest.approx([3] * len(CYCLE))
