"""Converts a picture of a handwritten digit to the format of MNIST: white on black, 28 x 28 pixels, centred by mass.

The steps of `digit`, which follow the description of MNIST by LeCun, Cortes and Burges (1998):

1. Paper: a quadratic surface is fitted to the picture and subtracted, so that uneven light becomes black.
2. Drawing: pixels that differ clearly from the paper form connected components. Small components (speckles) and
   components along the border (such as the edge of a table) are ignored. The rest gives the bounding box.
3. Stroke: a stroke that is much thinner or thicker than the strokes of MNIST is thickened or thinned.
4. Size: the longest side of the bounding box is scaled to 20 pixels with antialiasing.
5. Position: the box is placed so that its centre of mass is at the centre of the image.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.prepared_image import PreparedImage, block_means, enlargement_of
from model.spec import Fit, Invert

SIZE = 28  # pixels per side of an MNIST image
BOX = 20 / 28  # longest side of the drawing, as a share of the image
COARSE = 256  # the drawing is found in a picture that is reduced to at most this number of pixels per side
FINE = 8  # subpixels per pixel while the stroke width is changed

# Mean stroke widths in pixels, by `_stroke_width`. The quantiles of 1,000 validation digits of MNIST are 1.4 (1%),
# 2.6 (50%), 3.9 (95%) and 4.6 (99%). Strokes outside of the bounds are changed. Thin strokes get the width TYPICAL.
# Thick strokes get the larger width FIRM, because a loop that the stroke has filled would otherwise disappear.
THINNEST, THICKEST = 1.4, 4.2
TYPICAL, FIRM = 2.6, 3.4

CLEAN = 0.75  # a picture with a larger share of equal pixels has even paper, which needs no fit
LEAST_CONTRAST = 0.04  # strokes must differ from the paper by at least this share of the range from black to white
LEAST_EXTENT = 0.1  # a component that is smaller than this share of the largest component is a speckle
LEAST_MASS = 0.02  # also a component whose mass is below this share
BORDER_CONTACT = 0.25  # a component that touches the border along this share of a side is not part of the drawing


@torch.inference_mode()
def normalise(picture: Any, fit: Fit = "auto", invert: Invert = "auto", size: int = SIZE) -> PreparedImage:
    """Converts a grey picture (H, W), uint8 or float in 0..255, to an image of size x size pixels.

    `picture` is a tensor or an array that `torch.as_tensor` accepts. `fit` is one of:
    `resize`: the whole picture is scaled, with its aspect ratio, and centred on its background;
    `digit`: MNIST's normalisation, or `resize` if the picture contains no drawing;
    `auto`: a picture of size x size pixels keeps its pixels, and every other picture is fitted by `digit`.
    Unless `fit` is `digit`, an enlarged image is first reduced to its original pixels (see `enlargement_of`).
    `invert`: True for dark strokes on a light background, False for the opposite. `auto` detects it from the border
    (pictures of size x size pixels) or from the sign of the contrast between strokes and paper (other pictures).
    Raises ValueError if the picture is not two-dimensional or is empty.
    """
    grey = torch.as_tensor(picture)
    if grey.ndim != 2 or not grey.numel():
        raise ValueError(f"A picture must have the shape (H, W), not {tuple(grey.shape)}")
    if fit != "digit":
        factor = enlargement_of(grey, size)
        grey = grey[::factor, ::factor]
    if tuple(grey.shape) == (size, size) and fit != "digit":
        inverted = _has_light_border(grey.float()) if invert == "auto" else invert
        return PreparedImage(_whole(grey, size, inverted), "resize", inverted)
    coarse = block_means(grey, COARSE)
    paper = _fit_paper(coarse)
    contrast = coarse - _evaluate(paper, *_grid(coarse.shape))
    inverted = _is_darker(contrast, coarse) if invert == "auto" else invert
    if fit != "resize" and (drawing := _find_drawing(-contrast if inverted else contrast)) is not None:
        return PreparedImage(_to_pixels(_fit_digit(grey, drawing, paper, inverted, size)), "digit", inverted)
    return PreparedImage(_whole(grey, size, inverted), "resize", inverted)


@torch.inference_mode()
def resize_mask(mask: Any, size: int = SIZE) -> Tensor:
    """Scales a mask (H, W), bool, as `normalise` scales a picture with `resize`. Returns bool (1, size, size).

    A pixel of the result is True if any True pixel of the mask contributes to it.
    """
    return _scaled(torch.as_tensor(mask).to(torch.uint8) * 255, size, background=0.0) > 0


def _whole(grey: Tensor, size: int, inverted: bool) -> Tensor:
    image = _scaled(grey, size).round().clamp(0, 255).to(torch.uint8)
    return 255 - image if inverted else image


def _scaled(grey: Tensor, size: int, background: float | None = None) -> Tensor:
    """Scales a picture (H, W) and centres it on the background, or on the median of its border: float32 (1, s, s)."""
    height, width = _box_of(grey.shape, size)
    small = grey.float()[None, None] if max(grey.shape) <= size else block_means(grey, 8 * size)[None, None] * 255
    small = F.interpolate(small, (height, width), mode="bilinear", antialias=True)[0]  # (1, h, w)
    image = torch.full((1, size, size), _border(small[0], 1).median().item() if background is None else background)
    top, left = (size - height) // 2, (size - width) // 2
    image[:, top : top + height, left : left + width] = small
    return image


def _has_light_border(grey: Tensor) -> bool:
    """True if the border of an image is light, and lighter than its middle. MNIST's strokes do not reach the border.

    The second condition matters for noisy images, in which the mean of a black border is grey.
    """
    margin = max(1, round(min(grey.shape) * (1 - BOX) / 2))
    border = _border(grey, margin)
    inside = grey[margin:-margin, margin:-margin]
    return border.mean().item() > 127.5 and (not inside.numel() or border.mean().item() > inside.mean().item())


def _border(grey: Tensor, margin: int) -> Tensor:
    """Returns the pixels within `margin` pixels of the border, (N,)."""
    is_border = torch.ones(grey.shape, dtype=torch.bool)
    is_border[margin:-margin, margin:-margin] = False
    return grey[is_border]


def _box_of(shape: tuple[int, ...], longest: int) -> tuple[int, int]:
    """Returns height and width with the aspect ratio of the shape and this longest side."""
    scale = longest / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _grid(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns the positions of rows (H,) and columns (W,) as shares of the picture, 0..1."""
    rows, columns = ((torch.arange(n) + 0.5) / n for n in shape)
    return rows, columns


