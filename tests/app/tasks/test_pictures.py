import contextlib
import io
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image, ImageOps

from app.tasks import picture_files
from app.tasks.picture_files import MAX_BLOCKS, MAX_CHUNKS, MAX_SCANS, MAX_SIDE, PictureError, inspect
from app.tasks.pictures import decode, decode_transparency
from tests.app.picture_samples import DRAWING, SIGNATURE, animation, chunk, encode, exif, grey, png, zeros

RGB = np.stack([DRAWING, DRAWING // 2, 255 - DRAWING], axis=-1)
TINY = png(2, 2, zeros(6))


def expected(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"))


def message_of(data: bytes) -> str:
    with pytest.raises(PictureError) as refused:
        decode(data)
    return str(refused.value)


# Modes


@pytest.mark.parametrize("name", ["PNG", "WEBP", "GIF"])
def test_grey_picture_keeps_its_pixels(name: str) -> None:
    options = {"lossless": True, "exact": True} if name == "WEBP" else {}
    picture = decode(encode(grey(), name, **options))
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, DRAWING)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_is_decoded_to_its_brightness(mode: str, progressive: bool) -> None:
    image = Image.fromarray(RGB).convert(mode)
    data = encode(image, "JPEG", quality=95, subsampling=0 if mode == "RGB" else -1, progressive=progressive)
    truth = expected(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(decode(data) - truth).max() <= 8  # the colours between are clipped, the brightness is not


def test_colour_becomes_brightness() -> None:
    image = Image.fromarray(RGB)
    np.testing.assert_array_equal(decode(encode(image, "PNG")), expected(image))


def test_picture_with_1_bit_becomes_black_and_white() -> None:
    np.testing.assert_array_equal(decode(encode(grey().convert("1"), "PNG")), DRAWING)


def test_picture_with_a_palette_has_the_brightness_of_its_colours() -> None:
    image = Image.fromarray(RGB).quantize(8)
    np.testing.assert_array_equal(decode(encode(image, "PNG")), expected(image))


def test_picture_with_16_bits_is_scaled_and_not_clipped() -> None:
    deep = np.array([[0, 256, 32896, 65535]], np.uint16)
    assert decode(encode(Image.fromarray(deep), "PNG")).tolist() == [[0, 1, 128, 255]]


def test_picture_higher_than_a_band_is_complete() -> None:
    rows = np.arange(1000, dtype=np.uint32)[:, None] * np.ones((1, 3), np.uint32)
    pixels = (rows * 7 % 256).astype(np.uint8)
    np.testing.assert_array_equal(decode(encode(grey(pixels), "PNG")), pixels)


# Transparency


def with_alpha(level: int, mode: str) -> Image.Image:
    """Strokes of this grey level. Everything else is transparent and has the same colour."""
    image = Image.new("L", DRAWING.shape[::-1], level).convert(mode)
    image.putalpha(grey())
    return image


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_black_strokes_on_transparency_are_placed_on_white(mode: str) -> None:
    np.testing.assert_array_equal(decode(encode(with_alpha(0, mode), "PNG")), 255 - DRAWING)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_white_strokes_on_transparency_are_placed_on_black(mode: str) -> None:
    np.testing.assert_array_equal(decode(encode(with_alpha(255, mode), "PNG")), DRAWING)


def test_half_transparent_pixels_are_mixed_with_the_background() -> None:
    image = with_alpha(0, "RGBA")
    image.putalpha(grey(DRAWING // 2))
    assert set(np.unique(decode(encode(image, "PNG")))) == {128, 255}


def test_transparent_corners_of_a_sheet_have_the_colour_of_the_sheet() -> None:
    sheet = grey(255 - DRAWING).convert("RGBA")
    alpha = np.full_like(DRAWING, 255)
    alpha[:2, :2] = 0
    sheet.putalpha(grey(alpha))
    np.testing.assert_array_equal(decode(encode(sheet, "PNG")), 255 - DRAWING)


def test_transparent_colour_of_a_palette_is_background() -> None:
    image = grey(np.where(DRAWING, 1, 0).astype(np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 0])
    for name in ("PNG", "GIF"):
        np.testing.assert_array_equal(decode(encode(image, name, transparency=0)), 255 - DRAWING)


def test_transparent_grey_level_with_16_bits_is_background() -> None:
    key = chunk(b"tRNS", (1000).to_bytes(2, "big"))
    pixels = b"\0" + (1000).to_bytes(2, "big") + (0).to_bytes(2, "big") + (1000).to_bytes(2, "big")
    assert decode(png(3, 1, zlib.compress(pixels), [key], depth=16)).tolist() == [[255, 0, 255]]


@pytest.mark.parametrize(
    ("depth", "colour", "key", "pixels"),
    [
        (2, 0, b"\0\1", b"\0\x54"),  # the grey levels 1, 1, 1, 0
        (4, 0, b"\0\1", b"\0\x11\x10"),
        (16, 2, b"\3\xe8" * 3, b"\0" + b"\3\xe8" * 9 + b"\0\0" * 3),
    ],
    ids=["grey, 2 bits", "grey, 4 bits", "colour, 16 bits"],
)
def test_transparent_colour_is_scaled_like_the_pixels(depth: int, colour: int, key: bytes, pixels: bytes) -> None:
    data = png(4, 1, zlib.compress(pixels), [chunk(b"tRNS", key)], depth=depth, colour=colour)
    assert decode(data).tolist() == [[255, 255, 255, 0]]


@pytest.mark.parametrize("name", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_marks_the_pixels_with_alpha_0(mode: str, name: str) -> None:
    image = with_alpha(200, mode)
    image.putalpha(grey(np.where(DRAWING, 0, 1).astype(np.uint8)))
    marked = decode_transparency(encode(image.convert("RGBA" if name == "WEBP" else mode), name, lossless=True))
    np.testing.assert_array_equal(marked, DRAWING)


def test_transparency_of_a_palette_and_of_a_colour_marks_pixels() -> None:
    image = grey(np.where(DRAWING, 1, 0).astype(np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 0])
    for name in ("PNG", "GIF"):
        np.testing.assert_array_equal(decode_transparency(encode(image, name, transparency=1)), DRAWING)
    key = chunk(b"tRNS", b"\3\xe8")
    data = png(3, 1, zlib.compress(b"\0\3\xe8\0\0\3\xe8"), [key], depth=16)
    assert decode_transparency(data).tolist() == [[255, 0, 255]]


def test_transparency_of_a_mask_higher_than_a_band_is_complete_and_upright() -> None:
    alpha = np.random.default_rng(0).integers(0, 2, (150, 40), np.uint8)
    image = Image.fromarray(np.dstack([np.zeros_like(alpha), alpha]), "LA")
    np.testing.assert_array_equal(decode_transparency(encode(image, "PNG")), np.where(alpha, 0, 255))
    turned = decode_transparency(encode(image, "PNG", exif=exif(3)))
    np.testing.assert_array_equal(turned, np.where(alpha, 0, 255)[::-1, ::-1])


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_mask_without_transparency_is_refused(name: str) -> None:
    with pytest.raises(PictureError, match="The mask has no transparency"):
        decode_transparency(encode(grey().convert("RGB"), name))


def test_damaged_mask_is_refused() -> None:
    with pytest.raises(PictureError, match="incomplete or damaged"):
        decode_transparency(encode(with_alpha(0, "LA"), "PNG")[:-30])


def test_completely_transparent_picture_is_uniform() -> None:
    image = with_alpha(255, "RGBA")
    image.putalpha(0)
    assert len(np.unique(decode(encode(image, "PNG")))) == 1


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_applied(name: str, orientation: int) -> None:
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(name, {})
    data = encode(grey(), name, exif=exif(orientation), **options)
    truth = expected(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    assert decode(data).shape == truth.shape
    assert np.abs(decode(data) - truth).max() <= 2


@pytest.mark.parametrize("metadata", [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", exif(6)[:20]])
def test_damaged_metadata_is_ignored(metadata: bytes) -> None:
    data = png(2, 2, zeros(6), [chunk(b"eXIf", metadata)])
    assert decode(data).shape == (2, 2)


# Files that are refused


@pytest.mark.parametrize(
    "data", [b"hello", b"%PDF-1.7", b"<svg/>", b"BM" + bytes(60), b"II*\0" + bytes(60), b"\xff\xd8"]
)
def test_file_of_another_format_is_refused(data: bytes) -> None:
    assert "not a PNG, JPEG, WebP or GIF picture" in message_of(data)


def test_empty_file_is_refused() -> None:
    assert "empty" in message_of(b"")


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF"])
def test_file_that_ends_early_is_refused(name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)
    data = encode(grey(noise), name)
    for length in {*range(12, len(data) * 3 // 4, 37), len(data) // 2}:
        assert "Save it again" in message_of(data[:length])


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_file_is_decoded_or_refused_with_a_message(name: str) -> None:
    data = encode(Image.fromarray(RGB), name)
    random = np.random.default_rng(1)
    for _ in range(300):
        changed = bytearray(data)
        for position in random.integers(8, len(data), 3):
            changed[position] = random.integers(256)
        try:
            assert decode(bytes(changed)).ndim == 2
        except PictureError as error:
            assert str(error)[-1] != "."


def test_changed_byte_in_png_pixels_is_refused() -> None:
    data = bytearray(encode(grey(), "PNG"))
    data[data.index(b"IDAT") + 8] ^= 1
    assert "damaged" in message_of(bytes(data))


@pytest.mark.parametrize(("name", "num_frames"), [("GIF", 2), ("GIF", 10_000), ("PNG", 2), ("WEBP", 2)])
def test_animated_picture_is_refused(name: str, num_frames: int) -> None:
    assert message_of(animation(name, num_frames)) == "The picture is animated. Send a picture with a single frame"


@pytest.mark.parametrize("name", ["PNG", "GIF", "WEBP"])
def test_animation_of_a_single_frame_is_a_picture(name: str) -> None:
    assert decode(animation(name, 1)).shape == (4, 4)


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (2**31, 1)])
def test_too_large_picture_is_refused_by_its_header(width: int, height: int) -> None:
    text = message_of(png(width, height, b""))
    assert f"{width} x {height} pixels" in text
    assert f"At most {MAX_SIDE} x {MAX_SIDE}" in text


def test_frame_that_enlarges_a_gif_counts_for_its_size() -> None:
    data = bytearray(encode(grey(), "GIF"))
    at = data.index(b"\x2c")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    assert "At most" in message_of(bytes(data))


@pytest.mark.parametrize("size", [(MAX_SIDE, 1), (1, MAX_SIDE)])
def test_longest_permitted_side_is_accepted(size: tuple[int, int]) -> None:
    assert decode(encode(Image.new("L", size), "PNG")).shape == size[::-1]


@pytest.mark.parametrize(
    ("data", "most"),
    [
        (b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (2048).to_bytes(3, "little") * 2, "4194304"),
        (b"\xff\xd8\xff\xc2\0\x11\x08\x0f\xff\x0f\xff\x03" + bytes(9) + b"\xff\xda\0\x0c\x03", "12582912"),
        (b"\xff\xd8\xff\xc0\0\x11\x08\x0f\xff\x0f\xff\x03" + bytes(9) + b"\xff\xda\0\x08\x01", "12582912"),
        (b"\xff\xd8\xff\xc2\0\x14\x08\x0f\xff\x0f\xff\x04" + bytes(12) + b"\xff\xda\0\x0e\x04", "4194304"),
        (b"\xff\xd8\xff\xc0\0\x14\x08\x0f\xff\x0f\xff\x04" + bytes(12) + b"\xff\xff\xda\0\x08\x01", "4194304"),
    ],
    ids=["WebP", "progressive JPEG", "JPEG with a scan for each colour", "progressive CMYK JPEG", "CMYK, fill byte"],
)
def test_format_whose_decoder_needs_much_memory_has_a_lower_limit(data: bytes, most: str) -> None:
    assert f"at most {most} pixels" in message_of(data)


def test_jpeg_with_many_scans_is_refused() -> None:
    data = encode(grey(), "JPEG", progressive=True)
    last, missing = data.rindex(b"\xff\xda"), MAX_SCANS - data.count(b"\xff\xda")
    most, too_many = (data[:-2] + data[last:-2] * count + b"\xff\xd9" for count in (missing, missing + 1))
    assert inspect(most).format == "JPEG"
    assert f"more than {MAX_SCANS} scans" in message_of(too_many)


def test_gif_whose_frame_lies_outside_of_it_is_enlarged() -> None:
    data = bytearray(encode(grey(), "GIF"))
    start = data.index(b"\x2c\0\0\0\0")
    data[start + 1 : start + 5] = b"\3\0\2\0"  # 3 pixels from the left and 2 from the top
    height, width = DRAWING.shape
    assert decode(bytes(data)).shape == (height + 2, width + 3)


def test_png_with_two_sizes_is_damaged() -> None:
    """The size that is checked is that of the first header. The decoder uses the last one."""
    data = encode(grey(), "PNG")
    height, width = DRAWING.shape
    header = chunk(b"IHDR", (width + 1).to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29])
    assert "damaged" in message_of(SIGNATURE + header + data[len(SIGNATURE) :])


@pytest.mark.parametrize(("num_opaque", "level", "background"), [(7, 250, 255), (7, 5, 0), (3, 250, 0), (3, 5, 255)])
def test_transparent_pixels_continue_a_background_or_make_strokes_visible(
    num_opaque: int, level: int, background: int
) -> None:
    """More than half of the picture is opaque if it has a background."""
    pixels = np.zeros((10, 10, 2), np.uint8)
    pixels[:num_opaque] = level, 255
    picture = decode(encode(Image.fromarray(pixels, "LA"), "PNG"))
    assert (picture[:num_opaque] == level).all()
    assert (picture[num_opaque:] == background).all()


def test_gif_with_many_data_blocks_is_refused() -> None:
    data = b"GIF89a\2\0\2\0\0\0\0"
    empty = data + b"\x21\xfe\0" * (MAX_BLOCKS + 1)
    short = data + b"\x21\xfe" + b"\1a" * (MAX_BLOCKS + 1) + b"\0"
    for each in (empty, short):
        assert f"more than {MAX_BLOCKS} data blocks" in message_of(each)


def test_time_to_inspect_a_file_does_not_grow_with_bytes_that_are_skipped() -> None:
    """Counts the executed lines of the module, because times depend on the machine."""
    exif_chunk = chunk(b"eXIf", b"II*\0\x08\0\0\0" + (1000).to_bytes(2, "little") + bytes(12_000))
    files = {
        "fill bytes": lambda size: b"\xff\xd8\xff\xfe\0\2" + b"\xff" * size + b"\xda\0\x08\1",
        "EXIF": lambda size: png(2, 2, zeros(6), [exif_chunk] * (size // 1000)),
    }
    for name, make in files.items():
        few, many = (lines_executed(make(size)) for size in (10_000, 100_000))
        assert many < few + 3000, name


def lines_executed(data: bytes) -> int:
    """Returns the number of lines of app/tasks/picture_files.py that `inspect` executes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> object:
        nonlocal count
        if frame.f_code.co_filename != picture_files.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(picture_files.PictureError):
            picture_files.inspect(data)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "data",
    [
        png(2, 2, zeros(6), [chunk(b"tEXt")] * MAX_CHUNKS),
        b"\xff\xd8" + b"\xff\xe1\0\2" * (MAX_CHUNKS + 1),
    ],
    ids=["PNG", "JPEG"],
)
def test_file_with_many_parts_is_refused(data: bytes) -> None:
    assert f"more than {MAX_CHUNKS}" in message_of(data)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (
            "PNG",
            lambda: png(
                2, 2, zeros(6), [chunk(b"iCCP", b"p\0\0" + zeros(2**24)), chunk(b"zTXt", b"t\0\0" + zeros(2**24))]
            ),
        ),
        ("JPEG", lambda: encode(grey(), "JPEG", icc_profile=bytes(60_000), comment=b"c" * 60_000)),
        ("GIF", lambda: encode(grey(), "GIF", comment=b"c" * 60_000)),
    ],
)
def test_metadata_is_removed_before_decoding(name: str, make: Callable[[], bytes]) -> None:
    data = make()
    file = inspect(data)
    assert len(file.data) < 2000
    with Image.open(io.BytesIO(file.data), formats=[name]) as image:
        image.load()
        assert not {"icc_profile", "comment", "t"} & set(image.info)


def test_format_is_not_guessed_by_pillow() -> None:
    """An icon or a TIFF file within a PNG header would otherwise reach other decoders."""
    assert set(picture_files._READERS) == {"PNG", "JPEG", "WebP", "GIF"}
    assert "damaged" in message_of(SIGNATURE + bytes(100))


# Memory

PEAKS = """
import sys
from app.tasks.pictures import decode, decode_transparency

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

small, large = (group.split(",") for group in sys.argv[1:])
for path in small + large:
    with open(path, "rb") as file:
        data = file.read()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM, the peak
    before = memory("VmRSS")
    shape = (decode_transparency if "mask" in path else decode)(data).shape
    if path in large:
        print((memory("VmHWM") - before) // 1024)
"""
LARGE: dict[str, Callable[[], bytes]] = {
    "RGBA PNG": lambda: png(MAX_SIDE, MAX_SIDE, zeros((4 * MAX_SIDE + 1) * MAX_SIDE), colour=6),
    "RGBA PNG as a mask": lambda: png(MAX_SIDE, MAX_SIDE, zeros((4 * MAX_SIDE + 1) * MAX_SIDE), colour=6),
    "CMYK JPEG": lambda: encode(Image.new("CMYK", (MAX_SIDE, MAX_SIDE)), "JPEG"),
    "progressive JPEG": lambda: encode(Image.new("RGB", (4032, 3024)), "JPEG", progressive=True, subsampling=0),
    "WebP": lambda: encode(Image.new("RGBA", (2048, 2048)), "WEBP", method=0),
    "more data than the stated size": lambda: png(1, 1, zeros(2**28)),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_largest_permitted_picture_needs_at_most_100_megabytes(tmp_path: Path) -> None:
    """The small pictures load the decoders, so that their memory is not counted."""
    files = {
        **{name: encode(Image.new("RGB", (8, 8)), name) for name in ("PNG", "JPEG", "WEBP", "GIF")},
        **{name: make() for name, make in LARGE.items()},
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    small = ",".join(str(tmp_path / name) for name in files if name not in LARGE)
    large = ",".join(str(tmp_path / name) for name in LARGE)
    done = subprocess.run([sys.executable, "-c", PEAKS, small, large], capture_output=True, text=True, check=True)
    peaks = dict(zip(LARGE, map(int, done.stdout.split()), strict=True))
    assert max(peaks.values()) <= 100, peaks
    assert peaks["RGBA PNG"] >= 64  # shows that the measurement works
    assert peaks["more data than the stated size"] <= 5
