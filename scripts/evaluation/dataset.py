"""Generates data sets of digits in parts, so that a stopped run can continue. `samples.read_samples` reads them."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.files import write_atomically, write_json
from model.pixels import to_pixels
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.classifiers import Classifier, load_classifier, probabilities_of
from scripts.evaluation.dataset_card import CARD, card, command_of
from scripts.evaluation.dataset_files import Rows, write_idx, write_pngs
from scripts.evaluation.parquet import write_parquet
from scripts.evaluation.samples import FACTS, generated_images

PART = 1000  # images per part; each part is saved when it is complete
PARTS = "parts"  # folder of the parts, removed when the data set is complete
PIXELS = 28 * 28  # bytes of an image in a part
RESULTS = ("num_dropped",)  # facts that are known only when the data set is complete
LOWEST_SHARE = 0.01  # the run ends if the filter keeps a smaller share of the images of a digit
FEWEST_DRAWN = 300  # images of a digit that are generated before the share is checked
Part = tuple[Tensor, Tensor]  # the labels and the noise indices of its images, int64 (N,) each
DrawParts = Callable[[Sequence[Part]], Iterator[Tensor]]  # yields the images of each part, uint8 (N, 1, 28, 28)


class Engine(NamedTuple):
    """Generates the images, here or on other machines. Every engine gives the same bytes for the same facts."""

    facts: dict[str, Any]  # those of Drawer.facts, of the processes that generate the images
    draw: DrawParts  # in the order of the parts. Parts that are known together can be generated at the same time


OpenEngine = Callable[[DrawingRequest, Drawer, DrawingOptions, Reporter], AbstractContextManager[Engine]]


@dataclass(frozen=True, slots=True)
class DatasetRequest:
    """The content and the file format of the data set."""

    num_images: tuple[int, ...]  # for each digit
    form: str  # idx, png or parquet
    min_confidence: float | None = None  # lowest probability of the requested digit by the judge; None keeps all images


@dataclass(frozen=True, slots=True)
class Filter:
    """Keeps images to which the judge gives at least this probability of the requested digit."""

    judge: Classifier
    min_confidence: float

    def confidence(self, images: Tensor, y: Tensor) -> np.ndarray:
        """Returns the probabilities of the digits `y`, float32 (N,), for images uint8 (N, 1, 28, 28)."""
        return probabilities_of(self.judge, images).gather(1, y[:, None])[:, 0].numpy().astype("<f4")


def equal_numbers(count: int) -> tuple[int, ...]:
    """Returns the number of images of each digit for `count` images. The first digits get the remainder."""
    return tuple(count // NUM_CLASSES + (digit < count % NUM_CLASSES) for digit in range(NUM_CLASSES))


@contextmanager
def local_engine(
    request: DrawingRequest, drawer: Drawer, options: DrawingOptions, reporter: Reporter
) -> Iterator[Engine]:
    """Generates the images in this process."""
    drawer.compile(request.compile, reporter)

    def draw(parts: Sequence[Part]) -> Iterator[Tensor]:
        for y, index in parts:
            yield to_pixels(drawer.draw(y, index, options, reporter, seed=request.seed, batch_size=request.batch_size))

    yield Engine(drawer.facts, draw)


def make_dataset(
    request: DrawingRequest,
    wanted: DatasetRequest,
    folder: Path,
    reporter: Reporter,
    open_engine: OpenEngine = local_engine,
) -> None:
    """Generates the images that are missing in the folder and writes the data set.

    Raises ScriptError if the checkpoint has other images or classes, if the folder has other content, or if the filter
    keeps almost no image.
    """
    drawer = open_drawer(request)
    if drawer.checkpoint.image_shape != (1, 28, 28) or len(drawer.class_names) != NUM_CLASSES:
        raise ScriptError(
            f"The checkpoint must generate {NUM_CLASSES} classes of 1x28x28 images, {generated_images(drawer)}"
        )
    options = options_from(request, drawer.checkpoint)
    begun = _find(folder)
    request = replace(request, compile=_compile_mode(request.compile, begun))
    with open_engine(request, drawer, options, reporter) as engine:
        facts: dict[str, Any] = {
            **engine.facts,
            "options": options.facts,
            "seed": request.seed,
            "count": sum(wanted.num_images),
            "format": wanted.form,
            "num_images": list(wanted.num_images),
        }
        kept_if = None
        if wanted.min_confidence is not None:
            judge = load_classifier("judge")
            kept_if = Filter(judge.network, wanted.min_confidence)
            facts |= {"min_confidence": wanted.min_confidence, "judge_sha256": judge.sha256}
        if _begin(folder, begun, facts):
            rows, num_dropped = _fill(labels_of(wanted.num_images), folder / PARTS, engine.draw, kept_if, reporter)
            if kept_if:
                facts["num_dropped"], dropped = num_dropped.tolist(), int(num_dropped.sum())
                num_drawn = facts["count"] + dropped
                reporter.line(f"The filter dropped {dropped} of {num_drawn} images ({dropped / num_drawn:.2%})")
            _write(folder, rows, facts, drawer, command_of(request, facts))
    reporter.line(f"Wrote {facts['count']} images to {folder}")


def labels_of(num_images: tuple[int, ...]) -> np.ndarray:
    """Returns the digits of all images in order, int64 (N,), with each digit spread evenly over the data set.

    For equal numbers the order is 0 to 9, 0 to 9, and so on.
    """
    labels = np.repeat(np.arange(NUM_CLASSES), num_images)  # (N,)
    place = np.concatenate([(2 * np.arange(n) + 1) / (2 * max(n, 1)) for n in num_images])  # (N,) in (0, 1)
    return labels[np.lexsort((labels, place))]


def differing_facts(begun: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Returns the names of the facts in which a run differs from the data set that it would continue.

    Data sets of earlier releases do not state the numbers per digit, which were equal.
    """
    begun = {"num_images": list(equal_numbers(int(begun.get("count", 0)))), **begun}
    begun = {name: value for name, value in begun.items() if name not in RESULTS}
    return sorted(name for name in {*begun, *facts} if begun.get(name) != facts.get(name))


