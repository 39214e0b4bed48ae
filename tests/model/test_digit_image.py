import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import digit_image
from model.digit_image import FIRM, THICKEST, THINNEST, TYPICAL, enlargement_of, normalise, resize_mask

SIDE = 400


def distance_to_segment(y: Tensor, x: Tensor, a: tuple[float, float], b: tuple[float, float]) -> Tensor:
    (ay, ax), (by, bx) = a, b
    t = (((y - ay) * (by - ay) + (x - ax) * (bx - ax)) / ((by - ay) ** 2 + (bx - ax) ** 2)).clamp(0, 1)
    return torch.hypot(y - ay - t * (by - ay), x - ax - t * (bx - ax))


def seven(height: int = SIDE, width: int = SIDE, stroke: float = 30, scale: float = 0.5) -> Tensor:
    """Draws a seven in the middle: 1 on the stroke, 0 elsewhere, with antialiased edges, (height, width)."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    length = scale * min(height, width)
    top, left = (height - length) / 2, (width - 0.6 * length) / 2
    corner = (top, left + 0.6 * length)
    lines = ((top, left), corner), (corner, (top + length, left + 0.15 * length))
    distance = torch.minimum(*(distance_to_segment(y, x, a, b) for a, b in lines))
    return (stroke / 2 - distance + 0.5).clamp(0, 1)


def to_uint8(x: Tensor) -> Tensor:
    return (255 * x).round().clamp(0, 255).to(torch.uint8)


def light(height: int = SIDE, width: int = SIDE) -> Tensor:
    """Brightness of paper that is lit from one side, 0.5 to 1."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return 1 - 0.3 * x - 0.2 * y * y


def noise(like: Tensor, std: float) -> Tensor:
    return std * torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def similarity(a: Tensor, b: Tensor) -> float:
    """Largest cosine similarity of two images (1, H, W) that may be shifted by one pixel.

    A centre of mass between two pixels can be rounded to either of them.
    """
    shifts = [a.roll((dy, dx), (1, 2)).float().flatten() for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return F.cosine_similarity(torch.stack(shifts), b.float().flatten()[None]).max().item()


REFERENCE = normalise(to_uint8(seven()), "digit").pixels


# Fit


def test_reference_has_the_format_of_mnist() -> None:
    assert (REFERENCE.shape, REFERENCE.dtype) == ((1, 28, 28), torch.uint8)
    rows, columns = (REFERENCE[0] > 0).nonzero().unbind(dim=1)
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) + 1 == 20
    mass = REFERENCE[0].double()
    for dim in (0, 1):
        centre = (torch.arange(28).double() * mass.sum(dim=1 - dim)).sum() / mass.sum()
        assert abs(centre - 14) <= 0.51  # MNIST's centre of mass is at pixel 14
    assert REFERENCE.max() == 255
    assert REFERENCE[0, 0].max() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_auto_keeps_the_pixels_of_a_28_x_28_picture(dtype: torch.dtype) -> None:
    picture = torch.randint(0, 100, (28, 28), generator=torch.Generator().manual_seed(0)).to(dtype)
    result = normalise(picture)
    assert (result.fit, result.inverted) == ("resize", False)
    assert torch.equal(result.pixels[0], picture.to(torch.uint8))


def test_auto_inverts_a_light_28_x_28_picture_exactly() -> None:
    result = normalise(255 - REFERENCE[0])
    assert (result.fit, result.inverted) == ("resize", True)
    assert torch.equal(result.pixels, REFERENCE)


def test_x_is_the_image_from_minus_1_to_1() -> None:
    x = normalise(REFERENCE[0]).x
    assert (x.shape, x.dtype) == ((1, 28, 28), torch.float32)
    torch.testing.assert_close(x, REFERENCE / 127.5 - 1)


@pytest.mark.parametrize("std", [50, 150, 300])
def test_noisy_28_x_28_picture_on_black_is_not_inverted(std: float) -> None:
    for seed in range(20):
        z = std * torch.randn(28, 28, generator=torch.Generator().manual_seed(seed))
        noisy = (REFERENCE[0] + z).round().clamp(0, 255).to(torch.uint8)
        assert torch.equal(normalise(noisy).pixels[0], noisy)


@pytest.mark.parametrize("fit", ["auto", "resize"])
@pytest.mark.parametrize("factor", [2, 10, 16])
def test_enlarged_image_is_reduced_to_its_original_pixels(fit: digit_image.Fit, factor: int) -> None:
    pixels = torch.randint(256, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(factor))
    enlarged = torch.from_numpy(np.kron(pixels.numpy(), np.ones((factor, factor), np.uint8)))
    image = normalise(enlarged, fit, invert=False)
    assert image.fit == "resize"
    assert torch.equal(image.pixels[0], pixels)


