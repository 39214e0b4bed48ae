"""The same checkpoint drawn with in many ways, each evaluated alike; what was evaluated once is kept."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.checkpoint import write_atomically
from scripts.drawing import Drawer, DrawingOptions
from scripts.evaluation.quality import Evaluator, Quality
from scripts.evaluation.samples import draw_samples
from scripts.figures import new_figure
from scripts.progress import Reporter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Figures = dict[str, Any]
FEWEST_MISTAKES = 1e-4  # that an axis of powers of ten can show


class SweepError(Exception):
    """The file of earlier figures cannot be gone on with; one sentence."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What every setting has in common, and the file in which figures are kept."""

    drawer: Drawer
    evaluator: Evaluator
    file: Path
    seed: int
    batch_size: int

    def run(self, settings: Iterable[DrawingOptions], reporter: Reporter) -> list[Figures]:
        """The figures of each setting, in order; SweepError where the file is of another sweep."""
        figures = []
        for options in settings:
            kept = {json.dumps(row["options"], sort_keys=True): row for row in self._read()}
            key = json.loads(json.dumps(asdict(options)))
            if json.dumps(key, sort_keys=True) not in kept:
                row = {"options": key, **self._evaluate(options, reporter)}
                self._write([*kept.values(), row])
                reporter.line(as_row(row))
            figures.append(next(row for row in self._read() if row["options"] == key))
        return figures

    def as_markdown(self, rows: list[Figures]) -> str:
        """The rows under their heads, real digits last, and what was compared with what."""
        evaluator = self.evaluator
        manifold, seen = evaluator.real_manifold, evaluator.real_extractor
        beside = {
            "extractor": seen.accuracy,
            "extractor_worst": min(seen.per_digit),
            "frechet_ratio": 1.0,
            **asdict(manifold),
        }
        lines = [*(as_row(row) for row in rows), as_line(("real digits", "", ""), beside)]
        caption = (
            f"{evaluator.num_images:,} digits a line, seed {self.seed}, against the {evaluator.references.name} split; "
            "recognised by the extractor, in whose features distances are measured."
        )
        return f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n" + "\n".join(lines) + f"\n\n{caption}\n"

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
                raise SweepError(f"{self.file} holds figures of another checkpoint, seed, split or number of images")
            rows: list[Figures] = content["figures"]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise SweepError(f"{self.file} does not hold the figures of a sweep") from error
        return rows

    def _write(self, rows: list[Figures]) -> None:
        content = {"sweep": self._identity, "figures": rows}
        write_atomically(self.file, f"{json.dumps(content, indent=1)}\n".encode())


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


def as_columns(options: dict[str, Any]) -> tuple[str, str, str]:
    """Sampler, steps and guidance of DrawingOptions as JSON has them, for a table."""
    guidance = options["guidance"]
    acts = f"{guidance['scale']:g} in {guidance['start']}-{guidance['stop']}"
    return options["sampler"], str(options["num_steps"]), "off" if guidance["scale"] == 1 else acts


COLUMNS = (
    "sampler",
    "steps",
    "guidance",
    "as asked, by the extractor",
    "worst digit",
    "Fréchet ÷ floor",
    "precision",
    "recall",
    "coverage",
)


def as_row(figures: Figures) -> str:
    """One line of the table; choices are made by the extractor's answers, so those are shown."""
    return as_line(as_columns(figures["options"]), figures)


def as_line(what: tuple[str, str, str], figures: Figures) -> str:
    """The figures after three columns that say what they are of."""
    shown = [
        *what,
        f"{figures['extractor']:.2%}",
        f"{figures['extractor_worst']:.2%}",
        f"{figures['frechet_ratio']:.2f}",
        *(f"{figures[name]:.3f}" for name in ("precision", "recall", "coverage")),
    ]
    return f"| {' | '.join(shown)} |"


def show_steps(rows: list[Figures]) -> "Figure":
    """Errors and Fréchet distance against the number of network calls, a line a sampler."""
    figure = new_figure(900, 380)
    left, right = figure.subplots(1, 2)
    for i, sampler in enumerate(dict.fromkeys(row["options"]["sampler"] for row in rows)):
        of_it = [row for row in rows if row["options"]["sampler"] == sampler]
        steps = [row["options"]["num_steps"] for row in of_it]
        mistakes = [max(1 - row["extractor"], FEWEST_MISTAKES) for row in of_it]
        left.plot(steps, mistakes, f"C{i}o-", markersize=3, label=sampler)
        right.plot(steps, [row["frechet_ratio"] for row in of_it], f"C{i}o-", markersize=3, label=sampler)
    left.set_ylabel("not recognised as asked")
    right.set_ylabel("Fréchet distance ÷ floor")
    right.axhline(1, color="grey", linestyle=":", linewidth=1)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("steps")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(which="both", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.tight_layout()
    return figure
