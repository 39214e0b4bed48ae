import torch

from model.pixels import from_pixels, to_pixels


def test_to_pixels_maps_minus_1_to_0_and_1_to_255_and_clips() -> None:
    assert to_pixels(torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0])).tolist() == [0, 128, 255, 0, 255]


def test_all_256_grey_levels_survive_a_round_trip() -> None:
    greys = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(from_pixels(greys)), greys)


def test_from_pixels_maps_0_to_minus_1_and_255_to_1() -> None:
    values = from_pixels(torch.tensor([0, 255, 51], dtype=torch.uint8))
    torch.testing.assert_close(values, torch.tensor([-1.0, 1.0, -0.6]))
