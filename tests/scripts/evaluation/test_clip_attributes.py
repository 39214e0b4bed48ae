import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

from scripts import evaluate, sample
from scripts.evaluation.captions import boldness
from scripts.evaluation.clip_attributes import ATTRIBUTES, PROMPTS, Attribute, compare_pairs, show_attributes, sign_test
from tests.scripts.tiny_checkpoint import save_tiny_checkpoint


@pytest.mark.parametrize(("positive", "negative"), [(50, 0), (31, 19), (25, 25), (3, 4), (0, 5), (0, 0), (480, 520)])
def test_sign_test_equals_that_of_scipy(positive: int, negative: int) -> None:
    expected = (
        binomtest(positive, positive + negative, alternative="greater").pvalue if positive + negative else 1
    )  # scipy needs at least one pair
    assert sign_test(positive, negative) == pytest.approx(expected, rel=1e-9)


def test_pairs_are_compared_by_index_and_equal_values_are_left_out() -> None:
    light = Attribute("light", "a light {}", "a dark {}", lambda x: x.mean(dim=(1, 2, 3)))
    more, less = (
        torch.tensor(values, dtype=torch.uint8)[:, None, None, None] for values in ([51, 102, 0, 255], [0, 0, 51, 255])
    )
    found = compare_pairs(light, 7, more, less)
    assert (found.attribute, found.digit, found.larger, found.pairs) == ("light", 7, 2, 4)
    assert (found.more, found.less) == (pytest.approx(0.4), pytest.approx(0.3))
    assert found.p == 0.5  # 2 or 3 of 3 pairs


def test_attributes_tell_thick_from_thin_and_slanted_from_upright() -> None:
    stroke, slant = ATTRIBUTES
    thick, thin = torch.zeros(1, 1, 28, 28), torch.zeros(1, 1, 28, 28)
    thick[..., 4:24, 12:16], thin[..., 4:24, 12:14] = 1, 1
    assert stroke.measure(thick) > stroke.measure(thin)
    left, right = torch.eye(28)[None, None], torch.eye(28).flip(1)[None, None]
    assert slant.measure(left) == slant.measure(right) == pytest.approx(1)
    assert slant.measure(thick) == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("attributes")
    path = save_tiny_checkpoint(folder / "tiny.safetensors", num_steps=100)
    given = [f"--checkpoint={path}", f"--out={folder / 'shown.png'}", "--num-steps=2", "--clip-guidance-scale=10"]
    evaluate.main(["clip-attributes", *given, "--num-images=3", "--seed=5"])
    return folder


def test_every_digit_is_compared_for_both_attributes(compared: Path) -> None:
    content = json.loads((compared / "shown.json").read_text())
    found = [(row["attribute"], row["digit"], row["pairs"]) for row in content["comparisons"]]
    assert found == [(name, digit, 3) for name in ("stroke width", "slant") for digit in range(10)]
    assert set(content["recognised"]) == set(PROMPTS)
    assert content["options"]["clip"]["guidance"]["scale"] == 10
    assert (content["seed"], content["num_images"]) == (5, 3)
    rows = [line for line in (compared / "shown.md").read_text().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if "---" not in row]
    assert [row[0] for row in cells] == [str(digit) for digit in range(10)]
    for digit, row in enumerate(cells):
        for first, comparison in ((1, content["comparisons"][digit]), (5, content["comparisons"][10 + digit])):
            expected = [f"{comparison['more']:.3f}", f"{comparison['less']:.3f}", f"{comparison['larger']} of 3"]
            assert row[first : first + 3] == expected


def test_values_are_those_of_images_of_scripts_sample(compared: Path, tmp_path: Path) -> None:
    """Draws the images of one prompt with another script, and measures them."""
    given = [f"--checkpoint={compared / 'tiny.safetensors'}", "--num-steps=2", "--clip-guidance-scale=10", "--seed=5"]
    for prompt, field in (("a thick four", "more"), ("a thin four", "less")):
        out = tmp_path / field
        sample.main([*given, f"--clip-prompt={prompt}", "--digit=4", "--count=3", f"--out={out}"])
        images = torch.stack([pixels(path) for path in sorted(out.iterdir())])
        expected = boldness(images[:, None] / 255).mean().item()
        (row,) = [
            row
            for row in json.loads((compared / "shown.json").read_text())["comparisons"]
            if (row["attribute"], row["digit"]) == ("stroke width", 4)
        ]
        assert row[field] == pytest.approx(expected, rel=1e-5)


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)


def test_picture_has_a_row_for_each_prompt() -> None:
    images = {prompt: torch.full((10, 3, 1, 28, 28), i, dtype=torch.uint8) for i, prompt in enumerate(PROMPTS)}
    axes = show_attributes(images).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "a thick …",
        "a thin …",
        "a slanted …",
        "an upright …",
    ]
    shown = torch.as_tensor(axes.images[0].get_array())
    assert shown.shape == (4 * 28, 2 * 10 * 28, 3)
    rows = rearrange(shown, "(row h) w c -> row (h w c)", h=28)
    assert rows.amin(dim=1).tolist() == rows.amax(dim=1).tolist() == [0, 1, 2, 3]


def test_scale_of_zero_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["clip-attributes", f"--out={tmp_path / 'x.png'}", "--clip-guidance-scale=0"])
    assert exit_.value.code == 2
    assert "--clip-guidance-scale must be above 0" in capsys.readouterr().err
