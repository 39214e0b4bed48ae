"""Training data of the small CLIP: pictures of digits in known states, and captions about these states.

Since the state of each picture is known, every caption is known to be true, false or undecided for it. A true caption
is therefore never a negative example.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.diffusion import Diffusion
from model.pixels import to_pixels
from model.prompts import DIGIT_WORDS
from scripts.common.mnist import NUM_CLASSES
from scripts.evaluation.classifier_training import augment

CLEAR, NOISY = "a clear picture", "a noisy, blurry picture"
CLEAR_UNTIL, NOISY_FROM = 4, 12  # timesteps; between them the captions are undecided
DIGIT_UNTIL, STATIC_FROM = 60, 90  # timesteps; between them the captions are undecided
FOGGED_SHARE, BLURRED_SHARE, RESTROKED_SHARE = 0.4, 0.1, 0.15  # fractions of the pictures
MAX_SHEAR = 0.25
BOLDNESS = 0.42, 0.58  # fine up to the first value, bold from the second value
LEAN = 0.12, 0.3  # upright up to the first value, slanted from the second value
TRUE, FALSE, UNDECIDED = 1.0, -1.0, 0.0

DIGIT_CAPTIONS = (
    "a handwritten digit {}",
    "the digit {}",
    "a handwritten {}",
    "a picture of the number {}",
    "the number {}, written by hand",
)
STATE_CAPTIONS = {
    "clear": (CLEAR, "a clear picture of a handwritten digit", "a sharp picture"),
    "degraded": (NOISY, "a bad picture"),
    "degraded digit": (f"{NOISY} of a handwritten digit",),
    "noisy": ("a noisy picture", "a grainy picture"),
    "noisy digit": ("a grainy picture of a digit",),
    "blurry": ("a blurry picture", "a blurred digit"),
    "static": ("random noise", "pure static"),
    "written": ("a handwritten digit", "handwriting"),
    "bold": ("a thick digit", "a digit in bold strokes"),
    "fine": ("a thin digit", "a digit in fine strokes"),
    "slanted": ("a slanted digit", "a digit that leans"),
    "upright": ("an upright digit",),
}
CAPTIONS = [
    *(form.format(name) for form in DIGIT_CAPTIONS for d in range(NUM_CLASSES) for name in (DIGIT_WORDS[d], str(d))),
    *(f"{CLEAR} of a handwritten digit {DIGIT_WORDS[d]}" for d in range(NUM_CLASSES)),
    *(f"{NOISY} of a handwritten digit {DIGIT_WORDS[d]}" for d in range(NUM_CLASSES)),
    *(caption for captions in STATE_CAPTIONS.values() for caption in captions),
]


@dataclass(frozen=True, slots=True)
class Scene:
    """A batch of pictures and their states."""

    pictures: Tensor  # (B, 1, 28, 28) float32 in [0, 1], rounded to 8 bits
    digit: Tensor  # (B,) int64
    t: Tensor  # (B,) int64, timestep of the added noise, 0 for no noise
    blurred: Tensor  # (B,) bool
    boldness: Tensor  # (B,) measured by `boldness` before noise and blur
    lean: Tensor  # (B,) measured by `lean` before noise and blur


def make_scene(images: Tensor, digit: Tensor, diffusion: Diffusion) -> Scene:
    """Makes a scene of images, uint8 (B, 1, 28, 28), and their digits (B,).

    Half of the pictures are clear, 40% have noise and 10% are blurred. All are moved a little. Many are sheared or get
    thicker or thinner strokes.
    """

    def draw() -> Tensor:
        return torch.rand(len(images), generator=diffusion.generator)  # (B,)

    kind = draw()
    t = torch.where(kind < FOGGED_SHARE, diffusion.draw_timesteps(len(images)), 0)  # (B,)
    blurred = (kind >= FOGGED_SHARE) & (kind < FOGGED_SHARE + BLURRED_SHARE)
    shear = torch.where(draw() < 0.5, (2 * draw() - 1) * MAX_SHEAR, 0)
    x = _restroke(_sheared(augment(images, diffusion.generator), shear), draw())
    hazy = torch.where(blurred[:, None, None, None], F.avg_pool2d(x, 5, stride=1, padding=2), x)
    x_t, _ = diffusion.add_noise(2 * hazy - 1, t)
    return Scene(to_pixels(x_t) / 255, digit, t, blurred, boldness(x), lean(x))


def boldness(x: Tensor) -> Tensor:
    """Returns the share of ink that is left when the strokes become one pixel thinner: (B, 1, 28, 28) -> (B,)."""
    return _thinned(x).sum(dim=(1, 2, 3)) / x.sum(dim=(1, 2, 3)).clamp(min=1e-6)


def lean(x: Tensor) -> Tensor:
    """Returns the slant: pixels to the right per row upwards, from second moments: (B, 1, 28, 28) -> (B,)."""
    ink = x[:, 0] / x.sum(dim=(1, 2, 3)).clamp(min=1e-6)[:, None, None]  # (B, H, W)
    row, column = torch.arange(28.0)[:, None], torch.arange(28.0)
    mean_row, mean_column = (ink * row).sum(dim=(1, 2)), (ink * column).sum(dim=(1, 2))  # (B,)
    up, right = mean_row[:, None, None] - row, column - mean_column[:, None, None]  # (B, H, 1), (B, 1, W)
    return (ink * up * right).sum(dim=(1, 2)) / (ink * up.square()).sum(dim=(1, 2)).clamp(min=1e-6)


def truth(scene: Scene) -> Tensor:
    """Returns TRUE, FALSE or UNDECIDED for each picture and each of CAPTIONS, (B, len(CAPTIONS))."""
    states = _states(scene)  # (B,) each
    is_digit = F.one_hot(scene.digit, NUM_CLASSES) * 2.0 - 1  # (B, 10)
    shown = torch.where(is_digit == TRUE, states["written"][:, None], FALSE)  # (B, 10): pure noise shows no digit
    by_digit = shown.repeat_interleave(2, dim=1).repeat(1, len(DIGIT_CAPTIONS))  # each digit has a word and a numeral
    clear_digit = torch.minimum(shown, states["clear"][:, None])
    noisy_digit = torch.minimum(shown, states["degraded"][:, None])
    by_state = [states[name] for name, captions in STATE_CAPTIONS.items() for _ in captions]
    return torch.cat([by_digit, clear_digit, noisy_digit, torch.stack(by_state, dim=1)], dim=1)


def _states(scene: Scene) -> dict[str, Tensor]:
    fogged = _rising(scene.t, CLEAR_UNTIL, NOISY_FROM)
    degraded = torch.where(scene.blurred, TRUE, fogged)
    clear = degraded == FALSE
    blurry = torch.where(scene.blurred, TRUE, torch.where(clear, FALSE, UNDECIDED))  # noise may hide the blur
    static = _rising(scene.t, DIGIT_UNTIL, STATIC_FROM)
    written = -static
    bold, leaning = _rising(scene.boldness, *BOLDNESS), _rising(scene.lean.abs(), *LEAN)
    return {
        "clear": -degraded,
        "degraded": degraded,
        "degraded digit": torch.minimum(degraded, written),
        "noisy": fogged,
        "noisy digit": torch.minimum(fogged, written),
        "blurry": blurry,
        "static": static,
        "written": written,
        "bold": torch.where(clear, bold, UNDECIDED),
        "fine": torch.where(clear, -bold, UNDECIDED),
        "slanted": torch.where(clear, leaning, UNDECIDED),
        "upright": torch.where(clear, -leaning, UNDECIDED),
    }


def _rising(x: Tensor, until: float, start: float) -> Tensor:
    """Returns FALSE up to `until`, TRUE from `start`, and UNDECIDED between them."""
    return torch.where(x <= until, FALSE, torch.where(x >= start, TRUE, UNDECIDED))


def _restroke(x: Tensor, draw: Tensor) -> Tensor:
    """Makes strokes one pixel thinner in 15% of the pictures and one pixel thicker in 15%. `draw` is (B,) in [0, 1)."""
    draw = draw[:, None, None, None]
    bold = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, stride=1)
    return torch.where(draw < RESTROKED_SHARE, _thinned(x), torch.where(draw > 1 - RESTROKED_SHARE, bold, x))


def _thinned(x: Tensor) -> Tensor:
    return -F.max_pool2d(F.pad(-x, (0, 1, 0, 1)), 2, stride=1)


def _sheared(x: Tensor, shear: Tensor) -> Tensor:
    one, zero = torch.ones_like(shear), torch.zeros_like(shear)
    rows = [torch.stack([one, shear, zero], dim=1), torch.stack([zero, one, zero], dim=1)]  # (B, 3) each
    positions = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, positions, align_corners=False)
