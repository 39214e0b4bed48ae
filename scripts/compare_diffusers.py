"""Compares the images of a pipeline here and in diffusers: `python -m scripts.compare_diffusers FOLDER`.

Both start from the same seed. The table has the largest difference of x_t, relative to its largest value if that is
above 1: of each step from the x_t of diffusers, and of all steps so far. The last line compares the images as 8-bit
pixels. If a scheduler clips x_0, tiny differences can grow over the steps, also between two machines with diffusers.
"""

import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.pipelines.folder import Pipeline, load_pipeline
from model.pipelines.sampling import run_plan, torch_noise
from model.pipelines.schedulers import PipelinePlan, clipped_x_0, pipeline_step
from model.pixels import to_pixels
from model.png import MAX_SEED
from scripts.common.arguments import Parser, integer
from scripts.common.errors import ScriptError, reports_errors
from scripts.common.progress import require


@dataclass(frozen=True, slots=True)
class Parity:
    """Differences of a plan from diffusers: for each step the pair (one step, all steps so far), and the images."""

    steps: list[tuple[float, float]]
    equal_pixels: float  # share of the 8-bit values
    largest_pixel_difference: int


@reports_errors("compare_diffusers")
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    require("diffusers", extra="diffusers").logging.set_verbosity_error()
    pipeline = load_pipeline(args.folder, eta=args.eta)
    label = _label_of(args, pipeline)
    try:
        plan = pipeline.scheduler.plan(args.num_steps)
    except ValueError as error:
        raise ScriptError(f"{args.folder}: {error}") from error
    parity = compare(pipeline, plan, args.seed, label)
    print("step | t | difference of the step | difference of the path\n--- | --- | --- | ---")
    for number, (row, (one, path)) in enumerate(zip(plan.rows.tolist(), parity.steps, strict=True), 1):
        print(f"{number} | {row[0]:g} | {one:.1e} | {path:.1e}")
    largest = max(one for one, _ in parity.steps)
    print(
        f"\n{pipeline.scheduler.name}, {plan.num_steps} steps: the largest difference of one step is {largest:.1e}. "
        f"Of the pixels of the image, {parity.equal_pixels:.2%} are equal, and the largest difference is "
        f"{parity.largest_pixel_difference} of 255."
    )


def build_parser() -> Parser:
    parser = Parser(prog="python -m scripts.compare_diffusers", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that save_pretrained of diffusers has written")
    parser.add_argument("--num-steps", type=integer(1, 1000), default=50, help="default: 50")
    parser.add_argument("--label", type=integer(0), help="number of the class, if the network has classes; default: 0")
    parser.add_argument("--seed", type=integer(0, MAX_SEED), default=0, help="default: 0")
    parser.add_argument(
        "--eta", type=float, default=0.0, help="for DDIM: share of the noise of DDPM, 0 to 1; default: 0"
    )
    return parser


def _label_of(args: Namespace, pipeline: Pipeline) -> int:
    if args.label is not None and args.label >= pipeline.num_classes:
        most = (
            f"at most {pipeline.num_classes - 1}" if pipeline.num_classes else "left out, because there are no classes"
        )
        raise ScriptError(f"--label is {args.label}, but must be {most}")
    return args.label or 0


@torch.inference_mode()
def compare(pipeline: Pipeline, plan: PipelinePlan, seed: int, label: int) -> Parity:
    """Runs diffusers and the plan from the same seed."""
    noise, y = torch_noise(seed, plan, pipeline.image_shape)[:, None], torch.tensor([label])
    theirs = run_diffusers(pipeline, plan.num_steps, seed, label)
    ours = [x_t for x_t, _ in run_plan(pipeline.network, plan, noise, y)]
    steps, x_0 = [], torch.zeros_like(noise[0])
    for k, row in enumerate(plan.rows.split(1)):
        output = pipeline.network(theirs[k], row[:, 0], y)
        u, clipped = clipped_x_0(theirs[k], output, row)
        x_t, x_0 = pipeline_step(theirs[k], x_0, u, clipped, noise[k + 1], row)
        steps.append((difference(x_t, theirs[k + 1]), difference(ours[k + 1], theirs[k + 1])))
    pixels, expected = (to_pixels(each[-1]).int() for each in (ours, theirs))
    return Parity(steps, (pixels == expected).double().mean().item(), int((pixels - expected).abs().max()))


def run_diffusers(pipeline: Pipeline, num_steps: int, seed: int, label: int) -> list[Tensor]:
    """Returns x_t (1, C, H, W) before each step and after the last one, with the loop of the pipelines of diffusers."""
    diffusers, plans = require("diffusers", extra="diffusers"), pipeline.scheduler
    scheduler = getattr(diffusers, plans.name).from_config(plans.config)
    scheduler.set_timesteps(num_steps)
    options: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed)}
    x_t = torch.randn((1, *pipeline.image_shape), **options) * scheduler.init_noise_sigma
    options |= {"eta": plans.eta} if plans.name == "DDIMScheduler" else {}
    y, visited = torch.tensor([label]) if pipeline.num_classes else None, [x_t]
    for t in scheduler.timesteps:
        output = pipeline.network.unet(scheduler.scale_model_input(x_t, t), t, y).sample
        x_t = scheduler.step(output, t, x_t, **options).prev_sample
        visited.append(x_t)
    if plans.name == "EulerDiscreteScheduler":  # it keeps x_t / alpha
        ratios = [*map(float, scheduler.sigmas[:-1]), 0.0]
        visited = [each / math.hypot(1, ratio) for each, ratio in zip(visited, ratios, strict=True)]
    return visited


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest difference, relative to the largest value of `theirs` if it is above 1."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


if __name__ == "__main__":
    main()
