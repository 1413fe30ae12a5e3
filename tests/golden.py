"""Deterministic weights and inputs for golden outputs, by the same formulas for every network."""

import torch
from torch import Tensor, nn


def fill(net: nn.Module) -> nn.Module:
    """Fill a network with weights from sines; returns it in eval mode.

    Tensor i in sorted order gets sin(0.7 k + i) at position k, scaled according to its kind.
    """
    weights = net.state_dict()
    for i, key in enumerate(sorted(weights)):
        value = weights[key]
        if not value.is_floating_point() or key.endswith("inv_freq"):
            continue
        wave = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + i)
        if key.endswith("running_var"):
            wave = 1 + 0.5 * wave
        elif key.endswith(("running_mean", "bias")):
            wave = 0.1 * wave
        elif value.dim() == 1:
            wave = 1 + 0.1 * wave
        else:
            inputs = value.numel() / value.shape[0]
            wave = wave * (2 / inputs) ** 0.5
        weights[key] = wave.reshape(value.shape).float()
    net.load_state_dict(weights)
    return net.eval()


def image(batch: int, channels: int, size: int) -> Tensor:
    """cos(0.01 k) at position k, as float32 (batch, channels, size, size)."""
    count = batch * channels * size * size
    wave = torch.cos(0.01 * torch.arange(count, dtype=torch.float64))
    return wave.reshape(batch, channels, size, size).float()
