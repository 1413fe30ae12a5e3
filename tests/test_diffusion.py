"""diffusion/samplers.py and guidance.py: against independent formulas and diffusers' schedulers."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from diffusion.guidance import guided_eps, predict_eps
from diffusion.samplers import (
    ancestral_step,
    clamp_x0,
    ddim_step,
    dpm_solver_step,
    step_pairs,
)
from diffusion.schedule import Schedule, spaced_steps

SHAPE = (3, 2, 4, 4)


def toy_eps(x: Tensor, fraction: float) -> Tensor:
    """Stands for a network at t / T: smooth in both, with images inside and outside the clamp."""
    return 0.8 * torch.sin(3 * x) + 0.3 * math.cos(5 * fraction) * x


def starting_noise() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=rng, dtype=torch.float64)


class Noise:
    """Calls give one noise after the other, the same ones for each new object."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(1)

    def __call__(self) -> Tensor:
        return torch.randn(SHAPE, generator=self.rng, dtype=torch.float64)


# One sampler is one function that goes from a step to the one before it.


class Now(NamedTuple):
    """What a sampler knows at step t, on its way to `previous`."""

    x: Tensor
    x0: Tensor
    eps: Tensor
    t: int
    previous: int


Step = Callable[[Now], Tensor]


def ddpm(schedule: Schedule, large_sigma: bool = False) -> Step:
    draw = Noise()

    def step(now: Now) -> Tensor:
        noise = draw() if now.previous > 0 else None
        return ancestral_step(schedule, now.x, now.x0, now.t, now.previous, noise, large_sigma)

    return step


def ddim(schedule: Schedule, eta: float = 0.0) -> Step:
    draw = Noise()

    def step(now: Now) -> Tensor:
        noise = draw() if eta > 0 and now.previous > 0 else None
        return ddim_step(schedule, now.x0, now.eps, now.t, now.previous, eta, noise)

    return step


def ddim_with_eta_1(schedule: Schedule) -> Step:
    return ddim(schedule, eta=1.0)


def dpm_solver(schedule: Schedule) -> Step:
    before = None

    def step(now: Now) -> Tensor:
        nonlocal before
        x = dpm_solver_step(schedule, now.x, now.x0, now.t, now.previous, before)
        before = (now.t, now.x0)
        return x

    return step


def run_sampler(
    step: Step,
    schedule: Schedule,
    steps: list[int],
    clamp: str = "static",
    net: Callable[[Tensor, int], Tensor] | None = None,
    x: Tensor | None = None,
) -> Tensor:
    """The states (len(steps), *SHAPE) after each step. `net(x, t)` is the toy if not given."""
    if x is None:
        x = starting_noise()
    states = []
    for t, previous in step_pairs(steps):
        eps = toy_eps(x, t / schedule.T) if net is None else net(x, t)
        x0 = clamp_x0(schedule.x0_from_eps(x, t, eps), clamp)
        x = step(Now(x, x0, eps, t, previous))
        states.append(x)
    return torch.stack(states)


# Against diffusers


@pytest.mark.parametrize("large", [False, True])
def test_ddpm_over_all_steps_is_that_of_diffusers(large):
    T = 60
    schedule = Schedule(T)
    ours = run_sampler(ddpm(schedule, large_sigma=large), schedule, spaced_steps(T, T))
    theirs = DDPMScheduler(
        T,
        beta_start=1e-4 * 1000 / T,
        beta_end=0.02 * 1000 / T,
        variance_type="fixed_large" if large else "fixed_small",
        clip_sample=True,
    )
    x = starting_noise()
    draw = Noise()
    for number, t in enumerate(theirs.timesteps.tolist()):
        eps = toy_eps(x, (t + 1) / T)
        rng = torch.Generator().manual_seed(0)
        x0 = theirs.step(eps, t, x, generator=rng).pred_original_sample
        # Their noise comes from a generator of their own, so the posterior is put together here
        # from their coefficients.
        a_t = theirs.alphas_cumprod[t]
        a_prev = theirs.alphas_cumprod[t - 1] if t > 0 else torch.tensor(1.0)
        weight_of_x0 = a_prev.sqrt() * theirs.betas[t] / (1 - a_t)
        weight_of_x = theirs.alphas[t].sqrt() * (1 - a_prev) / (1 - a_t)
        variance = theirs._get_variance(t)
        x = weight_of_x0 * x0 + weight_of_x * x
        if t > 0:
            x = x + variance.sqrt() * draw()
        torch.testing.assert_close(ours[number], x, rtol=1e-5, atol=1e-5)  # their ᾱ is float32


