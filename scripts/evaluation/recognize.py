"""Measures how well the diffusion model recognises real digits, and how well it rejects images that show no digit.

The errors of all classes and pairs are saved while they are computed, so that a stopped run continues. All figures
follow from these errors: an answer with fewer pairs uses the first ones.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model.files import write_atomically, write_json
from model.pixels import from_pixels
from model.process import recognise
from model.recognition import CYCLE, DEFAULT_NUM_PAIRS, Readout, Recognition, ink_of
from scripts.common.data.data_set import ImageSet
from scripts.common.drawing import Drawer, DrawingRequest, open_digit_drawer
from scripts.common.errors import ScriptError
from scripts.common.figures import finish_curves, new_figure, save_figure
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter, require
from scripts.evaluation.non_digits import non_digits
from scripts.evaluation.readout import fit_readout, fit_suspicion
from scripts.evaluation.samples import load_references

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK = 100  # the errors are saved after this number of images; each image has up to 1,000 evaluations
REPORTED = (1, 2, 3, 5, 10, 20, 30, 50, 100)  # numbers of pairs in the results
UNLIKELY = 4.0  # error of a class without evaluation, as a multiple of the largest error
NUM_PLOTTED = 100  # digits in the plot; each has 100 evaluations
NUM_BINS = 15  # of the expected calibration error (Guo 2017)


@dataclass(frozen=True, slots=True)
class RecognitionRequest:
    """The options of `scripts.evaluate recognize`. Their names are those of the arguments."""

    split: str
    data_dir: Path
    num_pairs: int
    prune: bool
    num_non_digits: int  # images of each kind; 0 means none
    fit: bool
    out: Path
    num_images: int | None = None  # the first images of the shuffled split; None means all

    @property
    def pairs_to_reject(self) -> int:
        """The number of pairs for images that show no digit. More pairs than the service's default take long."""
        return min(self.num_pairs, DEFAULT_NUM_PAIRS)


def evaluate_recognition(request: RecognitionRequest, drawing: DrawingRequest, reporter: Reporter) -> None:
    """Writes the results to request.out (JSON) and plots next to it. Raises CheckpointError or ScriptError.

    With `fit`, the constants are fitted to the digits first, and also written to `<out>.readout.json`.
    """
    digits = load_references(request.split, request.data_dir).held_out.rows(slice(request.num_images))
    drawer = open_digit_drawer(drawing, reporter)
    table = ErrorTable(request, drawer, digits)
    readout, started = Readout.of(drawer.checkpoint.weights_sha256, len(drawer.class_names)), time.monotonic()
    num_evaluations = table.fill(drawer, readout, reporter)
    minutes = (time.monotonic() - started) / 60
    if request.fit:
        readout = fit_readout(table.errors, digits.labels, readout, drawer.checkpoint.weights_sha256)
    others = _others(request, drawer, readout, digits, reporter)
    if request.fit and others:
        readout = _fit_to_others(readout, table, others)
        others = _others(request, drawer, readout, digits, reporter)
    rows = _rows(request, table, readout, digits.labels)
    for row in rows:
        reporter.line(summary(row))
    rejected = rejection(table.replay(readout, request.pairs_to_reject, prune=True), others)
    for name, value in rejected.items():
        reporter.line(f"{name}: {value}")
    content = {
        "split": request.split,
        "num_images": len(digits.labels),
        **drawer.facts,
        "threads": torch.get_num_threads(),
        "new_evaluations": num_evaluations,
        "minutes": round(minutes, 1),
        "rows": rows,
        "not_a_digit": rejected,
    }
    write_json(request.out.with_suffix(".json"), content)
    if request.fit:
        write_json(request.out.with_suffix(".readout.json"), asdict(readout))
    _plot(request.out, drawer, readout, digits, reporter)


def _rows(request: RecognitionRequest, table: "ErrorTable", readout: Readout, labels: Tensor) -> list[dict[str, Any]]:
    """Returns the figures for each number of pairs, with pruning, and also without if all classes were evaluated."""
    counts = sorted({n for n in REPORTED if n < request.num_pairs} | {request.num_pairs})
    kinds = (True,) if request.prune else (False, True)
    return [
        {"num_pairs": n, "pruned": prune, **figures_of(table.replay(readout, n, prune=prune), labels)}
        for n in counts
        for prune in kinds
    ]