@pytest.mark.parametrize("factor", [2, 10, 16])
def test_enlargement_is_found_only_if_all_blocks_have_equal_pixels(factor: int) -> None:
    enlarged = np.kron(np.arange(784, dtype=np.float32).reshape(28, 28), np.ones((factor, factor), np.float32))
    assert enlargement_of(enlarged, 28) == factor
    assert enlargement_of(enlarged[:, :-factor], 28) == 1
    enlarged[-1, -1] += 1
    assert enlargement_of(enlarged, 28) == 1


@pytest.mark.parametrize("shape", [(28, 28), (28 * 17, 28 * 17), (280, 560), (14, 14)])
def test_other_sizes_are_not_enlargements(shape: tuple[int, int]) -> None:
    assert enlargement_of(np.zeros(shape, np.uint8), 28) == 1


@pytest.mark.parametrize("shape", [(28, 29), (56, 56), (300, 500), (30, 20)])
def test_auto_fits_every_other_size_as_a_digit(shape: tuple[int, int]) -> None:
    assert normalise(to_uint8(seven(*shape, stroke=0.08 * min(shape)))).fit == "digit"


def test_digit_does_not_depend_on_size_and_position() -> None:
    drawing = seven()
    for picture in (
        F.pad(drawing, (300, 10, 20, 500)),
        F.interpolate(drawing[None, None], scale_factor=3.7, mode="bilinear")[0, 0],
        F.interpolate(drawing[None, None], scale_factor=0.2, mode="bilinear", antialias=True)[0, 0],
    ):
        assert similarity(normalise(to_uint8(picture)).pixels, REFERENCE) > 0.97


def test_digit_keeps_a_normalised_image_nearly_unchanged() -> None:
    again = normalise(REFERENCE[0], "digit").pixels
    assert (again.int() - REFERENCE.int()).abs().float().mean() < 1


def test_resize_scales_the_whole_picture_and_keeps_its_aspect_ratio() -> None:
    picture = torch.zeros(40, 80, dtype=torch.uint8)
    picture[:, 20:60] = 200
    result = normalise(picture, "resize", False)
    assert result.fit == "resize"
    assert result.pixels[0, 7:21, 10:18].eq(200).all()
    assert not result.pixels[0, 7:21, :4].any()


def test_resize_fills_the_rest_with_the_background() -> None:
    picture = torch.full((10, 56), 90, dtype=torch.uint8)
    picture[4:6, 10:40] = 255
    assert (normalise(picture, "resize", False).pixels[0, :11] == 90).all()
    assert (normalise(picture, "resize", False).pixels[0, 18:] == 90).all()


