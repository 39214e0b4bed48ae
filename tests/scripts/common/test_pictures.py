from pathlib import Path

import numpy as np
import pytest
import torch
from einops import EinopsError
from PIL import Image

from scripts.common.pictures import grid, save_grid


def test_a_grid_is_row_major() -> None:
    images = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 1, 2, 3)
    sheet = grid(images, columns=3)
    assert sheet.shape == (4, 9, 1)
    assert sheet[::2, ::3, 0].tolist() == [[0, 51, 102], [153, 204, 255]]


def test_grid_rejects_an_incomplete_row() -> None:
    with pytest.raises(EinopsError):
        grid(torch.zeros(5, 1, 2, 2), columns=3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_saved_grid_is_a_png_enlarged_by_an_integer_factor(tmp_path: Path, channels: int, mode: str) -> None:
    images = torch.rand(4, channels, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_grid(images, tmp_path / "new" / "grid.png", columns=2, scale=3)
    with Image.open(tmp_path / "new" / "grid.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", mode, (2 * 7 * 3, 2 * 5 * 3))
        pixels = np.asarray(image).reshape(30, 42, channels)
    expected = grid(images, columns=2).numpy().repeat(3, axis=0).repeat(3, axis=1)
    assert (pixels == expected).all()
