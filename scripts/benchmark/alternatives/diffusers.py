"""FastAPI with a lock around the DDPMPipeline of diffusers, with a UNet2DModel of about the same number of weights.

The weights are random, since only the time matters. There are three variants: with default settings; tuned (bfloat16,
eight groups per norm); and tuned and compiled, in channels_last as the documentation recommends. Without compilation
channels_last is slower, since PyTorch's group norm is slow there for small groups.
"""

import threading
from typing import Any

import torch
import uvicorn
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from fastapi import FastAPI, Response
from torch import nn

from scripts.benchmark.alternatives.painter import Request, sheet_of

WIDTHS = (32, 64, 96)  # about 2.6 million weights; `default` has 2.7 million
TUNED_GROUPS = 8


def new_pipeline(*, tuned: bool) -> Any:
    """Returns a pipeline for grey images of 28x28 in at most 100 steps."""
    unet: Any = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=WIDTHS,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=TUNED_GROUPS if tuned else 32,
    )
    pipeline: Any = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100))
    unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    if tuned:
        unet.to(torch.bfloat16)
        unet.register_forward_pre_hook(lambda _, given: (given[0].to(torch.bfloat16), *given[1:]))
        unet.register_forward_hook(_in_float32)  # the pipeline converts to NumPy, which has no bfloat16
    return pipeline


def _in_float32(unet: nn.Module, given: Any, output: Any) -> Any:
    output.sample = output.sample.float()
    return output


def create_app(*, tuned: bool, compiled_for: int = 0) -> FastAPI:
    """Returns an application that runs one request after the other, each as one batch.

    If `compiled_for` is not 0, the network is compiled first, for batches of this number of images.
    """
    app, pipeline, lock = FastAPI(), new_pipeline(tuned=tuned), threading.Lock()
    if compiled_for:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.unet.compile()
        pipeline(batch_size=compiled_for, num_inference_steps=1, output_type="np")

    @app.post("/generate")
    def generate(request: Request) -> Response:
        generator = torch.Generator().manual_seed(request.seed)
        with lock:
            images = pipeline(
                batch_size=request.count,
                generator=generator,
                num_inference_steps=request.num_steps,
                output_type="np",
            ).images  # (B, H, W, 1) in [0, 1]
        x_0 = 2 * torch.from_numpy(images).permute(0, 3, 1, 2) - 1  # (B, 1, H, W)
        return Response(sheet_of(x_0), media_type="image/png")

    return app


def serve(port: int, *, tuned: bool, compiled_for: int = 0) -> None:
    """Runs the server until the process is stopped."""
    uvicorn.run(create_app(tuned=tuned, compiled_for=compiled_for), host="127.0.0.1", port=port, log_level="warning")
