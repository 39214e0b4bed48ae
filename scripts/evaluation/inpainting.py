"""Evaluates how well missing parts of real digits are filled in."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from model.files import write_json
from model.inpainting import ClassDistances, inpainting_path, recognition_path
from model.pixels import from_pixels, to_pixels
from model.process import Start, compare
from model.sampler import plan_through
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.figures import Panel, draw_panels, save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import Classifier, load_classifier, recognise
from scripts.evaluation.samples import balanced, load_references

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SHOWN = 10  # images in the plot, one of each digit
MISSING_COLOUR = (250, 180, 90)
MASK_SEED = 0  # of the mask of random pixels


def _right(num_images: int) -> Tensor:
    return (torch.arange(28) < 14).expand(num_images, 1, 28, 28)


def _lower(num_images: int) -> Tensor:
    return (torch.arange(28) < 14)[:, None].expand(num_images, 1, 28, 28)


def _centre(num_images: int) -> Tensor:
    is_known = torch.ones(num_images, 1, 28, 28, dtype=torch.bool)
    is_known[:, :, 7:21, 7:21] = False
    return is_known


def _random(num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(MASK_SEED)
    return torch.rand(num_images, 1, 28, 28, generator=generator) >= 0.75


# Each function returns the known pixels of a number of images: (N,) -> bool (N, 1, 28, 28).
MASKS: dict[str, Callable[[int], Tensor]] = {
    "right half": _right,
    "lower half": _lower,
    "centre 14 x 14": _centre,
    "random 75%": _random,
}


@dataclass(frozen=True, slots=True)
class Filled:
    """The figures of one mask, with or without the class."""

    mask: str
    calls: float  # mean number of network calls for one image, including those to guess the class
    class_given: bool
    guessed: float | None  # share whose class was guessed correctly from the known pixels; None if it was given
    recognised: float  # share recognised by the judge as the true digit
    changed: int  # number of known pixels that differ from the input
    border_step: float  # mean absolute difference in grey levels between neighbours on both sides of the border
    border_step_of_real: float  # the same for the real digits

    @property
    def border_ratio(self) -> float:
        """The step at the border, divided by that of real digits at the same place."""
        return self.border_step / self.border_step_of_real

    def line(self) -> str:
        """Returns the figures as one line of text."""
        guessed = "class given" if self.guessed is None else f"class guessed {self.guessed:.1%}"
        return (
            f"{self.mask}, {guessed}: recognised {self.recognised:.1%}, changed {self.changed} known pixels, "
            f"step at the border {self.border_step:.1f}, real digits {self.border_step_of_real:.1f} "
            f"(ratio {self.border_ratio:.3f}), {self.calls:.0f} network calls"
        )


class Filler:
    """Fills in images with a checkpoint, and guesses the class of an image from its known pixels."""

    def __init__(
        self,
        drawer: Drawer,
        options: DrawingOptions,
        reporter: Reporter,
        *,
        num_resamplings: int,
        request: DrawingRequest,
    ) -> None:
        schedule = drawer.checkpoint.schedule
        self._drawer, self._options, self._reporter, self._request = drawer, options, reporter, request
        self._path = inpainting_path(schedule, options.num_steps, num_resamplings)
        self._plan = plan_through(schedule, "ddpm", recognition_path(schedule))

    @property
    def calls(self) -> int:
        """The number of network calls to fill in one image of a known class."""
        timesteps = plan_through(self._drawer.checkpoint.schedule, "ddpm", self._path).timesteps[:-1]
        return len(timesteps) + sum(self._options.guidance.acts_at(t) for t in timesteps)

    def fill(self, images: Tensor, is_known: Tensor, labels: Tensor) -> Tensor:
        """Returns filled images, uint8 like `images` (N, 1, 28, 28). Known pixels are kept."""
        start = _start(images, is_known)
        request, index = self._request, torch.arange(len(labels))
        given = labels, index, self._options, self._reporter
        filled = self._drawer.draw(
            *given, seed=request.seed, batch_size=request.batch_size, timesteps=self._path, start=start
        )
        return to_pixels(filled)

    def guess(self, images: Tensor, is_known: Tensor) -> tuple[Tensor, float]:
        """Returns the class (N,) that fits the known pixels of each image best, and the mean number of calls."""
        plan, start = self._plan, _start(images, is_known)
        guessed, total, count = [], 0, len(images)
        batches = torch.arange(count, device=self._drawer.device).split(max(self._request.batch_size // NUM_CLASSES, 1))
        with self._reporter.task("recognising the known pixels", count, "images") as task:
            for rows in batches:
                seed = torch.full_like(rows, self._request.seed)
                results = [ClassDistances(NUM_CLASSES, plan.num_steps) for _ in rows]
                given = self._drawer.step, [plan] * len(rows), results
                compare(*given, seed=seed, index=rows, start=start.rows(rows))
                guessed.append(torch.tensor([result.label for result in results]))
                total += sum(result.evaluations for result in results)
                task.advance(len(rows))
        return torch.cat(guessed), total / count


def _start(images: Tensor, is_known: Tensor) -> Start:
    """Starts from noise, as the service does."""
    signal = torch.zeros(len(images))  # (N,)
    return Start(from_pixels(images), signal, 1 - signal, is_known)


def measure(
    mask: str,
    calls: float,
    guessed: Tensor | None,
    filled: Tensor,
    is_known: Tensor,
    digits: ImageSet,
    judge: Classifier,
) -> Filled:
    """Returns the figures of filled images. `guessed` has the classes that were guessed, or None if they were given."""
    return Filled(
        mask=mask,
        calls=calls,
        class_given=guessed is None,
        guessed=None if guessed is None else _share(guessed == digits.labels),
        recognised=_share(recognise(judge, filled) == digits.labels),
        changed=int((filled != digits.images)[is_known].sum()),
        border_step=border_step(filled, is_known),
        border_step_of_real=border_step(digits.images, is_known),
    )


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def border_step(images: Tensor, is_known: Tensor) -> float:
    """Returns the mean absolute difference between neighbouring pixels of which one is known and one is not.

    images are uint8 (N, 1, H, W) and is_known is bool of the same shape. The result is in grey levels.
    """
    steps = [images.double().diff(dim=dim).abs()[is_known.diff(dim=dim)] for dim in (2, 3)]
    return torch.cat(steps).mean().item()


def evaluate_inpainting(
    request: DrawingRequest,
    judge: Path | None,
    out: Path,
    reporter: Reporter,
    *,
    counts: tuple[int, int],
    split: str,
    data_dir: Path,
) -> None:
    """Fills in real digits with each mask, with and without the class. Prints figures, writes a plot and JSON.

    `counts` are the number of images and the number of times that each step is taken. Raises CheckpointError or
    ScriptError.
    """
    num_images, num_resamplings = counts
    drawer, trained = open_drawer(request), load_classifier("judge", judge)
    options = options_from(request, drawer.checkpoint)
    digits = balanced(load_references(split, data_dir).held_out, num_images)
    drawer.compile(request.compile, reporter)
    filler = Filler(drawer, options, reporter, num_resamplings=num_resamplings, request=request)
    rows = list[Filled]()
    shown = [Shown("real digits", digits.images[:NUM_SHOWN])]
    for mask, known_pixels in MASKS.items():
        is_known = known_pixels(num_images)
        shown.append(Shown(mask, digits.images[:NUM_SHOWN], is_known[:NUM_SHOWN]))
        guess, calls_to_guess = filler.guess(digits.images, is_known)
        for guessed in (None, guess):
            filled = filler.fill(digits.images, is_known, digits.labels if guessed is None else guessed)
            calls = filler.calls + (0 if guessed is None else calls_to_guess)
            rows.append(measure(mask, calls, guessed, filled, is_known, digits, trained.network))
            shown.append(Shown("class given" if guessed is None else "not given", filled[:NUM_SHOWN]))
            reporter.line(rows[-1].line())
    save_figure(show_filled(shown), out, grey=False)
    content = {
        **drawer.facts,
        "options": options.facts,
        "num_resamplings": num_resamplings,
        "seed": request.seed,
        "num_images": num_images,
        "split": split,
        "judge": {"sha256": trained.sha256, "test_accuracy": trained.accuracy},
        "recognised_real": _share(recognise(trained.network, digits.images) == digits.labels),
        "masks": [asdict(row) | {"border_ratio": row.border_ratio} for row in rows],
    }
    write_json(out.with_suffix(".json"), content)


class Shown(NamedTuple):
    """One row of images in the plot."""

    label: str
    images: Tensor  # uint8 (N, 1, 28, 28)
    is_known: Tensor | None = None  # the other pixels are shown in colour


def show_filled(rows: Sequence[Shown]) -> "Figure":
    """Shows rows of images. Missing pixels are orange."""
    pictures = []
    for row in rows:
        rgb = row.images.expand(-1, 3, -1, -1)  # (N, 3, 28, 28)
        if row.is_known is not None:
            rgb = rgb.where(row.is_known, torch.tensor(MISSING_COLOUR, dtype=torch.uint8)[:, None, None])
        pictures.append(rgb)
    pixels = rearrange(torch.stack(pictures), "row n c h w -> (row h) (n w) c")
    columns = [str(i % NUM_CLASSES) for i in range(len(rows[0].images))]
    return draw_panels([Panel(pixels, columns, [row.label for row in rows])], scale=2)
