"""Measures how well noise is removed from digits, with class and noise level unknown to the method."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from model.denoising import estimate_noise_std, restored_image
from model.files import write_json
from model.noisy_image import (
    DENOISING_SAMPLER,
    DENOISING_STEPS,
    WHITE,
    NoisyComparison,
    can_compare,
    matching_timestep,
    noise_levels,
)
from model.paths import timesteps_from
from model.pixels import to_pixels
from model.process import Start, draw
from model.sampler import plan_through
from model.spec import Guidance
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import Drawer, DrawingRequest, open_digit_drawer
from scripts.common.figures import Panel, draw_panels, save_figure
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import Classifier, accuracy, load_classifier
from scripts.evaluation.noise_search import (
    SEARCH_COLUMNS,
    SEARCH_LEVELS,
    as_search_row,
    fit_probabilities,
    search,
    search_figures,
)
from scripts.evaluation.samples import load_references
from scripts.evaluation.tables import as_table

LEVELS = (20, 35, 50, 65)  # timesteps whose noise levels are evaluated
SEED = 0  # of the noise in the steps of a sampler that adds noise
BATCH_SIZE = 100  # images
NUM_SHOWN = 4  # digits at each level in the plot
PSNRS, ACCURACIES = ("noisy PSNR", "mean PSNR", "sample PSNR"), ("recognised", "mean judge", "sample judge")
COLUMNS = ("t", "noise", "noise error", *PSNRS, *ACCURACIES)


@dataclass(frozen=True, slots=True)
class Denoised:
    """The results for N noisy images. Images are uint8 (N, 1, 28, 28)."""

    noise_std: Tensor  # (N,) estimated, in grey levels
    mean: Tensor
    sample: Tensor
    digits: Tensor  # (N,) recognised, or the null label


def evaluate_denoising(
    drawing: DrawingRequest, out: Path, reporter: Reporter, *, num_images: int, split: str, data_dir: Path
) -> None:
    """Writes a plot and JSON, and prints a table. Raises CheckpointError or ScriptError."""
    held_out = load_references(split, data_dir).held_out
    digits = held_out.rows(slice(num_images))
    judge = load_classifier("judge")
    drawer = open_digit_drawer(drawing, reporter)
    denoiser, loaded = Denoiser(drawer), drawer.checkpoint
    levels = {t: noise_levels(loaded.schedule)[t].item() for t in LEVELS if t <= loaded.schedule.num_steps}
    rows, panels = list[dict[str, Any]](), list[Panel]()
    for t, noise_std in levels.items():
        noisy = add_noise(digits.images, noise_std, seed=t)
        answers = denoiser.denoise(noisy, reporter)
        rows.append({"t": t, "noise_std": noise_std, **figures_of(answers, noisy, digits, noise_std, judge.network)})
        reporter.line(
            f"t = {t}: {rows[-1]['psnr_mean']:.2f} dB, {rows[-1]['judge_sample']:.1%} recognised by the judge"
        )
        panels.append(panel_of(answers, noisy, digits, noise_std, has_rows=not panels))
    reporter.line(as_table(COLUMNS, [as_row(row) for row in rows]).rstrip())
    save_figure(draw_panels(panels, scale=2), out, grey=True)
    searches = evaluate_search(denoiser, digits, reporter, has_fit=split == "validation")
    content = {
        "split": split,
        "num_images": len(digits.labels),
        **drawer.facts,
        "judge": {"sha256": judge.sha256, "accuracy": accuracy(judge.network, digits.images, digits.labels)},
        "sampler": DENOISING_SAMPLER,
        "num_steps": DENOISING_STEPS,
        "levels": rows,
        "searches": searches,
    }
    write_json(out.with_suffix(".json"), content)


def evaluate_search(
    denoiser: "Denoiser", digits: ImageSet, reporter: Reporter, *, has_fit: bool
) -> list[dict[str, float]]:
    """Prints a table of the search for the digit, with a given noise level. Returns its rows.

    `has_fit` also prints the constants of `NoisyComparison.probabilities` that fit these digits best.
    """
    rows, every = list[dict[str, float]](), list[list[NoisyComparison]]()
    for t in SEARCH_LEVELS:
        if t > denoiser.schedule.num_steps or not can_compare(denoiser.schedule, t):
            continue
        noise_std = noise_levels(denoiser.schedule)[t].item()
        every.append(denoiser.search(add_noise(digits.images, noise_std, seed=t), noise_std, reporter))
        rows.append({"t": t, "noise_std": noise_std, **search_figures(every[-1], digits.labels)})
    reporter.line(as_table(SEARCH_COLUMNS, [as_search_row(row) for row in rows]).rstrip())
    if has_fit and every:
        scale, variance = fit_probabilities(every, digits.labels)
        reporter.line(f"best constants for these digits: ODDS_SCALE {scale:.3g}, PREDICTION_VARIANCE {variance:.3g}")
    return rows


def add_noise(images: Tensor, noise_std: float, seed: int) -> Tensor:
    """Returns 8-bit images (N, 1, 28, 28) with normal noise of this standard deviation in grey levels."""
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + noise_std * z).clamp(0, WHITE).round().to(torch.uint8)


class Denoiser:
    """Removes noise from batches of images. Estimates the noise level and the class of each, as the service does."""

    def __init__(self, drawer: Drawer) -> None:
        self.step, self.checkpoint, self.schedule = drawer.step, drawer.checkpoint, drawer.checkpoint.schedule
        self.guidance, self.device = drawer.checkpoint.config.guidance_of(DENOISING_SAMPLER), drawer.device

    def denoise(self, noisy: Tensor, reporter: Reporter) -> Denoised:
        """Returns the results for uint8 images (N, 1, 28, 28). An image without noise is returned unchanged."""
        noise_std = estimate_noise_std(noisy)  # (N,)
        t = [matching_timestep(self.schedule, std) for std in noise_std.tolist()]
        u = restored_image(noisy, noise_std)  # (N, 1, 28, 28)
        mean, sample = u.clamp(-1, 1), u.clamp(-1, 1)  # (N, 1, 28, 28) each
        null_label = self.checkpoint.network.null_label
        digits = torch.full((len(noisy),), null_label)  # (N,)
        has_noise = torch.tensor(t).nonzero()[:, 0]
        with reporter.task("removing noise", len(has_noise), "images") as task:
            for rows in has_noise.split(BATCH_SIZE):
                levels, part = [t[i] for i in rows.tolist()], u[rows].to(self.device)
                mean[rows] = self._follow([(t, 0) for t in levels], part, digits[rows], rows, Guidance())
                found = search(self.step, self.schedule, part, noise_std[rows].tolist())
                digits[rows] = torch.tensor([each.label if each else null_label for each in found])
                paths = [timesteps_from(self.schedule, DENOISING_SAMPLER, DENOISING_STEPS, t) for t in levels]
                sample[rows] = self._follow(paths, part, digits[rows], rows, self.guidance)
                task.advance(len(rows))
        return Denoised(noise_std, to_pixels(mean), to_pixels(sample), digits)

    def search(self, noisy: Tensor, noise_std: float, reporter: Reporter) -> list[NoisyComparison]:
        """Compares the classes of uint8 images (N, 1, 28, 28) with this noise level, which must not be too strong."""
        found = list[NoisyComparison]()
        with reporter.task("comparing classes", len(noisy), "images") as task:
            for images in noisy.split(BATCH_SIZE):
                levels = [noise_std] * len(images)
                u = restored_image(images, levels).to(self.device)  # (B, 1, 28, 28)
                found += [each for each in search(self.step, self.schedule, u, levels) if each]
                task.advance(len(images))
        return found

    def _follow(
        self, paths: Sequence[Sequence[int]], u: Tensor, y: Tensor, index: Tensor, guidance: Guidance
    ) -> Tensor:
        """Returns x_0 (B, 1, 28, 28) after the path of each row, which starts at the matching timestep of u."""
        signal = [self.schedule.alpha_bar[path[0]].sqrt().item() for path in paths]
        levels = torch.tensor([signal, [0.0] * len(signal)], device=u.device)  # (2, B)
        index = index.to(u.device)
        x_0 = draw(
            self.step,
            [plan_through(self.schedule, DENOISING_SAMPLER, path) for path in paths],
            self.checkpoint.image_shape,
            seed=torch.full_like(index, SEED),
            index=index,
            y=y.to(u.device),
            null_label=self.checkpoint.network.null_label,
            guidance=guidance,
            start=Start(u, *levels),
        )
        return x_0.cpu()


def psnr(images: Tensor, truth: Tensor) -> float:
    """Returns the mean over the images of the peak signal-to-noise ratio in dB, for 8-bit images (N, 1, H, W)."""
    error = (images.double() - truth.double()).square().mean(dim=(1, 2, 3))  # (N,)
    return (10 * (WHITE**2 / error.clamp(min=1e-3)).log10()).mean().item()


def figures_of(
    answers: Denoised, noisy: Tensor, digits: ImageSet, noise_std: float, judge: Classifier
) -> dict[str, float]:
    """Returns the figures of one noise level."""
    relative = (answers.noise_std / noise_std - 1).abs()  # (N,)
    return {
        "noise_std_median_relative_error": relative.median().item(),
        "noise_std_median": answers.noise_std.median().item(),
        "psnr_noisy": psnr(noisy, digits.images),
        "psnr_mean": psnr(answers.mean, digits.images),
        "psnr_sample": psnr(answers.sample, digits.images),
        "recognised": (answers.digits == digits.labels).double().mean().item(),
        "judge_noisy": accuracy(judge, noisy, digits.labels),
        "judge_mean": accuracy(judge, answers.mean, digits.labels),
        "judge_sample": accuracy(judge, answers.sample, digits.labels),
    }


def as_row(row: dict[str, Any]) -> list[str]:
    """Returns the cells of COLUMNS."""
    return [
        str(row["t"]),
        f"{row['noise_std']:.0f}",
        f"{row['noise_std_median_relative_error']:.1%}",
        *(f"{row[name]:.1f}" for name in ("psnr_noisy", "psnr_mean", "psnr_sample")),
        *(f"{row[name]:.1%}" for name in ("recognised", "judge_mean", "judge_sample")),
    ]


def panel_of(answers: Denoised, noisy: Tensor, digits: ImageSet, noise_std: float, *, has_rows: bool) -> Panel:
    """Returns a grid for one noise level: a row for each of a few digits, a column for each kind of image.

    `has_rows` adds the labels of the rows.
    """
    labels = list(dict.fromkeys(digits.labels.tolist()))[:NUM_SHOWN]  # different digits
    shown = [int((digits.labels == label).int().argmax()) for label in labels]  # the first image of each
    kinds = torch.stack([images[shown] for images in (noisy, answers.mean, answers.sample, digits.images)])
    pixels = rearrange(kinds, "kind n c h w -> (n h) (kind w) c")
    title = f"noise of {noise_std:.0f} grey levels"
    rows = [str(label) for label in labels] if has_rows else []
    return Panel(pixels, ["noisy", "mean", "sample", "truth"], rows, title)
