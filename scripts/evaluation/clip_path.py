"""Computes CLIP scores at each step of the reverse process, from noise to the finished digit."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.files import write_json
from model.pixels import to_pixels
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.figures import finish_curves, new_figure, save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.captions import CLEAR, NOISY
from scripts.evaluation.clip import PROMPTS, ClipScorer
from scripts.evaluation.samples import balanced, load_references

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = ("its own digit", CLEAR, NOISY)  # prompts with a line in the plot


def evaluate_clip(
    request: DrawingRequest,
    model: str,
    out: Path,
    reporter: Reporter,
    *,
    num_images: int,
    split: str,
    data_dir: Path,
) -> None:
    """Computes CLIP scores along the reverse process. Writes a plot and a JSON file.

    Raises CheckpointError or ScriptError.
    """
    scorer, drawer = ClipScorer(model), open_drawer(request)
    real = balanced(load_references(split, data_dir).held_out, num_images)
    options = options_from(request, drawer.checkpoint)
    drawer.compile(request.compile, reporter)
    timesteps, means, of_real = scores_along(drawer, options, scorer, real, reporter, seed=request.seed)
    for prompt, first, last, real_score in zip(LINES, means[0], means[-1], of_real, strict=True):
        reporter.line(f"{prompt}: {first:.3f} at t = {timesteps[0]}, {last:.3f} at t = 0, real digits {real_score:.3f}")
    save_figure(show_scores(model, timesteps, means, of_real), out, grey=False)
    scores = {prompt: {"drawn": means[:, i].tolist(), "real": of_real[i].item()} for i, prompt in enumerate(LINES)}
    content = {
        **drawer.facts,
        "options": options.facts,
        "seed": request.seed,
        "num_images": num_images,
        "split": split,
        "clip": {"model": scorer.name, "weights_sha256": scorer.sha256},
        "t": timesteps,
        "scores": scores,
    }
    write_json(out.with_suffix(".json"), content)


def scores_along(
    drawer: Drawer, options: DrawingOptions, scorer: ClipScorer, real: ImageSet, reporter: Reporter, *, seed: int
) -> tuple[list[int], Tensor, Tensor]:
    """Returns the timesteps down to 0, and mean similarities to each of LINES: of x_t (K, 3), and of real digits (3,).

    Generates as many digits as `real` has, with the same labels.
    """
    timesteps: list[int] = []
    means: list[Tensor] = []

    def score_step(t: int, x_t: Tensor, x_0: Tensor) -> None:
        timesteps.append(t)
        means.append(_mean_scores(scorer, ImageSet(to_pixels(x_t.cpu()), real.labels)))

    index = torch.arange(len(real.labels))
    x_0 = drawer.draw(real.labels, index, options, reporter, seed=seed, batch_size=len(index), on_step=score_step)
    means.append(_mean_scores(scorer, ImageSet(to_pixels(x_0), real.labels)))
    return [*timesteps, 0], torch.stack(means), _mean_scores(scorer, real)


def _mean_scores(scorer: ClipScorer, digits: ImageSet) -> Tensor:
    similarities = scorer.similarities(digits.images, list(PROMPTS))  # (N, 12)
    own = similarities.gather(1, digits.labels[:, None])  # (N, 1)
    return torch.cat([own, similarities[:, NUM_CLASSES:]], dim=1).mean(dim=0)


def show_scores(name: str, timesteps: list[int], means: Tensor, real: Tensor) -> "Figure":
    """Plots a line for each prompt, and the similarity of real digits."""
    figure = new_figure(760, 400)
    axes = figure.add_subplot()
    for i, prompt in enumerate(LINES):
        axes.plot(timesteps, means[:, i].tolist(), f"C{i}", linewidth=1.4, label=prompt)
        axes.axhline(real[i].item(), color=f"C{i}", linestyle=":", linewidth=1)
    axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="real digits")
    axes.set_xlim(timesteps[0], 0)
    axes.set_xlabel("t")
    axes.set_ylabel(f"cosine similarity of $x_t$ and the prompt ({name})")
    return finish_curves(figure)
