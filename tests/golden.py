"""Deterministic weights and inputs for golden outputs, the same formulas for every net."""

import torch
from torch import Tensor, nn


def fill(net: nn.Module) -> nn.Module:
    """Weights from sines: sin(0.7 k + i) for tensor i in sorted order, scaled by its kind; the net in eval mode."""
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
            wave = wave * (2 / (value.numel() / value.shape[0])) ** 0.5
        weights[key] = wave.reshape(value.shape).float()
    net.load_state_dict(weights)
    return net.eval()


def image(batch: int, channels: int, size: int) -> Tensor:
    """cos(0.01 k) as float32 (batch, channels, size, size)."""
    count = batch * channels * size * size
    return torch.cos(0.01 * torch.arange(count, dtype=torch.float64)).reshape(batch, channels, size, size).float()
