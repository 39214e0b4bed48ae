"""Plots quality against latency, from results of scripts.bench and scripts.evaluate."""

import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scripts.common.errors import ScriptError
from scripts.common.figures import LABEL_SIZE, new_figure, save_figure
from scripts.common.progress import require
from scripts.evaluation.tables import read_evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "ddpm": "default, 100 steps",
    "ddpm-off": "default, 100 steps, guidance off",
    "dpmpp": "default, dpmpp in 10 steps",
    "dpmpp-off": "default, dpmpp in 10 steps, guidance off",
    "fast": "fast, 4 steps",
}
COLOURS = {"ddpm": "#1f5fa8", "dpmpp": "#c24a06", "fast": "#2b7a3d"}


class Setting(NamedTuple):
    """A published setting: its latency in milliseconds, one value per start, and its share of recognised digits."""

    name: str
    milliseconds: list[float]
    recognised: float
    real: float  # share of real digits that are recognised
    num_images: int


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
        accuracy, real = evaluation["judge"]["accuracy"], evaluation["real_judge"]["accuracy"]
        settings.append(Setting(name, values, accuracy, real, evaluation["num_images"]))
    save_figure(show_tradeoff(settings), out, grey=False)


def show_tradeoff(settings: list[Setting]) -> "Figure":
    """Returns a figure with a point for each setting. Bars show the range of the latency and two standard errors."""
    figure = new_figure(760, 380)
    axes = figure.add_subplot()
    for name, milliseconds, recognised, _, num_images in settings:
        x, colour = statistics.median(milliseconds), COLOURS[name.removesuffix("-off")]
        error = 2 * math.sqrt(recognised * (1 - recognised) / num_images)
        spread = [[x - min(milliseconds)], [max(milliseconds) - x]]
        face = "white" if name.endswith("-off") else colour
        axes.errorbar(x, recognised, [[error], [error]], spread, "o", color=colour, markerfacecolor=face, capsize=2)
        axes.annotate(
            f"{NAMES[name]}\n{100 * recognised:.2f}%, {x:.0f} ms",
            (x, recognised),
            (8, -8),
            textcoords="offset points",
            va="top",
            fontsize=LABEL_SIZE,
            color=colour,
        )
    real = settings[0].real
    axes.axhline(real, color="grey", linestyle=":", linewidth=1)
    axes.annotate(
        "real digits",
        (0.995, real),
        (0, 4),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        color="grey",
        fontsize=LABEL_SIZE,
    )
    ticker = require("matplotlib.ticker")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set_xlabel("milliseconds for one image on an idle service (p50, logarithmic)", fontsize=LABEL_SIZE + 1)
    axes.set_ylabel("digits recognised as requested", fontsize=LABEL_SIZE + 1)
    axes.tick_params(labelsize=LABEL_SIZE)
    axes.margins(x=0.25, y=0.15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
