"""Evaluates recognition with handwriting that is not from MNIST: the fixed pictures of `handwriting`."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.digit_image import normalise
from model.files import write_json
from model.recognition import Readout, Recognition
from scripts.common.drawing import DrawingRequest, open_digit_drawer
from scripts.common.figures import Panel, draw_panels, save_figure
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import load_classifier
from scripts.evaluation.classifiers import recognise as recognise_by_classifier
from scripts.evaluation.handwriting import TILE, Part, Picture, load_handwriting, load_letters, tile
from scripts.evaluation.recognize import recognise_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 100  # pictures that are recognised together
PER_ROW = 10  # wrong pictures in a row of the plot
MOST_SHOWN = 40  # wrong pictures in the plot


@dataclass(frozen=True, slots=True)
class Recognised:
    """The results for N pictures of digits."""

    pictures: Sequence[Picture[int]]
    images: Tensor  # uint8 (N, 1, 28, 28)
    answers: Sequence[Recognition]

    @property
    def is_right(self) -> list[bool]:
        """True for each picture whose digit was recognised."""
        return [answer.label == picture.label for answer, picture in zip(self.answers, self.pictures, strict=True)]

    def shares(self, group: Callable[[Picture[int]], str]) -> dict[str, float]:
        """Returns the share of recognised digits in each group of pictures."""
        groups: dict[str, list[bool]] = {}
        for picture, is_right in zip(self.pictures, self.is_right, strict=True):
            groups.setdefault(group(picture), []).append(is_right)
        return {name: sum(each) / len(each) for name, each in groups.items()}


def evaluate_handwriting(
    drawing: DrawingRequest, out: Path, reporter: Reporter, *, num_pairs: int, split: Part
) -> None:
    """Recognises the pictures of a part. Prints figures, writes JSON, and plots up to MOST_SHOWN wrong pictures.

    The JSON also has the share of letters that are accepted as digits. Raises CheckpointError or ScriptError.
    """
    drawer = open_digit_drawer(drawing, reporter)
    readout = Readout.of(drawer.checkpoint.weights_sha256, len(drawer.class_names))

    def answers_for(pictures: Sequence[Picture[Any]], name: str) -> tuple[Tensor, list[Recognition]]:
        images = torch.stack([normalise(_grey(picture.data)).pixels for picture in pictures])  # (N, 1, 28, 28)
        answers: list[Recognition] = []
        with reporter.task(f"recognising {name}", len(images), "pictures") as task:
            for part in images.split(CHUNK):
                answers += recognise_digits(drawer, part, readout, num_pairs)
                task.advance(len(part))
        return images, answers

    pictures = load_handwriting(split)
    digits = Recognised(pictures, *answers_for(pictures, "digits"))
    _, letters = answers_for(load_letters(split), "letters")
    judge = load_classifier("judge")
    labels = torch.tensor([picture.label for picture in pictures])  # (N,)
    by_judge = (recognise_by_classifier(judge.network, digits.images) == labels).double().mean().item()
    recognised = sum(digits.is_right) / len(pictures)
    of_font = digits.shares(lambda picture: picture.font)
    of_variant = digits.shares(lambda picture: picture.variant)
    content = {
        "split": split,
        "num_digits": len(pictures),
        "num_letters": len(letters),
        "num_pairs": num_pairs,
        **drawer.facts,
        "recognised": recognised,
        "of_font": of_font,
        "of_variant": of_variant,
        "of_digit": digits.shares(lambda picture: str(picture.label)),
        "digits_taken_for_no_digit": sum(not answer.is_digit for answer in digits.answers) / len(pictures),
        "letters_taken_for_a_digit": sum(answer.is_digit for answer in letters) / len(letters),
        "evaluations_an_image": sum(answer.evaluations for answer in digits.answers) / len(pictures),
        "judge": {"sha256": judge.sha256, "recognised": by_judge},
    }
    for name, share in (of_font | of_variant).items():
        reporter.line(f"{name}: {share:.1%}")
    reporter.line(f"recognised: {recognised:.1%} of {len(pictures)}; by the judge: {by_judge:.1%}")
    write_json(out.with_suffix(".json"), content)
    save_figure(show_wrong(digits), out, grey=False, colours=256)


def _grey(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("L"))


def show_wrong(digits: Recognised) -> "Figure":
    """Shows up to MOST_SHOWN pictures with a wrong answer, each above its image of 28x28 pixels."""
    wrong = [i for i, is_right in enumerate(digits.is_right) if not is_right][:MOST_SHOWN]
    empty = torch.full((TILE, TILE, 3), 255, dtype=torch.uint8)
    rows, labels = list[Tensor](), list[str]()
    for start in range(0, max(len(wrong), 1), PER_ROW):
        chosen = wrong[start : start + PER_ROW]
        above = [torch.from_numpy(tile(digits.pictures[i].data).copy()) for i in chosen]
        below = [
            digits.images[i, 0, :, :, None].expand(-1, -1, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
            for i in chosen
        ]
        for tiles in (above, below):
            rows.append(torch.cat(tiles + [empty] * (PER_ROW - len(tiles)), dim=1))
        read = " ".join(f"{digits.pictures[i].label}:{digits.answers[i].label}" for i in chosen)
        labels += [read, ""]
    return draw_panels([Panel(torch.cat(rows), [], labels)], scale=1)
