"""Plots quality against latency, from results of scripts.bench and scripts.evaluate."""

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scripts.common.errors import ScriptError
from scripts.common.figures import LABEL_SIZE, new_figure, save_figure
from scripts.common.progress import require
from scripts.evaluation.tables import SPACES, read_evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {  # evaluated settings: folder in docs/results/final -> model and steps, as written in the figure
    "ddpm": "default\n100 steps",
    "dpmpp-20": "default\n20 steps",
    "dpmpp": "default\n10 steps",
    "fast": "fast\n4 steps",
    "fast-2": "fast\n2 steps",
    "fast-1": "fast\n1 step",
}
COLOURS = {"ddpm": "#1f5fa8", "dpmpp": "#c24a06", "fast": "#2b7a3d"}  # by the first part of the folder
MARKERS = {"": "o", "clip": "^", "efficientnet": "s"}  # by feature space; "" is that of the extractor


class Setting(NamedTuple):
    """A published setting: its latency in milliseconds, one value per start, recognised digits and distances."""

    name: str
    milliseconds: list[float]
    recognised: float  # share
    ratios: dict[str, float]  # Fréchet distance divided by that of real digits, by feature space as in MARKERS


def plot_tradeoff(file: Path, evaluations: Path, out: Path) -> None:
    """Writes the figure. `file` is the result of `scripts.bench models`. `evaluations` has a folder for each setting.

    Raises ScriptError for other files.
    """
    try:
        rows = json.loads(file.read_text("utf-8"))["rows"]
        latencies = {
            name: [1000 * row["latencies"]["one"]["p50"] for row in rows if row["load"] == name] for name in NAMES
        }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ScriptError(f"{file} is not a result file of scripts.bench models") from error
    if missing := [name for name, values in latencies.items() if not values]:
        raise ScriptError(f"{file} has no measurement of {missing[0]}. Use a result of scripts.bench models")
    settings = []
    for name, values in latencies.items():
        evaluation = read_evaluation(evaluations / name)
        fields = {space: f"{space}_frechet_ratio".removeprefix("_") for space in MARKERS}
        if lacking := [space for space, field in fields.items() if evaluation.get(field) is None]:
            where = SPACES.get(lacking[0], "the extractor")
            raise ScriptError(f"{evaluations / name} has no distance in the features of {where}. Evaluate it again")
        ratios = {space: evaluation[field] for space, field in fields.items()}
        settings.append(Setting(name, values, evaluation["judge"]["accuracy"], ratios))
    save_figure(show_tradeoff(settings), out, grey=False)


def show_tradeoff(settings: list[Setting]) -> "Figure":
    """Returns a figure with the ratios of each setting above its latency, one marker for each feature space."""
    figure = new_figure(760, 400)
    axes = figure.add_subplot()
    for name, milliseconds, recognised, ratios in settings:
        x, colour = statistics.median(milliseconds), COLOURS[name.partition("-")[0]]
        low, high = min(ratios.values()), max(ratios.values())
        axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.5)
        for space, ratio in ratios.items():
            axes.plot(x, ratio, MARKERS[space], color=colour, markersize=5)
        axes.annotate(
            f"{NAMES[name]}\n{x:.3g} ms\n{100 * recognised:.1f}%",
            (x, high),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=LABEL_SIZE,
            color=colour,
        )
    axes.axhline(1, color="grey", linestyle=":", linewidth=1)
    axes.annotate(
        "real digits",
        (0.8, 1),
        (0, -11),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        color="grey",
        fontsize=LABEL_SIZE,
    )
    for space, marker in MARKERS.items():
        axes.plot([], [], marker, color="grey", markersize=5, label=f"features of {SPACES.get(space, 'the extractor')}")
    axes.legend(loc="upper right", fontsize=LABEL_SIZE, frameon=False)
    ticker = require("matplotlib.ticker")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("milliseconds for one image on an idle service (p50, logarithmic)", fontsize=LABEL_SIZE + 1)
    axes.set_ylabel("distance ÷ that of real digits", fontsize=LABEL_SIZE + 1)
    axes.tick_params(labelsize=LABEL_SIZE)
    lowest = min(min(setting.ratios.values()) for setting in settings)
    highest = max(max(setting.ratios.values()) for setting in settings)
    room = highest - min(lowest, 1)
    axes.set_ylim(min(lowest, 1) - 0.1 * room, highest + 0.35 * room)  # for the labels
    axes.margins(x=0.1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