def _others(
    request: RecognitionRequest, drawer: Drawer, readout: Readout, digits: ImageSet, reporter: Reporter
) -> dict[str, list[Recognition]]:
    """Returns the answers for images that show no digit, by kind."""
    if not request.num_non_digits:
        return {}
    answers = {}
    kinds = non_digits(digits, request.num_non_digits, seed=0)
    with reporter.task("recognising other images", len(kinds), "kinds") as task:
        for name, pictures in kinds.items():
            answers[name] = recognise_digits(drawer, pictures, readout, request.pairs_to_reject)
            task.advance(1)
    return answers


def _fit_to_others(readout: Readout, table: "ErrorTable", others: dict[str, list[Recognition]]) -> Readout:
    """Returns constants that separate the digits of the table from the other images."""
    if len(table.errors[0]) < len(CYCLE):
        raise ScriptError(f"--fit needs at least {len(CYCLE)} pairs for images that show no digit")
    of_digits = table.replay(readout, len(CYCLE), prune=True)
    of_others = [answer for kind in others.values() for answer in kind]
    kinds = torch.tensor([number for number, kind in enumerate(others.values()) for _ in kind])
    (errors, ink), (other_errors, other_ink) = (_of_best_class(answers) for answers in (of_digits, of_others))
    return fit_suspicion(readout, errors, ink, other_errors, other_ink, kinds)


def _of_best_class(answers: Sequence[Recognition]) -> tuple[Tensor, Tensor]:
    """Returns the errors (N, len(CYCLE)) of the most probable class in the first pairs, and the ink (N,)."""
    errors = [[of_classes[answer.label] for of_classes in answer.errors[: len(CYCLE)]] for answer in answers]
    return torch.tensor(errors), torch.tensor([answer.ink for answer in answers])


def rejection(digits: Sequence[Recognition], others: dict[str, list[Recognition]]) -> dict[str, Any]:
    """Returns the share of rejected digits. For each kind of other images, returns the share that was not rejected.

    Also returns the area under the ROC curve of each kind. It is the probability that an image of this kind has a
    higher suspicion than a digit.
    """
    of_digits = torch.tensor([answer.suspicion for answer in digits]).sort().values  # (N,)
    found: dict[str, Any] = {"false alarms": sum(not answer.is_digit for answer in digits) / len(digits)}
    for name, answers in others.items():
        suspicion = torch.tensor([answer.suspicion for answer in answers])  # (M,)
        below = torch.searchsorted(of_digits, suspicion).double().mean().item()
        missed = sum(answer.is_digit for answer in answers) / len(answers)
        found[name] = {"missed": round(missed, 4), "area": round(below / len(of_digits), 4), "count": len(answers)}
    return found


def _plot(out: Path, drawer: Drawer, readout: Readout, digits: ImageSet, reporter: Reporter) -> None:
    """Evaluates a few digits without pruning, and plots their distances."""
    shown = digits.rows(slice(NUM_PLOTTED))
    reporter.line(f"Evaluating all classes of {len(shown.labels)} digits for the plots")
    answers = recognise_digits(drawer, shown.images, readout, len(CYCLE), prune=False)
    errors = errors_of_answers(answers, len(CYCLE))  # (N, len(CYCLE), C)
    save_figure(show_leads(leads_at(errors, shown.labels)), out, grey=False)
    hardest = min(range(len(answers)), key=lambda i: max(answers[i].probabilities))
    save_figure(show_errors(errors[hardest]), out.with_name(f"{out.stem}-digit.png"), grey=False)


def recognise_digits(
    drawer: Drawer, images: Tensor, readout: Readout, num_pairs: int, *, prune: bool = True
) -> list[Recognition]:
    """Recognises images (N, 1, 28, 28) uint8."""
    x_0 = from_pixels(images).to(drawer.device)  # (N, 1, 28, 28)
    return recognise(drawer.step, drawer.checkpoint.schedule, x_0, readout, num_pairs, prune=prune)


