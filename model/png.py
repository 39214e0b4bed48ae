"""Encodes PNG files with text chunks that say how the image was drawn, so that it can be drawn again."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from PIL import Image
from PIL.PngImagePlugin import PngInfo

LEVEL = 6  # compression level of zlib
SOFTWARE = f"unfog {version('unfog')}"


@dataclass(frozen=True, slots=True)
class Provenance:
    """How an image was drawn. Together with an index, this decides every bit of the image."""

    digit: int | str  # a contact sheet of several digits lists them, separated by commas
    seed: int
    sampler: str
    num_steps: int
    guidance_scale: float
    model_sha256: str

    def text(self, index: int | str) -> dict[str, str]:
        """Returns the text chunks for the PNG of the image `index`, or for a contact sheet of a range of indices."""
        return {
            "Software": SOFTWARE,
            "Digit": str(self.digit),
            "Seed": str(self.seed),
            "Index": str(index),
            "Sampler": self.sampler,
            "Steps": str(self.num_steps),
            "Guidance-Scale": str(self.guidance_scale),
            "Model-SHA256": self.model_sha256,
        }


def encode_png(image: Image.Image, *, scale: int = 1, text: Mapping[str, str] | None = None) -> bytes:
    """Returns the image as PNG, each pixel enlarged to scale x scale, with these text chunks."""
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    chunks, buffer = PngInfo(), io.BytesIO()
    for name, value in (text or {}).items():
        chunks.add_text(name, value)
    image.save(buffer, format="PNG", pnginfo=chunks, compress_level=LEVEL)
    return buffer.getvalue()
