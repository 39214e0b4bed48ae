from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from scripts.common.progress import Reporter
from scripts.evaluation import spaces, tables
from scripts.evaluation.classifiers import Extractor, features_of
from scripts.evaluation.distances import frechet_distance
from scripts.evaluation.spaces import (
    Space,
    space_of_classifier,
    space_of_clip,
    space_of_photographs,
    spaces_for_digits,
    spaces_for_pictures,
)
from tests.scripts.evaluation.bars import bars, untrained

MILITARY_UNIFORM = 652  # number of the class in ImageNet


@pytest.fixture(scope="module", params=[space_of_clip, space_of_photographs], ids=["clip", "efficientnet"])
def space(request: pytest.FixtureRequest) -> Space:
    return request.param()


def blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.float(), 3, stride=1, padding=1).round().to(torch.uint8)


def test_features_of_an_image_do_not_depend_on_the_others(space: Space) -> None:
    images = bars(20, 1).images
    together, alone = space.features(images), space.features(images[:1])
    assert torch.allclose(together[:1], alone, atol=1e-4)
    assert together.dtype == torch.float32


def test_grey_images_have_the_features_of_three_equal_channels() -> None:
    images, space = bars(10, 1).images, space_of_photographs()
    assert torch.equal(space.features(images), space.features(images.expand(-1, 3, -1, -1)))
    assert not torch.equal(space.features(images), space.features(images * torch.tensor([1, 0, 0])[:, None, None]))


def test_efficientnet_recognises_a_photograph_in_the_size_of_its_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """This needs the right weights, and pixels in the range of the training."""
    monkeypatch.setattr(spaces, "SIDE", 224)
    space = space_of_photographs()
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg") as picture:
        square = picture.convert("RGB").crop((0, 44, 512, 556)).resize((224, 224))
    features = space.features(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None])  # (1, 1280)
    network = space.features.args[0]  # type: ignore[attr-defined] # a functools.partial
    assert int(network._fc(features).argmax()) == MILITARY_UNIFORM


def test_blurred_images_are_farther_than_other_images_of_the_same_kind(space: Space) -> None:
    real, same = space.features(bars(300, 1).images), space.features(bars(300, 2).images)
    # A few random directions of the features are enough, and make the distance fast to compute.
    few = torch.randn(real.shape[1], 16, generator=torch.Generator().manual_seed(0)) / real.shape[1] ** 0.5
    floor = frechet_distance(same @ few, real @ few)
    assert frechet_distance(space.features(blurred(bars(300, 2).images)) @ few, real @ few) > 5 * floor


def test_space_of_a_classifier_has_its_features() -> None:
    trained, images = untrained(Extractor), bars(10, 1).images
    space = space_of_classifier("extractor", trained)
    assert torch.equal(space.features(images), features_of(trained.network, images))
    assert (space.name, space.sha256) == ("extractor", trained.sha256)


@pytest.mark.parametrize(
    ("spaces_for", "names"), [(spaces_for_digits, ["clip", "efficientnet"]), (spaces_for_pictures, ["efficientnet"])]
)
def test_few_images_have_no_further_spaces(
    spaces_for: Callable[[int, Reporter], tuple[Space, ...]], names: list[str]
) -> None:
    with Reporter() as reporter:
        assert spaces_for(tables.FEWEST_IMAGES - 1, reporter) == ()
        assert [space.name for space in spaces_for(tables.FEWEST_IMAGES, reporter)] == names
