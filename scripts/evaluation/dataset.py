"""Writes generated digits to a folder, as IDX files like MNIST's or as PNGs. `samples.read_samples` reads them."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.files import write_atomically, write_json
from model.pixels import to_pixels
from model.png import encode_png
from scripts.common.drawing import Drawer, DrawingOptions, DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError
from scripts.common.mnist import NUM_CLASSES
from scripts.common.progress import Reporter
from scripts.evaluation.samples import FACTS, IDX, generated_images

PART = 1000  # images per part; each part is saved when it is complete
PARTS = "parts"  # folder of the parts, removed when the data set is complete


def make_dataset(request: DrawingRequest, folder: Path, reporter: Reporter, *, count: int, form: str) -> None:
    """Generates the images that are missing in the folder and writes the data set. `form` is idx or png.

    Raises ScriptError if the checkpoint has other images or classes, or if the folder has other content.
    """
    drawer = open_drawer(request)
    if drawer.checkpoint.image_shape != (1, 28, 28) or len(drawer.class_names) != NUM_CLASSES:
        raise ScriptError(
            f"The checkpoint must generate {NUM_CLASSES} classes of 1x28x28 images, {generated_images(drawer)}"
        )
    options = options_from(request, drawer.checkpoint)
    begun = _find(folder)
    drawer.compile(_compile_mode(request.compile, begun), reporter)
    facts = {**drawer.facts, "options": options.facts, "seed": request.seed, "count": count, "format": form}
    if _begin(folder, begun, facts):
        for start in range(0, count, PART):
            path = folder / PARTS / f"{start:07d}"
            if not path.exists():
                index = torch.arange(start, min(start + PART, count))
                reporter.line(f"Images {start} to {start + len(index) - 1} of {count}")
                write_atomically(path, _draw(drawer, options, index, request, reporter))
        write = write_idx if form == "idx" else write_pngs
        write(folder, _read_parts(folder / PARTS))
        shutil.rmtree(folder / PARTS)
    reporter.line(f"Wrote {count} images to {folder}")


def write_idx(folder: Path, images: np.ndarray) -> None:
    """Writes images, uint8 (N, 28, 28), and their labels as two IDX files. Image i has the label i mod 10."""
    count = len(images)
    labels = (np.arange(count) % NUM_CLASSES).astype(np.uint8)
    header = struct.pack(">4i", 2051, *images.shape)
    write_atomically(folder / IDX[0], header + images.tobytes())
    write_atomically(folder / IDX[1], struct.pack(">2i", 2049, count) + labels.tobytes())


def write_pngs(folder: Path, images: np.ndarray) -> None:
    """Writes images, uint8 (N, 28, 28), as PNGs, with one folder per digit."""
    for i, image in enumerate(images):
        png = encode_png(Image.fromarray(image))
        write_atomically(folder / str(i % NUM_CLASSES) / f"{i // NUM_CLASSES:05d}.png", png)


def _find(folder: Path) -> dict[str, Any] | None:
    """Returns the facts of the data set in the folder, or None for an empty folder.

    Raises ScriptError for other content.
    """
    path = folder / FACTS
    if not path.exists():
        if any(found != folder / PARTS for found in folder.rglob("*")):
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
        if differing := sorted(name for name in {*begun, *facts} if begun.get(name) != facts.get(name)):
            name = differing[0]
            raise ScriptError(
                f"{folder} has a data set with {name} = {begun.get(name)!r}, but this run has {facts.get(name)!r}. "
                "Use the same arguments, or choose another folder for --out"
            )
        return (folder / PARTS).exists()
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    write_json(folder / FACTS, facts)
    return True


def _draw(
    drawer: Drawer, options: DrawingOptions, index: torch.Tensor, request: DrawingRequest, reporter: Reporter
) -> bytes:
    y, seed, batch_size = index % NUM_CLASSES, request.seed, request.batch_size
    x_0 = drawer.draw(y, index, options, reporter, seed=seed, batch_size=batch_size)
    return to_pixels(x_0).numpy().tobytes()


def _read_parts(folder: Path) -> np.ndarray:
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("[0-9]*")))
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, 28, 28)
