"""Draws a picture of this service again: reads what it was drawn with, and compares it with the images drawn now."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from app.api.images import arrange, sheet_shape
from app.api.options import options_of
from app.api.picture_files import PictureError, PictureFile, damaged, inspect, read_text
from app.api.requests import validate
from app.api.schemas import GenerateRequest
from app.api.task import Task
from app.api.task_schemas import ReproduceResponse
from app.engine.interface import ModelInfo
from app.engine.job import ImageKey, Options, Pixels
from app.errors import InvalidRequest
from model.png import CHUNKS, MAX_SCALE, SOFTWARE, TASK, Provenance, ProvenanceError

AS_WRITTEN = "Send the PNG file as the service wrote it"
_GREY, _RGB = 0, 2  # colour types of PNG
_CHUNK_OF = {"digit": "Digit", "num_steps": "Steps", "sampler": "Sampler", "guidance_scale": "Guidance-Scale"}


@dataclass(slots=True)
class Original:
    """A picture of this service, and what it was drawn with.

    The pixels of a waiting request would take much memory. An enlarged pixel is therefore kept as its smallest and its
    largest value. They are equal unless the picture was altered.
    """

    options: Options
    indices: range  # of its images
    scale: int
    software: str
    low: Pixels  # (H, W) or (H, W, 3), before the enlargement
    high: Pixels
    facts: dict[str, Any] = field(default_factory=dict)  # the response fields of the comparison, set by `compare`

    def task(self, timeout: float | None) -> Task:
        """Returns the task that draws the picture again. `compare` must be called before the response is encoded."""
        digit, seed, count = self.options.digit, self.options.seed, len(self.indices)
        assert digit is not None, "the options of a picture of /generate have a digit"
        return Task(
            self.options,
            count,
            timeout,
            num_steps=self.options.num_steps,
            scale=self.scale,
            response=ReproduceResponse,
            result_facts=lambda: self.facts,
            images=tuple(ImageKey(digit, seed, index) for index in self.indices) if count == 1 else (),
        )

    def compare(self, images: list[Pixels]) -> None:
        """Compares the picture with its images as they are drawn now."""
        drawn = (images[0] if len(images) == 1 else arrange(images)).astype(np.int16)
        difference = np.maximum(np.abs(self.low - drawn), np.abs(self.high - drawn))
        if difference.ndim == 3:
            difference = difference.max(axis=2)
        identical, reason = not difference.any(), "other_pixels" if self.software == SOFTWARE else "other_release"
        self.facts = {
            "identical": identical,
            "reason": None if identical else reason,
            "different_pixels": int(np.count_nonzero(difference)),
            "largest_difference": int(difference.max()),
        }

    @property
    def is_identical(self) -> bool:
        """True if the comparison found no different pixel."""
        return bool(self.facts["identical"])


def read_original(data: bytes, models: Mapping[str, ModelInfo], max_count: int) -> Original:
    """Reads a PNG file of this service. Raises PictureError if the served models cannot draw it again.

    The pixels are decoded last, so that other pictures are refused at a low cost.
    """
    file = inspect(data)
    if file.format != "PNG":
        raise PictureError(f"The file is not a PNG file. {AS_WRITTEN}")
    try:
        provenance, indices = Provenance.parse(read_text(data, {*CHUNKS, TASK}))
    except ProvenanceError as error:
        raise PictureError(str(error)) from error
    if isinstance(provenance.digit, str):
        raise PictureError("The picture has several digits. Draw it again with python -m scripts.sample --like")
    if len(indices) > max_count:
        raise PictureError(f"The picture has {len(indices)} images. At most {max_count} are permitted")
    info = _model_of(provenance, models)
    options = _options_of(provenance, provenance.digit, info)
    scale = _scale_of(file, info, len(indices))
    low, high = _without_enlargement(_pixels_of(file, info), scale)
    return Original(options, indices, scale, provenance.software, low, high)


def _model_of(provenance: Provenance, models: Mapping[str, ModelInfo]) -> ModelInfo:
    for info in models.values():
        if info.sha256 == provenance.model_sha256:
            return info
    served = " and ".join(f"'{info.name}' ({info.sha256})" for info in models.values())
    raise PictureError(
        f"The picture was drawn by the checkpoint {provenance.model_sha256}, which is not served. This service has "
        f"{served}"
    )


def _options_of(provenance: Provenance, digit: int, info: ModelInfo) -> Options:
    """Returns the options of the picture. Raises PictureError for values that /generate or the model do not permit."""
    document = {
        "digit": digit,
        "seed": provenance.seed,
        "num_steps": provenance.num_steps,
        "sampler": provenance.sampler,
        "guidance_scale": provenance.guidance_scale,
    }
    try:
        return options_of(validate(document, GenerateRequest), digit, info)
    except InvalidRequest as error:
        first = error.errors[0]
        raise PictureError(f"The text chunk {_CHUNK_OF[first['loc'][1]]} is not permitted. {first['msg']}") from error


def _scale_of(file: PictureFile, info: ModelInfo, count: int) -> int:
    """Returns the scale of the picture. Raises PictureError if it does not have the size of `count` images."""
    height, width = info.image_shape[1:]
    rows, columns = sheet_shape(count)
    scale = file.width // (columns * width)
    if not 1 <= scale <= MAX_SCALE or (file.width, file.height) != (columns * width * scale, rows * height * scale):
        raise PictureError(
            f"The picture has {file.width} x {file.height} pixels. For this number of images ({count}), the model "
            f"'{info.name}' draws {columns * width} x {rows * height} pixels, times a scale of 1 to {MAX_SCALE}. "
            f"{AS_WRITTEN}"
        )
    return scale


def _pixels_of(file: PictureFile, info: ModelInfo) -> Pixels:
    """Returns the exact pixels. Raises PictureError unless the picture has the colours of the images of the model."""
    depth, colour_type = file.data[24:26]  # in the chunk IHDR
    colours = _GREY if info.image_shape[0] == 1 else _RGB
    try:
        with Image.open(io.BytesIO(file.data), formats=["PNG"]) as image:
            is_plain = not image.has_transparency_data and file.orientation == 1
            if is_plain and (depth, colour_type) == (8, colours) and image.size == (file.width, file.height):
                return np.asarray(image)
    except Exception as error:  # Pillow raises many types of exceptions for damaged files.
        raise damaged("PNG") from error
    raise PictureError(
        f"The file does not have 8 bits of {'grey' if colours == _GREY else 'RGB'} without transparency, as the images "
        f"of the model '{info.name}'. {AS_WRITTEN}"
    )


def _without_enlargement(pixels: Pixels, scale: int) -> tuple[Pixels, Pixels]:
    """Returns the smallest and the largest value of each enlarged pixel."""
    height, width, *channels = pixels.shape
    blocks = pixels.reshape(height // scale, scale, width // scale, scale, *channels)
    # Both axes at once would take several times as long.
    return blocks.min(axis=1).min(axis=2), blocks.max(axis=1).max(axis=2)
