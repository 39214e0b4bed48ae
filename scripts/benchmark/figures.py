"""Plots of the JSON results of scripts.bench: bars for each load and service, or lines over the request rate."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scripts.benchmark.report import plain_kind, plain_load
from scripts.common.figures import LABEL_SIZE, PIXELS_PER_LETTER, new_figure
from scripts.common.progress import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 1000, 340  # pixels; the height of bar plots depends on the number of bars
BAR_HEIGHT, MARGIN = 22, 90
KINDS_APART = 0.45  # distance between kinds of requests of one load, in bars
COLOURS = ("#1f77b4", "#6baed6", "#9e9e9e", "#c2a572", "#d95f02", "#a63603", "#7b3294")
COLOUR_OF = {  # by prefix of the service's name; longer prefixes come first
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
    """Plots the rows of a JSON file of scripts.bench: lines for an open loop, otherwise bars."""
    rising = [row for row in rows if "predicted_p95" in row]
    return _lines(rising) if rising else _bars(rows)


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
    throughput.set_ylim(0, 1.3 * max(row["images_a_second"] for row in rows))
    _describe(throughput, "requested images/s", "images/s")
    figure.tight_layout()
    return figure


def _line(axes: "Axes", x: Sequence[float], values: Sequence[Sequence[float]], label: str, colour: str) -> None:
    """Plots the medians and shades the range over the repeats."""
    axes.plot(x, [statistics.median(found) for found in values], "o-", color=colour, label=label, markersize=4)
    axes.fill_between(x, [min(found) for found in values], [max(found) for found in values], color=colour, alpha=0.2)


def _describe(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=LABEL_SIZE)
    axes.set_ylabel(y, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=LABEL_SIZE)
    axes.legend(fontsize=LABEL_SIZE, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _label_logarithms(axis: "Axis") -> None:
    """Labels a logarithmic axis with 0.1, 0.3, 1, 3, ... instead of powers of ten."""
    ticker = require("matplotlib.ticker")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _colour_of(contestant: str) -> str:
    return next((colour for name, colour in COLOUR_OF.items() if contestant.startswith(name)), "#444444")


def _bars(rows: Rows) -> "Figure":
    """Plots throughput and latency of each service under each load."""
    groups = list(dict.fromkeys((row["load"], row["contestant"]) for row in rows))
    height = BAR_HEIGHT * len(groups) + MARGIN
    figure = new_figure(WIDTH, height)
    labels = [f"{plain_load(load)}: {contestant}" for load, contestant in groups]
    left = PIXELS_PER_LETTER * max(map(len, labels)) + 10
    box = {"left": left / WIDTH, "right": 0.98, "bottom": 50 / height, "top": 1 - 10 / height, "wspace": 0.08}
    rate, latency = figure.subplots(1, 2, sharey=True, gridspec_kw=box)
    for place, (load, contestant) in enumerate(groups):
        own_rows = [row for row in rows if (row["load"], row["contestant"]) == (load, contestant)]
        colour = _colour_of(contestant)
        found = [row["images_a_second"] for row in own_rows]
        middle = statistics.median(found)
        spread = [[middle - min(found)], [max(found) - middle]]
        rate.barh(place, middle, color=colour, xerr=spread, error_kw={"ecolor": "#444444", "capsize": 2})
        kinds = own_rows[0]["latencies"]
        for k, kind in enumerate(kinds):
            at = place + KINDS_APART * (k - (len(kinds) - 1) / 2)
            p50, p95 = (
                statistics.median(row["latencies"][kind][share] for row in own_rows) for share in ("p50", "p95")
            )
            latency.plot([p50, p95], [at, at], "-", color=colour)
            latency.plot([p50], [at], "o", color=colour, markersize=4)
            latency.plot([p95], [at], "|", color=colour, markersize=9)
            if len(kinds) > 1:
                latency.annotate(
                    plain_kind(kind), (p95, at), (5, -3), textcoords="offset points", fontsize=LABEL_SIZE - 1
                )
    rate.set_yticks(range(len(groups)), labels, fontsize=LABEL_SIZE)
    rate.invert_yaxis()
    latency.set_xscale("log")
    _label_logarithms(latency.xaxis)
    latency.margins(x=0.12)
    rate.set_xlabel("images/s", fontsize=LABEL_SIZE)
    latency.set_xlabel("latency, s, p50 to p95", fontsize=LABEL_SIZE)
    for axes in (rate, latency):
        axes.tick_params(labelsize=LABEL_SIZE)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
