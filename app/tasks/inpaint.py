"""Fills in a part of a picture: the trajectories start from noise, and the pixels outside of the mask are known."""

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from app.engine.interface import ModelInfo
from app.engine.job import Input, Options, Pixels, Search
from app.errors import FieldError
from app.tasks.fields import GuidanceScale, NumStepsOfPath, may_be_absent
from app.tasks.from_image import PictureFields, job_of, task_of
from app.tasks.labels import Label, LabelFields, label_field, label_of
from app.tasks.pictures import decode_mask, decode_transparency
from app.tasks.preparation import Mask, decode_for, enlargement_of, prepare, resize_mask
from app.tasks.sampling import SamplingFields, options_of
from app.tasks.task import Task
from model.inpainting import INPAINTING_SCALE, NUM_LEVELS, ClassDistances, inpainting_path, recognition_path
from model.paths import num_steps_of
from model.spec import Fit

if TYPE_CHECKING:
    from model.prepared_image import PreparedImage

MASK_LEVEL = 127  # a pixel of a mask is white if its grey level is above this value


class InpaintFields(SamplingFields, LabelFields, PictureFields):
    """The fields of a request to fill in a part of a picture."""

    fit: Fit = Field(
        default="auto",
        description="How both pictures become images of the model. auto and resize: the whole picture, or its central "
        "square for a model that is not of handwriting. digit is not supported, because the mask must fit the image.",
        json_schema_extra={"enum": ["auto", "resize"]},
    )
    label: Label = label_field(
        "The class to generate: its name, or its number from 0. If absent, the class that fits the pixels outside of "
        "the mask best."
    )
    num_steps: NumStepsOfPath = Field(
        default=None,
        description="Number of noise levels, 10 by default. All but the first are repeated, so that the new pixels fit "
        "the kept pixels.",
        json_schema_extra=may_be_absent,
    )
    guidance_scale: GuidanceScale = Field(
        default=None,
        description="Scale of classifier-free guidance, 1.5 by default. A larger scale makes the border of the mask "
        "visible.",
        json_schema_extra=may_be_absent,
    )

    @field_validator("fit")
    @classmethod
    def _not_the_drawing_alone(cls, fit: Fit) -> Fit:
        if fit == "digit":
            raise ValueError("Input should be 'auto' or 'resize', because the mask must fit the image")
        return fit


class MaskedPicture:
    """Reads the mask of a request, and then its image, which is resized in the same way.

    The background and the value `auto` of `invert` follow from the pixels of a picture. They must not depend on pixels
    under the mask, so these are replaced before the picture is resized.
    """

    def __init__(self, *, marks_by_transparency: bool = False, complete: str = "/generate") -> None:
        """The mask marks pixels by white, or by transparency. `complete` is the route for complete images."""
        self._decode = decode_transparency if marks_by_transparency else decode_mask
        self._marked, self._complete = "transparent" if marks_by_transparency else "white", complete
        self.redrawn: Mask = np.zeros(0, np.bool_)  # (1, H, W): True at the pixels to fill in
        # The mask in its original size, with 8 pixels in a byte. It is in memory while the image is decoded.
        self._packed, self._shape = np.zeros(0, np.uint8), (0, 0)

    def read_mask(self, checked: tuple[InpaintFields, ModelInfo], data: bytes) -> None:
        """Reads the mask. Raises PictureError, or FieldError for a mask without pixels to fill in or to keep."""
        _, info = checked
        self._set_mask(info, self._decode(data) > MASK_LEVEL)

    def read_image(self, checked: tuple[InpaintFields, ModelInfo], data: bytes) -> "PreparedImage":
        """Reads the image. Raises PictureError, or FieldError if the mask has another size."""
        fields, info = checked
        picture = decode_for(info, data)
        height, width = picture.shape[:2]
        if (height, width) != self._shape:
            own_height, own_width = self._shape
            sizes = f"{width}x{height} pixels, but has {own_width}x{own_height}"
            raise FieldError("mask", f"The mask must have the size of the image, {sizes}")
        mask = np.unpackbits(self._packed, count=height * width).reshape(self._shape).view(np.bool_)
        if (factor := enlargement_of(info, picture)) > 1:  # Each pixel of the image is a block of equal pixels.
            picture, mask = picture[::factor, ::factor], _any_in_blocks(mask, factor)
            self.redrawn = mask[None]
        self._check(info)
        return prepare(info, _without(mask, picture), "resize", fields.invert)

    def _set_mask(self, info: ModelInfo, mask: npt.NDArray[np.bool_]) -> None:
        marked = self._marked
        if not mask.any():
            reason = f"The mask has no {marked} pixels. {marked.title()} pixels mark the part to fill in"
            raise FieldError("mask", reason)
        if mask.all():
            reason = f"The mask is {marked} everywhere. Use {self._complete} for a complete image"
            raise FieldError("mask", reason)
        self.redrawn = resize_mask(info, mask)
        self._packed, self._shape = np.packbits(mask), (mask.shape[0], mask.shape[1])

    def _check(self, info: ModelInfo) -> None:
        """Raises FieldError if no pixel of the image is to be filled in, or none is to be kept."""
        marked = self._marked
        size = "x".join(map(str, info.image_shape[1:]))
        if self.redrawn.all():
            reason = f"The {marked} pixels of the mask cover every pixel of the image of {size} pixels"
            raise FieldError("mask", f"{reason}. Mark a smaller part")
        if not self.redrawn.any():
            reason = f"The {marked} pixels of the mask are outside of the central square of the picture"
            raise FieldError("mask", f"{reason}, which becomes the image of {size} pixels")


