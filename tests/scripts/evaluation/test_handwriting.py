import hashlib
import io
import json
import re
import tomllib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from scripts.common.errors import ScriptError
from scripts.evaluation import handwriting
from scripts.evaluation.handwriting import (
    DIGITS,
    FOLDER,
    FONTS,
    LETTERS,
    Part,
    build_set,
    find_fonts,
    load_handwriting,
    load_letters,
    load_parameters,
    main,
    render,
)
from scripts.evaluation.mouse import STYLES

ROOT = Path(__file__).parents[3]
VARIANTS = ("scan", "photo", "inverted", "canvas")
NAMES = ("digits-test", "digits-validation", "letters-test", "letters-validation")


def load(name: str) -> list[tuple[bytes, str, str, str]]:
    kind, part = name.split("-")
    loader = load_handwriting if kind == "digits" else load_letters
    return [(data, str(label), font, variant) for data, label, font, variant in loader(part)]


def grey(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"), np.float64)


@pytest.fixture
def font() -> Path:
    """A font that is part of matplotlib. Its glyphs need not be handwriting."""
    matplotlib = pytest.importorskip("matplotlib")
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@pytest.mark.parametrize("name", NAMES)
def test_archive_is_the_fixed_one_and_is_packaged(name: str) -> None:
    table = re.findall(r"^\| (\S+)\.tar\.xz \| (\d+) \|.*`(\w{64})` \|$", (FOLDER / "README.md").read_text(), re.M)
    counts, digests = {row[0]: int(row[1]) for row in table}, {row[0]: row[2] for row in table}
    assert hashlib.sha256((FOLDER / f"{name}.tar.xz").read_bytes()).hexdigest() == digests[name]
    assert len(load(name)) == counts[name]
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert f"{FOLDER.name}/*" in data["scripts.evaluation"]


@pytest.mark.parametrize("name", NAMES)
def test_every_font_has_every_character_once_in_every_variant(name: str) -> None:
    kind, part = name.split("-")
    assert part in get_args(Part)
    fonts = [*FONTS[part], *(STYLES if name == "digits-test" else ())]
    expected = [(c, font, v) for font in fonts for c in (DIGITS if kind == "digits" else LETTERS) for v in VARIANTS]
    assert [row[1:] for row in load(name)] == expected
    assert len({row[0] for row in load(name)}) == len(expected)  # no two pictures are equal


def test_handwriting_has_at_least_five_fonts_and_200_pictures_with_equally_many_of_each_digit() -> None:
    counts = Counter(picture.label for picture in load_handwriting())
    assert set(counts) == set(range(10))
    assert len(set(counts.values())) == 1 and counts.total() >= 200
    assert len({picture.font for picture in load_handwriting()}) >= 5


def test_validation_parts_share_no_font_with_test_parts() -> None:
    assert not set(FONTS["validation"]) & {row[2] for name in ("digits-test", "letters-test") for row in load(name)}


def test_letters_do_not_include_those_that_look_like_digits() -> None:
    labels = {picture.label for part in get_args(Part) for picture in load_letters(part)}
    assert labels and not labels & set("BCDFGIJLOPQSTUXYZ")


@pytest.mark.parametrize("name", NAMES)
def test_pictures_decode_with_the_recorded_size_and_light_ink_only_where_inverted(name: str) -> None:
    looks = load_parameters(name)
    for data, label, font, variant in load(name):
        image = Image.open(io.BytesIO(data))
        assert image.format == ("PNG" if variant == "canvas" else "JPEG")
        look = looks[f"{font}/{label}-{variant}.{'png' if variant == 'canvas' else 'jpg'}"]
        assert image.size == (look["width"], look["height"])
        assert min(image.size) >= 40 and max(image.size) <= 600
        pixels = grey(data)
        paper = np.median(pixels)
        most, least = pixels.max() - paper, paper - pixels.min()
        assert (most > least) == (variant == "inverted")
        assert max(most, least) > 60  # the character has enough contrast to be read


def test_tilts_reach_15_degrees_in_both_directions_and_places_are_off_centre() -> None:
    looks = load_parameters("digits-test").values()
    tilts = [look["tilt"] for look in looks]
    assert -15 <= min(tilts) < -14 and 14 < max(tilts) <= 15
    shares = [look["x"] / look["width"] for look in looks]
    assert min(shares) < 0.1 and max(shares) > 0.6


@pytest.mark.parametrize("style", STYLES)
def test_drawing_a_mouse_digit_again_gives_the_fixed_picture(style: str) -> None:
    fixed = {(label, font, variant): data for data, label, font, variant in load("digits-test")}
    looks = load_parameters("digits-test")
    for digit, variant in (("4", "scan"), ("7", "photo"), ("2", "inverted"), ("9", "canvas")):
        file, data, look = render(digit, style, variant, None)
        assert json.loads(json.dumps(asdict(look))) == looks[file]
        difference = grey(data) - grey(fixed[digit, style, variant])
        assert np.abs(difference).mean() < 1  # other versions of libjpeg round differently


@pytest.mark.parametrize("variant", VARIANTS)
def test_rendering_a_font_is_deterministic_and_draws_the_character_in_the_recorded_box(
    font: Path, variant: str
) -> None:
    file, data, look = render("5", "dejavu", variant, font)
    assert (file, data, look) == render("5", "dejavu", variant, font)
    pixels = grey(data)
    paper = np.median(pixels)
    rows, columns = np.nonzero(np.abs(pixels - paper) > 0.5 * np.abs(pixels - paper).max())
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert max(height, width) == pytest.approx(look.character, abs=3)
    assert (columns.min(), rows.min()) == pytest.approx((look.x, look.y), abs=3)


def test_archive_built_twice_is_equal_and_can_be_loaded(
    font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_set("AK", {"dejavu": font})
    assert built == build_set("AK", {"dejavu": font})
    (tmp_path / "letters-test.tar.xz").write_bytes(built)
    monkeypatch.setattr(handwriting, "FOLDER", tmp_path)
    assert [row[1:] for row in load_letters()] == [(c, "dejavu", v) for c in "AK" for v in VARIANTS]


def test_missing_font_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "caveat.ttf").touch()
    assert find_fonts(tmp_path, ("caveat",)) == {"caveat": tmp_path / "caveat.ttf"}
    with pytest.raises(ScriptError, match=r"kalam\.woff"):
        find_fonts(tmp_path, ("caveat", "kalam"))


def test_contact_sheet_shows_every_font(tmp_path: Path) -> None:
    main(["--sheet", str(tmp_path / "sheet.png")])
    width, height = Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())).size
    assert width > 10 * handwriting.TILE
    assert height > (len(FONTS["test"]) + len(STYLES)) * handwriting.TILE
