"""Generates a picture again from its text chunks, and compares the pixels."""

import hashlib
import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import reduce
from PIL import Image
from torch import Tensor

from model.files import write_atomically
from model.png import MAX_SCALE, SOFTWARE, Provenance, ProvenanceError, encode_pixels, sheet_shape
from model.spec import SAMPLERS, SHIPPED, SHIPPED_FAST
from scripts.common.drawing import DrawingRequest, open_drawer, options_from
from scripts.common.errors import ScriptError
from scripts.common.pictures import arrange
from scripts.common.progress import Reporter


@dataclass(frozen=True, slots=True)
class Original:
    """A picture with provenance."""

    path: Path
    pixels: Tensor  # (H, W, C) uint8
    provenance: Provenance
    indices: range  # the noise indices of the images of each digit

    @property
    def digits(self) -> list[int]:
        """The digits of the picture, in the order of its rows."""
        return [int(digit) for digit in str(self.provenance.digit).split(",")]

    def scale_of(self, image_shape: tuple[int, int, int]) -> int:
        """Returns the enlargement factor. Raises ScriptError if the picture does not have the size of its images."""
        channels, height, width = image_shape
        rows, columns = sheet_shape(len(self.indices), len(self.digits))
        scale = self.pixels.shape[1] // (columns * width)
        if not 1 <= scale <= MAX_SCALE or self.pixels.shape != (
            rows * height * scale,
            columns * width * scale,
            channels,
        ):
            raise ScriptError(
                f"{self.path} has {self.pixels.shape[1]} x {self.pixels.shape[0]} pixels. Its checkpoint generates "
                f"{columns * width} x {rows * height} pixels of {'grey' if channels == 1 else 'RGB'}, times a scale of "
                f"1 to {MAX_SCALE}. Use the file as it was written"
            )
        return scale


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between a picture and the same picture generated again."""

    num_pixels: int  # before the enlargement: an enlarged pixel counts once
    different: int
    largest: int  # in grey levels, 0 to 255

    @classmethod
    def between(cls, one: Tensor, other: Tensor, scale: int) -> "Difference":
        """Compares pixels (H, W, C) uint8 of pictures with the same scale."""
        largest = reduce((one.int() - other.int()).abs(), "(h i) (w j) c -> h w", "max", i=scale, j=scale)
        return cls(largest.numel(), int(largest.count_nonzero()), int(largest.max()))


def read_original(path: Path) -> Original:
    """Reads a PNG file. Raises ScriptError if the picture cannot be generated again, and OSError."""
    content = path.read_bytes()
    try:
        text, pixels = _open(content)
    except Image.DecompressionBombError as error:
        raise ScriptError(f"{path} has too many pixels. Use the file as it was written") from error
    except Exception as error:  # Pillow raises many types of exceptions for damaged files.
        raise ScriptError(f"{path} is not a PNG file, or is damaged. Use the file as it was written") from error
    try:
        provenance, indices = Provenance.parse(text)
    except ProvenanceError as error:
        raise ScriptError(f"{path}: {error}") from error
    if pixels is None:
        raise ScriptError(f"{path} does not have 8 bits of grey or RGB. Use the file as it was written")
    return Original(path, pixels, provenance, indices)


def _open(content: bytes) -> tuple[dict[str, str], Tensor | None]:
    """Returns the text chunks and the pixels (H, W, C), or None for other colours than grey and RGB."""
    with warnings.catch_warnings():
        # Large sheets are permitted. From twice the limit of Pillow on, it raises DecompressionBombError.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(io.BytesIO(content), formats=["PNG"])
    with opened as image:
        image.load()
        text: dict[str, str] = image.text  # type: ignore[attr-defined] # of PNG files
        if image.mode not in ("L", "RGB") or image.has_transparency_data:
            return text, None
        return text, torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)


def checkpoint_of(original: Original, given: Path | None) -> Path:
    """Returns the checkpoint that generated the picture: the given one, or one of the shipped ones.

    Raises ScriptError if none of them has the digest of the picture, and OSError.
    """
    wanted = original.provenance.model_sha256
    digests = {path: _sha256(path) for path in ([given] if given else [SHIPPED, SHIPPED_FAST])}
    for path, digest in digests.items():
        if digest == wanted:
            return path
    found = " and ".join(f"{path.name} has {digest}" for path, digest in digests.items())
    raise ScriptError(
        f"{original.path} was generated by the checkpoint {wanted}, but {found}. Give its checkpoint with --checkpoint"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def draw_again(original: Original, request: DrawingRequest, reporter: Reporter, out: Path | None) -> Difference:
    """Generates the picture again, writes it to `out` if given, and returns its difference from the original.

    The options of `request` that the provenance has are replaced. Raises ScriptError, CheckpointError or OSError.
    """
    provenance, digits = original.provenance, original.digits
    request = replace(
        request,
        sampler=next(sampler for sampler in SAMPLERS if sampler == provenance.sampler),
        num_steps=provenance.num_steps,
        guidance_scale=provenance.guidance_scale,
        clip_guidance_scale=provenance.clip.scale if provenance.clip else 0.0,
        clip_prompt=provenance.clip.prompt if provenance.clip else None,
    )
    if request.clip_model and not provenance.clip:
        raise ScriptError(f"--clip-model has no effect: {original.path} has no CLIP guidance. Remove the option")
    drawer = open_drawer(request)
    if max(digits) >= len(drawer.class_names):
        raise ScriptError(f"{original.path}: its checkpoint has only {len(drawer.class_names)} digits")
    options, scale = options_from(request, drawer.checkpoint), original.scale_of(drawer.checkpoint.image_shape)
    if options.clip and provenance.clip and options.clip.sha256 != provenance.clip.sha256:
        raise ScriptError(
            f"{original.path} was generated with the CLIP model {provenance.clip.sha256}, but {options.clip.model} has "
            f"the digest {options.clip.sha256}. Give the CLIP model of the picture with --clip-model"
        )
    drawer.compile(request.compile, reporter)
    y = torch.tensor(digits).repeat_interleave(len(original.indices))  # (N,)
    index = torch.tensor(original.indices).repeat(len(digits))  # (N,)
    x_0 = drawer.draw(y, index, options, reporter, seed=provenance.seed, batch_size=request.batch_size)
    small = arrange(x_0, len(digits))  # (H, W, C)
    if out:
        text = replace(provenance, software=SOFTWARE).text(_index_of(original.indices))
        write_atomically(out, encode_pixels(small.numpy(), scale=scale, text=text))
    enlarged = small.repeat_interleave(scale, dim=0).repeat_interleave(scale, dim=1)
    return Difference.between(original.pixels, enlarged, scale)


def _index_of(indices: range) -> int | str:
    return indices[0] if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"


def describe(original: Original, difference: Difference) -> str:
    """Returns the result for the user, in one line."""
    if not difference.different:
        return f"{original.path} is identical"
    release = original.provenance.software
    levels = "1 grey level" if difference.largest == 1 else f"{difference.largest} grey levels"
    cause = (
        f"It was generated by another release: {release}. This release is {SOFTWARE}"
        if release != SOFTWARE
        else "Mostly small differences mean another device, precision or compile mode. Otherwise the file was altered"
    )
    pixels = f"{difference.different} of {difference.num_pixels} pixels"
    return f"{original.path} is not identical: {pixels} differ, by at most {levels}. {cause}"