class ErrorTable:
    """The errors (N, K, C) of N images, K pairs and C classes, in a file next to the results.

    NaN means that the class was not evaluated.
    """

    def __init__(self, request: RecognitionRequest, drawer: Drawer, digits: ImageSet) -> None:
        self._path = request.out.with_suffix(".errors.safetensors")
        self._num_pairs, self._prune, self._digits = request.num_pairs, request.prune, digits
        self._ink = ink_of(from_pixels(digits.images))
        self._facts = {
            "weights_sha256": drawer.checkpoint.weights_sha256,
            "dtype": str(drawer.dtype),
            "compiled": str(drawer.compiled),
            "split": request.split,
            "num_pairs": str(request.num_pairs),
            "prune": str(request.prune),
        }
        self.errors = self._read()
        if len(self.errors) > len(digits.labels):
            raise ScriptError(f"{self._path} has {len(self.errors)} images. Delete it, or increase --num-images")

    def fill(self, drawer: Drawer, readout: Readout, reporter: Reporter) -> int:
        """Computes the errors of the images that are not in the file. Returns the number of evaluations."""
        digits = self._digits
        missing = range(len(self.errors), len(digits.labels), CHUNK)
        evaluations = 0
        with reporter.task("recognising digits", len(digits.labels) - len(self.errors), "images") as task:
            for start in missing:
                images = digits.images[start : start + CHUNK]  # (n, 1, 28, 28)
                answers = recognise_digits(drawer, images, readout, self._num_pairs, prune=self._prune)
                self.errors = torch.cat([self.errors, errors_of_answers(answers, self._num_pairs)])
                evaluations += sum(answer.evaluations for answer in answers)
                write_atomically(self._path, save({"errors": self.errors}, metadata=self._facts))
                task.advance(len(images))
        return evaluations

    def replay(self, readout: Readout, num_pairs: int, *, prune: bool) -> list[Recognition]:
        """Returns the answers that follow from the first pairs, with other constants or without pruning."""
        given = zip(self.errors, self._ink, strict=True)
        return [replayed(errors, ink, readout, num_pairs, prune=prune) for errors, ink in given]

    def _read(self) -> Tensor:
        if not self._path.exists():
            return torch.empty(0, self._num_pairs, NUM_CLASSES)
        try:
            with safe_open(self._path, "pt") as file:
                facts, errors = file.metadata(), file.get_tensor("errors")
        except (SafetensorError, OSError) as error:
            raise ScriptError(f"{self._path} cannot be read: {error}. Delete it to start again") from error
        if facts != self._facts:
            differs = next(name for name, value in self._facts.items() if facts.get(name) != value)
            raise ScriptError(f"{self._path} was computed with another {differs}. Delete it, or change --out")
        return errors


def errors_of_answers(answers: Sequence[Recognition], num_pairs: int) -> Tensor:
    """Returns the errors (N, K, C) that the answers were computed from, with NaN for classes without an evaluation."""
    errors = torch.full((len(answers), num_pairs, NUM_CLASSES), torch.nan)
    for i, answer in enumerate(answers):
        for pair, of_classes in enumerate(answer.errors):
            for y, error in of_classes.items():
                errors[i, pair, y] = error
    return errors


def replayed(errors: Tensor, ink: float, readout: Readout, num_pairs: int, *, prune: bool) -> Recognition:
    """Returns the answer for one image with errors (K, C).

    A class that was not evaluated (NaN) gets UNLIKELY times the largest error, so that it is dropped. The answer ends
    at the first pair without evaluations.
    """
    answer = Recognition(readout, ink, num_pairs, prune=prune)
    for of_classes in errors.tolist():
        known = [error for error in of_classes if not math.isnan(error)]
        if not answer.remaining or not known:
            break
        answer.add([UNLIKELY * max(known) if math.isnan(of_classes[y]) else of_classes[y] for y in answer.remaining])
    return answer


