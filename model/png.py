"""Encodes PNG files. Text chunks record how an image was generated, so that it can be reproduced."""

import io
import json
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from model.prompts import MAX_PROMPT_LENGTH, is_prompt, is_text
from model.spec import MAX_CLIP_GUIDANCE_SCALE, MAX_GUIDANCE_SCALE, MAX_NAME_LENGTH, PIPELINE_SAMPLERS, Noise

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVEL = 6  # zlib compression level of enlarged images
FAST_LEVEL = 3  # zlib compression level of other images
SOFTWARE = f"unfog {version('unfog')}"
TASK = "Task"  # the text chunk of pictures of tasks other than generation
MAX_SEED = 2**53 - 1  # the largest integer that a JSON parser with double precision reads exactly
MAX_INDEX = 999_999
MAX_SCALE = 16  # the largest factor by which images of this project are enlarged
MAX_STEPS = 9999
MOST_COLUMNS = 16  # in a sheet whose images each have their own class
LAYOUT = "Layout"  # the text chunk that marks such a sheet
NOISE = "Noise"  # the text chunk of images whose noise was drawn by torch

# The length of each number is limited, because the conversion of long numbers is slow.
_FORMS = {  # name of a chunk -> pattern of its value, and description for errors
    "Software": (r"unfog [0-9A-Za-z.+!-]{1,64}", "'unfog' and the version of a release"),
    "Digit": (r"[0-9](?:,[0-9]){0,9}", "a digit from 0 to 9, or different digits separated by commas"),
    "Label": (r"[ -~]{1,700000}", f"a name of 1 to {MAX_NAME_LENGTH} characters, or names in JSON, in ASCII"),
    "Seed": (r"0|[1-9][0-9]{0,15}", f"an integer from 0 to {MAX_SEED}"),
    "Index": (r"(?:0-)?[1-9][0-9]{0,5}|0", f"an integer from 0 to {MAX_INDEX}, or a range such as 0-8"),
    "Sampler": ("|".join(PIPELINE_SAMPLERS), " or ".join(PIPELINE_SAMPLERS)),
    "Steps": (r"[1-9][0-9]{0,3}", f"an integer from 1 to {MAX_STEPS}"),
    "Guidance-Scale": (r"[0-9]{1,3}(?:\.[0-9]{1,20})?", f"a number from 1 to {MAX_GUIDANCE_SCALE}"),
    "Model-SHA256": (r"[0-9a-f]{64}", "64 hexadecimal digits in lower case"),
    LAYOUT: ("rows", "'rows'"),
    NOISE: ("torch", "'torch'"),
}
_CLIP_FORMS = {
    # A scale below 0.0001 is written with an exponent, such as 1e-05.
    "CLIP-Guidance-Scale": (
        r"[0-9]{1,3}(?:\.[0-9]{1,20})?(?:e-[0-9]{2,3})?",
        f"a number above 0 and up to {MAX_CLIP_GUIDANCE_SCALE}",
    ),
    "CLIP-Prompt": (r'"[ -~]{1,2500}"', f"a JSON string of 1 to {MAX_PROMPT_LENGTH} characters, in ASCII"),
    "CLIP-SHA256": (r"[0-9a-f]{64}", "64 hexadecimal digits in lower case"),
}
CHUNKS = (*_FORMS, *_CLIP_FORMS)  # the text chunks with provenance; those of CLIP occur only with CLIP guidance


