"""The subcommands of scripts.compare: sweeps of sampling options, tables of evaluations, and costs of networks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.checkpoint import CheckpointConfig
from model.files import write_atomically
from model.precision import can_compile, no_compiler
from model.spec import Guidance, Sampler
from model.unet import UNet
from scripts.benchmark.step_time import COLUMNS, as_row, costs_of
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError
from scripts.common.figures import save_figure
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import load_classifier
from scripts.evaluation.quality import Evaluator
from scripts.evaluation.samples import load_references
from scripts.evaluation.spaces import spaces_for_digits
from scripts.evaluation.sweep import Sweep, show_steps
from scripts.evaluation.tables import RUN_COLUMNS, across, as_run, as_table, check_comparable, read_evaluation
from scripts.training.recipe import load_recipe

STEPS = (1, 2, 4, 6, 10, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """The options that are common to all sweeps."""

    num_images: int
    split: str
    data_dir: Path
    out: Path  # folder for the results; an unfinished sweep in it is continued


def choose_steps(
    config: CheckpointConfig, samplers: Sequence[Sampler] | None, steps: Sequence[int] | None
) -> tuple[Sequence[Sampler], Sequence[int]]:
    """Returns the samplers and the numbers of steps to compare.

    `samplers=None` means all that the checkpoint permits. `steps=None` means the numbers of the checkpoint, or STEPS.
    Raises ScriptError for those that the checkpoint does not permit.
    """
    T = config.schedule.num_steps
    permitted = config.steps or range(1, T + 1)
    samplers = samplers or config.samplers
    steps = steps or sorted(config.steps) or [num_steps for num_steps in STEPS if num_steps <= T]
    if wrong := [sampler for sampler in samplers if sampler not in config.samplers]:
        raise ScriptError(f"The checkpoint does not permit sampler {wrong[0]}. It permits {', '.join(config.samplers)}")
    if not set(steps) <= set(permitted):
        numbers = ", ".join(map(str, sorted(config.steps))) or f"1 to {T}"
        wrong_steps = min(set(steps) - set(permitted))
        raise ScriptError(f"The checkpoint does not permit {wrong_steps} steps. It permits {numbers}")
    return samplers, steps


def compare_steps(
    request: DrawingRequest,
    sweep_request: SweepRequest,
    reporter: Reporter,
    *,
    samplers: Sequence[Sampler],
    steps: Sequence[int],
) -> None:
    """Evaluates each sampler with each number of steps. Writes steps.md, steps.json and steps.png.

    Each sampler uses the guidance that is recommended for it. Raises CheckpointError or ScriptError.
    """
    drawer = open_drawer(request)
    settings = [
        options_from(replace(request, sampler=sampler, num_steps=num_steps), drawer.checkpoint)
        for sampler in samplers
        for num_steps in steps
    ]
    sweep = _sweep("steps", drawer, request, sweep_request, reporter)
    rows = sweep.run(settings, reporter)
    _write_table(sweep_request.out / "steps.md", sweep.as_markdown(rows), reporter)
    save_figure(show_steps(rows, sweep_request.num_images), sweep_request.out / "steps.png", grey=False)


def check_intervals(config: CheckpointConfig, intervals: Iterable[tuple[int, int]]) -> None:
    """Raises ScriptError for intervals of timesteps that the checkpoint does not have."""
    T = config.schedule.num_steps
    if (last := max(stop for _, stop in intervals)) > T:
        raise ScriptError(f"An interval ends at {last}, but the checkpoint has {T} steps. Use intervals within 1-{T}")


def compare_guidance(
    request: DrawingRequest,
    sweep_request: SweepRequest,
    reporter: Reporter,
    *,
    scales: Sequence[float],
    intervals: Sequence[tuple[int, int]],
) -> None:
    """Evaluates images without guidance and with each scale and interval. Writes guidance.md and guidance.json.

    Raises CheckpointError or ScriptError.
    """
    drawer = open_drawer(request)
    own = options_from(request, drawer.checkpoint)
    swept = [(scale, *interval) for scale in scales if scale != 1 for interval in intervals]
    guidances = [Guidance(), *(Guidance(scale, start, stop) for scale, start, stop in swept)]
    sweep = _sweep("guidance", drawer, request, sweep_request, reporter)
    rows = sweep.run([DrawingOptions(own.sampler, own.num_steps, guidance) for guidance in guidances], reporter)
    _write_table(sweep_request.out / "guidance.md", sweep.as_markdown(rows), reporter)


def compare_runs(evaluations: Sequence[Path], out: Path | None, reporter: Reporter, *, columns: bool) -> None:
    """Prints a table of evaluations, as rows or as columns, and writes it to `out` if given.

    Raises ScriptError for evaluations that cannot be compared.
    """
    read = {(path.parent if path.is_file() else path).name: read_evaluation(path) for path in evaluations}
    if len(read) < len(evaluations):
        raise ScriptError("Two evaluations have the same folder name. Rename one, since the table shows these names")
    check_comparable(list(read.values()))
    rows = [as_run(name, evaluation) for name, evaluation in read.items()]
    table = across(read) if columns else as_table(RUN_COLUMNS, rows)
    reporter.line(table)
    if out:
        write_atomically(out, table.encode())


def compare_networks(
    presets: Sequence[str], reporter: Reporter, *, rows: int, compiled: bool, num_threads: int | None
) -> None:
    """Prints number of weights, arithmetic and step time of each recipe's network. Raises ScriptError."""
    if compiled and not can_compile():
        raise ScriptError(f"--compile {no_compiler()}")
    if num_threads:
        torch.set_num_threads(num_threads)
    networks = {Path(preset).stem: UNet(load_recipe(preset).unet) for preset in presets}
    if len(networks) < len(presets):
        raise ScriptError("Two recipes have the same name. Rename one, since the table shows these names")
    costs = costs_of(networks, reporter, rows=rows, compiled=compiled)
    reporter.line(as_table(COLUMNS, [as_row(name, cost) for name, cost in costs.items()]))


def _sweep(
    name: str, drawer: Drawer, request: DrawingRequest, sweep_request: SweepRequest, reporter: Reporter
) -> Sweep:
    references = load_references(sweep_request.split, sweep_request.data_dir)
    judge, extractor = load_classifier("judge"), load_classifier("extractor")
    num_images = sweep_request.num_images
    spaces = spaces_for_digits(num_images, reporter)
    evaluator = Evaluator(references, judge, extractor, num_images, further_spaces=spaces)
    drawer.compile(request.compile, reporter)
    return Sweep(drawer, evaluator, sweep_request.out / f"{name}.json", request.seed, request.batch_size)


def _write_table(path: Path, table: str, reporter: Reporter) -> None:
    write_atomically(path, table.encode())
    reporter.line(f"Wrote the table to {path}")
