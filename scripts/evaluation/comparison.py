"""Tables that compare sampling options of one checkpoint, evaluations of several, and networks of recipes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.files import write_atomically
from model.precision import can_compile, no_compiler
from model.sampler import Guidance, Sampler
from model.unet import UNet
from scripts.benchmark.step_time import COLUMNS, as_row, costs_of
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError
from scripts.common.figures import save_figure
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import load_classifier
from scripts.evaluation.quality import Evaluator
from scripts.evaluation.samples import load_references
from scripts.evaluation.sweep import Sweep, show_steps
from scripts.evaluation.tables import RUN_COLUMNS, across, as_run, as_table, check_comparable, read_evaluation
from scripts.training.recipe import load_recipe

STEPS = (1, 2, 4, 6, 10, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class SweepRequest:
    """The options that all sweeps share."""

    num_images: int
    split: str
    data_dir: Path
    out: Path  # folder of the figures; continues the sweep that is in it


def compare_steps(
    request: DrawingRequest,
    sweep_request: SweepRequest,
    reporter: Reporter,
    *,
    samplers: Sequence[Sampler] | None,
    steps: Sequence[int] | None,
) -> None:
    """Evaluates each sampler with each number of steps. Writes steps.md, steps.json and steps.png.

    None means all samplers that the checkpoint permits, and the permitted numbers in STEPS. Each sampler uses its own
    recommended guidance. Raises CheckpointError or ScriptError.
    """
    drawer = open_drawer(request)
    config, T = drawer.checkpoint.config, drawer.checkpoint.schedule.num_steps
    permitted = config.steps or range(1, T + 1)
    samplers = samplers or config.samplers
    steps = steps or sorted(config.steps) or [num_steps for num_steps in STEPS if num_steps <= T]
    if not set(samplers) <= set(config.samplers) or not set(steps) <= set(permitted):
        raise ScriptError("this checkpoint does not permit those samplers or numbers of steps")
    settings = [
        options_from(replace(request, sampler=sampler, num_steps=num_steps), drawer.checkpoint)
        for sampler in samplers
        for num_steps in steps
    ]
    sweep = _sweep("steps", drawer, request, sweep_request, reporter)
    rows = sweep.run(settings, reporter)
    _write_table(sweep_request.out / "steps.md", sweep.as_markdown(rows), reporter)
    save_figure(show_steps(rows), sweep_request.out / "steps.png", grey=False)


def compare_guidance(
    request: DrawingRequest,
    sweep_request: SweepRequest,
    reporter: Reporter,
    *,
    scales: Sequence[float],
    intervals: Sequence[tuple[int, int]],
) -> None:
    """Evaluates drawing without guidance, and with each scale in each interval. Writes guidance.md and guidance.json.

    Raises CheckpointError or ScriptError.
    """
    drawer = open_drawer(request)
    if not drawer.checkpoint.config.guidable:
        raise ScriptError("this checkpoint cannot be guided: no label was dropped in its training")
    own, T = options_from(request, drawer.checkpoint), drawer.checkpoint.schedule.num_steps
    if max(stop for _, stop in intervals) > T:
        raise ScriptError(f"this checkpoint has {T} steps: no interval may end above")
    swept = [(scale, *interval) for scale in scales if scale != 1 for interval in intervals]
    guidances = [Guidance(), *(Guidance(scale, start, stop) for scale, start, stop in swept)]
    sweep = _sweep("guidance", drawer, request, sweep_request, reporter)
    rows = sweep.run([DrawingOptions(own.sampler, own.num_steps, guidance) for guidance in guidances], reporter)
    _write_table(sweep_request.out / "guidance.md", sweep.as_markdown(rows), reporter)


def compare_runs(evaluations: Sequence[Path], out: Path | None, reporter: Reporter, *, columns: bool) -> None:
    """Shows evaluations as rows of a table, or as columns, and writes it to `out`.

    Raises ScriptError for evaluations that cannot be compared.
    """
    read = {(path.parent if path.is_file() else path).name: read_evaluation(path) for path in evaluations}
    if len(read) < len(evaluations):
        raise ScriptError("evaluations are told apart by the names of their folders, and two have the same")
    check_comparable(list(read.values()))
    rows = [as_run(name, evaluation) for name, evaluation in read.items()]
    table = across(read) if columns else as_table(RUN_COLUMNS, rows)
    reporter.line(table)
    if out:
        write_atomically(out, table.encode())


def compare_networks(
    presets: Sequence[str], reporter: Reporter, *, rows: int, compiled: bool, num_threads: int | None
) -> None:
    """Shows weights, arithmetic and time of a step of each recipe's network. May raise ScriptError."""
    if compiled and not can_compile():
        raise ScriptError(f"--compile {no_compiler()}")
    if num_threads:
        torch.set_num_threads(num_threads)
    networks = {Path(preset).stem: UNet(load_recipe(preset).unet) for preset in presets}
    if len(networks) < len(presets):
        raise ScriptError("recipes are told apart by their names, and two have the same")
    costs = costs_of(networks, reporter, rows=rows, compiled=compiled)
    reporter.line(as_table(COLUMNS, [as_row(name, cost) for name, cost in costs.items()]))


def _sweep(
    name: str, drawer: Drawer, request: DrawingRequest, sweep_request: SweepRequest, reporter: Reporter
) -> Sweep:
    references = load_references(sweep_request.split, sweep_request.data_dir)
    judge, extractor = load_classifier("judge"), load_classifier("extractor")
    evaluator = Evaluator(references, judge, extractor, sweep_request.num_images)
    drawer.compile(request.compile, reporter)
    return Sweep(drawer, evaluator, sweep_request.out / f"{name}.json", request.seed, request.batch_size)


def _write_table(path: Path, table: str, reporter: Reporter) -> None:
    write_atomically(path, table.encode())
    reporter.line(f"the table, with real digits beside: {path}")
