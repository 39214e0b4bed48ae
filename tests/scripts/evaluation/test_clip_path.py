from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.sampler import Guidance
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.progress import Reporter
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.clip_path import LINES, scores_along, show_scores
from tests.scripts.evaluation.bars import bars
from tests.scripts.tiny_checkpoint import NUM_STEPS, save_tiny_checkpoint


class Brightness(ClipScorer):
    """The similarity is the brightness of the picture plus 0.1 times the index of the prompt."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def similarities(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        self.seen.append(images)
        return images.float().mean(dim=(1, 2, 3))[:, None] / 255 + torch.arange(len(prompts)) / 10


def test_scores_along_has_three_prompts_for_every_step(tmp_path: Path) -> None:
    drawer = Drawer(checkpoint.load(save_tiny_checkpoint(tmp_path / "tiny.safetensors")))
    scorer, real = Brightness(), bars(20, 0)
    options = DrawingOptions("ddim", 5, Guidance())
    with Reporter() as reporter:
        timesteps, means, of_real = scores_along(drawer, options, scorer, real, reporter, seed=0)
    assert timesteps == [10, 8, 6, 4, 2, 0]
    assert NUM_STEPS == 10
    assert means.shape == (6, 3)
    light = torch.stack([images.float().mean() / 255 for images in scorer.seen])  # (7,)
    own = real.labels.double().mean() / 10
    expected = light[:, None] + torch.tensor([own, 1.0, 1.1])
    torch.testing.assert_close(means, expected[:-1].float())
    torch.testing.assert_close(of_real, expected[-1].float())
    assert torch.equal(scorer.seen[-1], real.images)


def test_plot_has_a_line_per_prompt_and_one_for_real_digits() -> None:
    means, real = torch.rand(3, 3), torch.rand(3)
    lines = show_scores("model", [10, 5, 0], means, real).axes[0].lines
    for i, prompt in enumerate(LINES):
        generated, of_real = lines[2 * i : 2 * i + 2]
        assert generated.get_label() == prompt
        assert list(generated.get_ydata()) == pytest.approx(means[:, i].tolist())
        assert list(of_real.get_ydata()) == pytest.approx([real[i].item()] * 2)
