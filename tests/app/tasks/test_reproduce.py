import io
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.engine.interface import ClipInfo
from app.engine.job import ImageKey, Pixels
from app.tasks.images import encode_image, encode_sheet
from app.tasks.picture_files import PictureError
from app.tasks.reproduce import Original, read_original
from model.png import SOFTWARE, ClipProvenance, Provenance
from model.prompts import digit_prompt
from tests.app.fakes import INFO
from tests.app.picture_samples import exif, png, zeros

GREY = replace(INFO, image_shape=(1, 2, 3))
COLOUR = replace(INFO, name="colour", sha256="c" * 64, image_shape=(3, 2, 3))
FAST = replace(INFO, name="fast", sha256="f" * 64, image_shape=(1, 2, 3), steps=(4,), samplers=("ddim",))
MODELS = {"default": GREY, "colour": COLOUR, "fast": FAST}
PROVENANCE = Provenance(("7",), 42, "ddim", 20, 1.5, GREY.sha256)
CLIP = ClipInfo("embedded", "e" * 64)
SHAPES = {"default": (2, 3), "colour": (2, 3, 3)}


def picture(number: int = 0, shape: tuple[int, ...] = (2, 3)) -> Pixels:
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def pictures(count: int, shape: tuple[int, ...] = (2, 3)) -> list[Pixels]:
    return [picture(number, shape) for number in range(count)]


def read(data: bytes) -> Original:
    return read_original(data, MODELS, CLIP, 64)


def having(
    text: Mapping[str, str] | None = None, pixels: Pixels | None = None, scale: int = 1, **changed: str
) -> bytes:
    """Returns the file of a picture, with other text chunks."""
    chunks = PROVENANCE.text(0) | {name.replace("_", "-"): value for name, value in changed.items()}
    return encode_image(picture() if pixels is None else pixels, scale, {**chunks, **(text or {})})


def facts(data: bytes, images: list[Pixels]) -> dict[str, Any]:
    return read(data).compare(images)


IDENTICAL = {"identical": True, "reason": None, "different_pixels": 0, "largest_difference": 0}


@pytest.mark.parametrize("model", ["default", "colour"])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
@pytest.mark.parametrize("scale", [1, 3, 16])
def test_untouched_picture_is_identical(model: str, count: int, scale: int) -> None:
    images = pictures(count, SHAPES[model])
    provenance = replace(PROVENANCE, model_sha256=MODELS[model].sha256)
    original = read(encode_sheet(images, provenance, scale))
    task = original.task
    assert (task.scale, task.job.count, task.options.model) == (scale, count, model)
    assert original.compare(images) == IDENTICAL


def test_task_generates_the_image_with_the_noise_of_its_index() -> None:
    task = read_original(encode_image(picture(), 4, PROVENANCE.text(5)), MODELS, CLIP, 64, timeout=7.5).task
    assert (task.job.count, task.scale, task.job.timeout, task.num_steps) == (1, 4, 7.5, 20)
    assert task.job.images == (ImageKey(7, 42, 5),)
    options = task.options
    assert (options.label, options.seed, options.num_steps, options.sampler) == (7, 42, 20, "ddim")
    assert (options.guidance_scale, options.model) == (1.5, "default")


def test_task_of_a_sheet_generates_every_image() -> None:
    job = read(encode_sheet(pictures(9), PROVENANCE, 1)).task.job
    assert (job.count, job.images, job.timeout) == (9, (), None)


@pytest.mark.parametrize("scale", [1, 4])
def test_difference_is_counted_in_pixels_before_the_enlargement(scale: int) -> None:
    pixels = np.full((2, 3), 100, np.uint8)
    changed = np.kron(pixels, np.ones((scale, scale), np.uint8))
    changed[0, 0], changed[-1, -1] = 90, 255
    assert facts(having(pixels=changed), [pixels]) == {
        "identical": False,
        "reason": "other_pixels",
        "different_pixels": 2,
        "largest_difference": 155,
    }


def test_pixel_that_differs_in_several_colours_counts_once() -> None:
    pixels = picture(0, (2, 3, 3)) // 2
    changed = pixels.copy()
    changed[1, 2] += np.array([1, 2, 9], np.uint8)
    found = facts(having(pixels=changed, Model_SHA256=COLOUR.sha256), [pixels])
    assert (found["different_pixels"], found["largest_difference"]) == (1, 9)


def test_black_and_white_differ_by_255() -> None:
    black, white = np.zeros((2, 3), np.uint8), np.full((2, 3), 255, np.uint8)
    for one, other in ((black, white), (white, black)):
        found = facts(having(pixels=one), [other])
        assert (found["different_pixels"], found["largest_difference"]) == (6, 255)


def test_altered_empty_cell_of_a_sheet_is_found() -> None:
    images = pictures(3)
    with Image.open(io.BytesIO(encode_sheet(images, PROVENANCE, 1))) as image:
        sheet = np.array(image)
    sheet[-1, -1] = 1
    assert facts(encode_image(sheet, 1, PROVENANCE.text("0-2")), images)["different_pixels"] == 1


def test_reason_is_another_release_only_if_the_pixels_differ() -> None:
    other = {"Software": f"{SOFTWARE}.1"}
    assert facts(having(other), [picture()]) == IDENTICAL
    assert facts(having(other), [picture(1)])["reason"] == "other_release"
    assert facts(having(), [picture(1)])["reason"] == "other_pixels"


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "JPEG")
    return buffer.getvalue()