def _terms(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the terms 1, x, y, x^2, xy, y^2 of a quadratic surface, (H, W, 6)."""
    y, x = torch.meshgrid(2 * rows - 1, 2 * columns - 1, indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1)


def _evaluate(paper: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return _terms(rows, columns) @ paper


def _fit_paper(coarse: Tensor) -> Tensor:
    """Fits a quadratic surface to the brightness of the paper. Returns its 6 coefficients.

    Minimises the mean of the absolute residuals, plus half of the squared coefficients except the constant, by
    iteratively reweighted least squares. Like a median, the result hardly depends on strokes that cover less than half
    of the picture. If most of the picture has exactly one brightness, this is the constant surface.
    """
    level = coarse.median()
    if (coarse == level).count_nonzero() > CLEAN * coarse.numel():
        return F.pad(level[None], (0, 5))
    stride = max(1, max(coarse.shape) // 64)
    rows, columns = _grid(coarse.shape)
    terms = _terms(rows[::stride], columns[::stride]).flatten(0, 1).double()  # (N, 6)
    brightness = coarse[::stride, ::stride].flatten().double()  # (N,)
    weight = torch.ones_like(brightness)
    paper = torch.zeros(6, dtype=torch.float64)
    # Without a penalty on its slope and curvature, the surface would follow large strokes at the border. The penalty on
    # the constant only makes the equations solvable.
    ridge = len(brightness) * torch.diag(torch.tensor([1e-6, 1, 1, 1, 1, 1], dtype=torch.float64))
    for _ in range(20):
        weighted = terms * weight[:, None]
        paper = torch.linalg.solve(terms.T @ weighted + ridge, weighted.T @ brightness)
        weight = 1 / (brightness - terms @ paper).abs().clamp_min(0.005)
    return paper.float()


def _noise(contrast: Tensor) -> float:
    """Returns the standard deviation of the paper's noise, estimated from the median of the absolute contrast."""
    return 1.4826 * contrast.abs().median().item()


def _is_darker(contrast: Tensor, coarse: Tensor) -> bool:
    """True if the strokes are darker than the paper. Without strokes, True if the paper is light."""
    least = 4 * _noise(contrast) + LEAST_CONTRAST
    lighter = (contrast - least).clamp_min(0).sum().item()
    darker = (-contrast - least).clamp_min(0).sum().item()
    return darker > lighter if darker or lighter else coarse.median().item() > 0.5


def _stroke_level(strength: Tensor, noise: float) -> float:
    """Returns the typical strength of a stroke, or 0 if no pixels differ clearly from the paper."""
    strokes = strength[strength > max(5 * noise, LEAST_CONTRAST)]
    return strokes.quantile(0.9).item() if len(strokes) >= 4 else 0.0


def _find_drawing(strength: Tensor) -> Tensor | None:
    """Returns the mask (H, W) of the drawing in a coarse picture, or None if there is no drawing."""
    noise = _noise(strength)
    level = _stroke_level(strength, noise)
    if not level:
        return None
    mask = strength > max(5 * noise, 0.35 * level)
    labels = _components(_dilate(mask, 1)) * mask
    kept = _select(labels, strength)
    return torch.isin(labels, kept) & mask if len(kept) else None


def _components(mask: Tensor) -> Tensor:
    """Labels the connected components of a mask (H, W), with 8 neighbours: int64 (H, W), 0 outside of the mask.

    A run is a maximal sequence of adjacent True pixels in a row. If two runs of adjacent rows touch, one of them has
    its first pixel next to the other. All edges between runs are therefore found at the first pixels.
    """
    framed = F.pad(mask, [1] * 4)
    width, flat = framed.shape[1], framed.flatten()
    first = flat[1:] & ~flat[:-1]
    number = F.pad(first.cumsum(0), (1, 0))  # of the run of a pixel, from 1
    starts = first.nonzero().flatten() + 1
    near = torch.cat([starts + row + column for row in (-width, width) for column in (-1, 0, 1)])
    touching = flat[near]
    one, other = number[starts].repeat(6)[touching], number[near][touching]
    label = _joined(one, other, len(starts))[number] * flat
    return label.view(framed.shape)[1:-1, 1:-1]


def _joined(one: Tensor, other: Tensor, num_nodes: int) -> Tensor:
    """Returns for each node of a graph the largest node that is connected to it. Nodes are numbered from 1.

    In each iteration, a node and the node of its old label take the largest label of its neighbours. Each label is then
    replaced by the label of the node that it refers to. The number of iterations is about the logarithm of the length
    of the longest path.
    """
    label = torch.arange(num_nodes + 1)
    while True:
        grown = label.scatter_reduce(0, one, label[other], "amax")
        grown = grown.scatter_reduce(0, other, grown[one], "amax")
        roots = grown.scatter_reduce(0, label, grown, "amax")
        grown = roots[roots]
        if torch.equal(grown, label):
            return label
        label = grown


def _select(labels: Tensor, strength: Tensor) -> Tensor:
    """Returns the labels of the components that belong to the drawing."""
    height, width = labels.shape
    y, x = labels.nonzero().unbind(dim=1)  # (N,), the pixels of all components
    names, component = labels[y, x].unique(return_inverse=True)
    if not len(names):
        return names

    def extreme(values: Tensor, kind: str) -> Tensor:
        return torch.zeros(len(names), dtype=torch.int64).scatter_reduce(0, component, values, kind, include_self=False)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(len(names)).scatter_add(0, component, values.float())

    extent = 1 + torch.maximum(extreme(y, "amax") - extreme(y, "amin"), extreme(x, "amax") - extreme(x, "amin"))
    mass = total(strength[y, x])
    sides = [total(axis == end) for axis, length in ((y, height), (x, width)) for end in (0, length - 1)]
    contact = torch.stack(sides).amax(dim=0) / min(height, width)
    is_drawing = torch.ones(len(names), dtype=torch.bool)
    is_inside = contact < BORDER_CONTACT
    if (is_inside & (extent >= 0.15 * max(height, width))).any():
        is_drawing = is_inside
    main = (mass * is_drawing).argmax()
    return names[is_drawing & (extent >= LEAST_EXTENT * extent[main]) & (mass >= LEAST_MASS * mass[main])]


def _bounds(mask: Tensor) -> tuple[int, int, int, int]:
    """Returns the bounding box of a mask: top, bottom, left, right. Bottom and right are exclusive."""
    rows, columns = (mask.any(dim=dim).nonzero().flatten() for dim in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _fit_digit(grey: Tensor, drawing: Tensor, paper: Tensor, inverted: bool, size: int) -> Tensor:
    """Returns the image (1, size, size) in [0, 1] of the drawing, whose mask was found in the coarse picture."""
    strokes = _crop_strokes(grey, drawing, paper, inverted)  # (h, w)
    longest = max(1, round(size * BOX))
    height, width = _box_of(strokes.shape, FINE * longest)
    fine = F.interpolate(strokes[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    if (changed := _with_typical_stroke(fine > 0.5)) is not None:
        strokes = changed
    box = F.interpolate(strokes[None, None], _box_of(strokes.shape, longest), mode="bilinear", antialias=True)[0, 0]
    return _centre(box.clamp(0, 1), size)


def _crop_strokes(grey: Tensor, drawing: Tensor, paper: Tensor, inverted: bool) -> Tensor:
    """Returns the strength of the strokes within their bounding box, 0 = paper and 1 = stroke, (h, w).

    The crop is made from the original picture, so that a small drawing in a large picture keeps its details.
    """
    height, width = grey.shape
    k = -(-max(grey.shape) // COARSE)  # pixels of the picture per pixel of the mask
    top, bottom, left, right = _bounds(drawing)
    top, left = max(0, (top - 1) * k), max(0, (left - 1) * k)
    bottom, right = min(height, (bottom + 1) * k), min(width, (right + 1) * k)
    crop = block_means(grey[top:bottom, left:right], COARSE)
    step = -(-max(bottom - top, right - left) // COARSE)
    rows = (top + (torch.arange(crop.shape[0]) + 0.5) * step).clamp_max(height - 1)
    columns = (left + (torch.arange(crop.shape[1]) + 0.5) * step).clamp_max(width - 1)
    contrast = crop - _evaluate(paper, rows / height, columns / width)
    near = _dilate(drawing, 2)[(rows / k).long()][:, (columns / k).long()]
    strength = -contrast if inverted else contrast
    noise = _noise(contrast[~near]) if (~near).any() else 0.0
    level = _stroke_level(strength[near], noise)
    if not level:  # The drawing is fainter than the noise at this resolution. Use the coarse mask itself.
        return _tight(drawing.float(), drawing)
    floor = min(3 * noise, 0.5 * level)
    strokes = ((strength - floor) / (level - floor)).clamp(0, 1) * near
    return _tight(strokes, strokes > 0.15)


def _tight(values: Tensor, mask: Tensor) -> Tensor:
    top, bottom, left, right = _bounds(mask)
    return values[top:bottom, left:right]


def _with_typical_stroke(mask: Tensor) -> Tensor | None:
    """Returns the mask (h, w) with strokes of MNIST's typical width, or None if their width is as in MNIST.

    The longest side of the mask is FINE subpixels per pixel of the box. The strokes keep their topology.
    """
    if not mask.any():
        return None
    mask = _tight(mask, mask)
    width, longest = _stroke_width(mask), max(mask.shape)
    unit = longest / (SIZE * BOX)  # subpixels per pixel of an MNIST image
    if THINNEST <= width / unit <= THICKEST:
        return None
    # If `change` subpixels are removed on each side, both the stroke and the box become smaller:
    # width - 2 change = share * (longest - 2 change)
    share = (TYPICAL if width < THINNEST * unit else FIRM) / (SIZE * BOX)
    change = round((width - share * longest) / (2 * (1 - share)))
    if change < 0:
        return _tight_or_none(_dilate(F.pad(mask, [-change + 2] * 4), -change))
    rest = round(0.25 * TYPICAL * unit)  # thin parts of a stroke keep at least twice this width
    thin = _thin(F.pad(mask, [rest + 2] * 4), change + rest)
    return _tight_or_none(_dilate(thin, rest))


def _tight_or_none(mask: Tensor) -> Tensor | None:
    return _tight(mask.float(), mask) if mask.any() else None


def _stroke_width(mask: Tensor) -> float:
    """Returns the mean width of the strokes of a mask, in pixels of the mask.

    The mask is eroded until it is empty. On average, a pixel of a stroke of width w is in about w / 4 + 1 / 2 of these
    masks. The first mask is included.
    """
    left, areas = F.pad(mask, [1] * 4), []
    while area := left.count_nonzero().item():
        areas.append(area)
        left = ~_grow(~left, len(areas) % 2 == 0)
    return 4 * (sum(areas) / areas[0] - 0.5)


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """Grows a mask (H, W) by about `radius` pixels in every direction. The structuring element is an octagon."""
    for i in range(radius):
        mask = _grow(mask, i % 2 == 0)
    return mask


def _grow(mask: Tensor, square: bool) -> Tensor:
    """Grows a mask by one pixel: with a square of 3 x 3 pixels, or with a cross."""
    grown = mask.clone()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    source = grown.clone() if square else mask
    grown[:, 1:] |= source[:, :-1]
    grown[:, :-1] |= source[:, 1:]
    return grown


def _thin(mask: Tensor, layers: int) -> Tensor:
    """Removes up to `layers` layers of pixels without breaking a stroke (Zhang and Suen, 1984).

    The outermost pixels of the mask must be empty.
    """
    for _ in range(layers):
        before = mask
        for is_first in (True, False):
            n, ne, e, se, s, sw, w, nw = (
                mask.roll(shift, (0, 1))
                for shift in ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
            )
            ring = (n, ne, e, se, s, sw, w, nw, n)
            neighbours = torch.stack(ring[:8]).sum(dim=0, dtype=torch.uint8)  # B(p)
            rises = torch.stack([~a & b for a, b in pairwise(ring)]).sum(dim=0, dtype=torch.uint8)  # A(p)
            ends = ~(n & e & s) & ~(e & s & w) if is_first else ~(n & e & w) & ~(n & s & w)
            mask = mask & ~((neighbours >= 2) & (neighbours <= 6) & (rises == 1) & ends)
        if torch.equal(mask, before):
            break
    return mask


def _centre(box: Tensor, size: int) -> Tensor:
    """Places a box (h, w) in an image (1, size, size), so that its centre of mass is at pixel (size / 2, size / 2).

    This pixel of MNIST images is half a pixel below and to the right of the geometric centre.
    """
    mass = box.sum().clamp_min(1e-6)
    corner = []
    for dim, length in enumerate(box.shape):
        centre = ((torch.arange(length) + 0.5) * box.sum(dim=1 - dim)).sum() / mass
        corner.append(min(max(round((size + 1) / 2 - centre.item()), 0), size - length))
    image = torch.zeros(1, size, size)
    image[0, corner[0] : corner[0] + box.shape[0], corner[1] : corner[1] + box.shape[1]] = box
    return image


def _to_pixels(image: Tensor) -> Tensor:
    """Converts an image in [0, 1] to uint8."""
    return (image * 255).round().clamp(0, 255).to(torch.uint8)
