"""Measures how well noise is removed from digits, with class and noise level unknown to the method."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from model import checkpoint
from model.denoising import (
    WHITE,
    estimate_noise_std,
    matching_timestep,
    noise_levels,
    start_of,
)
from model.files import write_json
from model.noise import normal
from model.pixels import to_pixels
from model.precision import fast_dtype
from model.prediction import predict_x_0
from model.sampler import Plan, Sampler, plan_through, reverse_step
from model.step import ReverseStep
from scripts.common.errors import ScriptError
from scripts.common.figures import Panel, draw_panels, save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import Classifier, accuracy, load_classifier
from scripts.evaluation.samples import Digits, load_references
from scripts.evaluation.tables import as_table

LEVELS = (20, 35, 50, 65)  # timesteps whose noise levels are evaluated
SAMPLER: Sampler = "ddim"
NUM_STEPS = 10
SEED = 0  # of the noise in the steps of a sampler that adds noise
BATCH_SIZE = 100  # images
ROWS = 128  # evaluations of the network in one call
NUM_SHOWN = 4  # digits at each level in the picture
COLUMNS = ("t", "noise", "noise error", "noisy PSNR", "mean PSNR", "sample PSNR", "mean judge", "sample judge")


@dataclass(frozen=True, slots=True)
class Denoised:
    """The answers for N noisy pictures. Images are uint8 (N, 1, 28, 28)."""

    noise_std: Tensor  # (N,) estimated, in grey levels
    mean: Tensor
    sample: Tensor


def evaluate_denoising(
    path: Path, out: Path, reporter: Reporter, *, num_images: int, split: str, data_dir: Path
) -> None:
    """Writes a picture and JSON, and prints a table. Raises CheckpointError or ScriptError."""
    loaded = checkpoint.load(path)
    if loaded.image_shape != (1, 28, 28) or loaded.network.null_label != NUM_CLASSES:
        raise ScriptError(f"{path} cannot denoise digits: it must have {NUM_CLASSES} classes of 1x28x28 images")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = Denoiser(ReverseStep(loaded, device, fast_dtype(device)))
    held_out = load_references(split, data_dir).held_out
    digits = Digits(held_out.images[:num_images], held_out.labels[:num_images])
    judge = load_classifier("judge")
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
    content = {
        "split": split,
        "num_images": len(digits.labels),
        "weights_sha256": loaded.weights_sha256,
        "dtype": str(denoiser.step.dtype).removeprefix("torch."),
        "judge": {"sha256": judge.sha256, "accuracy": accuracy(judge.network, digits.images, digits.labels)},
        "sampler": SAMPLER,
        "num_steps": NUM_STEPS,
        "levels": rows,
    }
    write_json(out.with_suffix(".json"), content)


def add_noise(images: Tensor, noise_std: float, seed: int) -> Tensor:
    """Returns 8-bit images (N, 1, 28, 28) with normal noise of this standard deviation in grey levels."""
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + noise_std * z).clamp(0, WHITE).round().to(torch.uint8)


class Denoiser:
    """Removes noise from batches of pictures. Noise level and class are estimated for each picture."""

    def __init__(self, step: ReverseStep) -> None:
        self.step, self.schedule = step, step.checkpoint.schedule

    @torch.inference_mode()
    def denoise(self, noisy: Tensor, reporter: Reporter) -> Denoised:
        """Returns the answers for uint8 pictures (N, 1, 28, 28)."""
        noise_std = estimate_noise_std(noisy)  # (N,)
        t = torch.tensor([matching_timestep(self.schedule, std) for std in noise_std.tolist()])  # (N,)
        x_t = start_of(self.schedule, noisy, noise_std, t)  # (N, 1, 28, 28)
        means, samples = [], []
        with reporter.task("removing noise", len(noisy), "images") as task:
            for rows in torch.arange(len(noisy)).split(BATCH_SIZE):
                means.append(self._x_0(x_t[rows], t[rows]))
                samples.append(self._sample(x_t[rows], t[rows], rows))
                task.advance(len(rows))
        mean, sample = to_pixels(torch.cat(means)), to_pixels(torch.cat(samples))
        return Denoised(noise_std, mean, sample)

    def _sample(self, x_t: Tensor, t: Tensor, index: Tensor) -> Tensor:
        """Returns the results (B, 1, 28, 28) of the reverse process from x_t at timesteps t (B,)."""
        x = x_t.clamp(-1, 1)  # the answer where t is 0
        num_steps = t.clamp(max=NUM_STEPS)  # (B,)
        for count in num_steps.unique().tolist():
            rows = (num_steps == count).nonzero()[:, 0]
            if count:
                plans = [self._plan(start, count) for start in t[rows].tolist()]
                x[rows] = self._follow(plans, x_t[rows], index[rows])
        return x

    def _plan(self, start: int, num_steps: int) -> Plan:
        return plan_through(self.schedule, SAMPLER, self.schedule.even_timesteps(num_steps, start))

    def _follow(self, plans: Sequence[Plan], x_t: Tensor, index: Tensor) -> Tensor:
        """Returns x_0 (B, 1, 28, 28) after the plan of each row. All plans have the same number of steps."""
        steps = torch.stack([plan.table(x_t.device) for plan in plans], dim=1)  # (num_steps, B, 5)
        x_0, image_shape = torch.zeros_like(x_t), self.step.checkpoint.image_shape
        for k, step in enumerate(steps):
            x_0_prev, x_0 = x_0, self._x_0(x_t, step[:, 0].long())
            z = normal(torch.full_like(index, SEED), index, torch.full_like(index, k + 1), image_shape)
            x_t = reverse_step(x_t, x_0, x_0_prev, z, step[:, 1:])
        return x_0

    def _x_0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the predicted x_0 (B, 1, 28, 28) in [-1, 1], and the picture itself where t is 0."""
        x_0 = predict_x_0(x_t, self._call(x_t, t), self.step.mix.cpu()[t.clamp(min=1)])
        return torch.where((t == 0)[:, None, None, None], x_t, x_0)

    def _call(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Returns the output of the network (B, 1, 28, 28) for the null label."""
        step, outputs = self.step, []
        for rows in torch.arange(len(x_t)).split(ROWS):
            c = step.condition[t[rows].to(step.device), step.null_label]  # (N, D)
            x = x_t[rows].to(step.device, step.dtype)  # (N, 1, 28, 28)
            outputs.append(step.call_rows.call(step.denoise, x, c).float().cpu())
        return torch.cat(outputs)


def psnr(images: Tensor, truth: Tensor) -> float:
    """Returns the mean over the images of the peak signal-to-noise ratio in dB, for 8-bit images (N, 1, H, W)."""
    error = (images.double() - truth.double()).square().mean(dim=(1, 2, 3))  # (N,)
    return (10 * (WHITE**2 / error.clamp(min=1e-3)).log10()).mean().item()


def figures_of(
    answers: Denoised, noisy: Tensor, digits: Digits, noise_std: float, judge: Classifier
) -> dict[str, float]:
    """Returns the figures of one noise level."""
    relative = (answers.noise_std / noise_std - 1).abs()  # (N,)
    return {
        "noise_std_median_relative_error": relative.median().item(),
        "noise_std_median": answers.noise_std.median().item(),
        "psnr_noisy": psnr(noisy, digits.images),
        "psnr_mean": psnr(answers.mean, digits.images),
        "psnr_sample": psnr(answers.sample, digits.images),
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
        *(f"{row[name]:.1%}" for name in ("judge_mean", "judge_sample")),
    ]


def panel_of(answers: Denoised, noisy: Tensor, digits: Digits, noise_std: float, *, has_rows: bool) -> Panel:
    """Returns a grid for one noise level: a row for each of a few digits, a column for each kind of picture.

    `has_rows` adds the labels of the rows.
    """
    labels = list(dict.fromkeys(digits.labels.tolist()))[:NUM_SHOWN]  # different digits
    shown = [int((digits.labels == label).int().argmax()) for label in labels]  # the first image of each
    kinds = torch.stack([images[shown] for images in (noisy, answers.mean, answers.sample, digits.images)])
    pixels = rearrange(kinds, "kind n c h w -> (n h) (kind w) c")
    title = f"noise of {noise_std:.0f} grey levels"
    rows = [str(label) for label in labels] if has_rows else []
    return Panel(pixels, ["noisy", "mean", "sample", "truth"], rows, title)
