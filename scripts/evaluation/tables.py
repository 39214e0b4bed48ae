"""Markdown tables of evaluations and sweeps. Does not import the packages that compute the metrics."""

import json
from pathlib import Path
from typing import Any

from scripts.common.errors import ScriptError

Figures = dict[str, Any]
Evaluation = dict[str, Any]  # content of an evaluation.json of `scripts.evaluate digits`

# Smallest number of images for a Fréchet distance. With few images, the distance is mostly bias, which falls as
# 1/images. In the features of the extractor and with 10,000 images, slightly blurred digits have 4 times the distance
# of real digits. This ratio is 1.7 to 2.2 with 1,000 images, 1.3 to 1.6 with 500 and 1.0 to 1.3 with 200. Fewer than
# 1,000 images therefore do not show a difference of this size.
FEWEST_IMAGES = 1_000

SETTING = ("sampler", "steps", "guidance")
MANIFOLD = ("precision", "recall", "coverage")
# The feature spaces besides the extractor's, and their names in tables.
SPACES = {"judge": "the judge", "clip": "CLIP", "efficientnet": "EfficientNet"}
FRECHET_RATIO = "ratio to real digits"  # the Fréchet distance divided by that of real digits
CLIP_COLUMNS = (
    "guidance",
    "CLIP guidance",
    "accuracy (extractor)",
    "accuracy (judge)",
    "worst digit (judge)",
    "Fréchet distance",
    FRECHET_RATIO,
    "recall",
    "coverage",
    "CLIP similarity",
)
RUN_COLUMNS = (
    "run",
    *SETTING,
    "accuracy (extractor)",
    "accuracy (judge)",
    "worst digit (judge)",
    "Fréchet ratio",
    *MANIFOLD,
)


def read_evaluation(path: Path) -> Evaluation:
    """Reads an evaluation from a file, or from evaluation.json in a folder. Raises ScriptError if it is incomplete."""
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
        raise ScriptError(f"{file} is not an evaluation. Write one with python -m scripts.evaluate digits") from error
    return content


def check_comparable(evaluations: list[Evaluation]) -> None:
    """Raises ScriptError if the evaluations have different numbers of images, splits or classifiers."""
    for field in ("num_images", "split", "networks"):
        if len({json.dumps(evaluation[field]) for evaluation in evaluations}) > 1:
            raise ScriptError(f"The evaluations cannot be compared: they differ in {field}")


def as_table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], f"|{' --- |' * len(columns)}", *lines[1:]]) + "\n"


def too_few_images(num_images: int, kind: str = "images") -> str:
    """Returns a sentence if there are too few images for a Fréchet distance, otherwise an empty string.

    `kind` says which images these are.
    """
    if num_images >= FEWEST_IMAGES:
        return ""
    return f"Too few {kind} for a Fréchet distance: {num_images:,}, at least {FEWEST_IMAGES:,} needed."


def fixed(value: float | None, digits: int) -> str:
    """Returns the value with `digits` decimal places, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def as_setting(options: dict[str, Any]) -> list[str]:
    """Returns sampler, steps and guidance. `options` are DrawingOptions as a JSON object."""
    guidance = options["guidance"]
    return [
        options["sampler"],
        str(options["num_steps"]),
        "off" if guidance["scale"] == 1 else _scale_and_interval(guidance),
    ]


def _scale_and_interval(guidance: dict[str, Any]) -> str:
    return f"{guidance['scale']:g} in {guidance['start']}-{guidance['stop']}"


def spaces_of(figures: Figures) -> list[str]:
    """Returns the feature spaces besides the extractor's in which the figures have a Fréchet ratio."""
    return [name for name in SPACES if f"{name}_frechet_ratio" in figures]


def sweep_columns(figures: Figures) -> tuple[str, ...]:
    """Returns the columns of `as_sweep_row` for the same figures."""
    ratios = ("Fréchet ratio", *(f"ratio, {SPACES[name]}" for name in spaces_of(figures)))
    return (*SETTING, "network calls", "accuracy (extractor)", "worst digit", *ratios, *MANIFOLD)


