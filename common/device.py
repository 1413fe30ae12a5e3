"""Where a script computes, in which precision, and how much memory that took."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import nn

from common.cli import UserError
from common.trackers import Tracker, refuse_missing_packages

if TYPE_CHECKING:
    from accelerate import Accelerator

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
Net = TypeVar("Net", bound=nn.Module)
# How long the processes of torchrun wait for one another. PyTorch's 10 minutes are too short where
# the first one draws or evaluates alone. torchrun itself ends all when one fails.
PATIENCE = timedelta(hours=12)


def make_accelerator(
    device: Device = "auto",
    precision: Precision = "auto",
    log_with: Sequence[Tracker] = (),
    folder: Path | None = None,
) -> Accelerator:
    """Set up device, precision and data parallelism with Hugging Face Accelerate.

    The same script then runs alone or under torchrun. Device "auto" is CUDA, else Apple's MPS, else
    the CPU. Precision "auto" is bf16 where the hardware is fast at it (`has_fast_bf16`), else
    fp32. A training names the trackers of --log-with and its run directory, and `Run` starts them.
    Raises UserError for a device or a tracker's package that is not there.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs  # takes more than a second to import
    from accelerate.state import AcceleratorState

    refuse_missing_packages(log_with)
    chosen = choose_device(device)
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(chosen) else "fp32"
    # A program may train in bf16 and then predict in fp32. Accelerate keeps the settings of its
    # first Accelerator unless they are reset.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    mixed_precision = "bf16" if precision == "bf16" else "no"
    waiting = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(
        cpu=chosen == "cpu",
        mixed_precision=mixed_precision,
        log_with=list(log_with) or None,  # pyright: ignore[reportArgumentType]
        project_dir=folder,
        kwargs_handlers=[waiting],
    )


def choose_device(device: Device) -> str:
    """The kind of device of the option --device. Raises UserError if it is not there."""
    available = available_devices()
    if device not in ("auto", *available):
        there = ", ".join(available)
        raise UserError(f"--device {device}: not available on this machine (available: {there})")
    return available[0] if device == "auto" else device


def available_devices() -> list[str]:
    """The kinds of device on this machine, the preferred one first."""
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.insert(0, "mps")
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    return devices


def has_fast_bf16(device: str) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 on this kind of device.

    They are on CUDA since Ampere, on CPUs with AMX, and on AMD's with AVX512-BF16, where they take
    half the time. On Intel's with AVX512-BF16 alone they take 1.7 times as long. Torch up to 2.11
    does not say what a CPU has.
    """
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if device == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # newer than torch 2.11
        found = torch.cpu.get_capabilities()
        is_intel = str(found.get("cpu_name", "")).startswith("Intel")
        return bool(found.get("amx_bf16") or (found.get("avx512_bf16") and not is_intel))
    return False


def place(net: Net, device: torch.device) -> Net:
    """Move a network to a device, its weights in the channels-last layout; returns the network.

    That layout makes convolutions faster, and much faster in bf16.
    """
    return net.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def peak_memory(device: torch.device) -> float:
    """The largest memory of this process so far in MiB: its tensors on CUDA, else all of it.

    NaN on Windows, where Python does not know it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return peak / unit