def _find(folder: Path) -> dict[str, Any] | None:
    """Returns the facts of the data set in the folder, or None for an empty folder.

    Raises ScriptError for other content.
    """
    path = folder / FACTS
    if not path.exists():
        # A run that was killed while it wrote FACTS leaves a temporary file, see write_atomically.
        if any(found != folder / PARTS and not found.name.startswith(f".{FACTS}.") for found in folder.rglob("*")):
            raise ScriptError(f"{folder} is not empty and is not a data set. Choose another folder for --out")
        return None
    try:
        begun = json.loads(path.read_text("utf-8"))
    except ValueError:
        begun = None
    if not isinstance(begun, dict):
        raise ScriptError(f"{path} is damaged. Choose another folder for --out")
    return begun


def _compile_mode(mode: str, begun: dict[str, Any] | None) -> str:
    """Returns the compile mode. `auto` continues a data set in its own mode, since the modes round differently."""
    if mode == "auto" and begun and "compiled" in begun:
        return "on" if begun["compiled"] else "off"
    return mode


def _begin(folder: Path, begun: dict[str, Any] | None, facts: dict[str, Any]) -> bool:
    """Returns True if images are missing. Raises ScriptError if the data set was begun with other arguments."""
    if begun is not None:
        if differing := differing_facts(begun, facts):
            name = differing[0]
            raise ScriptError(
                f"{folder} has a data set with {name} = {begun.get(name)!r}, but this run has {facts.get(name)!r}. "
                "Use the same arguments, or choose another folder for --out"
            )
        return (folder / PARTS).exists()
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    write_json(folder / FACTS, facts)
    return True


