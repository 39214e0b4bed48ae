"""Plots of an evaluation: the confusion matrix, and generated images with their nearest training images."""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from scripts.common.figures import Panel, draw_panels, new_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.evaluation.distances import Nearest
from scripts.evaluation.recognition import Recognition
from scripts.evaluation.samples import Digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_PAIRS = 12  # images shown with their nearest training images


def show_confusion(judged: Recognition) -> "Figure":
    """Plots the confusion matrix. The colours show only mistakes, so that a few mistakes are visible."""
    counts = torch.tensor(judged.confusion)  # (10, 10)
    mistakes = counts.clone().fill_diagonal_(0)
    figure = new_figure(460, 440)
    axes = figure.add_subplot()
    axes.imshow(mistakes.numpy(), cmap="Oranges", vmin=0, vmax=max(int(mistakes.max()), 1) * 1.5)
    for asked in range(NUM_CLASSES):
        for seen in range(NUM_CLASSES):
            count = int(counts[asked, seen])
            if count:
                weight = "bold" if asked == seen else "normal"
                axes.text(seen, asked, f"{count}", ha="center", va="center", fontsize=7, fontweight=weight)
    digits = range(NUM_CLASSES)
    axes.set_xticks(digits, [str(digit) for digit in digits])
    axes.set_yticks(digits, [str(digit) for digit in digits])
    axes.set_xlabel("recognised by the judge")
    axes.set_ylabel("requested digit")
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    figure.tight_layout()
    return figure


def show_nearest(digits: Digits, nearest: Nearest, learned: Tensor) -> "Figure":
    """Shows the images with the smallest `Nearest.ratio`, above their two nearest training images."""
    closest = nearest.ratio.argsort()[:NUM_PAIRS]  # (P,)
    rows = torch.stack([digits.images[closest], *(learned[nearest.indices[closest, k]] for k in (0, 1))])  # (3, P, ...)
    pixels = rearrange(rows, "row pair c h w -> (row h) (pair w) c")
    columns = [f"{ratio:.2f}" for ratio in nearest.ratio[closest].tolist()]
    return draw_panels([Panel(pixels, columns, ["generated", "nearest", "second"])], scale=2)
