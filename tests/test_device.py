"""common/device.py: where a script computes."""

import pytest
import torch

from common.cli import UserError
from common.device import make_accelerator


def test_a_device_that_is_not_there_is_named():
    missing = "cuda" if torch.backends.mps.is_available() else "mps"
    with pytest.raises(UserError, match=rf"--device {missing}: not available on this machine"):
        make_accelerator(missing)
