import numpy as np
import torch

from app.runner.graphs.graph_calls import GraphCalls
from tests.app.runner.late_device import LateDevice


def test_graphs_are_removed_after_the_device_has_done_them() -> None:
    device = LateDevice(most_queued=10**6)  # does nothing on its own
    calls, total = GraphCalls(device, 1), torch.zeros(1, dtype=torch.int64)
    calls.capture("add", lambda: total.add_(calls.inputs) and None)
    calls.call("add", np.array([3]))
    calls.call("add", np.array([4]))
    assert total.item() < 7
    calls.clear()
    assert total.item() == 7
    assert "add" not in calls
