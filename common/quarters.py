"""Losses of a diffusion training by quarter of the noise, which show what is learned at what noise.

Each step adds sums and counts, because a batch may have no image in a quarter. The end of an epoch
makes means of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from common.figures import save_curves
from common.run import Run

QUARTERS = 4


def add_quarters(losses: dict[str, Tensor], errors: Tensor, quarter: Tensor, name: str) -> None:
    """Add loss_NAME0 … and count_NAME0 … to a step's losses.

    `errors` (batch,) are those of the images, `quarter` (batch,) are the numbers 0 … 3 of theirs.
    """
    for number in range(QUARTERS):
        inside = quarter == number
        losses[f"loss_{name}{number}"] = errors.where(inside, 0).sum()
        losses[f"count_{name}{number}"] = inside.float().sum()


def quarter_of(t: Tensor, timesteps: int) -> Tensor:
    """The quarter 0 … 3 of the schedule that steps t (batch,) are in."""
    return (t - 1) * QUARTERS // timesteps


def end_epoch(run: Run, row: dict[str, Any], name: str, title: str) -> None:
    """Log an epoch's row of metrics and draw the curves; `title` is that of the quarters' panel.

    A quarter in which no image of the epoch fell has no loss: its value is None.
    """
    if not run.is_main:
        return
    columns = [f"loss_{name}{number}" for number in range(QUARTERS)]
    for number, column in enumerate(columns):
        count = row.pop(f"count_{name}{number}")
        row[column] = row[column] / count if count > 0 else None
    run.log_metrics(row)
    run.log_row(row)
    panels = {
        "loss": ["loss"],
        title: columns,
        "gradient's norm": ["gradient_norm"],
        "learning rate": ["learning_rate"],
    }
    save_curves(run.history(), panels, run.dir / "figures" / "curves.png")
