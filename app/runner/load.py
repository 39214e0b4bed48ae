"""Loads the models of the settings onto the device."""

from importlib.util import find_spec
from pathlib import Path

import torch

from app.engine.interface import RunnerError
from app.runner.clip import ClipModel
from app.runner.device import DTYPES, available_threads, choose_device, choose_dtype, choose_num_threads
from app.runner.graphs.device import CudaDevice
from app.runner.graphs.graph_runner import GraphRunner
from app.runner.graphs.shapes import FIXED_ROWS
from app.runner.loaded_model import LoadedFile
from app.runner.runner import Runner
from app.settings import Settings
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from model.pipelines.folder import load_pipeline
from model.pipelines.hub import hub_folder, is_hub_name
from model.pipelines.model import PipelineModel
from model.pipelines.step import cpu_threads

NEEDS_DIFFUSERS = "Pipelines of diffusers need the extra `diffusers`: scripts/serve --install diffusers"


def load_runner(settings: Settings) -> Runner:
    """Returns the runner for these settings. Raises RunnerError with a message of one line if this fails."""
    models, device = _load_models(settings), choose_device(settings.device)
    has_pipeline = any(loaded.spec.is_pipeline for loaded in models.values())
    fixed_rows = _fixed_rows(settings, device, has_pipeline=has_pipeline)
    dtype = choose_dtype(settings.dtype, device)
    dtype_of_pipelines = DTYPES.get(settings.dtype, torch.float32)  # diffusers itself uses float32 by default
    threads_of_pipelines = cpu_threads(settings.num_threads or available_threads())
    wanted = settings.compile == "on" or (settings.compile == "auto" and device.type == "cpu")
    threads = choose_num_threads(settings.num_threads, device, dtype, compiled=wanted)
    checkpoints = {name: loaded for name, loaded in models.items() if isinstance(loaded, Checkpoint)}
    if device.type == "cuda" and settings.compile != "off" and not has_pipeline:
        runner: Runner = GraphRunner(checkpoints, CudaDevice(device), dtype, fixed_rows=fixed_rows)
    else:
        runner = Runner(
            models,
            device,
            dtype,
            threads,
            dtype_of_pipelines=dtype_of_pipelines,
            threads_of_pipelines=threads_of_pipelines,
        )
    prompts = [prompt for info in runner.models.values() for prompt in info.prompts]
    runner.clip = ClipModel.load(settings.clip, device, list(dict.fromkeys(prompts)))
    if wanted and not runner.compile(settings.cache_dir, must=settings.compile == "on"):
        runner.threads = choose_num_threads(settings.num_threads, device, dtype, compiled=False)
    if runner.clip:
        runner.clip.wait_until_ready()  # Otherwise its start would take CPU time from the warm-up and the steps.
    return runner


def _fixed_rows(settings: Settings, device: torch.device, *, has_pipeline: bool) -> int | None:
    """Returns the number of rows of every step with UNFOG_REPRODUCIBLE=on, otherwise None. Raises RunnerError."""
    if settings.reproducible == "off":
        return None
    if device.type == "cuda" and settings.compile == "off":
        raise RunnerError("UNFOG_REPRODUCIBLE=on needs CUDA graphs. Set UNFOG_COMPILE to auto or on")
    if device.type == "cuda" and has_pipeline:
        raise RunnerError("UNFOG_REPRODUCIBLE=on does not support pipelines of diffusers on a GPU. Set it to off")
    return settings.max_batch or FIXED_ROWS


def _load_models(settings: Settings) -> dict[str, LoadedFile]:
    """Loads all models, by name. Raises RunnerError."""
    paths, null_labels = settings.model_paths, settings.null_labels
    for name in null_labels:
        if name not in paths or paths[name].is_file():
            raise RunnerError(f"UNFOG_NULL_LABELS names {name!r}, which is not a served pipeline of diffusers")
    return {name: _load(path, settings.source_of(name), null_labels.get(name)) for name, path in paths.items()}


def _load(path: Path, variable: str, null_label: int | None) -> LoadedFile:
    """Loads a checkpoint, or a pipeline of diffusers from a folder or from the Hub. Raises RunnerError."""
    try:
        if not (path.is_dir() or is_hub_name(path)):
            return checkpoint.load(path)
        if not find_spec("diffusers"):
            raise CheckpointError(f"{path} cannot be loaded. {NEEDS_DIFFUSERS}")
        pipeline = load_pipeline(hub_folder(path) if is_hub_name(path) else path)
        try:
            return PipelineModel(pipeline, null_label)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise RunnerError(f"{variable}: {error}") from error
