"""Evaluates one checkpoint with many sampling settings. Results are kept, so that a stopped sweep can continue."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.files import write_json
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.errors import ScriptError
from scripts.common.figures import finish_curves, new_figure, save_figure
from scripts.common.progress import Reporter
from scripts.evaluation.clip import ClipScorer
from scripts.evaluation.quality import Evaluator, Quality
from scripts.evaluation.samples import draw_samples
from scripts.evaluation.tables import (
    CLIP_COLUMNS,
    MANIFOLD,
    Figures,
    as_clip_row,
    as_sweep_row,
    as_table,
    sweep_columns,
    too_few_images,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST_MISTAKES = 1e-4  # lower limit of plotted error rates, since a logarithmic axis cannot show 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """The values that all settings of a sweep share, and the JSON file with the results.

    With a scorer, the results have the mean CLIP similarity of an image and the prompt of its digit.
    """

    drawer: Drawer
    evaluator: Evaluator
    file: Path
    seed: int
    batch_size: int
    scorer: ClipScorer | None = None

    def run(self, settings: Iterable[DrawingOptions], reporter: Reporter) -> list[Figures]:
        """Returns the results of each setting, in order. Raises ScriptError if the file belongs to another sweep."""
        kept, figures = self.results(), []
        reporter.line(" | ".join(self._columns))
        for options in settings:
            row = next((row for row in kept if row["options"] == options.facts), None)
            if row is None:
                evaluations = options.evaluations(self.drawer.checkpoint.schedule)
                row = {"options": options.facts, "evaluations": evaluations, **self._evaluate(options, reporter)}
                kept.append(row)
                self._write(kept)
                reporter.line(" | ".join(self._cells(row)))
            figures.append(row)
        return figures

    def as_markdown(self, rows: list[Figures]) -> str:
        """Returns a Markdown table of the rows and of real digits, with a caption."""
        evaluator = self.evaluator
        lines = [self._cells(row) for row in (*rows, self.real)]
        measured = "Distances" if self.scorer else "Accuracy and the columns without the name of a network"
        caption = (
            f"{evaluator.num_images:,} digits per setting, seed {self.seed}, compared with the "
            f"{evaluator.references.name} split. {measured} are measured with the extractor."
        )
        note = too_few_images(evaluator.smallest_set)
        return f"{as_table(self._columns, lines)}\n{caption}\n" + (f"\n{note}\n" if note else "")

    @property
    def _columns(self) -> tuple[str, ...]:
        return CLIP_COLUMNS if self.scorer else sweep_columns(self.real)

    def _cells(self, row: Figures) -> list[str]:
        return as_clip_row(row) if self.scorer else as_sweep_row(row)

    @property
    def real(self) -> Figures:
        """The metrics of real digits, with the same fields as a row."""
        evaluator = self.evaluator
        manifold, seen = evaluator.real_manifold, evaluator.real_extractor
        ratio = None if too_few_images(evaluator.smallest_set) else 1.0
        further: Figures = {}
        if self.scorer:
            further = {
                "judge": evaluator.real_judge.accuracy,
                "judge_worst": min(evaluator.real_judge.per_class),
                "frechet": evaluator.real_frechet,
                "similarity": self.scorer.score(evaluator.references.held_out).similarity,
            }
        return {
            "extractor": seen.accuracy,
            "extractor_worst": min(seen.per_class),
            "frechet_ratio": ratio,
            **{f"{space.name}_frechet_ratio": ratio for space in evaluator.further_spaces},
            **{name: getattr(manifold, name) for name in MANIFOLD},
            **further,
        }

    @property
    def _identity(self) -> Figures:
        """The facts that must be the same when a sweep continues."""
        evaluator = self.evaluator
        return {
            **self.drawer.facts,
            "num_images": evaluator.num_images,
            "split": evaluator.references.name,
            "judge_sha256": evaluator.judge.sha256,
            "extractor_sha256": evaluator.extractor.sha256,
            "seed": self.seed,
            **{f"{space.name}_space_sha256": space.sha256 for space in evaluator.further_spaces},
            **({"clip_sha256": self.scorer.sha256} if self.scorer else {}),
        }

    def _evaluate(self, options: DrawingOptions, reporter: Reporter) -> Figures:
        digits = draw_samples(
            self.drawer,
            options,
            reporter,
            num_images=self.evaluator.num_images,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        quality, _ = self.evaluator.evaluate(digits, reporter)
        similarity = {"similarity": self.scorer.score(digits).similarity} if self.scorer else {}
        return {**brief(quality), **similarity}

    def results(self) -> list[Figures]:
        """Returns the results in the file. Raises ScriptError if the file belongs to another sweep."""
        try:
            content = json.loads(self.file.read_text())
            if content["sweep"] != self._identity:
                different = (
                    "another checkpoint, CLIP model, seed, split, number of images or --compile mode, or of an earlier "
                    "release that measured in fewer feature spaces"
                )
                raise ScriptError(f"{self.file} has results of {different}. Choose another folder for --out")
            rows: list[Figures] = content["figures"]
            for row in rows:
                self._cells(row)
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise ScriptError(f"{self.file} is not a result of a sweep. Choose another folder for --out") from error
        return rows

    def _write(self, rows: list[Figures]) -> None:
        write_json(self.file, {"sweep": self._identity, "real": self.real, "figures": rows})


def brief(quality: Quality) -> Figures:
    """Returns the metrics by which settings are compared."""
    assert quality.manifold  # None only for fewer images than a sweep has
    return {
        "judge": quality.judge.accuracy,
        "judge_worst": min(quality.judge.per_class),
        "extractor": quality.extractor.accuracy,
        "extractor_worst": min(quality.extractor.per_class),
        "frechet": quality.frechet,
        "frechet_ratio": quality.frechet_ratio,
        **{f"{name}_frechet_ratio": each.ratio for name, each in quality.in_spaces.items() if name != "judge"},
        "recall": quality.manifold.recall,
        "coverage": quality.manifold.coverage,
        "precision": quality.manifold.precision,
    }


def show_steps(rows: list[Figures], num_images: int) -> "Figure":
    """Plots error rates and, if computed, Fréchet ratios of each sampler by number of steps.

    Bands show 95 % confidence intervals of the error rate of `num_images` images (Wilson 1927). A row with a `label` is
    drawn as a separate point.
    """
    has_distances = any(row["frechet_ratio"] is not None for row in rows)
    figure = new_figure(900, 400)
    left, *right = figure.subplots(1, 1 + has_distances, squeeze=False)[0]
    for axes in (left, *right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        axes.set_xticks([1, 2, 4, 10, 20, 50, 100])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    names = [str(row.get("label", row["options"]["sampler"])) for row in rows]
    for i, name in enumerate(dict.fromkeys(names)):
        own = [row for row, label in zip(rows, names, strict=True) if label == name]
        steps = [row["options"]["num_steps"] for row in own]
        style = f"C{i}o-" if len(own) > 1 else f"C{i}D"
        errors = [max(1 - row["extractor"], FEWEST_MISTAKES) for row in own]
        low, high = zip(*[_confidence(error, num_images) for error in errors], strict=True)
        left.plot(steps, errors, style, markersize=4, label=name)
        if len(own) > 1:
            left.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        else:
            left.vlines(steps, low, high, color=f"C{i}", linewidth=1)
        for axes in right:
            axes.plot(steps, [row["frechet_ratio"] for row in own], style, markersize=4, label=name)
    left.set_title("Digits that are not recognised", loc="left", fontsize=10)
    left.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    for axes in right:
        axes.set_title("Fréchet distance, ratio to real digits", loc="left", fontsize=10)
        axes.axhline(1, color="grey", linestyle=":", linewidth=1)
        axes.yaxis.set_major_formatter("{x:g}")
    return finish_curves(figure)


def _confidence(share: float, count: int) -> tuple[float, float]:
    """Returns the Wilson interval of a share, with a confidence of 95 %."""
    z = 1.96
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def plot_steps(file: Path, fast: Path | None, out: Path) -> None:
    """Writes the figure of a steps.json. `fast` is the steps.json of the checkpoint `fast`, drawn as a point."""
    rows, num_images = _read_steps(file)
    if fast is not None:
        rows += [{**row, "label": "fast"} for row in _read_steps(fast)[0]]
    save_figure(show_steps(rows, num_images), out, grey=False)


def _read_steps(file: Path) -> tuple[list[Figures], int]:
    try:
        content = json.loads(file.read_text("utf-8"))
        return list(content["figures"]), int(content["sweep"]["num_images"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ScriptError(f"{file} is not a steps.json of scripts.compare") from error