def figures_of(answers: Sequence[Recognition], labels: Tensor) -> dict[str, Any]:
    """Returns accuracy, calls, calibration and the confusion matrix of answers for digits with labels (N,)."""
    seen = torch.tensor([answer.label for answer in answers])  # (N,)
    confidence = torch.tensor([max(answer.probabilities) for answer in answers])  # (N,)
    of_digit = torch.tensor([answer.probabilities[y] for answer, y in zip(answers, labels.tolist(), strict=True)])
    confusion = (labels * NUM_CLASSES + seen).bincount(minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)
    evaluations = sum(answer.evaluations for answer in answers)
    most = len(answers) * NUM_CLASSES * len(answers[0].timesteps)
    return {
        "accuracy": (seen == labels).double().mean().item(),
        "wrong": int((seen != labels).sum()),
        "evaluations_an_image": evaluations / len(answers),
        "share_of_calls": evaluations / most,
        "calibration_error": calibration_error(confidence, seen == labels),
        "log_loss": -of_digit.clamp(min=1e-12).log().mean().item(),
        "confusion": confusion.tolist(),
    }


def calibration_error(confidence: Tensor, is_right: Tensor, num_bins: int = NUM_BINS) -> float:
    """Returns the expected calibration error (Guo 2017, eq. 3) of answers with these confidences (N,)."""
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)  # (N,)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, is_right.double() - confidence.double())
    return gaps.abs().sum().item() / len(confidence)


def summary(row: dict[str, Any]) -> str:
    """Returns one line with the main figures."""
    kind = "pruned" if row["pruned"] else "all classes"
    return (
        f"{row['num_pairs']:3} pairs, {kind}: {row['accuracy']:.2%} recognised, {row['wrong']} wrong, "
        f"{row['evaluations_an_image']:.1f} evaluations per image ({row['share_of_calls']:.1%}), "
        f"calibration error {row['calibration_error']:.2%}"
    )


def leads_at(errors: Tensor, labels: Tensor) -> Tensor:
    """Returns by how much the mean distance of the nine wrong classes exceeds that of the true class.

    errors is (N, K, C) without NaN, for K = len(CYCLE) pairs. The result (10, K) has one row for each true class, as a
    share of the distance of the true class.
    """
    distances = errors.sqrt()  # (N, K, C)
    true = distances.gather(2, labels[:, None, None].expand(-1, distances.shape[1], 1))[:, :, 0]  # (N, K)
    wrong = (distances.sum(dim=2) - true) / (NUM_CLASSES - 1)  # (N, K)
    lead = wrong / true - 1  # (N, K)
    return torch.stack([lead[labels == digit].mean(dim=0) for digit in range(NUM_CLASSES)])


def show_leads(leads: Tensor) -> "Figure":
    """Plots the result (10, len(CYCLE)) of `leads_at` by timestep, with one line for each digit."""
    figure = new_figure(760, 420)
    axes = figure.add_subplot()
    colours = require("matplotlib").colormaps["tab10"].colors
    order = sorted(range(len(CYCLE)), key=CYCLE.__getitem__)
    for digit in range(NUM_CLASSES):
        lead = leads[digit, order].tolist()
        axes.plot([CYCLE[i] for i in order], lead, color=colours[digit], label=str(digit), marker="o", markersize=3)
    axes.axhline(0, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("timestep t (0: image, 100: noise)")
    axes.set_ylabel("wrong classes: distance above the true class")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return finish_curves(figure)


def show_errors(errors: Tensor) -> "Figure":
    """Plots the distances of all classes of one image by timestep. errors is (len(CYCLE), C).

    Each line shows how much the distance exceeds the smallest one at the same timestep.
    """
    figure = new_figure(760, 420)
    axes = figure.add_subplot()
    colours = require("matplotlib").colormaps["tab10"].colors
    order = sorted(range(len(CYCLE)), key=CYCLE.__getitem__)
    distances = errors.sqrt()  # (K, C)
    above = distances / distances.min(dim=1, keepdim=True).values - 1  # (K, C)
    for y in range(NUM_CLASSES):
        axes.plot([CYCLE[i] for i in order], above[order, y].tolist(), color=colours[y], label=str(y))
    axes.set_xlabel("timestep t (0: image, 100: noise)")
    axes.set_ylabel("distance above that of the closest class")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    return finish_curves(figure)