def test_resize_keeps_a_picture_of_the_final_size() -> None:
    picture = torch.randint(0, 256, (28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(normalise(picture, "resize", False).pixels[0], picture)


@pytest.mark.parametrize("size", [8, 28, 32])
def test_image_has_the_requested_size(size: int) -> None:
    assert normalise(to_uint8(seven()), size=size).pixels.shape == (1, size, size)
    assert resize_mask(seven() > 0.5, size).shape == (1, size, size)


# Invert


def test_dark_strokes_on_light_paper_become_white_on_black() -> None:
    result = normalise(to_uint8(1 - seven()))
    assert result.inverted
    assert similarity(result.pixels, REFERENCE) > 0.99


@pytest.mark.parametrize("level", [0.25, 0.6, 1.0])
def test_polarity_follows_the_contrast_at_every_brightness_of_the_paper(level: float) -> None:
    assert normalise(to_uint8(level * (1 - 0.6 * seven()))).inverted
    assert not normalise(to_uint8(0.6 * level + 0.4 * level * seven())).inverted


@pytest.mark.parametrize("fit", ["resize", "digit"])
def test_invert_can_be_forced(fit: digit_image.Fit) -> None:
    picture = to_uint8(seven())
    assert normalise(picture, fit, True).inverted
    assert not normalise(255 - picture, fit, False).inverted
    both = normalise(picture, "resize", True).pixels.int() + normalise(picture, "resize", False).pixels.int()
    assert (both == 255).all()


# Strokes and paper


@pytest.mark.parametrize("stroke", [1.5, 3, 8, 15, 30, 45, 60])
def test_strokes_of_every_width_get_the_width_of_mnist(stroke: float) -> None:
    pixels = normalise(to_uint8(0.9 - 0.7 * seven(stroke=stroke))).pixels
    ink = pixels.float().sum() / 255
    path = 20 * (0.6 + math.hypot(1, 0.45))  # length of a seven that is 20 pixels high
    assert THINNEST <= ink / path <= THICKEST
    assert pixels.max() > 200
    assert similarity(pixels, REFERENCE) > 0.75


def test_thick_stroke_stays_thicker_than_a_typical_one() -> None:
    """With a typical width, a loop that the stroke has filled would disappear."""
    pixels = normalise(to_uint8(seven(stroke=60))).pixels
    assert pixels.float().sum() / 255 > 1.05 * TYPICAL * 20 * (0.6 + math.hypot(1, 0.45))


@pytest.mark.parametrize("stroke", [2, 12])
def test_thin_stroke_on_a_very_large_picture_is_found(stroke: float) -> None:
    pixels = normalise(to_uint8(1 - seven(2500, 3000, stroke=stroke))).pixels
    assert similarity(pixels, REFERENCE) > 0.75
    assert pixels.max() > 200


def test_uneven_light_and_noise_become_black() -> None:
    picture = light() * (1 - 0.7 * seven())
    result = normalise(to_uint8(picture + noise(picture, 0.03)))
    assert (result.fit, result.inverted) == ("digit", True)
    assert similarity(result.pixels, REFERENCE) > 0.97
    far = F.max_pool2d(REFERENCE.float(), 7, 1, 3) == 0
    assert result.pixels[far].float().mean() < 2


def test_speckles_do_not_change_the_bounding_box() -> None:
    picture = seven()
    for y, x in ((5, 5), (390, 20), (30, 370), (380, 390), (200, 20)):
        picture[y : y + 5, x : x + 5] = 1
    assert similarity(normalise(to_uint8(picture)).pixels, REFERENCE) > 0.99


@pytest.mark.parametrize("length", [80, 200])
def test_long_faint_scratch_does_not_belong_to_the_drawing(length: int) -> None:
    """It is longer than a tenth of the digit, but has less than 2% of its mass."""
    picture = seven()
    scratched = picture.clone()
    scratched[380:382, 20 : 20 + length] = 0.5
    assert picture.sum() * 0.02 > (scratched - picture).sum()
    assert similarity(normalise(to_uint8(scratched)).pixels, REFERENCE) > 0.99


@pytest.mark.parametrize("length", [SIDE, SIDE // 2], ids=["whole side", "half of a side"])
def test_edge_of_a_table_does_not_belong_to_the_drawing(length: int) -> None:
    picture = 0.9 - 0.7 * seven()
    picture[:length, :40] = 0.1
    assert similarity(normalise(to_uint8(picture)).pixels, REFERENCE) > 0.97


def test_drawing_that_reaches_the_border_is_kept() -> None:
    picture = seven()[90:310, 130:275]
    assert similarity(normalise(to_uint8(picture)).pixels, REFERENCE) > 0.97


def test_separate_strokes_of_a_digit_are_kept() -> None:
    picture = torch.zeros(SIDE, SIDE)
    picture[100:300, 200:220] = 1
    picture[100:120, 230:280] = 1  # a stroke that does not touch the other
    image = normalise(to_uint8(picture)).pixels[0]
    assert (image.sum(dim=0) > 0).sum() >= 8


# Unusual pictures


@pytest.mark.parametrize("level", [0, 90, 255])
@pytest.mark.parametrize("shape", [(1, 1), (28, 28), (1, 500), (40, 30)])
def test_blank_picture_is_resized(level: int, shape: tuple[int, int]) -> None:
    for fit in ("auto", "digit"):
        result = normalise(torch.full(shape, level, dtype=torch.uint8), fit)  # type: ignore[arg-type]
        assert result.fit == "resize"
        assert result.pixels.unique().tolist() == [255 - level if result.inverted else level]


@pytest.mark.parametrize("shape", [(1, 2), (2, 300), (300, 1), (3, 3), (29, 27), (257, 256)])
def test_every_size_of_a_random_picture_gives_an_image(shape: tuple[int, int]) -> None:
    picture = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for fit in ("auto", "resize", "digit"):
        assert normalise(picture, fit).pixels.shape == (1, 28, 28)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 28, 28), (28,), (0, 5)])
def test_picture_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        normalise(torch.zeros(shape))


# Parts


def test_components_equal_those_of_a_flood_fill() -> None:
    mask = torch.rand(60, 50, generator=torch.Generator().manual_seed(0)) < 0.45
    labels = digit_image._components(mask)
    assert torch.equal(labels > 0, mask)
    seen = torch.zeros_like(mask)
    names = set()
    for start in mask.nonzero().tolist():
        if seen[tuple(start)]:
            continue
        name, stack = labels[tuple(start)].item(), [tuple(start)]
        assert name not in names
        names.add(name)
        seen[tuple(start)] = True
        while stack:
            y, x = stack.pop()
            assert labels[y, x] == name
            for near in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if 0 <= near[0] < 60 and 0 <= near[1] < 50 and mask[near] and not seen[near]:
                    seen[near] = True
                    stack.append(near)


@pytest.mark.parametrize("is_vertical", [False, True])
def test_components_of_a_long_spiral_are_found_in_few_iterations(
    is_vertical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True  # a path of more than 8,000 pixels
    iterations: list[int] = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *tensors: iterations.append(1) or equal(*tensors))
    assert len(digit_image._components(mask.T if is_vertical else mask).unique()) == 2
    assert 1 < len(iterations) < 30


@pytest.mark.parametrize("level", [0.0, 0.3, 0.9])
def test_paper_of_a_clean_picture_is_its_brightness_without_a_fit(
    level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.linalg, "solve")
    paper = digit_image._fit_paper(level + 0.1 * seven(256, 256))
    assert paper.tolist() == pytest.approx([level, 0, 0, 0, 0, 0], abs=1e-7)


def test_clean_and_nearly_clean_picture_give_nearly_the_same_image() -> None:
    """The paper of the second picture is fitted, because its levels differ by one grey level."""
    picture = to_uint8(0.9 - 0.7 * seven())
    picture[::2, 1::2] += 1
    clean, fitted = normalise(to_uint8(0.9 - 0.7 * seven())), normalise(picture)
    assert similarity(clean.pixels, fitted.pixels) > 0.999


@pytest.mark.parametrize("width", [4, 10, 31])
def test_stroke_width_of_a_line_is_its_width(width: int) -> None:
    line = torch.ones(200, width, dtype=torch.bool)
    assert digit_image._stroke_width(line) == pytest.approx(width, rel=0.15)


def test_thinning_keeps_the_number_of_components_and_holes() -> None:
    y, x = torch.meshgrid(torch.arange(80), torch.arange(60), indexing="ij")
    rings = [((y - cy) ** 2 + (x - 30) ** 2).sqrt() for cy in (24, 54)]
    eight = torch.stack([(ring > 7) & (ring < 19) for ring in rings]).any(dim=0)
    thin = digit_image._thin(eight, 30)
    assert thin.sum() < eight.sum() / 5
    for mask in (eight, thin):
        assert len(digit_image._components(mask).unique()) - 1 == 1
        background = ~F.max_pool2d(mask.float()[None, None], 3, 1, 1)[0, 0].bool() if mask is thin else ~mask
        assert len(digit_image._components(background).unique()) - 1 == 3


def test_centre_of_mass_is_at_pixel_14() -> None:
    image = digit_image._centre(torch.ones(5, 3), 28)[0]
    rows, columns = (image.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    assert (rows, columns) == ([12, 13, 14, 15, 16], [13, 14, 15])


def test_typical_stroke_is_between_the_bounds() -> None:
    assert THINNEST < TYPICAL < FIRM < THICKEST


@pytest.mark.parametrize("shape", [(28, 28), (280, 280), (64, 64), (900, 700), (20, 14)])
def test_pixels_outside_of_a_resized_mask_do_not_depend_on_masked_pixels(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[shape[0] // 3 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = True
    changed = torch.where(mask, 255 - picture, picture)
    before, after = (normalise(each, "resize", False).pixels for each in (picture, changed))
    masked = resize_mask(mask)
    assert torch.equal(before[~masked], after[~masked])
    assert (before != after)[masked].float().mean() > 0.5
    assert masked.float().mean().item() < 1.8 * mask.float().mean().item() + 0.03


def test_thin_line_of_a_mask_is_not_lost() -> None:
    mask = torch.zeros(600, 600, dtype=torch.bool)
    mask[300:303] = True
    assert resize_mask(mask).any(dim=2).sum() in (1, 2, 3)
    assert not resize_mask(torch.zeros(600, 400, dtype=torch.bool)).any()
    assert resize_mask(torch.ones(28, 28, dtype=torch.bool)).all()
