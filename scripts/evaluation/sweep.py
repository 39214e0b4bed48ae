"""Evaluates one checkpoint with many sampling settings. Results are kept, so that a stopped sweep can continue."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.files import write_json
from scripts.common.drawing import Drawer, DrawingOptions
from scripts.common.errors import ScriptError
from scripts.common.figures import finish_curves, new_figure
from scripts.common.progress import Reporter
from scripts.evaluation.quality import Evaluator, Quality
from scripts.evaluation.samples import draw_samples
from scripts.evaluation.tables import (
    MANIFOLD,
    SWEEP_COLUMNS,
    Figures,
    as_sweep_row,
    as_table,
    too_few_images,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST_MISTAKES = 1e-4  # lower limit of plotted error rates, since a logarithmic axis cannot show 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What all settings of a sweep have in common, and the JSON file with the results."""

    drawer: Drawer
    evaluator: Evaluator
    file: Path
    seed: int
    batch_size: int

    def run(self, settings: Iterable[DrawingOptions], reporter: Reporter) -> list[Figures]:
        """Returns the results of each setting, in order. Raises ScriptError if the file is of another sweep."""
        kept, figures = self._read(), []
        reporter.line(" | ".join(SWEEP_COLUMNS))
        for options in settings:
            row = next((row for row in kept if row["options"] == asdict(options)), None)
            if row is None:
                evaluations = options.evaluations(self.drawer.checkpoint.schedule)
                row = {"options": asdict(options), "evaluations": evaluations, **self._evaluate(options, reporter)}
                kept.append(row)
                self._write(kept)
                reporter.line(" | ".join(as_sweep_row(row)))
            figures.append(row)
        return figures

    def as_markdown(self, rows: list[Figures]) -> str:
        """Returns a Markdown table of the rows and of real digits, with a caption."""
        evaluator = self.evaluator
        lines = [as_sweep_row(row) for row in (*rows, self._real)]
        caption = (
            f"{evaluator.num_images:,} digits per setting, seed {self.seed}, compared with the "
            f"{evaluator.references.name} split. Accuracy and distances are measured with the extractor."
        )
        note = too_few_images(evaluator.num_compared)
        return f"{as_table(SWEEP_COLUMNS, lines)}\n{caption}\n" + (f"\n{note}\n" if note else "")

    @property
    def _real(self) -> Figures:
        """The same metrics of real digits."""
        manifold, seen = self.evaluator.real_manifold, self.evaluator.real_extractor
        return {
            "extractor": seen.accuracy,
            "extractor_worst": min(seen.per_digit),
            "frechet_ratio": None if too_few_images(self.evaluator.num_compared) else 1.0,
            **{name: getattr(manifold, name) for name in MANIFOLD},
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
        return brief(quality)

    def _read(self) -> list[Figures]:
        try:
            content = json.loads(self.file.read_text())
            if content["sweep"] != self._identity:
                different = "another checkpoint, seed, split, number of images or --compile mode"
                raise ScriptError(f"{self.file} has results of {different}. Choose another folder for --out")
            rows: list[Figures] = content["figures"]
            for row in rows:
                as_sweep_row(row)
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise ScriptError(f"{self.file} is not a result of a sweep. Choose another folder for --out") from error
        return rows

    def _write(self, rows: list[Figures]) -> None:
        write_json(self.file, {"sweep": self._identity, "real": self._real, "figures": rows})


def brief(quality: Quality) -> Figures:
    """Returns the metrics by which settings are compared."""
    return {
        "judge": quality.judge.accuracy,
        "judge_worst": min(quality.judge.per_digit),
        "extractor": quality.extractor.accuracy,
        "extractor_worst": min(quality.extractor.per_digit),
        "frechet": quality.frechet,
        "frechet_ratio": quality.frechet_ratio,
        "recall": quality.manifold.recall,
        "coverage": quality.manifold.coverage,
        "precision": quality.manifold.precision,
    }


def show_steps(rows: list[Figures]) -> "Figure":
    """Plots error rates and, if computed, Fréchet ratios of each sampler by number of steps."""
    has_distances = any(row["frechet_ratio"] is not None for row in rows)
    figure = new_figure(900, 380)
    left, *right = figure.subplots(1, 1 + has_distances, squeeze=False)[0]
    for i, sampler in enumerate(dict.fromkeys(row["options"]["sampler"] for row in rows)):
        of_sampler = [row for row in rows if row["options"]["sampler"] == sampler]
        steps = [row["options"]["num_steps"] for row in of_sampler]
        mistakes = [max(1 - row["extractor"], FEWEST_MISTAKES) for row in of_sampler]
        left.plot(steps, mistakes, f"C{i}o-", markersize=3, label=sampler)
        for axes in right:
            axes.plot(steps, [row["frechet_ratio"] for row in of_sampler], f"C{i}o-", markersize=3, label=sampler)
    left.set_ylabel("share not recognised as asked")
    for axes in right:
        axes.set_ylabel("Fréchet distance ÷ that of real digits")
        axes.axhline(1, color="grey", linestyle=":", linewidth=1)
    for axes in (left, *right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    return finish_curves(figure)