def inpaint(info: ModelInfo, fields: InpaintFields, image: "PreparedImage", redrawn: Mask) -> Task:
    """Returns the task that fills in the pixels `redrawn` and keeps the others.

    Raises FieldError for a value that the model does not support.
    """
    steps = fields.num_steps or min(NUM_LEVELS, info.max_steps)
    scale = INPAINTING_SCALE if info.guidable else 1.0
    defaults = {"num_steps": steps, "guidance_scale": fields.guidance_scale or scale}
    label = label_of(info, fields)
    options = options_of(fields.model_copy(update=defaults), label, info)
    path = tuple(inpainting_path(info.schedule, options.num_steps))
    following = replace(options, path=path, num_steps=num_steps_of(path))
    x = image.x.numpy()  # (C, H, W)
    start = Input(x, 0.0, 1.0, is_known=np.broadcast_to(~redrawn, x.shape).copy())
    search = _search_by_known_pixels(info, options) if label is None else None
    job = job_of(info, fields, following, start, search)
    chunks = {"Mask-SHA256": hashlib.sha256(np.packbits(redrawn).tobytes()).hexdigest()}
    return task_of("inpaint", info, fields, image, job, num_steps=options.num_steps, facts={}, chunks=chunks)


def _search_by_known_pixels(info: ModelInfo, options: Options) -> Search:
    """Returns the search for the class of an image with missing pixels."""
    path = tuple(recognition_path(info.schedule))
    options = replace(options, path=path, num_steps=num_steps_of(path), sampler="ddpm", guidance_scale=1.0)
    return Search(options, ClassDistances(info.num_classes, options.num_steps))


def _any_in_blocks(mask: npt.NDArray[np.bool_], factor: int) -> npt.NDArray[np.bool_]:
    """Returns for each block of factor x factor pixels of a mask (H, W) whether one of them is True."""
    height, width = mask.shape
    blocks = mask.reshape(height // factor, factor, width // factor, factor)
    return np.logical_or.reduce(blocks, axis=(1, 3))


def _without(mask: npt.NDArray[np.bool_], picture: Pixels) -> Pixels:
    """Returns the picture with the masked pixels replaced by the background: the median of the border.

    The picture is (H, W) or (H, W, 3).
    """
    edges = (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1])
    border = np.concatenate([picture[edge][~mask[edge]] for edge in edges])  # (N,) or (N, 3)
    background = np.median(border if border.size else picture[~mask], axis=0).astype(np.uint8)
    return np.where(mask if picture.ndim == 2 else mask[..., None], background, picture)
