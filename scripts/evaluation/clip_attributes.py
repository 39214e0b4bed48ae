"""Evaluates CLIP guidance with prompts about attributes: thick or thin digits, and slanted or upright digits.

The images of two opposite prompts have the same noise, so that they form pairs.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from model.files import write_atomically, write_json
from model.pixels import to_pixels
from model.prompts import DIGIT_WORDS
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.figures import Panel, draw_panels, save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.captions import boldness, lean
from scripts.evaluation.classifiers import Trained, load_classifier, recognise
from scripts.evaluation.samples import check_digits
from scripts.evaluation.tables import as_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE = 10.0  # of CLIP guidance. A higher scale changes the attributes more
SEED = 3
NUM_SHOWN = 2  # images of each digit and prompt in the picture


@dataclass(frozen=True, slots=True)
class Attribute:
    """Two opposite prompts and the property that they change. In a prompt, {} is replaced by the word of the digit."""

    name: str
    more: str  # prompt for images with a high value
    less: str  # prompt for images with a low value
    measure: Callable[[Tensor], Tensor]  # pixels in [0, 1] (B, 1, 28, 28) -> values (B,)


@dataclass(frozen=True, slots=True)
class Comparison:
    """An attribute of the images of one digit for two opposite prompts. Images with equal noise are a pair."""

    attribute: str
    digit: int
    more: float  # mean value of the images for the prompt `more`
    less: float
    larger: int  # pairs in which the image for the prompt `more` has the larger value
    pairs: int
    p: float  # of `sign_test`


def _slant(x: Tensor) -> Tensor:
    return lean(x).abs()


ATTRIBUTES = (
    Attribute("stroke width", "a thick {}", "a thin {}", boldness),
    Attribute("slant", "a slanted {}", "an upright {}", _slant),
)
PROMPTS = tuple(prompt for attribute in ATTRIBUTES for prompt in (attribute.more, attribute.less))
COLUMNS = ("digit", *(head for a in ATTRIBUTES for head in (a.more.format("…"), a.less.format("…"), "larger", "p")))


def evaluate_clip_attributes(request: DrawingRequest, out: Path, reporter: Reporter, *, num_images: int) -> None:
    """Generates `num_images` of each digit for each of PROMPTS and compares them. Writes a picture, a table and JSON.

    Raises CheckpointError or ScriptError.
    """
    drawer, judge = open_drawer(request), load_classifier("judge")
    check_digits(drawer)
    options = options_from(request, drawer.checkpoint)
    drawer.compile(request.compile, reporter)
    images = {prompt: _draw(drawer, options, prompt, num_images, reporter, request) for prompt in PROMPTS}
    comparisons = [
        compare_pairs(attribute, digit, images[attribute.more][digit], images[attribute.less][digit])
        for attribute in ATTRIBUTES
        for digit in range(NUM_CLASSES)
    ]
    recognised = {prompt: _recognised(judge, of_prompt) for prompt, of_prompt in images.items()}
    table = as_markdown(comparisons, recognised)
    reporter.line(table)
    write_atomically(out.with_suffix(".md"), table.encode())
    without = _draw(drawer, options, None, min(NUM_SHOWN, num_images), reporter, request)
    save_figure(show_attributes({"no CLIP guidance": without, **images}), out, grey=True)
    content = {
        **drawer.facts,
        "options": options.facts,
        "seed": request.seed,
        "num_images": num_images,
        "judge": {"sha256": judge.sha256, "test_accuracy": judge.accuracy},
        "recognised": recognised,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    write_json(out.with_suffix(".json"), content)


def _draw(
    drawer: Drawer,
    options: DrawingOptions,
    prompt: str | None,
    num_images: int,
    reporter: Reporter,
    request: DrawingRequest,
) -> Tensor:
    """Returns pixels (10, num_images, 1, 28, 28) uint8 for a prompt. {} is replaced by the word of the digit.

    Without a prompt, there is no CLIP guidance.
    """
    drawn = []
    for digit, word in enumerate(DIGIT_WORDS):
        clip = replace(options.clip, prompt=prompt.format(word)) if prompt and options.clip else None
        y, index, own = torch.full((num_images,), digit), torch.arange(num_images), replace(options, clip=clip)
        x_0 = drawer.draw(y, index, own, reporter, seed=request.seed, batch_size=request.batch_size)
        drawn.append(to_pixels(x_0))
    return torch.stack(drawn)


def compare_pairs(attribute: Attribute, digit: int, more: Tensor, less: Tensor) -> Comparison:
    """Compares images for the prompts `more` and `less`, uint8 (N, 1, 28, 28) each. Images with equal index are a
    pair."""
    high, low = attribute.measure(more / 255).double(), attribute.measure(less / 255).double()  # (N,) each
    larger = int((high > low).sum())
    means = high.mean().item(), low.mean().item()
    return Comparison(attribute.name, digit, *means, larger, len(high), sign_test(larger, int((high < low).sum())))


def sign_test(positive: int, negative: int) -> float:
    """Returns the p-value of the exact one-sided sign test: the probability of at least `positive` positive differences
    if both signs are equally likely. Pairs with equal values are left out."""
    count = positive + negative
    return sum(math.comb(count, k) for k in range(positive, count + 1)) / 2**count


def as_markdown(comparisons: list[Comparison], recognised: dict[str, float]) -> str:
    """Returns a Markdown table with a row for each digit, and the share that the judge recognises for each prompt."""
    rows = []
    for digit in range(NUM_CLASSES):
        own = [comparison for comparison in comparisons if comparison.digit == digit]
        cells = [[f"{c.more:.3f}", f"{c.less:.3f}", f"{c.larger} of {c.pairs}", f"{c.p:.0e}"] for c in own]
        rows.append([str(digit), *(cell for of_attribute in cells for cell in of_attribute)])
    shares = ", ".join(f"{prompt.format('…')} {share:.1%}" for prompt, share in recognised.items())
    return f"{as_table(COLUMNS, rows)}\nRecognised by the judge: {shares}.\n"


def _recognised(judge: Trained, images: Tensor) -> float:
    """Returns the share of images (10, N, 1, 28, 28) that the judge recognises as their digit."""
    labels = torch.arange(NUM_CLASSES).repeat_interleave(images.shape[1])  # (10 N,)
    return (recognise(judge.network, images.flatten(0, 1)) == labels).double().mean().item()


def show_attributes(images: dict[str, Tensor]) -> "Figure":
    """Shows the first NUM_SHOWN images (10, N, 1, 28, 28) of each digit, a row for each prompt."""
    shown = [of_prompt[:, :NUM_SHOWN] for of_prompt in images.values()]
    pixels = rearrange(torch.stack(shown), "row digit n c h w -> (row h) (digit n w) c")
    columns = [str(digit) for digit in range(NUM_CLASSES) for _ in range(shown[0].shape[1])]
    return draw_panels([Panel(pixels, columns, [prompt.format("…") for prompt in images])], scale=2)
