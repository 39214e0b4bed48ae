import pytest
import torch

from scripts.evaluation.inpainting import MASKS, border_step


def test_border_step_is_the_mean_difference_of_neighbours_across_the_border() -> None:
    image = torch.zeros(1, 1, 2, 3, dtype=torch.uint8)
    image[0, 0] = torch.tensor([[10, 30, 200], [40, 5, 7]])
    is_known = torch.tensor([[True, False, False], [True, True, False]])[None, None]
    # across the border: 10|30 and 5|7 in rows, 30|5 in the middle column; 200|7 and 30|200 are both missing
    assert border_step(image, is_known) == pytest.approx((20 + 2 + 25) / 3)


def test_masks_have_the_shape_and_the_share_of_their_names() -> None:
    known = {name: mask(50) for name, mask in MASKS.items()}
    assert {tuple(mask.shape) for mask in known.values()} == {(50, 1, 28, 28)}
    assert known["right half"][..., :14].all()
    assert not known["right half"][..., 14:].any()
    assert known["lower half"][..., :14, :].all()
    assert not known["lower half"][..., 14:, :].any()
    assert not known["centre 14 x 14"][..., 7:21, 7:21].any()
    assert (~known["centre 14 x 14"]).sum() == 50 * 14 * 14
    assert (~known["random 75%"]).double().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(known["random 75%"], MASKS["random 75%"](50))
    assert not torch.equal(known["random 75%"][0], known["random 75%"][1])
