import random
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from examples import draw_pictures
from scripts.common.data.data_set import load_data
from scripts.common.progress import Reporter


def test_same_seed_draws_the_same_pictures_of_twelve_kinds(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        draw_pictures.main([str(tmp_path / name), "--count=2", f"--seed={seed}"])
    one, same, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.png")}
        for name in ("one", "same", "other")
    )
    assert one == same
    assert one.keys() == other.keys()
    assert not set(one.values()) & set(other.values())
    assert len(set(one.values())) == 24
    with Reporter() as reporter:
        data = load_data(tmp_path / "one", reporter)
    assert data.class_names == tuple(sorted(draw_pictures.KINDS))
    assert data.image_shape == (3, 32, 32)


@pytest.mark.parametrize("kind", draw_pictures.KINDS)
def test_thing_is_inside_the_picture_and_differs_from_its_background(kind: str) -> None:
    for seed in range(20):
        picture = draw_pictures.draw(kind, random.Random(seed))
        background = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
        box = ImageChops.difference(picture, background).getbbox()
        assert box is not None
        assert min(box[2] - box[0], box[3] - box[1]) >= 8


def test_number_of_pictures_must_be_positive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        draw_pictures.main([str(tmp_path), "--count=-3"])
    assert "argument --count: invalid positive value: '-3'" in capsys.readouterr().err
