"""Figures with labelled image grids. Each image pixel covers a whole number of figure pixels, so images stay sharp."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from model.files import write_atomically
from scripts.common.progress import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
TOP, BOTTOM, RIGHT, GAP = 22, 4, 6, 14  # margins in pixels
TITLE_HEIGHT = 20
LABEL_SIZE = 8  # font size in points
LABEL_HEIGHT, LABEL_WIDTH = 12, 80  # minimum distance of two labels, in pixels
PIXELS_PER_LETTER = 7
RESOLUTION = 2  # number of file pixels per figure pixel; files have 200 dpi


@dataclass(frozen=True, slots=True)
class Panel:
    """A grid of images with labels above the columns. The first panel of a figure can also have row labels."""

    pixels: Tensor  # (H, W, C) uint8, C = 1 or 3
    columns: Sequence[str]
    rows: Sequence[str] = ()
    title: str = ""


def plain(text: str) -> str:
    """Returns the text so that matplotlib draws a dollar sign instead of a formula."""
    return text.replace("$", r"\$")


def can_draw(text: str) -> bool:
    """Returns True if matplotlib's default font, which comes with matplotlib, has all characters of the text."""
    manager, font = require("matplotlib.font_manager"), require("matplotlib.ft2font")
    known = font.FT2Font(manager.findfont(manager.FontProperties())).get_charmap()
    return all(ord(character) in known for character in text)


def new_figure(width: int, height: int) -> "Figure":
    """Returns an empty white figure. The size is in pixels."""
    figure: Figure = require("matplotlib.figure").Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    return figure


def finish_curves(figure: "Figure") -> "Figure":
    """Adds grid lines and line labels to all axes of a figure with curves. Returns the figure."""
    for axes in figure.axes:
        axes.grid(which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    for axes in figure.axes:
        label_lines(axes)
    figure.tight_layout()
    return figure


def label_lines(axes: "Axes") -> None:
    """Writes the label of each line next to its last point, in the colour of the line. Labels do not overlap."""
    lines = [
        line for line in axes.get_lines() if np.size(line.get_xydata()) and not str(line.get_label()).startswith("_")
    ]
    # (x, y, line) with the position of the last point, in pixels
    ends = [(*axes.transData.transform(np.asarray(line.get_xydata())[-1]), line) for line in lines]
    placed = list[tuple[float, float]]()
    for x, y, line in sorted(ends, key=lambda end: end[1]):
        below = [other for at, other in placed if abs(at - x) < LABEL_WIDTH]
        placed.append((x, max(y, below[-1] + LABEL_HEIGHT) if below else y))
        offset = (5, (placed[-1][1] - y) * 72 / DPI)  # offset in points
        at_x, at_y = axes.transData.inverted().transform((x, y))
        axes.annotate(
            str(line.get_label()),
            (at_x, at_y),
            offset,
            textcoords="offset points",
            va="center",
            fontsize=LABEL_SIZE,
            color=line.get_color(),
        )


def draw_panels(panels: Sequence[Panel], *, scale: int) -> "Figure":
    """Returns a figure with the panels in one row. `scale` is the integer factor by which images are enlarged."""
    left = 6 + PIXELS_PER_LETTER * max((len(label) for label in panels[0].rows), default=0)
    top = TOP + TITLE_HEIGHT * any(panel.title for panel in panels)
    widths = [panel.pixels.shape[1] * scale for panel in panels]
    image_height = panels[0].pixels.shape[0] * scale
    width = left + sum(widths) + GAP * (len(panels) - 1) + RIGHT
    height = top + image_height + BOTTOM
    figure = new_figure(width, height)
    x = left
    for panel, panel_width in zip(panels, widths, strict=True):
        box = (x / width, BOTTOM / height, panel_width / width, image_height / height)
        _draw_panel(figure, panel, box)
        x += panel_width + GAP
    return figure


def _draw_panel(figure: "Figure", panel: Panel, box: tuple[float, float, float, float]) -> None:
    axes = figure.add_axes(box)
    height, width, _ = panel.pixels.shape
    colours = panel.pixels.expand(height, width, 3).numpy()  # RGB values, because a colour map would round them
    axes.imshow(colours, interpolation="nearest", aspect="auto")
    axes.xaxis.tick_top()
    axes.set_xticks(_centres(width, len(panel.columns)), panel.columns, fontsize=LABEL_SIZE)
    axes.set_yticks(_centres(height, len(panel.rows)), panel.rows, fontsize=LABEL_SIZE)
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_visible(False)
    if panel.title:
        axes.set_title(panel.title, fontsize=LABEL_SIZE + 2, pad=6)


def _centres(length: int, count: int) -> list[float]:
    return [length * (i + 0.5) / count - 0.5 for i in range(count)]


def save_figure(figure: "Figure", path: Path, *, grey: bool, colours: int = 64) -> None:
    """Writes a small PNG: 8-bit greyscale if `grey`, else a palette of at most `colours` colours (up to 256)."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=RESOLUTION * DPI)
    image = Image.open(buffer).convert("RGB")
    image = image.convert("L") if grey else image.quantize(colours)
    image.save(small, format="PNG", optimize=True)
    write_atomically(path, small.getvalue())