def as_png(image: Image.Image, **options: Any) -> bytes:
    """Returns the file of an image with the text chunks of PROVENANCE."""
    chunks, buffer = PngInfo(), io.BytesIO()
    for name, value in PROVENANCE.text(0).items():
        chunks.add_text(name, value)
    image.save(buffer, "PNG", pnginfo=chunks, **options)
    return buffer.getvalue()


L = Image.fromarray(picture())
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "The file is empty"),
    "text": (b"hello", "not a PNG, JPEG, WebP or GIF picture"),
    "jpeg": (jpeg(), "not a PNG file"),
    "without provenance": (encode_image(picture()), "has no text chunk Software"),
    "without the digest": (encode_image(picture(), 1, {**PROVENANCE.text(0), "Model-SHA256": ""}), "Model-SHA256 must"),
    "another task": (having(Task="edit"), "was made from another picture"),
    "another checkpoint": (having(Model_SHA256="e" * 64), f"{'e' * 64}, which is not served. .* 'fast' \\(f{{64}}\\)"),
    "several classes": (having(Digit="7,2", Label='["7", "2"]'), "several classes.* scripts.sample --like"),
    "too many images": (having(Index="0-64"), "has 65 images. At most 64"),
    "huge range": (having(Index="0-999999999"), "The text chunk Index must be"),
    "range without a sheet": (having(Index="0-8"), "has 3 x 2 pixels. .*\\(9\\), .* 9 x 6 pixels"),
    "another size": (having(pixels=picture(0, (2, 4))), "has 4 x 2 pixels"),
    "two scales": (having(pixels=picture(0, (2, 6))), "has 6 x 2 pixels"),
    "too small": (having(pixels=picture(0, (1, 1))), "has 1 x 1 pixels"),
    "too large a scale": (having(pixels=np.kron(picture(), np.ones((17, 17), np.uint8))), "a scale of 1 to 16"),
    "colour": (having(pixels=picture(0, (2, 3, 3))), "8 bits of grey"),
    "grey of a colour model": (having(Model_SHA256=COLOUR.sha256), "8 bits of RGB"),
    "palette": (as_png(L.convert("P")), "8 bits of grey"),
    "alpha": (as_png(L.convert("LA")), "8 bits of grey"),
    "one bit": (as_png(L.convert("1")), "8 bits of grey"),
    "sixteen bits": (as_png(L.convert("I;16")), "8 bits of grey"),
    "transparent colour": (as_png(L, transparency=0), "and no transparency"),
    "turned": (as_png(L, exif=exif(6)), "8 bits of grey"),
    "too many steps": (having(Steps="101"), "Steps is not permitted. Input should be less than or equal to 100"),
    "unsupported steps": (having(Model_SHA256=FAST.sha256), "Steps is not permitted. Input should be 4 for"),
    "unsupported sampler": (having(Model_SHA256=FAST.sha256, Sampler="ddpm"), "Sampler is not permitted"),
    "truncated": (having()[:-30], "incomplete or damaged"),
    "damaged pixels": (having().replace(b"IDATx", b"IDATy"), "incomplete or damaged"),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_picture_that_cannot_be_generated_again_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        read(data)


def test_digit_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(PictureError, match=r"Digit is not permitted\. Input should be less than or equal to 4"):
        read_original(having(), {"default": replace(GREY, class_names=tuple("01234"))}, None, 64)


def test_guidance_that_the_model_does_not_support_is_refused() -> None:
    with pytest.raises(PictureError, match=r"Guidance-Scale is not permitted\. Input should be 1"):
        read_original(having(), {"default": replace(GREY, guidable=False)}, None, 64)


def test_pixels_are_not_decoded_before_the_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.tasks.reproduce.Image.open", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="has no text chunk"):
        read(png(4096, 4096, zeros(4096 * 4097)))
    with pytest.raises(PictureError, match="has 6 x 2 pixels"):
        read(having(pixels=picture(0, (2, 6))))


def test_incomplete_pixels_are_refused() -> None:
    chunks = having()
    start = chunks.index(b"tEXt") - 4
    text = chunks[start : chunks.index(b"IDAT") - 4]
    with pytest.raises(PictureError, match="incomplete or damaged"):
        read(png(3, 2, zlib.compress(bytes(3)), [text]))


def guided(prompt: str | None = "a thick seven", sha256: str = CLIP.sha256) -> dict[str, str]:
    return replace(PROVENANCE, clip=ClipProvenance(1.5, prompt, sha256)).text(0)


@pytest.mark.parametrize("prompt", [None, "a thick seven", "\u4e03"])
def test_options_of_a_picture_with_clip_guidance_are_read(prompt: str | None) -> None:
    options = read(having(guided(prompt))).task.options
    assert (options.clip_guidance_scale, options.clip_prompt) == (1.5, prompt or digit_prompt(7))


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (None, f"the CLIP model {'e' * 64}. This service has no CLIP model"),
        (ClipInfo("other", "d" * 64), f"the CLIP model {'e' * 64}. This service has the CLIP model 'other' (dddd"),
    ],
)
def test_picture_of_another_clip_model_is_refused(clip: ClipInfo | None, message: str) -> None:
    with pytest.raises(PictureError) as raised:
        read_original(having(guided()), MODELS, clip, 64)
    assert message in str(raised.value)


def test_picture_without_clip_guidance_needs_no_clip_model() -> None:
    assert read_original(having(), MODELS, None, 64).task.options.clip_guidance_scale == 0
