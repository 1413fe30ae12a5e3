"""common/training.py: the averaged network and the learning-rate schedule."""

import copy

import pytest
import torch
from torch import nn

from common.training import update_ema, warmup_cosine


def test_ema_averages_parameters_and_copies_buffers():
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = copy.deepcopy(trained)
    expected = [parameter.detach().clone() for parameter in trained.parameters()]
    for step in range(20):
        trained(torch.randn(8, 2))  # changes BatchNorm's statistics
        decay = min(0.9, (1 + step) / (10 + step))
        for number, parameter in enumerate(trained.parameters()):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter))
            expected[number] = decay * expected[number] + (1 - decay) * parameter.detach()
        update_ema(ema, trained, 0.9, step)
    for parameter, value in zip(ema.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    for ours, theirs in zip(ema.buffers(), trained.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine():
    factors = [warmup_cosine(progress, 0.2) for progress in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0], abs=1e-12)
