"""The same checkpoint drawn with in many ways, each evaluated alike; what was evaluated once is kept."""

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

FEWEST_MISTAKES = 1e-4  # that an axis of powers of ten can show


@dataclass(frozen=True, slots=True)
class Sweep:
    """What every setting has in common, and the file in which figures are kept."""

    drawer: Drawer
    evaluator: Evaluator
    file: Path
    seed: int
    batch_size: int

    def run(self, settings: Iterable[DrawingOptions], reporter: Reporter) -> list[Figures]:
        """Returns the figures of each setting, in order; ScriptError if the file is of another sweep."""
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
        """The rows under their heads, real digits last, and what was compared with what."""
        evaluator = self.evaluator
        lines = [as_sweep_row(row) for row in (*rows, self._real)]
        caption = (
            f"{evaluator.num_images:,} digits a line, seed {self.seed}, against the {evaluator.references.name} split; "
            "recognised by the extractor, in whose features distances are measured."
        )
        note = too_few_images(evaluator.num_compared)
        return f"{as_table(SWEEP_COLUMNS, lines)}\n{caption}\n" + (f"\n{note}\n" if note else "")

    @property
    def _real(self) -> Figures:
        """The same figures of real digits."""
        manifold, seen = self.evaluator.real_manifold, self.evaluator.real_extractor
        return {
            "extractor": seen.accuracy,
            "extractor_worst": min(seen.per_digit),
            "frechet_ratio": None if too_few_images(self.evaluator.num_compared) else 1.0,
            **{name: getattr(manifold, name) for name in MANIFOLD},
        }

    @property
    def _identity(self) -> Figures:
        """What must not change between the parts of one sweep."""
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
                raise ScriptError(f"{self.file} holds figures of {different}")
            rows: list[Figures] = content["figures"]
            for row in rows:
                as_sweep_row(row)
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise ScriptError(f"{self.file} does not hold the figures of a sweep") from error
        return rows

    def _write(self, rows: list[Figures]) -> None:
        write_json(self.file, {"sweep": self._identity, "real": self._real, "figures": rows})


def brief(quality: Quality) -> Figures:
    """The figures by which settings are compared."""
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
    """Plots errors and, if any was computed, the Fréchet distance against the number of steps; a line per sampler."""
    has_distances = any(row["frechet_ratio"] is not None for row in rows)
    figure = new_figure(900, 380)
    left, *right = figure.subplots(1, 1 + has_distances, squeeze=False)[0]
    for i, sampler in enumerate(dict.fromkeys(row["options"]["sampler"] for row in rows)):
        of_it = [row for row in rows if row["options"]["sampler"] == sampler]
        steps = [row["options"]["num_steps"] for row in of_it]
        mistakes = [max(1 - row["extractor"], FEWEST_MISTAKES) for row in of_it]
        left.plot(steps, mistakes, f"C{i}o-", markersize=3, label=sampler)
        for axes in right:
            axes.plot(steps, [row["frechet_ratio"] for row in of_it], f"C{i}o-", markersize=3, label=sampler)
    left.set_ylabel("not recognised as asked")
    for axes in right:
        axes.set_ylabel("Fréchet distance ÷ floor")
        axes.axhline(1, color="grey", linestyle=":", linewidth=1)
    for axes in (left, *right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
    return finish_curves(figure)
