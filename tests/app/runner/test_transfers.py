"""Tests of copies between host and device."""

import pytest
import torch

from app.runner.transfers import Transfers


def test_transfers_do_nothing_on_a_cpu() -> None:
    transfers = Transfers(torch.device("cpu"))
    uploaded = transfers.upload([3, 1, 2])
    assert (uploaded.tolist(), uploaded.dtype) == ([3, 1, 2], torch.int64)
    assert transfers.download(uploaded) is uploaded
    transfers.wait()


@pytest.mark.gpu
def test_values_are_unchanged_after_upload_and_download_on_a_gpu() -> None:
    transfers = Transfers(torch.device("cuda"))
    uploaded = transfers.upload(list(range(1000)))
    assert uploaded.device.type == "cuda"
    back = transfers.download(uploaded * 2)
    assert back.device.type == "cpu"
    assert back.tolist() == list(range(0, 2000, 2))
    for _ in range(5):
        transfers.wait()
