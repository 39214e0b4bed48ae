"""Pipelines of the Hugging Face Hub, in its local cache."""

import importlib
import logging
import re
from pathlib import Path

from model.checkpoint import CheckpointError
from model.pipelines.folder import CONFIG, INDEX, SCHEDULER, WEIGHTS

log = logging.getLogger(__name__)

PREFIX = "hf:"
# The commit is required, because the content of a branch can change between two starts.
_NAME = re.compile(rf"{PREFIX}([\w.-]+/[\w.-]+)@([0-9a-f]{{40}})", re.ASCII)
FILES = [INDEX, *(f"{folder}{name}" for folder in ("", "unet/", "scheduler/") for name in (CONFIG, SCHEDULER, WEIGHTS))]


def is_hub_name(path: Path) -> bool:
    """Returns True for a name such as `hf:google/ddpm-cifar10-32@` with a commit, instead of a path."""
    return str(path).startswith(PREFIX)


def hub_folder(path: Path) -> Path:
    """Returns the folder of a pipeline in the local cache. Downloads it if it is not there.

    Only the configurations and the safetensors file are downloaded. Raises CheckpointError.
    """
    name = _NAME.fullmatch(str(path))
    if not name:
        raise CheckpointError(
            f"{path} is not of the form {PREFIX}OWNER/NAME@COMMIT, with the 40 hexadecimal digits of a commit"
        )
    repository, commit = name.groups()
    hub = importlib.import_module("huggingface_hub")
    try:
        folder = Path(hub.snapshot_download(repository, revision=commit, local_files_only=True))
        if any(folder.rglob(WEIGHTS)):
            return folder
    except Exception:  # the types of the errors differ between releases
        log.debug("Pipeline not in the cache", extra={"repository": repository})
    log.info("Downloading pipeline", extra={"repository": repository, "commit": commit})
    try:
        return Path(hub.snapshot_download(repository, revision=commit, allow_patterns=FILES))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is not in the local cache, and the download failed: {reason}") from error
