"""Reads the PNG files back with Pillow."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from model.png import (
    CHUNKS,
    MAX_INDEX,
    MAX_SEED,
    MAX_STEPS,
    SOFTWARE,
    ClipProvenance,
    Provenance,
    ProvenanceError,
    encode_pixels,
    encode_png,
    sheet_shape,
)
from model.spec import SAMPLERS

PROVENANCE = Provenance(
    labels=("7",), seed=2**53 - 1, sampler="ddim", num_steps=20, guidance_scale=1.5, model_sha256="ab" * 32
)


def test_text_chunks_contain_all_generation_parameters() -> None:
    png = encode_png(Image.new("L", (2, 3)), text=PROVENANCE.text(4))
    with Image.open(io.BytesIO(png)) as image:
        assert image.info == {
            "Software": SOFTWARE,
            "Digit": "7",
            "Label": "7",
            "Seed": "9007199254740991",
            "Index": "4",
            "Sampler": "ddim",
            "Steps": "20",
            "Guidance-Scale": "1.5",
            "Model-SHA256": "ab" * 32,
        }


def test_scale_enlarges_each_pixel_to_a_square() -> None:
    pixels = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(Image.fromarray(pixels), scale=3))) as image:
        assert np.array_equal(np.asarray(image), np.kron(pixels, np.ones((3, 3), np.uint8)))
        assert image.info == {}


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (3, 5), (224, 224), (32, 32, 3), (1, 7, 3)])
@pytest.mark.parametrize("largest", [0, 1, 255])
def test_file_of_pixels_has_the_same_pixels_and_text_as_the_file_of_pillow(
    shape: tuple[int, ...], largest: int
) -> None:
    pixels = np.random.default_rng(1).integers(0, largest, shape, dtype=np.uint8, endpoint=True)
    files = encode_pixels(pixels, text=PROVENANCE.text(4)), encode_png(Image.fromarray(pixels), text=PROVENANCE.text(4))
    for png in files:
        with Image.open(io.BytesIO(png)) as image:
            image.verify()  # checks the checksums of the chunks
    own, expected = (Image.open(io.BytesIO(png)) for png in files)
    assert (own.format, own.mode, own.info) == ("PNG", expected.mode, expected.info)
    assert np.array_equal(np.asarray(own), pixels)


def test_pixels_that_are_not_contiguous_are_encoded() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)[::-2, ::2]
    with Image.open(io.BytesIO(encode_pixels(pixels))) as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert image.info == {}


def test_pixels_with_one_channel_are_grey() -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert encode_pixels(pixels) == encode_pixels(pixels[..., 0])
    assert encode_pixels(pixels, scale=2) == encode_png(Image.fromarray(pixels[..., 0]), scale=2)


def test_text_that_is_not_ascii_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        encode_pixels(np.zeros((1, 1), dtype=np.uint8), text={"CLIP-Prompt": "\N{LATIN SMALL LETTER E WITH ACUTE}"})


def chunks(**changed: str) -> dict[str, str]:
    """Returns the chunks of a valid picture, with other values for some names. `_` in a name is replaced by `-`."""
    return {**PROVENANCE.text(4), **{name.replace("_", "-"): value for name, value in changed.items()}}


@pytest.mark.parametrize(("index", "indices"), [(0, range(1)), (5, range(5, 6)), ("0-1", range(2)), ("0-8", range(9))])
def test_parsed_chunks_equal_the_written_provenance(index: int | str, indices: range) -> None:
    found, parsed = Provenance.parse(PROVENANCE.text(index))
    assert parsed == indices
    assert found == replace(PROVENANCE, first_index=indices[0])
    assert found.text(index) == PROVENANCE.text(index)


def test_chunks_of_a_sheet_of_several_digits_are_parsed() -> None:
    found, indices = Provenance.parse(replace(PROVENANCE, labels=("7", "0", "2")).text("0-2"))
    assert (found.labels, indices) == (("7", "0", "2"), range(3))


NAMED = replace(PROVENANCE, has_digits=False)


@pytest.mark.parametrize(
    ("labels", "chunk"),
    [
        (("truck",), "truck"),
        (("fire truck, red",), "fire truck, red"),
        (("caf\N{LATIN SMALL LETTER E WITH ACUTE}",), r'"caf\u00e9"'),
        (('"quoted"',), r'"\"quoted\""'),
        (("[1]",), '"[1]"'),
        (("7",), "7"),
        (("cat", "dog"), '["cat", "dog"]'),
        (("a" * 100,), "a" * 100),
    ],
)
def test_names_of_other_classes_are_written_and_parsed(labels: tuple[str, ...], chunk: str) -> None:
    text = replace(NAMED, labels=labels).text(0)
    assert text["Label"] == chunk
    assert "Digit" not in text
    assert encode_pixels(np.zeros((1, 1), dtype=np.uint8), text=text)
    found, _ = Provenance.parse(text)
    assert (found.labels, found.has_digits) == (labels, False)


def test_label_that_differs_from_the_digit_is_refused() -> None:
    with pytest.raises(ProvenanceError, match="The text chunk Label must be"):
        Provenance.parse(chunks(Label="4"))


def test_files_of_digits_without_a_label_are_parsed() -> None:
    text = chunks()
    del text["Label"]
    assert Provenance.parse(text)[0] == Provenance.parse(chunks())[0]


@pytest.mark.parametrize(
    "label",
    [
        '"',
        "[",
        "[]",
        "[1]",
        '["a", "a"]',
        '""',
        '"' + "a" * 101 + '"',
        "\n",
        "",
        "[" * 100_000,
        r'"\ud800"',
        r'["\udfff"]',
    ],
)
def test_malformed_label_is_refused(label: str) -> None:
    text = {**replace(NAMED, labels=("a",)).text(0), "Label": label}
    with pytest.raises(ProvenanceError, match="The text chunk Label must be"):
        Provenance.parse(text)


def test_release_of_the_picture_is_parsed_and_kept() -> None:
    found, _ = Provenance.parse(chunks(Software="unfog 0.0.9.dev1+local"))
    assert found.software == found.text(4)["Software"] == "unfog 0.0.9.dev1+local"


@pytest.mark.parametrize("scale", [1.0, 1.7, 10.0, 1 + 2**-52, 9.999999999999998, 4 / 3])
def test_guidance_scale_is_parsed_exactly(scale: float) -> None:
    found, _ = Provenance.parse(replace(PROVENANCE, guidance_scale=scale).text(0))
    assert found.guidance_scale == scale


def test_all_samplers_and_the_largest_values_are_parsed() -> None:
    for sampler in SAMPLERS:
        assert Provenance.parse(chunks(Sampler=sampler))[0].sampler == sampler
    found, indices = Provenance.parse(chunks(Seed=str(MAX_SEED), Index=str(MAX_INDEX), Steps=str(MAX_STEPS)))
    assert (found.seed, found.num_steps, indices) == (MAX_SEED, MAX_STEPS, range(MAX_INDEX, MAX_INDEX + 1))


REQUIRED = [name for name in CHUNKS if not name.startswith("CLIP-") and name not in ("Label", "Layout", "Noise")]


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_chunk_is_named(name: str) -> None:
    text = chunks()
    del text[name], text["Label"]
    with pytest.raises(ProvenanceError, match=f"has no text chunk {name}\\."):
        Provenance.parse(text)


MALFORMED = {
    "Software": ["unfog", "unfog ", "other 1.0", "unfog 1.0\n", "unfog 1 0", "unfog " + "1" * 10_000],
    "Digit": [
        "10",
        "-1",
        "seven",
        "7,",
        ",7",
        "7,7",
        "7, 2",
        "none",
        "\N{ARABIC-INDIC DIGIT SEVEN}",
        "1," * 5000 + "1",
    ],
    "Seed": ["-1", "1.0", "1e3", "007", "9007199254740992", "1_000", "0x10", "\N{FULLWIDTH DIGIT ONE}"],
    "Index": ["-1", "1-2", "0-0", "0-", "-8", "0-08", "0 - 8", "0-999999999", "1000000", "0-8-9", "0,1"],
    "Sampler": ["heun", "DDIM", "ddim ", "ddim|ddpm"],
    "Steps": ["0", "-1", "10000", "20.0", "\N{SUPERSCRIPT TWO}"],
    "Guidance-Scale": [
        "nan",
        "inf",
        "-1",
        "0.5",
        "10.5",
        "1e400",
        "1e0",
        "1.",
        ".5",
        "1,5",
        "+1",
        "999",
        "1." + "0" * 99,
    ],
    "Model-SHA256": ["ab" * 31, "ab" * 33, "AB" * 32, "zz" * 32, "\N{FULLWIDTH DIGIT ONE}" * 64],
}
EVERYWHERE = ["", " ", "9" * 10_000, "\x00", "\N{SNOWMAN}"]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in MALFORMED.items() for value in values + EVERYWHERE]
)
def test_malformed_chunk_is_refused_without_its_value(name: str, value: str) -> None:
    with pytest.raises(ProvenanceError, match=f"The text chunk {name} must be ") as error:
        Provenance.parse({**chunks(), name: value})
    assert len(str(error.value)) < 200


def test_picture_of_another_task_is_refused() -> None:
    with pytest.raises(ProvenanceError, match="was made from another picture"):
        Provenance.parse(replace(PROVENANCE, labels=(), task={"Task": "denoise"}).text(0))


CLIP = ClipProvenance(1.5, "a thick seven", "cd" * 32)


@pytest.mark.parametrize("prompt", [None, "a thick seven", 'quotes " and \\', "\u00fc\u4e03 \U0001f600" * 30])
def test_chunks_of_clip_guidance_are_parsed_again(prompt: str | None) -> None:
    written = replace(PROVENANCE, clip=replace(CLIP, prompt=prompt))
    text = written.text(0)
    assert all(value.isascii() for value in text.values())
    assert Provenance.parse(text)[0] == written


@pytest.mark.parametrize("scale", [5e-324, 1.2345678901234567e-05, 0.00012345678901234567, 10.0])
def test_every_permitted_scale_of_clip_guidance_is_parsed_again(scale: float) -> None:
    written = replace(PROVENANCE, clip=replace(CLIP, scale=scale))
    assert Provenance.parse(written.text(0))[0] == written


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CLIP-Guidance-Scale", "0"),
        ("CLIP-Guidance-Scale", "0e-05"),
        ("CLIP-Guidance-Scale", "10.5"),
        ("CLIP-Guidance-Scale", "nan"),
        ("CLIP-Prompt", "a thick seven"),
        ("CLIP-Prompt", '"'),
        ("CLIP-Prompt", '" "'),
        ("CLIP-Prompt", '"\\ud800"'),
        ("CLIP-Prompt", f'"{"a" * 201}"'),
        ("CLIP-SHA256", "CD" * 32),
    ],
)
def test_malformed_chunk_of_clip_guidance_is_named(name: str, value: str) -> None:
    with pytest.raises(ProvenanceError, match=f"The text chunk {name} must be "):
        Provenance.parse({**replace(PROVENANCE, clip=CLIP).text(0), name: value})


@pytest.mark.parametrize("name", ["CLIP-Guidance-Scale", "CLIP-SHA256"])
def test_missing_chunk_of_clip_guidance_is_named(name: str) -> None:
    text = replace(PROVENANCE, clip=CLIP).text(0)
    del text[name]
    with pytest.raises(ProvenanceError, match=f"no text chunk {name}"):
        Provenance.parse(text)


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (4, (2, 2)), (5, (2, 3)), (7, (3, 3)), (64, (8, 8))]
)
def test_sheet_of_one_digit_has_no_empty_row(count: int, shape: tuple[int, int]) -> None:
    assert sheet_shape(count) == shape
    assert sheet_shape(count, num_classes=3) == (3, count)


def test_sheet_with_layout_names_the_class_of_each_image() -> None:
    word = replace(PROVENANCE, labels=("L", "O", "O"), has_digits=False, one_each=True)
    found, indices = Provenance.parse(word.text("0-2"))
    assert (found.labels, found.one_each, indices) == (("L", "O", "O"), True, range(3))
    assert found.shape(3) == (1, 3)
    assert [word.text(index)["Label"] for index in range(3)] == ["L", "O", "O"]
    assert all("Layout" not in word.text(index) for index in range(3))
    with pytest.raises(ProvenanceError, match="chunk Label must be"):
        Provenance.parse(word.text("0-3"))
    with pytest.raises(ProvenanceError, match="chunk Index must be"):
        Provenance.parse({**replace(word, labels=("L",)).text("0"), "Index": "5"})
    with pytest.raises(ProvenanceError, match="chunk Layout must be 'rows'"):
        Provenance.parse({**word.text("0-2"), "Layout": "columns"})
