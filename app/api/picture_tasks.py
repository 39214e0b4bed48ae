"""Turns a request with a picture into a task of the engine: where its trajectories start, and which path they follow.

The functions fit_digit, estimate_noise and MaskedPicture.fit prepare a decoded picture. They run in a worker thread.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from app import errors
from app.api.options import options_of
from app.api.picture_files import MAX_SIDE, PictureError
from app.api.pictures import Picture
from app.api.schemas import ImagesResponse, SamplingRequest
from app.api.task import Task
from app.api.task_schemas import (
    DenoiseRequest,
    DenoiseResponse,
    EditRequest,
    EditResponse,
    FittedRequest,
    InpaintRequest,
    InpaintResponse,
    RecognizeRequest,
)
from app.engine.interface import ModelInfo
from app.engine.job import Input, Options, Pixels, Search
from model.denoising import (
    DENOISING_SAMPLER,
    DENOISING_STEPS,
    NoisyComparison,
    can_compare,
    comparison_path,
    estimate_noise_std,
    matching_timestep,
    restored_image,
)
from model.digit_image import DigitImage, enlargement_of, normalise, resize_mask
from model.editing import start_timestep
from model.inpainting import INPAINTING_SCALE, NUM_LEVELS, ClassDistances, inpainting_path, recognition_path
from model.recognition import DEFAULT_NUM_PAIRS, RECOGNITION_SEED, Recognition, ink_of
from model.recognition import timesteps as recognition_timesteps
from model.sampler import Sampler, noise_above, num_steps_of, timesteps_from

Image = npt.NDArray[np.float32]  # (1, H, W) in [-1, 1]
Mask = npt.NDArray[np.bool_]  # (1, H, W)

RESPONSES: dict[str, type[ImagesResponse]] = {
    "denoise": DenoiseResponse,
    "inpaint": InpaintResponse,
    "edit": EditResponse,
}
DECIMALS = 4  # of a probability in a response
MAX_PIXELS = MAX_SIDE**2  # of all pictures of a request with a list of pictures
MASK_LEVEL = 127  # a pixel of a mask is white if its grey level is above this value


def fit_digit(body: FittedRequest, field: str, picture: Picture) -> DigitImage:
    """Converts the picture of a drawing to an image."""
    return normalise(picture.grey, body.fit, body.invert)


def estimate_noise(body: DenoiseRequest, field: str, picture: Picture) -> tuple[DigitImage, float]:
    """Converts a noisy picture to an image. Returns the image and the noise_std in grey levels."""
    image = normalise(picture.grey, "resize" if body.fit == "auto" else body.fit, body.invert)
    noise_std = estimate_noise_std(image.pixels[None]).item() if body.noise_std is None else body.noise_std
    return image, round(noise_std, 3)  # the answer has the same value, so that a client can repeat the request


class SeveralPictures:
    """Converts the pictures of a request with a list of pictures. Limits their total size to MAX_PIXELS."""

    def __init__(self) -> None:
        self._num_pixels = 0

    def fit(self, body: FittedRequest, field: str, picture: Picture) -> DigitImage:
        """Converts the next picture. Raises PictureError if all of them together are too large."""
        self._num_pixels += picture.grey.size
        if self._num_pixels > MAX_PIXELS:
            raise PictureError(
                f"This picture and those before it together exceed {MAX_PIXELS} pixels. Send fewer or smaller pictures"
            )
        return fit_digit(body, field, picture)


class MaskedPicture:
    """Resizes the mask of an inpainting request, and then its image in the same way.

    The background and the value `auto` of `invert` follow from the pixels of a picture. They must not depend on pixels
    under the mask, so these are replaced before the picture is resized.
    """

    def __init__(self, marked: str = "white", complete: str = "/generate") -> None:
        """`marked` says in errors how the mask marks pixels. `complete` is the route for complete images."""
        self._marked, self._complete = marked, complete
        self.redrawn: Mask = np.zeros(0, np.bool_)  # (1, H, W): True at the pixels to fill in
        # The mask in its original size, with 8 pixels in a byte. It is in memory while the image is decoded.
        self._packed, self._shape = np.zeros(0, np.uint8), (0, 0)

    def fit(self, body: InpaintRequest, field: str, picture: Picture) -> DigitImage | None:
        """Converts the mask or, after it, the image. Returns the image."""
        if body.fit == "digit":
            reason = "Input should be 'auto' or 'resize', because the mask must fit the image"
            raise errors.InvalidRequest.of("fit", reason)
        if field == "mask":
            self._set_mask(picture.grey > MASK_LEVEL)
            return None
        if picture.grey.shape != self._shape:
            (height, width), (own_height, own_width) = picture.grey.shape, self._shape
            sizes = f"{width}x{height} pixels, but has {own_width}x{own_height}"
            raise errors.InvalidRequest.of("mask", f"The mask must have the size of the image, {sizes}")
        grey = picture.grey
        mask = np.unpackbits(self._packed, count=grey.size).reshape(self._shape).view(np.bool_)
        if (factor := enlargement_of(grey)) > 1:  # Each pixel of the image is a block of equal pixels.
            grey, mask = grey[::factor, ::factor], _any_in_blocks(mask, factor)
            self.redrawn = mask[None]
        return normalise(_without(mask, grey), "resize", body.invert)

    def _set_mask(self, mask: npt.NDArray[np.bool_]) -> None:
        marked = self._marked
        if not mask.any():
            reason = f"The mask has no {marked} pixels. {marked.title()} pixels mark the part to fill in"
            raise errors.InvalidRequest.of("mask", reason)
        if mask.all():
            reason = f"The mask is {marked} everywhere. Use {self._complete} for a complete image"
            raise errors.InvalidRequest.of("mask", reason)
        self.redrawn = resize_mask(mask).numpy()
        if self.redrawn.all():
            reason = (
                f"The {marked} pixels of the mask cover every pixel of the image of 28x28 pixels. Mark a smaller part"
            )
            raise errors.InvalidRequest.of("mask", reason)
        self._packed, self._shape = np.packbits(mask), (mask.shape[0], mask.shape[1])


def _any_in_blocks(mask: npt.NDArray[np.bool_], factor: int) -> npt.NDArray[np.bool_]:
    """Returns for each block of factor x factor pixels of a mask (H, W) whether one of them is True."""
    height, width = mask.shape
    blocks = mask.reshape(height // factor, factor, width // factor, factor)
    return np.logical_or.reduce(blocks, axis=(1, 3))


def _without(mask: npt.NDArray[np.bool_], grey: Pixels) -> Pixels:
    """Returns the picture (H, W) with the masked pixels replaced by the background: the median of the border."""
    edges = (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1])
    border = np.concatenate([grey[edge][~mask[edge]] for edge in edges])
    return np.where(mask, np.median(border if border.size else grey[~mask]).astype(np.uint8), grey)


def recognize(info: ModelInfo, body: RecognizeRequest, image: DigitImage) -> Task:
    """Returns the task that recognises an image."""
    options, start, recognition = _recognition(info, image, body.num_pairs)
    chunks = _chunks("recognize", image, {"num_pairs": body.num_pairs})
    return Task(options, timeout=body.timeout_seconds, input=start, comparison=recognition, chunks=chunks)


def denoise(info: ModelInfo, body: DenoiseRequest, image: DigitImage, noise_std: float) -> Task:
    """Returns the task that removes noise of the standard deviation `noise_std`, in grey levels."""
    for field, value in (("num_steps", body.num_steps), ("guidance_scale", body.guidance_scale)):
        if body.mode == "mean" and value not in (None, 1):
            raise errors.InvalidRequest.of(field, "Input should be 1 for mode 'mean'")
    if body.digit is None and not info.guidable:  # The network was trained without a null label.
        raise errors.InvalidRequest.of("digit", f"Field required for model '{info.name}'")
    steps = body.num_steps or min(DENOISING_STEPS, info.max_steps)
    defaults = {"num_steps": steps, "sampler": body.sampler or _either(DENOISING_SAMPLER, info.samplers)}
    options = options_of(body.model_copy(update=defaults), body.digit, info)
    t = matching_timestep(info.schedule, noise_std)
    requested = 1 if body.mode == "mean" else options.num_steps
    facts = {"noise_std": noise_std, "mode": body.mode}
    if not t:
        task = _task("denoise", body, requested, _unchanged(options), _kept(image), image, facts)
        return replace(task, result_facts=partial(_probabilities, None))
    if body.mode == "mean":
        options = replace(options, num_steps=1, path=(t, 0), guidance_scale=1.0)
    else:
        options = _starting_at(info, options, t)
    restored: Image = restored_image(image.pixels[None], [noise_std])[0].numpy()
    signal = info.schedule.alpha_bar[options.path[0]].sqrt().item()
    task = _task("denoise", body, requested, options, Input(restored, signal, 0.0), image, facts)
    is_searched = body.digit is None and body.mode == "sample" and can_compare(info.schedule, t)
    comparison = NoisyComparison(info.num_classes, noise_std) if is_searched else None
    search = _search_in_noise(info, restored, t, comparison) if comparison else None
    return replace(task, search=search, result_facts=partial(_probabilities, comparison))


def inpaint(info: ModelInfo, body: InpaintRequest, image: DigitImage, redrawn: Mask) -> Task:
    """Returns the task that fills in the pixels `redrawn` and keeps the others."""
    steps = body.num_steps or min(NUM_LEVELS, info.max_steps)
    scale = INPAINTING_SCALE if info.guidable else 1.0
    defaults = {"num_steps": steps, "guidance_scale": body.guidance_scale or scale}
    options = options_of(body.model_copy(update=defaults), body.digit, info)
    path = tuple(inpainting_path(info.schedule, options.num_steps))
    following = replace(options, path=path, num_steps=num_steps_of(path))
    start = Input(image.x.numpy(), 0.0, 1.0, is_known=~redrawn)
    search = _search_by_known_pixels(info, options) if body.digit is None else None
    chunks = {"Mask-SHA256": hashlib.sha256(np.packbits(redrawn).tobytes()).hexdigest()}
    task = _task("inpaint", body, options.num_steps, following, start, image, {}, chunks)
    return replace(task, search=search)


def edit(info: ModelInfo, body: EditRequest, image: DigitImage) -> Task:
    """Returns the task that redraws a sketch."""
    options = options_of(body, body.digit, info)
    requested, t = options.num_steps, start_timestep(info.schedule, body.strength)
    facts = {"strength": body.strength}
    if not t:
        return _task("edit", body, requested, _unchanged(options), _kept(image), image, facts)
    options = _starting_at(info, options, t)
    start = _with_noise(info, image.x.numpy(), options.path[0])
    if body.strength == 1:
        start = replace(start, signal=0.0, noise=1.0)  # At T, a little of the sketch is left in x_t.
    search = _search_by_recognition(info, image) if body.digit is None else None
    return replace(_task("edit", body, requested, options, start, image, facts), search=search)


def _recognition(info: ModelInfo, image: DigitImage, num_pairs: int) -> tuple[Options, Input, Recognition]:
    """Returns the options and the input of a row that recognises an image, and the comparison of its classes."""
    path = (*recognition_timesteps(num_pairs, info.schedule.num_steps), 0)
    options = Options(None, RECOGNITION_SEED, num_pairs, "forward", 1.0, info.name, path)
    x_0 = image.x.numpy()
    start = _with_noise(info, x_0, path[0], is_known=np.ones_like(x_0, dtype=np.bool_))
    (ink,) = ink_of(image.x[None])
    return options, start, Recognition(info.readout, ink, num_pairs, num_steps=info.schedule.num_steps)


def _search_by_recognition(info: ModelInfo, image: DigitImage) -> Search:
    """Returns the search for the digit of an image without noise, all of whose pixels are known."""
    options, start, recognition = _recognition(info, image, DEFAULT_NUM_PAIRS)
    return Search(options, recognition, start)


def _search_in_noise(info: ModelInfo, image: Image, t: int, comparison: NoisyComparison) -> Search:
    """Returns the search for the digit of a noisy image with the matching timestep t."""
    path = tuple(comparison_path(info.schedule, t))
    num_steps = 2 * (len(path) - 1)  # with the noise and with its negative at each timestep
    options = Options(None, RECOGNITION_SEED, num_steps, "noisy", 1.0, info.name, path)
    signal, noise = noise_above(info.schedule, *path[:2])
    start = Input(image, signal, noise, np.ones_like(image, dtype=np.bool_))
    return Search(options, comparison, start)


def _probabilities(comparison: NoisyComparison | None) -> dict[str, Any]:
    """Returns the response field of a finished comparison, or of a request without a search."""
    return {"probabilities": comparison and [round(each, DECIMALS) for each in comparison.probabilities]}


def _search_by_known_pixels(info: ModelInfo, options: Options) -> Search:
    """Returns the search for the digit of an image with missing pixels."""
    path = tuple(recognition_path(info.schedule))
    options = replace(options, path=path, num_steps=num_steps_of(path), sampler="ddpm", guidance_scale=1.0)
    return Search(options, ClassDistances(info.num_classes, options.num_steps))


def _either(sampler: Sampler, permitted: Sequence[Sampler]) -> Sampler:
    """Returns the sampler if the model permits it, otherwise the one that the model recommends."""
    return sampler if sampler in permitted else permitted[0]


def check_model(info: ModelInfo) -> ModelInfo:
    """Returns the model. Raises InvalidRequest if it supports only /generate."""
    if info.steps:  # The model was trained for the noise levels of a few steps only.
        raise errors.InvalidRequest.of("model", f"The model '{info.name}' supports only /generate")
    if info.image_shape != (1, 28, 28):
        size = "x".join(map(str, info.image_shape[1:]))
        message = f"Only models for grey images of 28x28 pixels are supported, not {size}"
        raise errors.InvalidRequest.of("model", message)
    return info


def has_picture_tasks(info: ModelInfo) -> bool:
    """Returns True if the model supports the routes for pictures."""
    try:
        check_model(info)
    except errors.InvalidRequest:
        return False
    return True


def _starting_at(info: ModelInfo, options: Options, t: int) -> Options:
    """Returns options whose path starts at t. The number of steps is multiplied by t / T."""
    sampler: Sampler = options.sampler  # type: ignore[assignment] # the options of a request have a sampler
    path = tuple(timesteps_from(info.schedule, sampler, options.num_steps, t))
    return replace(options, num_steps=len(path) - 1, path=path)


def _with_noise(info: ModelInfo, image: Image, t: int, is_known: Mask | None = None) -> Input:
    """Returns the input of rows that start from the forward process at timestep t (Ho 2020, eq. 4)."""
    alpha_bar = info.schedule.alpha_bar[t]
    return Input(image, alpha_bar.sqrt().item(), (1 - alpha_bar).sqrt().item(), is_known)


def _unchanged(options: Options) -> Options:
    """Returns options for one step whose result is the image itself, if all of its pixels are known."""
    return replace(options, num_steps=1, path=(1, 0), guidance_scale=1.0)


def _kept(image: DigitImage) -> Input:
    pixels = image.x.numpy()
    return Input(pixels, 1.0, 0.0, np.ones_like(pixels, dtype=np.bool_))


def _task(
    name: str,
    body: SamplingRequest,
    num_steps: int,
    options: Options,
    start: Input,
    image: DigitImage,
    facts: dict[str, Any],
    chunks: dict[str, str] | None = None,
) -> Task:
    """Returns a task with the response fields of /denoise, /inpaint and /edit. `num_steps` is that of the request."""
    return Task(
        options,
        body.count,
        body.timeout_seconds,
        start,
        num_steps=num_steps,
        scale=body.scale,
        response=RESPONSES[name],
        facts={**facts, "fit": image.fit, "invert": image.inverted},
        chunks={**_chunks(name, image, facts), **(chunks or {})},
    )


def _chunks(name: str, image: DigitImage, facts: dict[str, Any]) -> dict[str, str]:
    """Returns the text chunks of a task with a picture."""
    digest = hashlib.sha256(image.pixels.numpy().tobytes()).hexdigest()
    named = {name.replace("_", "-").title(): str(value) for name, value in facts.items()}
    return {"Task": name, "Input-SHA256": digest, "Fit": image.fit, "Invert": str(image.inverted).lower(), **named}
