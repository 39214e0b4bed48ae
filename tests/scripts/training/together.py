"""Short trainings in several processes, for tests.

`python -m tests.scripts.training.together JOBS` runs jobs, given in JSON, one after the other. Their processes are
forks, because each process that imports torch anew needs seconds. `torchrun ... -m tests.scripts.training.together JOB`
runs one job, of which this process is one of several.
"""

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it, which takes two seconds in each fork
from torch import Tensor
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scripts import train
from scripts.training import loop, objective
from scripts.training.processes import Processes
from scripts.training.trainer import Trainer
from tests.scripts.tiny_training import trust_idx_files

STEPS_PER_SAVE = 3
EVENT_STEP = 14  # the last step of the third epoch, in which a process is killed or stopped


def run_job(job: dict[str, Any]) -> None:
    """Trains with the arguments of the job. Each process appends its steps to `OUT-RANK-RESTART.steps`."""
    rank, restart = (os.environ.get(name, "0") for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    out = Path(job["arguments"][job["arguments"].index("--out") + 1])
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        trust_idx_files(patch)
        patch.setattr(loop, "is_installed", lambda package: False)  # without figures, which take two seconds
        patch.setattr(objective, "FEWEST_ROWS", 50)  # of the validation
        tame_adam(patch)
        save_by_steps(patch)
        watch_steps(
            patch,
            Path(f"{out}-{rank}-{restart}.steps"),
            EVENTS[job["event"]] if (rank, restart) == (job["event_rank"], "0") else lambda: None,
        )
        CHANGES[job["change"]](patch)
        train.main(job["arguments"])


def tame_adam(patch: pytest.MonkeyPatch) -> None:
    """Gives Adam a large eps.

    Some gradients are zero except for rounding, such as those of the biases of keys. With the usual eps, Adam makes a
    whole step of each, so that the weights of two equal trainings with different rounding move apart.
    """
    for name in ("Adam", "AdamW"):
        patch.setattr(torch.optim, name, partial(getattr(torch.optim, name), eps=1e-2))


def save_by_steps(patch: pytest.MonkeyPatch) -> None:
    """Saves the state within an epoch after each STEPS_PER_SAVE steps. The clock is read once in a step."""
    reads = itertools.count()
    patch.setattr(loop, "SAVE_SECONDS", STEPS_PER_SAVE - 0.5)
    patch.setattr(loop, "time", SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: next(reads)))


def watch_steps(patch: pytest.MonkeyPatch, log: Path, event: Callable[[], object]) -> None:
    learn = Trainer._learn_from

    def watched(trainer: Trainer, rows: Tensor, step: int) -> Tensor:
        if step == EVENT_STEP:
            event()
        with log.open("a") as file:
            file.write(f"{step}\n")
        return learn(trainer, rows, step)

    patch.setattr(Trainer, "_learn_from", watched)


def stop_all() -> None:
    """Stops torchrun as a user does, and waits for the end of this process. The others wait for its gradients."""
    os.kill(os.getppid(), signal.SIGTERM)
    threading.Event().wait()


EVENTS: dict[str, Callable[[], object]] = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "stop": stop_all}


def other_rows(patch: pytest.MonkeyPatch) -> None:
    """Makes the second process shuffle the images in another order."""
    begin = Trainer.run_epoch

    def run_epoch(trainer: Trainer, *args: Any) -> Any:
        trainer.seed = trainer.processes.rank
        return begin(trainer, *args)

    patch.setattr(Trainer, "run_epoch", run_epoch)


def clock_of_first(patch: pytest.MonkeyPatch) -> None:
    """Makes each reading of the clock take a minute in the first process. The clocks of the others stand still."""
    reads = itertools.count() if os.environ["RANK"] == "0" else itertools.repeat(0)
    patch.setattr(loop.time, "perf_counter", lambda: 60.0 * next(reads))


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "none": lambda patch: None,
    "own gradients": lambda patch: patch.setattr(Processes, "add_up", lambda self, tensors: None),
    "other rows": other_rows,
    "clock of first": clock_of_first,
}


def main(jobs: list[dict[str, Any]]) -> None:
    for number, job in enumerate(jobs):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job["count"],
            run_id=str(number),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.05,
            start_method="fork",
        )
        with suppress(SignalException):  # of `stop_all`
            elastic_launch(config, run_job)(job)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    run_job(given) if "RANK" in os.environ else main(given)
