import shutil

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tiny import tiny_unet


@pytest.mark.timeout(1200)  # on a busy machine the compiler can take minutes
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
# torch raises warnings about its own code while it compiles.
@pytest.mark.slow  # it compiles for a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_bfloat16_gradients_match_float32() -> None:
    """Regression test: in torch 2.13 the compiled gradient of nn.Upsample is zero, so lower levels did not learn."""
    network = tiny_unet(attention_heads=0).train().requires_grad_(True)
    size = network.config.image_size
    generator = torch.Generator().manual_seed(0)
    x_t, eps = torch.randn(2, 16, 1, size, size, generator=generator)  # (16, 1, H, W) each
    t, y = torch.arange(16) * 6 + 1, torch.arange(16) % 11

    def in_bfloat16(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(x_t.contiguous(memory_format=torch.channels_last), t, y)

    F.mse_loss(network(x_t, t, y), eps).backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    F.mse_loss(torch.compile(in_bfloat16)(x_t, t, y).float(), eps).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        similarity = F.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0)
        assert similarity > 0.95, f"{name}: {similarity:.3f}"
