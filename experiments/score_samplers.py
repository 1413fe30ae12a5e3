r"""The samplers of score-based models side by side: quality and time by number of network calls.

This is `p2_score.py table`. A row is a sampler with its calls of the network: the noise levels,
KID × 1,000, the Fréchet distance of random features and with --weights FID, the share of images
with exactly one face, and the seconds an image takes, start included. Langevin dynamics also has
the variance that its steps leave of the noise of sigma_min: 1 would be exact, and with few calls it
cannot be.

All rows use the same checkpoint and the seeds of the same images. One row leaves out the final
denoising. The last rows are those of real training images, as many as other rows have. The same
command again measures what is missing. Beside the table there is samples.png with the first faces
of every row.

    python experiments/score_samplers.py --checkpoint runs/p2/score/model.safetensors \
        --output-dir runs/p2/score-table
"""

from __future__ import annotations

import dataclasses
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import p2_score
from common.checkpoints import digest_of
from common.cli import run_cli
from diffusion.noise_levels import annealed_variance, level_ratio, levels_needed
from experiments.face_rows import (
    FEW_CALLS,
    Lines,
    Reference,
    check_shared,
    count_of,
    device_of,
    timed,
    write_reference,
)
from p2_score import Model, Plan, Sample, Sampler, Table

COLUMNS = ["sampler", "calls", "levels", "variance left", "images"]


class Row(NamedTuple):
    """A sampler with its calls of the network."""

    sampler: Sampler
    calls: int
    final_denoising: bool = True

    @property
    def words(self) -> str:
        """The sampler in words."""
        return self.sampler if self.final_denoising else f"{self.sampler}, no final denoising"

    @property
    def name(self) -> str:
        """The name of its folder."""
        end = "" if self.final_denoising else "-noisy"
        return f"{self.sampler}-{self.calls}{end}"


def rows_of(args: Table) -> list[Row]:
    """Every sampler with every number of calls; the last sampler also without final denoising."""
    rows = [
        Row(sampler, calls, args.final_denoising)
        for calls in args.calls
        for sampler in args.samplers
    ]
    if args.final_denoising:
        few = [calls for calls in args.calls if calls <= FEW_CALLS]
        rows.append(Row(args.samplers[-1], max(few or args.calls), final_denoising=False))
    return rows


def main(args: Table) -> list[list[str]]:
    """Sample and evaluate what is missing; write the table after each row; returns its lines."""
    model = p2_score.load_model(args)
    check_shared(
        args.output_dir,
        {
            "checkpoint": digest_of(args.checkpoint),
            "data_dir": args.data_dir.resolve(),
            "count": args.count,
            "count_above": args.count_above,
            "seed": args.seed,
            "final_denoising": args.final_denoising,
            "snr": args.snr,
            "rho": args.rho,
            "device": device_of(args.device),
            "precision": args.precision,
        },
    )
    size = model.net.image_size
    counts = sorted({count_of(args, calls) for calls in args.calls}, reverse=True)
    reference = write_reference(args.output_dir, args.data_dir, size, counts, args.seed)
    title = title_of(args, model, reference)
    lines = Lines(COLUMNS, args.output_dir, reference, title, args.device, args.weights)
    for row in rows_of(args):
        plan = p2_score.make_plan(model, row.sampler, row.calls, args.rho)
        count = count_of(args, row.calls)
        folder = args.output_dir / "rows" / row.name
        options = sample_options(args, row, count, folder / "images")
        seconds = timed(folder, count, partial(p2_score.sample, options))
        levels = str(len(plan.sigmas))
        words = [row.words, f"{plan.calls:,}", levels, variance_left(plan), f"{count:,}"]
        lines.add(words, folder, folder / "images", seconds)
    for count in counts:
        words = ["real images", "", "", "", f"{count:,}"]
        lines.add(words, args.output_dir / f"real-{count}", reference.train[count], None)
    lines.draw_samples(size)
    lines.print()
    return lines.rows


def title_of(args: Table, model: Model, reference: Reference) -> str:
    """What the numbers are about, and why Langevin dynamics fails with few calls."""
    levels = model.levels
    dimensions = math.prod(model.net.shape)
    needed = levels_needed(levels.sigma_max, levels.sigma_min, dimensions)
    return (
        f"{args.checkpoint}: {reference.description}.\n"
        "Distances compare only with those of as many images. Langevin dynamics needs "
        f"{needed} levels at a ratio of {level_ratio(dimensions):.4f}; with fewer it must fail."
    )


def sample_options(args: Table, row: Row, count: int, folder: Path) -> Sample:
    """The options of `p2_score.py sample` for a row."""
    shared = {}
    for field in dataclasses.fields(p2_score.Sampling):
        shared[field.name] = getattr(args, field.name)
    shared["output_dir"] = folder
    shared["final_denoising"] = row.final_denoising
    return Sample(**shared, sampler=row.sampler, calls=row.calls, num_images=count)


def variance_left(plan: Plan) -> str:
    """The variance that Langevin dynamics leaves, relative to sigma_min²; empty for the others."""
    if plan.sampler != "langevin" or len(plan.sigmas) < 2:
        return ""
    ratio = plan.sigmas[0] / plan.sigmas[1]
    return f"{annealed_variance(ratio, plan.steps, len(plan.sigmas)):.2f}"


if __name__ == "__main__":
    run_cli(Table, main)
