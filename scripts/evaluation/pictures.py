"""Plots of an evaluation: the confusion matrix, and generated images with their nearest training images."""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from model.spec import DIGITS
from scripts.common.data.data_set import ImageSet
from scripts.common.figures import Panel, can_draw, draw_panels, new_figure, plain
from scripts.evaluation.distances import Nearest
from scripts.evaluation.recognition import Recognition

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_PAIRS = 12  # images shown with their nearest training images
CELL, MARGIN, LARGEST_SIDE = 32, 120, 1600  # pixels of a plot: a class, the names, and the largest plot
MOST_NUMBERED = 40  # classes whose counts are written into the plot
MOST_LETTERS = 12  # of a name


def show_confusion(judged: Recognition, class_names: tuple[str, ...] = DIGITS) -> "Figure":
    """Plots the confusion matrix. The colours show only mistakes, so that a few mistakes are visible.

    A class whose name has characters that the font does not have is shown as its number, such as `class 3`.
    """
    counts, num_classes = torch.tensor(judged.confusion), len(class_names)  # (K, K)
    mistakes = counts.clone().fill_diagonal_(0)
    side = min(max(440, CELL * num_classes + MARGIN), LARGEST_SIDE)
    figure = new_figure(side + 20, side)
    axes = figure.add_subplot()
    axes.imshow(mistakes.numpy(), cmap="Oranges", vmin=0, vmax=max(int(mistakes.max()), 1) * 1.5)
    for asked, seen in counts.nonzero().tolist() if num_classes <= MOST_NUMBERED else ():
        weight = "bold" if asked == seen else "normal"
        axes.text(seen, asked, f"{counts[asked, seen]}", ha="center", va="center", fontsize=7, fontweight=weight)
    labels = range(0, num_classes, -(-num_classes // MOST_NUMBERED))
    shown = [
        plain(name[:MOST_LETTERS]) if can_draw(name[:MOST_LETTERS]) else f"class {label}"
        for label, name in ((label, class_names[label]) for label in labels)
    ]
    axes.set_xticks(labels, shown, rotation=90 if max(map(len, shown)) > 2 else 0)
    axes.set_yticks(labels, shown)
    axes.set_xlabel("recognised by the judge")
    axes.set_ylabel("requested class")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    figure.tight_layout()
    return figure


def show_nearest(drawn: ImageSet, nearest: Nearest, learned: Tensor) -> "Figure":
    """Shows the images with the smallest `Nearest.ratio`, above their two nearest training images."""
    closest = nearest.ratio.argsort()[:NUM_PAIRS]  # (P,)
    rows = torch.stack([drawn.images[closest], *(learned[nearest.indices[closest, k]] for k in (0, 1))])  # (3, P, ...)
    pixels = rearrange(rows, "row pair c h w -> (row h) (pair w) c")
    columns = [f"{ratio:.2f}" for ratio in nearest.ratio[closest].tolist()]
    return draw_panels([Panel(pixels, columns, ["generated", "nearest", "second"])], scale=2)
