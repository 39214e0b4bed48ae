"""Simulates the same requests with batching per step and per request, and draws both timelines."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from app.engine.step_times import Curve
from scripts.common.errors import ScriptError
from scripts.common.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 900, 360
WAITING, RUNNING, SHORT = "#d5dbe3", "#5b7fb4", "#c24a06"
LONG_REQUEST = 100  # number of steps
BAR_HEIGHT = 0.56
LABELLED_WAIT = 0.05  # fraction of the plotted time; a shorter wait has no room for its label
StepSeconds = Callable[[float], float]  # rows -> seconds of a step


@dataclass(frozen=True, slots=True)
class Request:
    """A request for one image."""

    name: str
    arrives: float  # seconds
    num_steps: int


@dataclass(frozen=True, slots=True)
class Span:
    """The time in which a request is computed, in seconds."""

    starts: float
    ends: float


EXAMPLE = (
    Request("A", 0.0, LONG_REQUEST),
    Request("B", 0.08, 10),
    Request("C", 0.12, LONG_REQUEST),
    Request("D", 0.32, 10),
)


def batched_by_step(requests: Sequence[Request], step_seconds: StepSeconds) -> list[Span]:
    """Returns the span of each request if every request that has arrived takes part in each step.

    `requests` are in order of arrival.
    """
    left = [request.num_steps for request in requests]
    starts, ends = [0.0] * len(left), [0.0] * len(left)
    now = 0.0
    while any(left):
        rows = [i for i, request in enumerate(requests) if left[i] and request.arrives <= now]
        if not rows:
            now = min(request.arrives for i, request in enumerate(requests) if left[i])
            continue
        for i in rows:
            if left[i] == requests[i].num_steps:
                starts[i] = now
            left[i] -= 1
        now += step_seconds(len(rows))
        for i in rows:
            ends[i] = now
    return [Span(*span) for span in zip(starts, ends, strict=True)]


def batched_by_request(requests: Sequence[Request], step_seconds: StepSeconds) -> list[Span]:
    """Returns the span of each request if all waiting requests form a batch when the previous batch has ended.

    All requests of a batch are answered when its longest request is done. `requests` are in order of arrival.
    """
    waiting, spans, now = list(requests), list[Span](), 0.0
    while waiting:
        now = max(now, waiting[0].arrives)
        batch = [request for request in waiting if request.arrives <= now]
        waiting = waiting[len(batch) :]
        ends = now
        for step in range(max(request.num_steps for request in batch)):
            ends += step_seconds(sum(request.num_steps > step for request in batch))
        spans += [Span(now, ends)] * len(batch)
        now = ends
    return spans


def show_timeline(step_seconds: StepSeconds, requests: Sequence[Request] = EXAMPLE) -> "Figure":
    """Returns a figure with one panel for each kind of batching and one bar for each request."""
    figure = new_figure(WIDTH, HEIGHT)
    panels = figure.subplots(2, 1, sharex=True)
    titles = (
        "Batching per step (unfog): a request joins the running batch at its next step",
        "Batching per request: a request waits for the batch before it and for the longest request of its batch",
    )
    for axes, title, simulate in zip(panels, titles, (batched_by_step, batched_by_request), strict=True):
        _draw(axes, requests, simulate(requests, step_seconds))
        axes.set_title(title, loc="left", fontsize=10)
    panels[1].set_xlabel("seconds", fontsize=9)
    panels[1].set_xlim(left=0)
    panels[1].margins(x=0.12)
    figure.tight_layout(h_pad=1.2)
    return figure


def plot_timeline(file: Path, out: Path) -> None:
    """Writes the figure, with the median step times in a result of `scripts.bench open`.

    Raises ScriptError for another file.
    """
    try:
        rows = json.loads(file.read_text("utf-8"))["rows"]
        looks = [look["seconds_by_rows"] for row in rows for look in row["adjacent"] if "seconds_by_rows" in look]
        measured = {int(count): statistics.median(look[count] for look in looks) for count in looks[0]}
    except (OSError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ScriptError(f"{file} has no step times. Use a result of scripts.bench open") from error
    save_figure(show_timeline(Curve(measured).seconds), out, grey=False)


def _draw(axes: "Axes", requests: Sequence[Request], spans: Sequence[Span]) -> None:
    for place, (request, span) in enumerate(zip(requests, spans, strict=True)):
        colour = RUNNING if request.num_steps >= LONG_REQUEST else SHORT
        axes.barh(place, span.starts - request.arrives, BAR_HEIGHT, left=request.arrives, color=WAITING)
        axes.barh(place, span.ends - span.starts, BAR_HEIGHT, left=span.starts, color=colour)
        if span.starts - request.arrives > LABELLED_WAIT * spans[-1].ends:
            axes.text((request.arrives + span.starts) / 2, place, "waits", ha="center", va="center", fontsize=9)
        label = f"{1000 * (span.ends - request.arrives):.0f} ms"
        axes.annotate(label, (span.ends, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    names = [f"{request.name}: {request.num_steps} steps" for request in requests]
    axes.set_yticks(range(len(requests)), names, fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(length=0, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
