"""Loads the models of the settings onto the device."""

from pathlib import Path

from app.engine.interface import RunnerError
from app.runner.clip import ClipModel
from app.runner.device import choose_device, choose_dtype, choose_num_threads
from app.runner.graphs.device import CudaDevice
from app.runner.graphs.graph_runner import GraphRunner
from app.runner.graphs.shapes import FIXED_ROWS
from app.runner.runner import Runner
from app.settings import Settings
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError


def load_runner(settings: Settings) -> Runner:
    """Returns the runner for these settings. Raises RunnerError with a message of one line if this fails."""
    models = {name: _load(path, settings.source_of(name)) for name, path in settings.model_paths.items()}
    device = choose_device(settings.device)
    fixed_rows = (settings.max_batch or FIXED_ROWS) if settings.reproducible == "on" else None
    if fixed_rows and device.type == "cuda" and settings.compile == "off":
        raise RunnerError("UNFOG_REPRODUCIBLE=on needs CUDA graphs. Set UNFOG_COMPILE to auto or on")
    dtype = choose_dtype(settings.dtype, device)
    wanted = settings.compile == "on" or (settings.compile == "auto" and device.type == "cpu")
    threads = choose_num_threads(settings.num_threads, device, dtype, compiled=wanted)
    if device.type == "cuda" and settings.compile != "off":
        runner: Runner = GraphRunner(models, CudaDevice(device), dtype, fixed_rows=fixed_rows)
    else:
        runner = Runner(models, device, dtype, threads)
    prompts = [prompt for info in runner.models.values() for prompt in info.prompts]
    runner.clip = ClipModel.load(settings.clip, device, list(dict.fromkeys(prompts)))
    if wanted and not runner.compile(settings.cache_dir, must=settings.compile == "on"):
        runner.threads = choose_num_threads(settings.num_threads, device, dtype, compiled=False)
    if runner.clip:
        runner.clip.wait_until_ready()  # Otherwise its start would take CPU time from the warm-up and the steps.
    return runner


def _load(path: Path, variable: str) -> Checkpoint:
    try:
        return checkpoint.load(path)
    except CheckpointError as error:
        raise RunnerError(f"{variable}: {error}") from error
