import torch

from model.pixels import from_pixels, to_pixels


def test_minus_1_is_black_1_is_white_and_what_lies_beyond_is_clipped() -> None:
    assert to_pixels(torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0])).tolist() == [0, 128, 255, 0, 255]


def test_all_256_greys_survive_the_way_there_and_back() -> None:
    greys = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(from_pixels(greys)), greys)


def test_black_is_minus_1_and_white_is_1() -> None:
    values = from_pixels(torch.tensor([0, 255, 51], dtype=torch.uint8))
    torch.testing.assert_close(values, torch.tensor([-1.0, 1.0, -0.6]))