@pytest.mark.parametrize(("count", "eta"), [(50, 0.0), (50, 0.5), (10, 1.0)])
def test_ddim_is_that_of_diffusers(count, eta):
    schedule = Schedule()
    steps = spaced_steps(1000, count, "leading", offset=1)
    ours = run_sampler(ddim(schedule, eta), schedule, steps)
    theirs = DDIMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        timestep_spacing="leading",
        steps_offset=1,
        clip_sample=True,
        set_alpha_to_one=True,
    )
    theirs.alphas_cumprod = torch.tensor(schedule.alpha_bar[1:], dtype=torch.float64)  # was float32
    theirs.set_timesteps(count)
    x = starting_noise()
    draw = Noise()
    for number, t in enumerate(theirs.timesteps.tolist()):
        is_last = number == count - 1
        noise = draw() if eta > 0 and not is_last else torch.zeros_like(x)
        eps = toy_eps(x, (t + 1) / 1000)
        x = theirs.step(eps, t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours[number], x, rtol=1e-7, atol=1e-7)


def test_ddim_of_a_network_that_predicts_v_is_that_of_diffusers():
    schedule = Schedule(1000, "cosine", prediction="v")

    def v_net(x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        return toy_eps(x, time[0].item())

    ours = run_sampler(
        ddim(schedule),
        schedule,
        spaced_steps(1000, 25),
        net=lambda x, t: predict_eps(v_net, schedule, x, t),
        x=starting_noise().float(),
    )
    theirs = DDIMScheduler(
        1000,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
    )
    theirs.alphas_cumprod = schedule.alpha_bars[1:].double()
    theirs.set_timesteps(25)
    x = starting_noise()
    for number, t in enumerate(theirs.timesteps.tolist()):
        x = theirs.step(toy_eps(x, (t + 1) / 1000), t, x).prev_sample
        # Ours is float32, at ᾱ_T = 2e-9.
        torch.testing.assert_close(ours[number].double(), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [5, 10, 20])
def test_dpm_solver_is_that_of_diffusers(count):
    schedule = Schedule()
    steps = spaced_steps(1000, count)
    ours = run_sampler(dpm_solver(schedule), schedule, steps, clamp="none")
    theirs = DPMSolverMultistepScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(timesteps=[t - 1 for t in steps])
    alpha_bars = [schedule.alpha_bar[t] for t in [*steps, 0]]
    theirs.sigmas = (1 / torch.tensor(alpha_bars, dtype=torch.float64) - 1).sqrt()  # was float32
    x = starting_noise()
    for number, t in enumerate(theirs.timesteps.tolist()):
        x = theirs.step(toy_eps(x, (t + 1) / 1000), t, x).prev_sample
        torch.testing.assert_close(ours[number], x, rtol=1e-5, atol=1e-5)  # theirs is float32


# Against independent formulas


def test_dpm_solver_is_of_second_order():
    """On ε = x, an ODE with a closed form, twice the steps leave about a quarter of the error."""
    schedule = Schedule(1000, "cosine")
    first = 900
    last = 100

    def reached(count: int) -> float:
        """The state at t = 100 after `count` steps."""
        steps = [round(first - (first - last) * number / count) for number in range(count + 1)]
        states = run_sampler(
            dpm_solver(schedule),
            schedule,
            steps,
            clamp="none",
            net=lambda x, t: x,
            x=torch.ones(1, 1, 1, 1, dtype=torch.float64),
        )
        return states[-2].item()  # the last one is the predicted image

    exact = reached(800)
    errors = [abs(reached(count) - exact) for count in (10, 20, 40)]
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


def test_ddim_with_eta_1_over_all_steps_is_ddpm():
    schedule = Schedule(100)
    steps = spaced_steps(100, 100)
    with_ddim = run_sampler(ddim(schedule, eta=1.0), schedule, steps, clamp="none")
    with_ddpm = run_sampler(ddpm(schedule), schedule, steps, clamp="none")
    torch.testing.assert_close(with_ddim, with_ddpm, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sampler", [ddpm, ddim_with_eta_1])
def test_steps_far_apart_follow_the_posterior_of_bayes_rule(sampler):
    """q(x_s | x_t, x_0) is the product of q(x_s | x_0) and q(x_t | x_s), up to a factor.

    Both are Gaussians in x_s, and x_0 is the predicted image.
    """
    schedule = Schedule(1000, "cosine")
    steps = spaced_steps(1000, 20, "beta")
    ours = run_sampler(sampler(schedule), schedule, steps, clamp="none")
    x = starting_noise()
    draw = Noise()
    for number, (t, s) in enumerate(itertools.pairwise(steps)):
        a_t = schedule.alpha_bar[t]
        a_s = schedule.alpha_bar[s]
        x0 = (x - (1 - a_t) ** 0.5 * toy_eps(x, t / 1000)) / a_t**0.5
        between = a_t / a_s
        precision = 1 / (1 - a_s) + between / (1 - between)
        mean = (a_s**0.5 * x0 / (1 - a_s) + between**0.5 * x / (1 - between)) / precision
        x = mean + precision**-0.5 * draw()
        torch.testing.assert_close(ours[number], x, rtol=1e-5, atol=1e-5)


def test_ddim_is_eulers_method_on_scaled_images():
    """Scaled images x / √ᾱ move by ε dσ, with σ = √(1/ᾱ - 1) (Song et al., DDIM, equation 14)."""
    schedule = Schedule(1000, "cosine")
    steps = spaced_steps(1000, 15, "beta")
    ours = run_sampler(ddim(schedule), schedule, steps, clamp="none")
    scales = [schedule.alpha_bar[t] ** 0.5 for t in steps]
    sigmas = [math.sqrt(1 / schedule.alpha_bar[t] - 1) for t in steps]
    scaled = starting_noise() / scales[0]
    for number in range(len(steps) - 1):
        eps = toy_eps(scaled * scales[number], steps[number] / 1000)
        scaled = scaled + (sigmas[number + 1] - sigmas[number]) * eps
        x = scaled * scales[number + 1]
        torch.testing.assert_close(ours[number], x, rtol=1e-5, atol=1e-5)


def test_dpm_solver_extrapolates_the_image_along_log_sigma():
    """On images scaled as above: 2M, with the image extrapolated from this step and the last."""
    schedule = Schedule(1000, "cosine")
    steps = spaced_steps(1000, 15, "beta")
    ours = run_sampler(dpm_solver(schedule), schedule, steps, clamp="none")
    scales = [schedule.alpha_bar[t] ** 0.5 for t in steps]
    sigmas = [math.sqrt(1 / schedule.alpha_bar[t] - 1) for t in steps]
    scaled = starting_noise() / scales[0]
    h_before = math.inf  # the first step has no memory
    x0_before = scaled
    for number in range(len(steps) - 1):
        sigma = sigmas[number]
        following = sigmas[number + 1]
        h = math.log(sigma / following)
        x0 = scaled - sigma * toy_eps(scaled * scales[number], steps[number] / 1000)
        extrapolated = x0 + h / (2 * h_before) * (x0 - x0_before)
        scaled = following / sigma * scaled + (1 - following / sigma) * extrapolated
        x = scaled * scales[number + 1]
        torch.testing.assert_close(ours[number], x, rtol=1e-5, atol=1e-5)
        h_before = h
        x0_before = x0


@pytest.mark.parametrize("sampler", [ddpm, ddim_with_eta_1, dpm_solver])
def test_a_perfect_network_gives_the_image_back_and_no_noise_is_added_last(sampler):
    schedule = Schedule()
    steps = spaced_steps(1000, 7)
    image = torch.rand(SHAPE, dtype=torch.float64) - 0.5
    predicted = []

    def perfect(x: Tensor, t: int) -> Tensor:
        a = schedule.alpha_bar[t]
        eps = (x - math.sqrt(a) * image) / math.sqrt(1 - a)
        predicted.append(schedule.x0_from_eps(x, t, eps))
        return eps

    states = run_sampler(sampler(schedule), schedule, steps, net=perfect)
    for x0 in predicted:
        torch.testing.assert_close(x0, image)
    torch.testing.assert_close(states[-1], image)


def test_the_last_step_ends_at_the_clean_image():
    assert list(step_pairs([981, 961, 1])) == [(981, 961), (961, 1), (1, 0)]
    assert list(step_pairs([7])) == [(7, 0)]


def test_clamps():
    x0 = torch.linspace(-4, 2, 1000, dtype=torch.float64).view(1, 1, 10, 100)
    assert clamp_x0(x0, "none") is x0
    assert clamp_x0(x0, "static").abs().max() == 1
    limit = np.quantile(np.abs(x0.numpy()), 0.995)
    torch.testing.assert_close(clamp_x0(x0, "dynamic"), (x0 / limit).clamp(-1, 1))
    small = x0 / 8  # within [-1, 1]
    torch.testing.assert_close(clamp_x0(small, "dynamic"), small)


# Guidance


class Classes(torch.nn.Module):
    """Predicts class + 1 for an image with a class and -1 for one without; counts its images."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(
        self, x: Tensor, time: Tensor, classes: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        self.batches.append(len(x))
        value = (classes + 1).double()
        if drop is not None:
            value = value.where(~drop, -1.0)
        return value.view(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize(("w", "expected"), [(0.5, [2, 8]), (3.0, [7, 23])])
def test_guidance_extrapolates_from_the_prediction_without_a_class(w, expected):
    """(1 + w) (class + 1) - w (-1) for the classes 0 and 4, in one batch of twice the size."""
    net = Classes()
    labels = torch.tensor([0, 4])
    eps = guided_eps(net, Schedule(), torch.zeros(2, 1, 1, 1), 500, labels, w)
    assert eps.flatten().tolist() == pytest.approx(expected)
    assert net.batches == [4]


def test_without_guidance_the_class_alone_counts_and_the_batch_is_not_doubled():
    net = Classes()
    labels = torch.tensor([0, 4])
    x = torch.zeros(2, 1, 1, 1)
    assert predict_eps(net, Schedule(), x, 500, labels).flatten().tolist() == [1, 5]
    assert net.batches == [2]
    guided = guided_eps(net, Schedule(), x, 500, labels, guidance=0.0)
    assert guided.flatten().tolist() == pytest.approx([1, 5])
