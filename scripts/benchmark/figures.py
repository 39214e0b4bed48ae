"""Plots of the JSON results of scripts.bench: bars for each service or load, or lines over the request rate."""

import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scripts.benchmark.report import plain_kind, plain_load
from scripts.common.figures import LABEL_SIZE, finish_curves, new_figure
from scripts.common.progress import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 1000, 340  # pixels; the height of bar plots depends on the number of bars
BAR_HEIGHT, MARGIN = 26, 110
TITLE_WIDTH = 32  # letters
LONE_CLIENT = "1 x 1 image"  # prefix of the names of loads that include a client of one image
COLOURS = ("#1f77b4", "#6baed6", "#9e9e9e", "#c2a572", "#d95f02", "#a63603", "#7b3294")
COLOUR_OF = {  # prefix of the service's name -> colour; longer prefixes come first
    "unfog,": COLOURS[1],
    "unfog": COLOURS[0],
    "locked": COLOURS[2],
    "batched": COLOURS[3],
    "litserve --batch-timeout 0.01": COLOURS[4],
    "litserve": COLOURS[5],
    "diffusers-tuned": "#c51b8a",
    "diffusers-compiled": "#7a0177",
    "diffusers": COLOURS[6],
}
Rows = Sequence[dict[str, Any]]


def show_bench(rows: Rows) -> "Figure":
    """Plots the rows of a JSON file of scripts.bench: lines for shares of the capacity, otherwise bars."""
    rising = [row for row in rows if "predicted_p95" in row]
    if rising:
        return _lines(rising)
    return _facets(rows) if len({row["contestant"] for row in rows}) > 1 else _closed(rows)


def _lines(rows: Rows) -> "Figure":
    """Plots latency and throughput by request rate."""
    figure = new_figure(WIDTH, HEIGHT)
    latency, throughput = figure.subplots(1, 2)
    rates = sorted({row["rate"] for row in rows})
    at = [[row for row in rows if row["rate"] == rate] for rate in rates]
    (kind,) = rows[0]["latencies"]
    for share, colour in (("p50", COLOURS[1]), ("p95", COLOURS[0])):
        _line(latency, rates, [[row["latencies"][kind][share] for row in same_rate] for same_rate in at], share, colour)
    for name, label, colour in (("predicted_p95", "simulated", COLOURS[4]), ("replayed_p95", "replayed", COLOURS[2])):
        if all(name in row for row in rows):
            medians = [statistics.median(row[name] for row in same_rate) for same_rate in at]
            latency.plot(rates, medians, "x--", color=colour, label=f"p95, {label}")
    latency.set_yscale("log")
    _label_logarithms(latency.yaxis)
    _describe(latency, "requested images/s", "latency, s")
    _line(
        throughput, rates, [[row["images_a_second"] for row in same_rate] for same_rate in at], "answered", COLOURS[0]
    )
    _line(
        throughput, rates, [[row["goodput"] for row in same_rate] for same_rate in at], "answered in time", COLOURS[4]
    )
    throughput.plot(rates, rates, "x:", color="#bbbbbb", label="requested")
    throughput.set_ylim(0, 1.05 * max(rates))
    _describe(throughput, "requested images/s", "images/s")
    return finish_curves(figure)


def _line(axes: "Axes", x: Sequence[float], values: Sequence[Sequence[float]], label: str, colour: str) -> None:
    """Plots the medians and shades the range over the repeats."""
    axes.plot(x, [statistics.median(found) for found in values], "o-", color=colour, label=label, markersize=4)
    axes.fill_between(x, [min(found) for found in values], [max(found) for found in values], color=colour, alpha=0.2)


def _describe(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=LABEL_SIZE)
    axes.set_ylabel(y, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=LABEL_SIZE)


def _label_logarithms(axis: "Axis") -> None:
    """Labels a logarithmic axis with 0.1, 0.3, 1, 3, ... instead of powers of ten."""
    ticker = require("matplotlib.ticker")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _colour_of(contestant: str) -> str:
    return next((colour for name, colour in COLOUR_OF.items() if contestant.startswith(name)), "#444444")


def _facets(rows: Rows) -> "Figure":
    """Plots one facet for each load and kind of request, with a bar for each service.

    Closed loops show the throughput. Random arrivals show the p95 latency. The whiskers show the range over the
    repeats.
    """
    facets = list(dict.fromkeys((row["load"], kind) for row in rows for kind in row["latencies"]))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure = new_figure(WIDTH, BAR_HEIGHT * len(names) + MARGIN)
    panels = figure.subplots(1, len(facets), sharey=True, squeeze=False)[0]
    for axes, (load, kind) in zip(panels, facets, strict=True):
        of_load = [row for row in rows if row["load"] == load]
        is_open = bool(of_load[0].get("rate"))
        for place, name in enumerate(names):
            own = [row for row in of_load if row["contestant"] == name]
            values = [row["latencies"][kind]["p95"] if is_open else row["images_a_second"] for row in own]
            if values:
                _bar(axes, place, values, _colour_of(name))
        several = len(of_load[0]["latencies"]) > 1
        quantity = "p95 latency, s" if is_open else "images/s"
        axes.set_title(_wrapped(plain_load(load)), loc="left", fontsize=LABEL_SIZE)
        axes.set_xlabel(f"{quantity}, {plain_kind(kind)}" if several else quantity, fontsize=LABEL_SIZE)
        _clean(axes)
    panels[0].set_yticks(range(len(names)), names, fontsize=LABEL_SIZE)
    panels[0].invert_yaxis()
    figure.tight_layout(w_pad=1.5)
    return figure


def _closed(rows: Rows) -> "Figure":
    """Plots the throughput of the loads with many images, and the latency of the loads with a client of one image."""
    loads = list(dict.fromkeys(row["load"] for row in rows))
    lone = [load for load in loads if load.startswith(LONE_CLIENT)]
    of_many = [load for load in loads if load not in lone]
    figure = new_figure(WIDTH, BAR_HEIGHT * max(len(lone), len(of_many)) + MARGIN)
    panels = figure.subplots(1, 2)
    quantities = ("images/s", "p50 latency of the client of one image, s")
    for axes, names, quantity in zip(panels, (of_many, lone), quantities, strict=True):
        for place, load in enumerate(names):
            own = [row for row in rows if row["load"] == load]
            values = [row["images_a_second"] if names is of_many else row["latencies"]["one"]["p50"] for row in own]
            _bar(axes, place, values, COLOURS[0])
        axes.set_yticks(range(len(names)), [plain_load(load) for load in names], fontsize=LABEL_SIZE)
        axes.invert_yaxis()
        axes.set_xlabel(quantity, fontsize=LABEL_SIZE)
        _clean(axes)
    figure.tight_layout(w_pad=1.5)
    return figure


def _bar(axes: "Axes", place: int, values: Sequence[float], colour: str) -> None:
    """Draws a bar of the median, a whisker of the range, and the median as a label."""
    middle = statistics.median(values)
    spread = [[middle - min(values)], [max(values) - middle]]
    axes.barh(place, middle, 0.6, color=colour, xerr=spread, error_kw={"ecolor": "#444444", "capsize": 2})
    axes.annotate(
        f"{middle:.3g}", (max(values), place), (5, 0), textcoords="offset points", va="center", fontsize=LABEL_SIZE
    )


def _clean(axes: "Axes") -> None:
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=LABEL_SIZE)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def _wrapped(title: str) -> str:
    return "\n".join(textwrap.wrap(title, TITLE_WIDTH))
