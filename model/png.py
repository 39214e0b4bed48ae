"""Encodes PNG files. Text chunks record how an image was generated, so that it can be reproduced."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from PIL import Image
from PIL.PngImagePlugin import PngInfo

LEVEL = 6  # zlib compression level
SOFTWARE = f"unfog {version('unfog')}"


@dataclass(frozen=True, slots=True)
class Provenance:
    """The parameters of a generated image. Together with its index they determine the pixels."""

    digit: int | str  # for a contact sheet of several digits: the digits, separated by commas
    seed: int
    sampler: str
    num_steps: int
    guidance_scale: float
    model_sha256: str
    task: Mapping[str, str] = field(default_factory=dict)  # further text chunks of tasks other than generation

    def text(self, index: int | str) -> dict[str, str]:
        """Returns the PNG text chunks for the image `index`. The index of a contact sheet is a range such as "0-3"."""
        return {
            "Software": SOFTWARE,
            "Digit": str(self.digit),
            "Seed": str(self.seed),
            "Index": str(index),
            "Sampler": self.sampler,
            "Steps": str(self.num_steps),
            "Guidance-Scale": str(self.guidance_scale),
            "Model-SHA256": self.model_sha256,
            **self.task,
        }


def encode_png(image: Image.Image, *, scale: int = 1, text: Mapping[str, str] | None = None) -> bytes:
    """Returns the image as a PNG file with these text chunks. Enlarges each pixel to scale x scale pixels."""
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    chunks, buffer = PngInfo(), io.BytesIO()
    for name, value in (text or {}).items():
        chunks.add_text(name, value)
    image.save(buffer, format="PNG", pnginfo=chunks, compress_level=LEVEL)
    return buffer.getvalue()