class ProvenanceError(ValueError):
    """A picture cannot be generated again from its text chunks. The message says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class ClipProvenance:
    """The parameters of CLIP guidance that determine the pixels."""

    scale: float  # above 0
    prompt: str | None  # None: the default prompt of each digit (see model/prompts.py)
    sha256: str  # digest of the weights of the CLIP model

    @classmethod
    def parse(cls, text: Mapping[str, str]) -> Self | None:
        """Returns the CLIP guidance of a picture, or None if it has none. Raises ProvenanceError."""
        if not text.keys() & _CLIP_FORMS.keys():
            return None
        scale, sha256 = float(_value("CLIP-Guidance-Scale", text)), _value("CLIP-SHA256", text)
        if not 0 < scale <= MAX_CLIP_GUIDANCE_SCALE:
            raise _malformed("CLIP-Guidance-Scale")
        prompt = None
        if "CLIP-Prompt" in text:
            try:
                prompt = json.loads(_value("CLIP-Prompt", text))
            except ValueError as error:
                raise _malformed("CLIP-Prompt") from error
            if not is_prompt(prompt):
                raise _malformed("CLIP-Prompt")
        return cls(scale, prompt, sha256)

    def text(self) -> dict[str, str]:
        """Returns the PNG text chunks."""
        prompt = {} if self.prompt is None else {"CLIP-Prompt": json.dumps(self.prompt)}
        return {"CLIP-Guidance-Scale": str(self.scale), **prompt, "CLIP-SHA256": self.sha256}


@dataclass(frozen=True, slots=True)
class Provenance:
    """The parameters of a generated image. Together with its index they determine the pixels."""

    labels: tuple[str, ...]  # the name of the class; several for a contact sheet of several classes; empty: no class
    seed: int
    sampler: str
    num_steps: int
    guidance_scale: float
    model_sha256: str
    task: Mapping[str, str] = field(default_factory=dict)  # further text chunks of tasks other than generation
    software: str = SOFTWARE  # the release that generated the image
    first_index: int = 0  # index of the first image of a request
    clip: ClipProvenance | None = None  # None: no CLIP guidance
    has_digits: bool = True  # True if the classes of the model are digits
    one_each: bool = False  # True if `labels` has one name for each image, False if it has one for each class
    noise: Noise = "unfog"

    @classmethod
    def parse(cls, text: Mapping[str, str]) -> tuple[Self, range]:
        """Returns the provenance of a picture, and the indices of its images, from its text chunks.

        A contact sheet of n images has the indices 0 to n - 1. A sheet of several classes has these indices for each
        class. With the chunk Layout, `Label` names the class of each image instead. Raises ProvenanceError for a
        picture of a task other than generation and for missing or malformed chunks.
        """
        if TASK in text:
            raise ProvenanceError(
                "The picture was made from another picture, which its file does not contain. Use a picture of "
                "/generate, /v1/images/generations or scripts.sample"
            )
        one_each = LAYOUT in text
        named = "Digit" if "Digit" in text or "Label" not in text else "Label"  # The oldest files have no Label.
        skipped = {"Digit", "Label", LAYOUT, NOISE} - {named, *({LAYOUT, NOISE} & text.keys())}
        values = {name: _value(name, text) for name in _FORMS if name not in skipped}
        labels = values["Digit"].split(",") if named == "Digit" else _labels_of(values["Label"])
        first, _, last = values["Index"].partition("-")
        provenance = cls(
            labels=tuple(labels),
            seed=int(values["Seed"]),
            sampler=values["Sampler"],
            num_steps=int(values["Steps"]),
            guidance_scale=float(values["Guidance-Scale"]),
            model_sha256=values["Model-SHA256"],
            software=values["Software"],
            first_index=int(first),
            clip=ClipProvenance.parse(text),
            has_digits=named == "Digit",
            one_each=one_each,
            noise="torch" if NOISE in values else "unfog",
        )
        indices = range(provenance.first_index, int(last or first) + 1)
        is_valid = {
            "Index": not (one_each and provenance.first_index),
            named: len(labels) == len(indices) if one_each else len(set(labels)) == len(labels),
            "Seed": provenance.seed <= MAX_SEED,
            "Guidance-Scale": 1 <= provenance.guidance_scale <= MAX_GUIDANCE_SCALE,
        }
        if named == "Digit" and "Label" in text:
            is_valid["Label"] = _labels_of(_value("Label", text)) == labels
        for name, valid in is_valid.items():
            if not valid:
                raise _malformed(name)
        return provenance, indices

    def of_image(self, index: int) -> Self:
        """Returns the provenance of one image, which has only the class of this image."""
        if not self.one_each:
            return self
        return replace(self, labels=(self.labels[index - self.first_index],), one_each=False)

    def shape(self, count: int) -> tuple[int, int]:
        """Returns the numbers of rows and columns of a contact sheet with the indices of `count` images."""
        return rows_shape(count) if self.one_each else sheet_shape(count, len(self.labels))

    def class_text(self) -> dict[str, str]:
        """Returns the PNG text chunks that name the class, or that of each image."""
        if self.one_each:
            return {"Label": json.dumps(self.labels), LAYOUT: "rows"}
        digit = {"Digit": ",".join(self.labels) or "none"} if self.has_digits else {}
        return {**digit, **({"Label": _label_text(self.labels)} if self.labels else {})}

    def text(self, index: int | str) -> dict[str, str]:
        """Returns the PNG text chunks for the image `index`. The index of a contact sheet is a range such as "0-3"."""
        if self.one_each and isinstance(index, int):
            return self.of_image(index).text(index)
        return {
            "Software": self.software,
            **self.class_text(),
            "Seed": str(self.seed),
            "Index": str(index),
            "Sampler": self.sampler,
            "Steps": str(self.num_steps),
            "Guidance-Scale": str(self.guidance_scale),
            "Model-SHA256": self.model_sha256,
            **({NOISE: self.noise} if self.noise != "unfog" else {}),
            **(self.clip.text() if self.clip else {}),
            **self.task,
        }


def _label_text(labels: Sequence[str]) -> str:
    """Returns the value of the chunk Label: one name as it is if possible, and otherwise JSON, which escapes it."""
    if len(labels) > 1:
        return json.dumps(labels)
    (name,) = labels
    is_plain = name.isascii() and name[0] not in '"['
    return name if is_plain else json.dumps(name)


def _labels_of(value: str) -> list[str]:
    """Returns the names in the chunk Label. Raises ProvenanceError if it is malformed."""
    if value[0] not in '"[':
        return [value]
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _malformed("Label") from error
    labels = found if isinstance(found, list) else [found]
    if not labels or not all(isinstance(name, str) and is_text(name, MAX_NAME_LENGTH) for name in labels):
        raise _malformed("Label")
    return labels


def _value(name: str, text: Mapping[str, str]) -> str:
    """Returns the value of a chunk. Raises ProvenanceError if it is missing or does not have its form."""
    if name not in text:
        raise ProvenanceError(
            f"The picture has no text chunk {name}. Use the PNG file as the service wrote it: many programs remove "
            "text chunks"
        )
    pattern, _ = (_FORMS | _CLIP_FORMS)[name]
    if not re.fullmatch(pattern, text[name]):
        raise _malformed(name)
    return text[name]


def _malformed(name: str) -> ProvenanceError:
    _, description = (_FORMS | _CLIP_FORMS)[name]
    return ProvenanceError(f"The text chunk {name} must be {description}. Use the PNG file as the service wrote it")


def sheet_shape(count: int, num_classes: int = 1) -> tuple[int, int]:
    """Returns the numbers of rows and columns of a sheet with `count` images of each class.

    Each class gets one row. The images of a single class are arranged in a square.
    """
    if num_classes > 1:
        return num_classes, count
    columns = math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns


def rows_shape(count: int) -> tuple[int, int]:
    """Returns the numbers of rows and columns of a sheet that is read like text: row by row."""
    return math.ceil(count / MOST_COLUMNS), min(count, MOST_COLUMNS)


def encode_png(image: Image.Image, *, scale: int = 1, text: Mapping[str, str] | None = None) -> bytes:
    """Returns the image as a PNG file with these text chunks. Enlarges each pixel to scale x scale pixels."""
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    chunks, buffer = PngInfo(), io.BytesIO()
    for name, value in (text or {}).items():
        chunks.add_text(name, value)
    image.save(buffer, format="PNG", pnginfo=chunks, compress_level=LEVEL)
    return buffer.getvalue()


def encode_pixels(pixels: npt.NDArray[np.uint8], *, scale: int = 1, text: Mapping[str, str] | None = None) -> bytes:
    """Returns pixels (H, W), (H, W, 1) or (H, W, 3) as a PNG file with these text chunks, which must be ASCII.

    Enlarges each pixel to scale x scale pixels.
    """
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    if scale > 1:  # Pillow finds the lines that are repeated.
        return encode_png(Image.fromarray(pixels), scale=scale, text=text)
    # The time of this code limits the throughput of the service. It takes a third of the time of Pillow for an image,
    # and the files have about the same size. zlib.compress() releases the GIL once, a compression object twice. Each
    # time, another thread can take the GIL, and this thread waits for it.
    height, width = pixels.shape[:2]
    lines = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)  # Each line of pixels begins with its filter, 0.
    lines[:, 1:] = pixels.reshape(height, -1)
    content = zlib.compress(lines.tobytes(), FAST_LEVEL)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    texts = [_text_chunk(name, value) for name, value in (text or {}).items()]
    return b"".join((SIGNATURE, _chunk(b"IHDR", header), *texts, _chunk(b"IDAT", content), _chunk(b"IEND", b"")))


@lru_cache(maxsize=256)  # The images of a request differ only in one chunk.
def _text_chunk(name: str, value: str) -> bytes:
    return _chunk(b"tEXt", f"{name}\0{value}".encode("ascii"))


def _chunk(name: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG file (W3C PNG, section 5)."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
