"""Pictures of the way from noise to image, which a sampler goes step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.faces import face_names
from common.figures import grid_of, save_gif, save_grid, save_labelled

COLUMNS = 10  # steps in the grids of faces


class State(NamedTuple):
    """A state of a sampler: step t, x_t, and the prediction of x_0 that led to it.

    The noise that sampling starts from has no prediction.
    """

    t: int
    x: Tensor
    x0: Tensor | None


class Digits(NamedTuple):
    """Digits at step t, uint8 (n, 3, 28, 28), on the CPU."""

    t: int
    pixels: Tensor


def draw_digits(
    states: Sequence[Digits], columns: int, timesteps: int, domain: str, folder: Path
) -> None:
    """Draw the grid of the digits, the film of its states, and six states of the first digit."""
    save_grid(states[-1].pixels, folder / f"{domain}_grid.png", columns)

    stride = math.ceil(len(states) / 50)  # at most 50 frames, and the last state
    shown = [*states[:-1:stride], states[-1]]
    frames = [grid_of(state.pixels, columns) for state in shown]
    save_gif(frames, folder / f"{domain}_reverse.gif", 150)

    six = evenly_spread(states, timesteps)
    first_zero = torch.stack([state.pixels[0] for state in six])
    names = [f"t = {state.t}" for state in six]
    save_labelled(first_zero, folder / f"{domain}_reverse.png", [domain], names)


def evenly_spread(states: Sequence[Digits], timesteps: int) -> list[Digits]:
    """The states nearest to t = T, 4/5 T, …, 0; fewer than six if there are fewer steps."""
    chosen = []
    for number in range(5, -1, -1):
        t = timesteps * number / 5
        nearest = min(states, key=lambda state: abs(state.t - t))
        if not any(nearest is state for state in chosen):
            chosen.append(nearest)
    return chosen


def draw_faces(
    states: Iterable[State],
    steps: Sequence[int],
    to_pixels: Callable[[Tensor], Tensor],
    about: str,
    folder: Path,
) -> None:
    """Draw faces (rows) at ten of the falling `steps` (columns), evenly from the first to the last.

    faces_xt.png has x_t, and faces_x0.png the x_0 that the network predicts from it. Ten steps are
    all shown. The last prediction is the face itself. `to_pixels` makes uint8 images of a state.
    """
    shown = evenly_chosen(len(steps), COLUMNS)
    noisy = []
    predicted = []
    for number, (before, after) in enumerate(pairwise(states)):
        if number in shown:
            assert after.x0 is not None
            noisy.append(to_pixels(before.x))
            predicted.append(to_pixels(after.x0))
    columns = [f"t = {steps[number]}" for number in shown]
    draw_way(noisy, columns, f"x_t: {about}", folder / "faces_xt.png")
    draw_way(predicted, columns, f"predicted x_0: {about}", folder / "faces_x0.png")


def draw_way(pictures: Sequence[Tensor], columns: Sequence[str], title: str, file: Path) -> None:
    """Draw the same faces (rows) at several steps (columns): uint8 (n, 3, height, width) each."""
    grid = torch.stack(list(pictures), dim=1).flatten(0, 1)  # row by row: a face at all its steps
    save_labelled(grid, file, face_names(len(pictures[0])), columns, title)


def evenly_chosen(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 … count - 1, evenly from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]
