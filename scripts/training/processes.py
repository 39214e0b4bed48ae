"""The processes of a training that torchrun has started, on one host or on several.

Each process draws the random numbers of the whole batch and computes the network for its own rows of it. The processes
exchange the outputs, so that each of them computes the loss of the whole batch, with a gradient only for its own rows.
The sum of these gradients over all processes is therefore the gradient of the whole batch, also if it cannot be divided
evenly. Only the first process prints and writes files.

torch's DistributedDataParallel is not used: it averages the gradients with equal weights, and torch.compile divides a
network in it into several graphs.
"""

import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from app.runner.device import granted_cores
from model.sampler import Denoiser
from scripts.common.errors import ScriptError

# The longest wait for another process. Between two waits, a process loads data, compiles the step, or writes files.
PATIENCE = timedelta(minutes=5)
QUEUE = "unfog"  # in the store of torchrun
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """Number of processes, and which of them this one is. A single process needs no connection."""

    count: int = 1
    rank: int = 0
    local_rank: int = 0  # among the processes of this host
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """True in the only process that prints and writes files."""
        return self.rank == 0

    @property
    def default_threads(self) -> int | None:
        """Number of compute threads that uses all cores of this host. None means torch's default."""
        if self.count == 1:
            return None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(min(cores, math.ceil(granted_cores() or cores)) // self.local_count, 1)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Hides stdout in all processes except the first. Errors are still visible on stderr."""
        if self.is_first:
            yield
            return
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            yield

    @contextmanager
    def connected(self, device: torch.device) -> Iterator[None]:
        """Connects the processes for the block. The methods below can then be called, by all processes in one order.

        Each of them raises ScriptError if another process has ended, or if it does not call it within PATIENCE.
        """
        if self.count == 1:
            yield
            return
        is_gpu = device.type == "cuda"
        if is_gpu:
            torch.cuda.set_device(device)
        with _others_may_end():
            store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
            dist.init_process_group(
                "nccl" if is_gpu else "gloo",
                store=PrefixStore(self._new_prefix(store), store),
                rank=self.rank,
                world_size=self.count,
                timeout=PATIENCE,
                device_id=device if is_gpu else None,
            )
        yield
        dist.destroy_process_group()  # not after an error, because with NCCL it waits for the other processes

    def share(self, num_rows: int) -> slice:
        """Returns the rows of a batch that this process computes. The numbers of two processes differ by at most 1."""
        return slice(num_rows * self.rank // self.count, num_rows * (self.rank + 1) // self.count)

    def shared(self, denoiser: Denoiser) -> Denoiser:
        """Returns a denoiser that computes the rows of this process and gets the others. Its output is in float32."""
        if self.count == 1:
            return denoiser

        def denoise(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
            mine = self.share(len(x_t))
            output = torch.zeros(x_t.shape, device=x_t.device)  # (B, C, H, W)
            if mine.start == mine.stop:
                self._add_up(output)
                return output
            own = denoiser(x_t[mine], t[mine], y[mine]).float()
            output[mine] = own.detach()
            self._add_up(output)
            output[mine] = own  # the same values, with their gradient
            return output

        return denoise

    def add_up(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its sum over all processes."""
        if self.count > 1:
            _in_one_call(self._add_up, tensors)

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by that of the first process."""
        if self.count > 1:
            with _others_may_end():
                _in_one_call(lambda flat: dist.broadcast(flat, src=0), tensors)

    def from_first(self, value: T) -> T:
        """Returns the value of the first process."""
        if self.count == 1:
            return value
        values = [value]
        with _others_may_end():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def check_equal(self, value: Any, description: str) -> None:
        """Raises ScriptError in a process whose value is not equal to that of the first. `description` names it."""
        if self.from_first(value) != value:
            raise ScriptError(
                f"{socket.gethostname()} has another {description} than the host of the first process. Use the same on "
                "all hosts"
            )

    def in_turn(self, load: Callable[[], T]) -> T:
        """Returns the result of `load`, which may write files that are then there for later calls.

        The first process calls it first, then one process of each other host, then the others. The hosts may share
        their files or not.
        """
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        for number in range(3 if self.count > 1 else 1):
            if number == turn:
                loaded = load()
            if self.count > 1:
                _wait_for_all()
        return loaded

    def remove_unfinished(self, cache: Path) -> None:
        """Removes the libraries in Inductor's cache that are empty. Does nothing for a single process.

        When torchrun ends a process, it also kills its compilers. They leave empty files, which all later trainings
        would try to load.
        """
        if self.count == 1:
            return
        if self.local_rank == 0:
            for library in cache.glob("*/*.so"):
                if not library.stat().st_size:
                    library.unlink()
        _wait_for_all()  # so that no process of this host compiles yet

    def _new_prefix(self, store: Store) -> str:
        """Returns a prefix for the keys of the store. It is the same in all processes.

        After a restart, torchrun can give the processes the store of before, in which torch would read the addresses of
        processes that have ended. The queue and the keys can also have entries of them, so the first process answers
        every request, and goes on until all others have confirmed its own prefix.
        """
        own = uuid4().hex
        if self.is_first:
            confirmed = set[str]()
            while len(confirmed) < self.count - 1:
                rank, request, prefix = store.queue_pop(QUEUE).decode().split(",")
                if not prefix:
                    store.set(request, own)
                elif prefix == own:
                    confirmed.add(rank)
            return own
        store.queue_push(QUEUE, f"{self.rank},{own},")
        prefix = store.get(own).decode()  # waits
        store.queue_push(QUEUE, f"{self.rank},{own},{prefix}")
        return prefix

    @staticmethod
    def _add_up(tensor: Tensor) -> None:
        with _others_may_end():
            dist.all_reduce(tensor)


ALONE = Processes()


def processes_of_environment() -> Processes:
    """Returns the processes that the variables of torchrun describe. Raises ScriptError if only some are set."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    try:
        count, rank, local_rank, local_count, _ = (int(os.environ[name]) for name in names)
        os.environ["MASTER_ADDR"]
    except (KeyError, ValueError) as error:
        raise ScriptError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not all variables of torchrun are set. Start several "
            "processes with torchrun, or unset WORLD_SIZE"
        ) from error
    return Processes(count, rank, local_rank, local_count)


def _wait_for_all() -> None:
    with _others_may_end():
        dist.barrier()


@contextmanager
def _others_may_end() -> Iterator[None]:
    """Says that another process has ended, or did not answer, instead of a traceback of each remaining process."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ScriptError(
            f"lost the connection to another process, or it did not answer in time ({reason}). Run the same command "
            "again to resume, unless torchrun restarts it"
        ) from error


def _in_one_call(call: Callable[[Tensor], object], tensors: list[Tensor]) -> None:
    """Applies a collective operation to all tensors at once, because each call waits for the network."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    call(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    with torch.no_grad():
        torch._foreach_copy_(tensors, [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])
