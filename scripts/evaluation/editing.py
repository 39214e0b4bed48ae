"""Evaluates redrawn sketches: recognition, and distance from the sketch, for several strengths."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from model.digit_image import normalise
from model.editing import start_timestep
from model.files import write_json
from model.paths import timesteps_from
from model.pixels import from_pixels, to_pixels
from model.process import Start
from model.process import recognise as recognise_by_diffusion
from model.recognition import Readout
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.figures import Panel, draw_panels, save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import Trained, features_of, load_classifier, recognise
from scripts.evaluation.samples import load_references
from scripts.evaluation.sketches import draw_sketches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
NUM_SHOWN = 2  # sketches of each digit in the plot


@dataclass(frozen=True, slots=True)
class Redrawn:
    """The figures of one strength, with or without the class."""

    strength: float
    class_given: bool
    t: int  # timestep at which the reverse process starts
    recognised: float  # share recognised by the judge as the digit of the sketch
    distance: float  # mean L2 distance from the sketch, for pixels in 0..1
    distance_from_real: float  # mean distance to the nearest real digit, in the features of the extractor

    def line(self) -> str:
        """Returns the figures as one line of text."""
        given = "class given" if self.class_given else "class guessed"
        return (
            f"strength {self.strength:g} (t = {self.t}), {given}: recognised {self.recognised:.1%}, "
            f"L2 distance from the sketch {self.distance:.2f}, from real digits {self.distance_from_real:.2f}"
        )


def evaluate_editing(
    request: DrawingRequest,
    judge: Path | None,
    out: Path,
    reporter: Reporter,
    *,
    num_images: int,
    split: str,
    data_dir: Path,
) -> None:
    """Redraws `num_images` sketches with each of STRENGTHS. Prints figures, writes a plot and JSON.

    The class is given, or guessed from the sketch. Strength 1 does not use the sketch, so it gives the distance of new
    images of the same class. Raises CheckpointError or ScriptError.
    """
    drawer, trained, extractor = open_drawer(request), load_classifier("judge", judge), load_classifier("extractor")
    options = options_from(request, drawer.checkpoint)
    real = features_of(extractor.network, load_references(split, data_dir).held_out.images)  # (M, 128)
    pictures, digits = draw_sketches(num_images // NUM_CLASSES)
    sketches = ImageSet(torch.stack([normalise(picture).pixels for picture in pictures]), digits)
    drawer.compile(request.compile, reporter)
    rows, shown = list[Redrawn](), {"sketch": sketches.images}
    results = recognise_by_diffusion(
        drawer.step,
        drawer.checkpoint.schedule,
        from_pixels(sketches.images).to(drawer.device),
        Readout.of(drawer.checkpoint.weights_sha256, len(drawer.class_names)),
    )
    guessed = torch.tensor([result.label for result in results])  # (N,)
    for class_given in (True, False):
        labels = digits if class_given else guessed
        for strength in STRENGTHS:
            t = start_timestep(drawer.checkpoint.schedule, strength)
            images = redraw(drawer, options, ImageSet(sketches.images, labels), t, reporter, request)
            figures = _figures(images, sketches, trained, extractor, real)
            rows.append(Redrawn(strength, class_given, t, *figures))
            reporter.line(rows[-1].line())
            if class_given:
                shown[f"{strength:g}"] = images
    save_figure(show_redrawn(shown, num_images // NUM_CLASSES), out, grey=True)
    recognised, _, of_real = _figures(sketches.images, sketches, trained, extractor, real)
    content = {
        **drawer.facts,
        "options": options.facts,
        "seed": request.seed,
        "num_images": num_images,
        "split": split,
        "judge": {"sha256": trained.sha256, "test_accuracy": trained.accuracy},
        "extractor": {"sha256": extractor.sha256},
        "sketches": {"recognised": recognised, "distance_from_real": of_real},
        "class_guessed": (guessed == digits).double().mean().item(),
        "strengths": [asdict(row) for row in rows],
    }
    write_json(out.with_suffix(".json"), content)


def redraw(
    drawer: Drawer, options: DrawingOptions, sketches: ImageSet, t: int, reporter: Reporter, request: DrawingRequest
) -> Tensor:
    """Returns the sketches after noise up to timestep `t` and the reverse process, uint8 (N, 1, 28, 28).

    The labels of the sketches are the classes of the result. There are options.num_steps steps from T to 0, of which a
    sketch takes the part that begins at `t`.
    """
    start = Start.at(drawer.checkpoint.schedule, t, from_pixels(sketches.images))
    if t == drawer.checkpoint.schedule.num_steps:  # strength 1 ignores the sketch
        start = Start(start.image, torch.zeros_like(start.signal), torch.ones_like(start.noise))
    path = timesteps_from(drawer.checkpoint.schedule, options.sampler, options.num_steps, t)
    given = sketches.labels, torch.arange(len(sketches.labels)), options, reporter
    redrawn = drawer.draw(*given, seed=request.seed, batch_size=request.batch_size, timesteps=path, start=start)
    return to_pixels(redrawn)


def _figures(
    images: Tensor, sketches: ImageSet, judge: Trained, extractor: Trained, real: Tensor
) -> tuple[float, float, float]:
    """Returns the share that is recognised, the mean L2 distance from the sketches and from the nearest real digits."""
    recognised = (recognise(judge.network, images) == sketches.labels).double().mean().item()
    distance = ((images.double() - sketches.images.double()) / 255).flatten(1).norm(dim=1).mean().item()
    nearest = torch.cdist(features_of(extractor.network, images), real).amin(dim=1)  # (N,)
    return recognised, distance, nearest.mean().item()


def show_redrawn(rows: dict[str, Tensor], per_digit: int) -> "Figure":
    """Shows the first NUM_SHOWN sketches of each digit above their redrawn versions, a row for each strength."""
    chosen = [digit * per_digit + i for digit in range(NUM_CLASSES) for i in range(min(NUM_SHOWN, per_digit))]
    pixels = rearrange(torch.stack([images[chosen] for images in rows.values()]), "row n c h w -> (row h) (n w) c")
    columns = [str(i // per_digit) for i in chosen]
    labels = ["sketch", *(f"strength {strength}" for strength in list(rows)[1:])]
    return draw_panels([Panel(pixels, columns, labels)], scale=2)
