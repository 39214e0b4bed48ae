"""Evaluates CLIP guidance: a sweep on the validation split, and one setting on the test split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model.clip_guidance import ClipGuidance
from model.files import write_atomically
from model.spec import Guidance
from scripts.common.drawing import ClipOptions, Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.figures import finish_curves, new_figure, save_figure
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import load_classifier
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.quality import Evaluator
from scripts.evaluation.samples import load_references
from scripts.evaluation.sweep import Sweep
from scripts.evaluation.tables import Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

SCALES = (2.0, 4.0, 8.0)
INTERVALS = ((20, 60), (30, 70), (40, 70), (40, 75))
SEEDS = {"validation": 1, "test": 4}  # settings are chosen with the first one and published with the second one
SCALE = 4.0  # the recommended scale


@dataclass(frozen=True, slots=True)
class ClipSweepRequest:
    """The options of the sweep over settings of CLIP guidance."""

    scales: Sequence[float]
    intervals: Sequence[tuple[int, int]]
    num_images: int  # for each setting of the sweep
    num_test_images: int  # for each setting that is measured on the test split
    data_dir: Path
    out: Path  # the plot; the other files have the same stem


def evaluate_clip_guidance(request: DrawingRequest, sweep: ClipSweepRequest, reporter: Reporter) -> None:
    """Measures CLIP guidance with and without classifier-free guidance. Writes a plot, a table and two JSON files.

    The sweep uses the validation split. The setting of the request is measured on the test split, with another seed. A
    stopped run continues with the settings that the JSON files do not have. The plot and the table show all results of
    the files, so that a sweep can be extended. Raises CheckpointError or ScriptError.
    """
    drawer = open_drawer(request)
    own = options_from(request, drawer.checkpoint)
    clip = own.clip
    assert clip is not None, "the scale is above 0"
    swept = [
        replace(clip, guidance=ClipGuidance(scale, *interval))
        for interval in sweep.intervals
        for scale in sweep.scales
        if scale
    ]
    scorer = ClipScorer(clip.model)
    drawer.compile(request.compile, reporter)
    chosen = {"validation": (swept, sweep.num_images), "test": ([clip], sweep.num_test_images)}
    tables = []
    for split, (guidances, num_images) in chosen.items():
        one = _sweep(split, num_images, drawer, scorer, sweep, request.batch_size)
        one.run(_settings(own, guidances), reporter)
        rows = one.results()  # also those of earlier runs with other lists
        tables.append(f"{split.capitalize()} split:\n\n{one.as_markdown(rows)}")
        reporter.line(tables[-1])
        if split == "validation":
            save_figure(show_clip_guidance(rows, one.real), sweep.out, grey=False)
    write_atomically(sweep.out.with_suffix(".md"), "\n".join(tables).encode())


def _sweep(
    split: str, num_images: int, drawer: Drawer, scorer: ClipScorer, sweep: ClipSweepRequest, batch_size: int
) -> Sweep:
    networks = load_classifier("judge"), load_classifier("extractor")
    evaluator = Evaluator(load_references(split, sweep.data_dir), *networks, num_images)
    file = sweep.out.with_name(f"{sweep.out.stem}.{split}.json")
    return Sweep(drawer, evaluator, file, SEEDS[split], batch_size, scorer)


def _settings(own: DrawingOptions, guidances: Sequence[ClipOptions]) -> Sequence[DrawingOptions]:
    """Returns the settings without and with classifier-free guidance, each without CLIP guidance and with each of
    `guidances`."""
    free = [Guidance(), own.guidance] if own.guidance.scale != 1 else [Guidance()]
    return [replace(own, guidance=guidance, clip=clip) for guidance in free for clip in (None, *guidances)]


def show_clip_guidance(rows: Sequence[Figures], real: Figures) -> "Figure":
    """Plots error rate, Fréchet ratio and similarity against the scale, with one line for each interval.

    The lines with classifier-free guidance are dashed. Each line begins at scale 0 with the images without CLIP
    guidance. A dotted line shows the ratio or the similarity of real digits.
    """
    figure = new_figure(1150, 380)
    wrong, ratio, similarity = figure.subplots(1, 3)
    lines = _plot_lines(wrong, rows, lambda row: 1 - row["judge"])
    wrong.set_title("Digits that the judge does not recognise", loc="left", fontsize=10)
    wrong.set_ylim(bottom=0)
    wrong.legend(list(lines.values()), list(lines), fontsize=8, frameon=False)
    wrong.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    _plot_lines(ratio, [row for row in rows if row["frechet_ratio"] is not None], lambda row: row["frechet_ratio"])
    ratio.set_title("Fréchet distance, ratio (dotted: real digits)", loc="left", fontsize=10)
    ratio.axhline(1, color="grey", linestyle=":", linewidth=1)
    _plot_lines(similarity, rows, lambda row: row["similarity"])
    similarity.set_title("CLIP similarity (dotted: real digits)", loc="left", fontsize=10)
    similarity.axhline(real["similarity"], color="grey", linestyle=":", linewidth=1)
    return finish_curves(figure)


def _plot_lines(axes: "Axes", rows: Sequence[Figures], value: Callable[[Figures], float]) -> "dict[str, Line2D]":
    """Plots a value against the scale. Returns the lines with at least two points, by their names."""
    lines = {}
    intervals = dict.fromkeys(_interval(row) for row in rows if "clip" in row["options"])
    for guided in (False, True):
        own = [row for row in rows if (row["options"]["guidance"]["scale"] != 1) == guided]
        for i, interval in enumerate(intervals):
            line = [row for row in own if "clip" not in row["options"] or _interval(row) == interval]
            points = sorted((_scale(row), value(row)) for row in line)
            label = f"t = {interval[0]} to {interval[1]}{', with guidance' if guided else ''}"
            x, y = [point[0] for point in points], [point[1] for point in points]
            (drawn,) = axes.plot(x, y, f"C{i}o{'--' if guided else '-'}", markersize=4, linewidth=1.4, label="_")
            if len(points) > 1:
                lines[label] = drawn
    axes.set_xlabel("scale of CLIP guidance")
    return lines


def _scale(row: Figures) -> float:
    return float(row["options"]["clip"]["guidance"]["scale"]) if "clip" in row["options"] else 0.0


def _interval(row: Figures) -> tuple[int, int]:
    guidance = row["options"]["clip"]["guidance"]
    return guidance["start"], guidance["stop"]