def _fill(
    labels: np.ndarray, parts: Path, draw: DrawParts, kept_if: Filter | None, reporter: Reporter
) -> tuple[Rows, np.ndarray]:
    """Generates an image for each label (N,). Returns the images, and the number of dropped images of each digit.

    Each part takes the first labels that have no image, and the next noise indices. An image that the filter drops
    leaves its label without an image for the next part. The result therefore depends only on the arguments, and with a
    filter, a part is known only when the part before it is complete.
    """
    known = None if kept_if else draw(_missing_parts(labels, parts))
    rows = Rows(
        images=np.zeros((len(labels), 28, 28), np.uint8),
        labels=labels,
        noise_index=np.zeros(len(labels), np.int64),
        confidence=np.zeros(len(labels), np.float32) if kept_if else None,
    )
    missing = np.arange(len(labels))
    drawn, dropped, start = np.zeros(NUM_CLASSES, np.int64), np.zeros(NUM_CLASSES, np.int64), 0
    while len(missing):
        places, later = missing[:PART], missing[PART:]
        index = np.arange(start, start + len(places))
        path = _path_of(parts, start)
        if not path.exists():
            state = f", {len(labels) - len(missing)} of {len(labels)} kept so far" if kept_if else f" of {len(labels)}"
            reporter.line(f"Images {start} to {index[-1]}{state}")
            y = torch.from_numpy(labels[places])
            (images,) = [next(known)] if known else draw([(y, torch.from_numpy(index))])
            write_atomically(path, _content_of(images, y, kept_if))
        pixels, confidence = _read_part(path, len(places), kept_if)
        rows.images[places], rows.noise_index[places] = pixels, index
        failed = places[:0]
        if kept_if and rows.confidence is not None:
            rows.confidence[places] = confidence
            failed = places[confidence < kept_if.min_confidence]
        drawn += np.bincount(labels[places], minlength=NUM_CLASSES)
        dropped += np.bincount(labels[failed], minlength=NUM_CLASSES)
        _check_share(drawn, dropped)
        missing, start = np.concatenate([failed, later]), start + len(places)
    return rows, dropped


def _missing_parts(labels: np.ndarray, parts: Path) -> list[Part]:
    """Returns the parts without a file, if no filter drops images."""
    starts = [start for start in range(0, len(labels), PART) if not _path_of(parts, start).exists()]
    y = torch.from_numpy(labels)
    return [(y[start : start + PART], torch.arange(start, min(start + PART, len(y)))) for start in starts]


def _path_of(parts: Path, start: int) -> Path:
    return parts / f"{start:07d}"


def _content_of(images: Tensor, y: Tensor, kept_if: Filter | None) -> bytes:
    """Returns the content of a part: the pixels of all images, then the confidences if there is a filter."""
    return images.numpy().tobytes() + (kept_if.confidence(images, y).tobytes() if kept_if else b"")


def _read_part(path: Path, num_images: int, kept_if: Filter | None) -> tuple[np.ndarray, np.ndarray]:
    content = path.read_bytes()
    if len(content) != num_images * (PIXELS + 4 * bool(kept_if)):
        raise ScriptError(f"{path} is damaged. Delete it, then run the same command again")
    pixels, confidence = content[: num_images * PIXELS], content[num_images * PIXELS :]
    return np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28), np.frombuffer(confidence, "<f4")


def _check_share(drawn: np.ndarray, dropped: np.ndarray) -> None:
    """Raises ScriptError if the filter keeps almost no image of a digit, so that the run would not end."""
    kept = drawn - dropped
    hopeless = (drawn >= FEWEST_DRAWN) & (kept < LOWEST_SHARE * drawn)
    if hopeless.any():
        digit = int(hopeless.argmax())
        raise ScriptError(
            f"--min-confidence is too high for this checkpoint: it kept {kept[digit]} of {drawn[digit]} images of "
            f"digit {digit}, less than {LOWEST_SHARE:.0%}. Use a lower value, for example 0.9, and another folder for "
            "--out"
        )


def _write(folder: Path, rows: Rows, facts: dict[str, Any], drawer: Drawer, command: str) -> None:
    """Writes the files of the data set and its card. Then removes the parts."""
    match facts["format"]:
        case "idx":
            write_idx(folder, rows)
        case "png":
            write_pngs(folder, rows)
        case _:
            write_parquet(folder, rows, seed=facts["seed"])
    write_atomically(folder / CARD, card(facts, drawer.checkpoint, command).encode())
    write_json(folder / FACTS, facts)
    shutil.rmtree(folder / PARTS)
