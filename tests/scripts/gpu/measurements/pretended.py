"""A simulated GPU on a CPU. With it, the tests run the code of the measurements that needs a GPU."""

from typing import Any

from app.runner.graphs.device import GraphDevice
from app.runner.runner import Runner
from model.checkpoint import Checkpoint
from scripts.gpu.measurements.machine import Kind, Machine
from tests.app.runner.late_device import LateDevice

MOST_ROWS = 4  # of the steps that warm-up captures


class PretendedGpu(Machine):
    """A CPU that records graphs and runs them late, as a GPU does."""

    is_gpu = True
    num_bytes_free = 0

    def runner(self, kind: Kind, models: dict[str, Checkpoint] | None = None, **options: Any) -> Runner:
        if kind == "graph":
            options = {"num_slots": 64, "most_rows": MOST_ROWS} | options
        return super().runner(kind, models, **options)

    def graph_device(self) -> GraphDevice:
        return LateDevice()

    def reserved_bytes(self) -> int:
        return 3 << 20

    def free_bytes(self) -> int:
        return self.num_bytes_free
