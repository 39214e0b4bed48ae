"""CLIP guidance: in each step, moves the predicted x_0 towards the images that a prompt describes.

    x_0 <- x_0 + w g / |g|,    g = gradient of cos(image embedding of x_0, text embedding) with respect to x_0

The input of CLIP is the predicted x_0, because CLIP was trained on images and not on noisy x_t (Nichol 2021, section
4.1, trains a CLIP on x_t instead; Bansal 2023 guides on the predicted x_0). The gradient does not pass through the
denoising network, so a step needs one gradient of CLIP. The length of the gradient differs much between timesteps and
images. Therefore it is normalised, and the scale w is the distance by which each step moves x_0. x_prev is linear in
x_0 for every sampler (model/sampler.py), so a finished step can be corrected: x_prev <- x_prev + b (change of x_0).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.clip import Clip
from model.sampler import COLUMN_OF_B
from model.spec import CALL_ROWS, MAX_CLIP_GUIDANCE_SCALE
from model.step import Rows, State, Step, Stepped

# The default interval of timesteps: docs/evaluation.md shows how it was chosen.
START, STOP = 40, 75


@dataclass(frozen=True, slots=True)
class ClipGuidance:
    """Scale of CLIP guidance and the interval of timesteps in which it is applied. A scale of 0 turns it off.

    The scale is the Euclidean distance by which a step moves the predicted x_0, with pixels in [-1, 1]. Raises
    ValueError for invalid values.
    """

    scale: float = 0.0
    start: int = START
    stop: int = STOP

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= MAX_CLIP_GUIDANCE_SCALE:
            raise ValueError(f"clip_guidance.scale must be 0 to {MAX_CLIP_GUIDANCE_SCALE}, got {self.scale}")
        if not 1 <= self.start <= self.stop:
            raise ValueError(
                "clip_guidance.start must be at least 1 and not above clip_guidance.stop, "
                f"got {self.start} and {self.stop}"
            )

    def acts_at(self, t: int) -> bool:
        """Returns True if a step at timestep t computes the gradient of CLIP."""
        return self.scale != 0 and self.start <= t <= self.stop

    def steps_within(self, timesteps: Sequence[int]) -> frozenset[int]:
        """Returns the indices of the timesteps within start..stop."""
        return frozenset(k for k, t in enumerate(timesteps) if self.start <= t <= self.stop)


def similarity_gradient(clip: Clip, x_0: Tensor, text: Tensor) -> Tensor:
    """Returns the gradient of the cosine similarity of each image and its text, (B, C, H, W).

    x_0 is (B, C, H, W) and `text` (B, E) has embeddings of length 1. An image gets the same bits in every batch.
    """
    calls = zip(x_0.split(CALL_ROWS), text.split(CALL_ROWS), strict=True)
    return torch.cat([_gradient(clip, _padded(x), _padded(own))[: len(x)] for x, own in calls])


def guide_with_clip(clip: Clip, stepped: Stepped, rows: Tensor, b: Tensor, text: Tensor, scale: Tensor) -> Stepped:
    """Returns the results of a step with CLIP guidance for some of its rows. The other rows keep their bits.

    `rows` (M,) has the positions of the guided rows in the step, `b` (M,) the coefficient of x_0 in their update, and
    `text` (M, E) and `scale` (M,) their guidance.
    """
    x_0 = stepped.x_0[rows]  # (M, C, H, W)
    g = similarity_gradient(clip, x_0, text)  # (M, C, H, W)
    direction = F.normalize(g.flatten(1), dim=1).view_as(g)  # (M, C, H, W)
    moved = (x_0 + scale[:, None, None, None] * direction).clamp(-1, 1)  # (M, C, H, W)
    x_prev = stepped.x_prev[rows] + b[:, None, None, None] * (moved - x_0)  # (M, C, H, W)
    finite = stepped.finite[rows] & moved.isfinite().flatten(1).all(dim=1)  # (M,)
    return stepped._replace(
        x_prev=stepped.x_prev.index_copy(0, rows, x_prev),
        x_0=stepped.x_0.index_copy(0, rows, moved),
        finite=stepped.finite.index_copy(0, rows, finite),
    )


class ClipGuidedStep:
    """A step in which all rows have the same CLIP guidance. Only rows whose timestep is in the interval are changed."""

    def __init__(self, step: Step, clip: Clip, guidance: ClipGuidance, text: Tensor) -> None:
        """`text` (S, E) has the embedding of the prompt of each row of the state."""
        self.step, self.clip, self.guidance, self.text = step, clip, guidance, text

    def __call__(self, state: State, plans: Tensor, rows: Rows) -> Stepped:
        """Computes one step, with the arguments and the result of ReverseStep."""
        stepped = self.step(state, plans, rows)
        plan = plans[rows.plan_row[: len(rows.second)]]  # (B, 7)
        acting = torch.tensor([self.guidance.acts_at(int(t)) for t in plan[:, 0]], device=plan.device)  # (B,)
        chosen = acting.nonzero()[:, 0]  # (M,)
        if not len(chosen):
            return stepped
        text, b = self.text[rows.slots[chosen]], plan[chosen, COLUMN_OF_B]  # (M, E), (M,)
        return guide_with_clip(self.clip, stepped, chosen, b, text, torch.full_like(b, self.guidance.scale))


def _gradient(clip: Clip, x_0: Tensor, text: Tensor) -> Tensor:
    # The service calls this in inference mode, in which no gradients are recorded.
    with torch.inference_mode(mode=False), torch.enable_grad():
        x = x_0.clone().requires_grad_()  # (CALL_ROWS, C, H, W)
        similarity = (clip.embed_images(x) * text.clone()).sum()  # the rows are independent
        (g,) = torch.autograd.grad(similarity, x)  # (CALL_ROWS, C, H, W)
    return g


def _padded(rows: Tensor) -> Tensor:
    missing = CALL_ROWS - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
