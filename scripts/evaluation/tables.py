"""Tables of figures: evaluations and sweeps, side by side. Needs none of the packages that compute the figures."""

import json
from pathlib import Path
from typing import Any

from scripts.common.errors import ScriptError

Figures = dict[str, Any]
Evaluation = dict[str, Any]  # as `scripts.evaluate digits` leaves it

# Fewest images for a Fréchet distance. With no more images than features, 128, the covariance is singular; above that
# the distance is still mostly bias, which falls as 1/images. Slightly blurred digits are at 4 times the distance of
# real ones if 10,000 are compared. With 1,000 images this ratio is 1.7 to 2.2, with 500 1.3 to 1.6, with 200 1.0 to
# 1.3, so that fewer images do not show a difference of this size.
FEWEST_IMAGES = 1_000

SETTING = ("sampler", "steps", "guidance")
MANIFOLD = ("precision", "recall", "coverage")
SWEEP_COLUMNS = (*SETTING, "calls", "as asked, by the extractor", "worst digit", "Fréchet ÷ floor", *MANIFOLD)
RUN_COLUMNS = (
    "run",
    *SETTING,
    "as asked, by the extractor",
    "by the judge",
    "its worst digit",
    "Fréchet ÷ floor",
    *MANIFOLD,
)


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file, or in a folder's evaluation.json."""
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        content: Evaluation = json.loads(file.read_text("utf-8"))
        as_run("", content)
        as_column(content)
        as_column(content, real=True)
        if not {"num_images", "split", "networks"} <= set(content):
            raise KeyError
    except OSError as error:
        raise ScriptError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ScriptError(f"{file} is not what scripts.evaluate digits leaves") from error
    return content


def check_comparable(evaluations: list[Evaluation]) -> None:
    """Raises ScriptError if the distances and shares of these evaluations cannot be compared."""
    for field in ("num_images", "split", "networks"):
        if len({json.dumps(evaluation[field]) for evaluation in evaluations}) > 1:
            raise ScriptError(f"the evaluations differ in {field}: distances and shares compare at equal ones only")


def as_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], f"|{' --- |' * len(columns)}", *lines[1:]]) + "\n"


def too_few_images(num_images: int) -> str:
    """Returns the sentence for a table without a Fréchet distance, empty if there are enough images."""
    if num_images >= FEWEST_IMAGES:
        return ""
    return f"Too few images for a Fréchet distance: {num_images:,}, at least {FEWEST_IMAGES:,} needed."


def fixed(value: float | None, digits: int) -> str:
    """Returns the value with that many digits after the point, or a dash if it was not computed."""
    return "-" if value is None else f"{value:.{digits}f}"


def as_setting(options: dict[str, Any]) -> list[str]:
    """Sampler, steps and guidance of DrawingOptions as JSON has them."""
    guidance = options["guidance"]
    acts = f"{guidance['scale']:g} in {guidance['start']}-{guidance['stop']}"
    return [options["sampler"], str(options["num_steps"]), "off" if guidance["scale"] == 1 else acts]


def as_sweep_row(figures: Figures) -> list[str]:
    """A line of a sweep: choices are made by the extractor's answers, so those are shown.

    Of real digits, which have no options, too.
    """
    drawn = "options" in figures
    setting = [*as_setting(figures["options"]), str(figures["evaluations"])] if drawn else ["real digits", "", "", ""]
    return [
        *setting,
        f"{figures['extractor']:.2%}",
        f"{figures['extractor_worst']:.2%}",
        fixed(figures["frechet_ratio"], 2),
        *(f"{figures[name]:.3f}" for name in MANIFOLD),
    ]


def as_run(name: str, evaluation: Evaluation) -> list[str]:
    """A line an evaluation."""
    judge = evaluation["judge"]
    worst = _worst(judge)
    setting = as_setting(evaluation["options"]) if "options" in evaluation else ["?"] * len(SETTING)  # a folder's
    return [
        name,
        *setting,
        f"{evaluation['extractor']['accuracy']:.2%}",
        f"{judge['accuracy']:.2%}",
        f"{judge['per_digit'][worst]:.1%} ({worst})",
        fixed(evaluation["frechet_ratio"], 2),
        *(f"{evaluation['manifold'][name]:.3f}" for name in MANIFOLD),
    ]


def as_column(evaluation: Evaluation, *, real: bool = False) -> dict[str, str]:
    """A column an evaluation, by the names of its lines; `real`: that of the real digits beside it."""
    of = "real_" if real else ""
    judge = evaluation[f"{of}judge"]
    worst = _worst(judge)
    distance = fixed(evaluation[f"{of}frechet"], 4)
    if real and evaluation["noise_frechet"] is not None:
        distance += f" (noise {evaluation['noise_frechet']:.0f})"
    return {
        "recognised as asked": f"{judge['accuracy']:.2%}",
        "worst digit": f"{worst}: {judge['per_digit'][worst]:.1%}",
        "Fréchet distance": distance,
        "as a multiple of real digits'": "1" if real else fixed(evaluation["frechet_ratio"], 2),
        **{name: f"{evaluation[f'{of}manifold'][name]:.3f}" for name in MANIFOLD},
        "memorised": f"{evaluation['held_out_memorised' if real else 'memorised']:.2%}",
    }


def across(evaluations: dict[str, Evaluation]) -> str:
    """A column an evaluation by name, real digits last; all of one split, number of images and networks."""
    columns = [as_column(evaluation) for evaluation in evaluations.values()]
    columns.append(as_column(next(iter(evaluations.values())), real=True))
    rows = [[line, *(column[line] for column in columns)] for line in columns[0]]
    return as_table(("", *evaluations, "real digits"), rows)


def _worst(recognition: dict[str, Any]) -> int:
    return min(range(10), key=recognition["per_digit"].__getitem__)
