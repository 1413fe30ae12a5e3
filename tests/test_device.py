"""common/device.py: where a script computes."""

import pytest
import torch

from common.cli import UserError
from common.device import has_fast_bf16, make_accelerator


def test_a_device_that_is_not_there_is_named():
    missing = "cuda" if torch.backends.mps.is_available() else "mps"
    with pytest.raises(UserError, match=rf"--device {missing}: not available on this machine"):
        make_accelerator(missing)


@pytest.mark.parametrize(
    ("found", "is_fast"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_bf16_is_taken_on_the_cpus_that_are_fast_at_it(monkeypatch, found, is_fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert has_fast_bf16("cpu") == is_fast
