"""Sampling from a text-to-image model, with classifier-free guidance.

Classifier-free guidance: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.rng import ImageNoise
from diffusion.samplers import ddim_step, dpm_solver_step, step_pairs
from diffusion.schedule import Schedule, spaced_steps
from models.stable_diffusion.model import StableDiffusion
from models.text_to_image import TextToImage

Solver = Literal["dpm", "ddim"]

# Both have the methods embed, encode_text, encode, predict, decode and save_memory. Both know
# `length` (tokens of a prompt), `text_width`, `image_size`, `shape` (of what is diffused) and
# `range_limit` (the largest absolute value of what is diffused; None if there is none).
TextToImageModel = StableDiffusion | TextToImage


@dataclass(frozen=True)
class Sampling:
    """How images are sampled."""

    steps: int
    """Steps of the solver; each calls the network with and without the prompt."""
    guidance: float
    """Scale s of the guidance: without + s (with - without); 1 is none."""
    solver: Solver = "dpm"
    """DPM-Solver++(2M) or DDIM with eta = 0."""


@torch.inference_mode()
def sample(
    model: TextToImageModel,
    schedule: Schedule,
    states: Tensor,
    empty: Tensor,
    seed: int,
    numbers: Sequence[int],
    sampling: Sampling,
) -> Tensor:
    """Images (n, 3, size, size), about in [-1, 1]; image k depends on (seed, k) alone.

    `states` are those of each image's prompt (n, length, width), `empty` those of the empty prompt
    (1, length, width). `numbers` are the k of the images.
    """
    noise = ImageNoise(seed, numbers, model.shape, states.device)
    x = noise().to(states.dtype)
    both = torch.cat([states, empty.expand_as(states)])
    before = None
    for t, previous in step_pairs(spaced_steps(schedule.T, sampling.steps, "trailing")):
        output = guided_output(model, schedule, x, t, both, sampling.guidance)
        x0 = schedule.x0_from_output(x, t, output)
        if model.range_limit is not None:
            x0 = x0.clamp(-model.range_limit, model.range_limit)
        if sampling.solver == "ddim":
            eps = schedule.eps_from_output(x, torch.full((len(x),), t, device=x.device), output)
            x = ddim_step(schedule, x0, eps, t, previous)
        else:
            x = dpm_solver_step(schedule, x, x0, t, previous, before)
            before = (t, x0)
    return model.decode(x)


def guided_output(
    model: TextToImageModel, schedule: Schedule, x: Tensor, t: int, both: Tensor, guidance: float
) -> Tensor:
    """What the model predicts for x_t, float32, guided: f(x) + s (f(x, prompt) - f(x)).

    `both` holds the states of the prompts and of the empty prompt (2 n, length, width). Both
    predictions are computed in one batch. For s = 1 the empty prompt is not needed.
    """
    if guidance == 1:
        steps = torch.full((len(x),), t, device=x.device)
        return model.predict(x, schedule.time(steps, model), both[: len(x)]).float()
    steps = torch.full((len(both),), t, device=x.device)
    output = model.predict(torch.cat([x, x]), schedule.time(steps, model), both).float()
    with_prompt, without = output.chunk(2)
    return torch.lerp(without, with_prompt, guidance)