def as_sweep_row(figures: Figures) -> list[str]:
    """Returns the cells of `sweep_columns`.

    The accuracy is that of the extractor, since the published accuracy of the judge must not influence choices.
    `figures` without options are those of real digits.
    """
    generated = "options" in figures
    setting = ["real digits", "", "", ""]
    if generated:
        setting = [*as_setting(figures["options"]), str(figures["evaluations"])]
    return [
        *setting,
        f"{figures['extractor']:.2%}",
        f"{figures['extractor_worst']:.2%}",
        fixed(figures["frechet_ratio"], 2),
        *(fixed(figures[f"{name}_frechet_ratio"], 2) for name in spaces_of(figures)),
        *(f"{figures[name]:.3f}" for name in MANIFOLD),
    ]


def as_clip_row(figures: Figures) -> list[str]:
    """Returns the cells of CLIP_COLUMNS. `figures` without options are those of real digits."""
    setting = ["real digits", ""]
    if "options" in figures:
        clip = figures["options"].get("clip")
        setting = [as_setting(figures["options"])[-1], _scale_and_interval(clip["guidance"]) if clip else "off"]
    return [
        *setting,
        *(f"{figures[name]:.2%}" for name in ("extractor", "judge", "judge_worst")),
        fixed(figures["frechet"], 4),
        fixed(figures["frechet_ratio"], 2),
        *(f"{figures[name]:.3f}" for name in ("recall", "coverage", "similarity")),
    ]


def as_run(name: str, evaluation: Evaluation) -> list[str]:
    """Returns the cells of RUN_COLUMNS."""
    judge = evaluation["judge"]
    worst = _worst(judge)
    setting = (
        as_setting(evaluation["options"]) if "options" in evaluation else ["?"] * len(SETTING)
    )  # the options of a folder of images are unknown
    return [
        name,
        *setting,
        f"{evaluation['extractor']['accuracy']:.2%}",
        f"{judge['accuracy']:.2%}",
        f"{shares_of(judge)[worst]:.1%} ({_name_of(evaluation, worst)})",
        fixed(evaluation["frechet_ratio"], 2),
        *(_share_of(evaluation["manifold"], name) for name in MANIFOLD),
    ]


def as_column(evaluation: Evaluation, *, real: bool = False) -> dict[str, str]:
    """Returns the metrics of an evaluation as text, by name. `real=True` returns those of its real digits."""
    of = "real_" if real else ""
    judge = evaluation[f"{of}judge"]
    worst = _worst(judge)
    distance = fixed(evaluation[f"{of}frechet"], 4)
    if real and evaluation["noise_frechet"] is not None:
        distance += f" (noise {evaluation['noise_frechet']:.0f})"
    return {
        "recognised as asked": f"{judge['accuracy']:.2%}",
        "worst digit": f"{_name_of(evaluation, worst)}: {shares_of(judge)[worst]:.1%}",
        "Fréchet distance": distance,
        FRECHET_RATIO: "1" if real else fixed(evaluation["frechet_ratio"], 2),
        **{
            f"{FRECHET_RATIO}, {SPACES[name]}": "1" if real else fixed(evaluation[f"{name}_frechet_ratio"], 2)
            for name in spaces_of(evaluation)
            if name != "judge"
        },
        **{name: _share_of(evaluation[f"{of}manifold"], name) for name in MANIFOLD},
        "memorised": f"{evaluation['held_out_memorised' if real else 'memorised']:.2%}",
    }


def across(evaluations: dict[str, Evaluation]) -> str:
    """Returns a table with a column for each evaluation and a last column for real digits.

    The evaluations must be comparable, see `check_comparable`.
    """
    columns = [as_column(evaluation) for evaluation in evaluations.values()]
    columns.append(as_column(next(iter(evaluations.values())), real=True))
    # Evaluations of earlier releases have fewer lines.
    lines = [line for line in columns[0] if all(line in column for column in columns)]
    rows = [[line, *(column[line] for column in columns)] for line in lines]
    return as_table(("", *evaluations, "real digits"), rows)


def shares_of(recognition: Figures) -> list[float]:
    """Returns the share recognised of each class. Published evaluations of digits have it as `per_digit`."""
    shares: list[float] = recognition["per_class" if "per_class" in recognition else "per_digit"]
    return shares


def _worst(recognition: Figures) -> int:
    shares = shares_of(recognition)
    return shares.index(min(shares))


def _name_of(evaluation: Evaluation, label: int) -> str:
    """Returns the name of a class. Evaluations of earlier releases are of digits and have no names."""
    return str(evaluation.get("class_names", range(10))[label])


def _share_of(manifold: Figures | None, name: str) -> str:
    return fixed(None if manifold is None else manifold[name], 3)
