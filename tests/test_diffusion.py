"""common/diffusion.py against independent formulas, against diffusers' schedulers, and in the traps of samplers."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from common.diffusion import Schedule, clamp_x0, predictor, sample
from common.run import ImageNoise, UserError


def predict(x: torch.Tensor, fraction: float) -> torch.Tensor:
    """Stands for a net: smooth in x and t, far from the clamp's edges and beyond them."""
    return 0.8 * torch.sin(3 * x) + 0.3 * math.cos(5 * fraction) * x


def start() -> torch.Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(schedule: Schedule, steps: list[int], sampler: str, **options) -> torch.Tensor:
    return torch.stack(
        [
            step.x
            for step in sample(schedule, lambda x, t: predict(x, t / schedule.T), start(), steps, sampler, **options)
        ]
    )


def drawer(seed: int = 1):
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(3, 2, 4, 4, generator=rng, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------- schedule


def test_linear_schedule_has_the_published_values():
    schedule = Schedule()
    # Ho et al.'s β from 1e-4 to 0.02; the last ᾱ of their code is 4.036e-5.
    assert schedule.betas[1].item() == pytest.approx(1e-4)
    assert schedule.betas[1000].item() == pytest.approx(0.02)
    assert schedule.a[0] == 1
    assert schedule.a[1] == pytest.approx(1 - 1e-4)
    assert schedule.a[1000] == pytest.approx(4.0358e-5, rel=1e-4)
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert schedule.a[1:] == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_short_schedule_reaches_noise_unless_the_betas_are_as_given():
    assert Schedule(400).a[400] < 1e-4
    assert Schedule(400, as_given=True).a[400] == pytest.approx(np.prod(1 - np.linspace(1e-4, 0.02, 400)))
    assert Schedule(400, as_given=True).a[400] > 0.017  # a signal of 13 % (its root) is left
    with pytest.raises(UserError, match="--steps 10: β would go"):
        Schedule(10, beta_end=0.5)


def test_cosine_schedule_is_the_formula_of_its_paper():
    schedule = Schedule(1000, "cosine")

    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert schedule.a[500] == pytest.approx(f(500) / f(0), rel=1e-9)
    assert schedule.betas[1000].item() == pytest.approx(0.999)


def test_forward_process_and_its_inverse():
    schedule, t = Schedule(), torch.tensor([1, 500, 1000])
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = schedule.q_sample(x0, t, noise)
    for row, step in enumerate(t.tolist()):
        expected = math.sqrt(schedule.a[step]) * x0[row] + math.sqrt(1 - schedule.a[step]) * noise[row]
        torch.testing.assert_close(x[row], expected)
    torch.testing.assert_close(schedule.x0_of(x, t, noise)[:2], x0[:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(schedule.score_of(t, noise)[1], -noise[1] / math.sqrt(1 - schedule.a[500]))
    weights = schedule.min_snr_weight(t)
    snr = schedule.a[1] / (1 - schedule.a[1])
    assert weights[0].item() == pytest.approx(5 / snr, rel=1e-2)  # 1 - ᾱ_1 in float32
    assert weights[1:].tolist() == [1, 1]


def test_v_tells_the_noise_and_is_weighted_as_the_image_s_error():
    """v is the derivative of x_t by the angle whose cosine is √ᾱ_t (Salimans and Ho, appendix D)."""
    schedule, t = Schedule(prediction="v"), torch.tensor([1, 250, 1000])
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x, v = schedule.q_sample(x0, t, noise), schedule.target(x0, t, noise)
    torch.testing.assert_close(schedule.eps_of(x, t, v), noise, rtol=1e-4, atol=1e-5)
    angle, h = torch.tensor([math.acos(math.sqrt(schedule.a[step])) for step in t.tolist()]).double(), 1e-4
    ahead, behind = (a.cos().view(-1, 1, 1, 1) * x0 + a.sin().view(-1, 1, 1, 1) * noise for a in (angle + h, angle - h))
    torch.testing.assert_close(v.double(), (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-4)  # v is float32
    # The same errors of the image, told as errors of the noise or of v, weigh the same: min(SNR, γ).
    snr = torch.tensor([schedule.a[step] / (1 - schedule.a[step]) for step in t.tolist()])
    for some, factor in ((Schedule(), snr), (schedule, snr + 1)):
        torch.testing.assert_close(some.min_snr_weight(t) * factor, snr.clamp(max=5), rtol=1e-2, atol=0)  # 1 - ᾱ_1
    assert Schedule(**schedule.config).prediction == "v"
    assert torch.equal(Schedule().target(x0, t, noise), noise)


@pytest.mark.parametrize("count", [1, 2, 13, 50, 300, 999, 1000])
def test_subsets_have_exactly_their_number_of_steps(count):
    schedule = Schedule()
    for spacing in ("leading", "trailing", "beta"):
        steps = schedule.subset(count, spacing)
        assert len(steps) == len(set(steps)) == count
        assert steps == sorted(steps, reverse=True)
        assert 1 <= steps[-1] <= steps[0] <= 1000
        assert (steps[-1] == 1) if spacing == "leading" else (steps[0] == 1000)
    quantiles = scipy.stats.beta(0.6, 0.6).ppf(np.arange(1, 19) / 18)
    assert schedule.subset(18, "beta")[::-1] == [round(1000 * q) for q in quantiles]
    assert schedule.subset(5, "beta") == [1000, 877, 637, 363, 123]  # by the trapezoidal rule
    assert schedule.subset(50, "leading", 1) == [2 + 20 * number for number in range(49, -1, -1)]  # t = 1 … 981 from 0
    for wrong in (0, 1001):
        with pytest.raises(UserError, match=f"--steps {wrong}"):
            schedule.subset(wrong)
    with pytest.raises(UserError, match="--offset 1: 1000 steps would begin at 1001"):
        schedule.subset(1000, "leading", 1)


# ------------------------------------------------------------------------------------------------------------ samplers


@pytest.mark.parametrize("large", [False, True])
def test_ddpm_over_all_steps_is_diffusers(large):
    schedule = Schedule(60)
    beta = {"beta_start": 1e-4 * 1000 / 60, "beta_end": 0.02 * 1000 / 60}
    kind = "fixed_large" if large else "fixed_small"
    theirs = DDPMScheduler(60, **beta, variance_type=kind, clip_sample=True)
    ours = run(schedule, schedule.subset(60), "ddpm", large_sigma=large, draw=drawer())
    x, draw = start(), drawer()
    for number, t in enumerate(theirs.timesteps.tolist()):
        eps = predict(x, (t + 1) / 60)
        mean = theirs.step(eps, t, x, generator=torch.Generator().manual_seed(0)).pred_original_sample
        # Their noise comes from a generator of their own: the posterior is put together from their parts.
        variance = theirs._get_variance(t)
        coefficient, current = theirs.betas[t], theirs.alphas[t] ** 0.5
        a, before = theirs.alphas_cumprod[t], theirs.alphas_cumprod[t - 1] if t else torch.tensor(1.0)
        x = mean * before**0.5 * coefficient / (1 - a) + x * current * (1 - before) / (1 - a)
        x = x + (variance.sqrt() * draw() if t else 0)
        torch.testing.assert_close(ours[number], x, rtol=1e-5, atol=1e-5)  # their ᾱ is float32


@pytest.mark.parametrize(("count", "eta"), [(50, 0.0), (50, 0.5), (10, 1.0)])
def test_ddim_is_diffusers(count, eta):
    schedule = Schedule()
    theirs = DDIMScheduler(
        1000, 1e-4, 0.02, timestep_spacing="leading", steps_offset=1, clip_sample=True, set_alpha_to_one=True
    )
    theirs.alphas_cumprod = torch.tensor(schedule.a[1:], dtype=torch.float64)  # theirs are float32
    theirs.set_timesteps(count)
    ours = run(schedule, schedule.subset(count, "leading", 1), "ddim", eta=eta, draw=drawer())
    x, draw = start(), drawer()
    for number, t in enumerate(theirs.timesteps.tolist()):
        noise = draw() if eta > 0 and number < count - 1 else torch.zeros_like(x)
        x = theirs.step(predict(x, (t + 1) / 1000), t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours[number], x, rtol=1e-7, atol=1e-7)


def test_ddim_of_a_net_that_gives_v_is_diffusers():
    schedule = Schedule(1000, "cosine", prediction="v")
    theirs = DDIMScheduler(1000, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=True)
    theirs.alphas_cumprod = schedule.alpha_bars[1:].double()
    theirs.set_timesteps(25)

    def net(x, time, labels):
        return predict(x, time[0].item())

    steps = sample(schedule, predictor(net, schedule), start().float(), schedule.subset(25), "ddim")
    x = start()
    for step, t in zip(steps, theirs.timesteps.tolist(), strict=True):
        x = theirs.step(predict(x, (t + 1) / 1000), t, x).prev_sample
        torch.testing.assert_close(step.x.double(), x, rtol=1e-3, atol=1e-3)  # ours is float32, at ᾱ_T = 2e-9


@pytest.mark.parametrize("count", [5, 10, 20])
def test_dpm_solver_is_diffusers(count):
    schedule = Schedule()
    theirs = DPMSolverMultistepScheduler(
        1000, 1e-4, 0.02, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    theirs.set_timesteps(timesteps=[step - 1 for step in schedule.subset(count)])
    alpha_bars = torch.tensor([schedule.a[step] for step in [*schedule.subset(count), 0]], dtype=torch.float64)
    theirs.sigmas = (1 / alpha_bars - 1).sqrt()  # theirs are float32
    ours = run(schedule, schedule.subset(count), "dpm-solver++", clamp="none")
    x = start()
    for number, t in enumerate(theirs.timesteps.tolist()):
        x = theirs.step(predict(x, (t + 1) / 1000), t, x).prev_sample
        torch.testing.assert_close(ours[number], x, rtol=1e-5, atol=1e-5)  # theirs keeps x in float32


def test_dpm_solver_is_of_second_order():
    """On ε = x, an ODE with a closed form, twice the steps leave about a quarter of the error."""
    schedule = Schedule(1000, "cosine")
    x, last = torch.ones(1, 1, 1, 1, dtype=torch.float64), 100

    def reached(count: int) -> float:
        steps = [round(900 - (900 - last) * number / count) for number in range(count + 1)]
        *_, before_last, _ = sample(schedule, lambda x, _: x, x, steps, "dpm-solver++", clamp="none")
        return before_last.x.item()

    errors = [abs(reached(count) - reached(800)) for count in (10, 20, 40)]
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


def test_ddim_with_eta_1_over_all_steps_is_ddpm():
    schedule = Schedule(100)
    steps = schedule.subset(100)
    one = run(schedule, steps, "ddim", eta=1.0, clamp="none", draw=drawer())
    other = run(schedule, steps, "ddpm", clamp="none", draw=drawer())
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 1.0}])
def test_steps_far_apart_follow_the_posterior_by_bayes_rule(options):
    """The product of the Gaussians q(x_s | x_0) and q(x_t | x_s), divided by its weight, with x_0 as predicted."""
    schedule = Schedule(1000, "cosine")
    steps, x, draw = schedule.subset(20, "beta"), start(), drawer()
    ours = run(schedule, steps, clamp="none", draw=drawer(), **options)
    for number, (t, s) in enumerate(itertools.pairwise(steps)):
        a_t, a_s = schedule.a[t], schedule.a[s]
        x0 = (x - (1 - a_t) ** 0.5 * predict(x, t / 1000)) / a_t**0.5
        between = a_t / a_s
        precision = 1 / (1 - a_s) + between / (1 - between)
        mean = (a_s**0.5 * x0 / (1 - a_s) + between**0.5 * x / (1 - between)) / precision
        x = mean + precision**-0.5 * draw()
        torch.testing.assert_close(ours[number], x, rtol=1e-5, atol=1e-5)


def test_deterministic_samplers_are_solvers_of_the_ode_of_scaled_images():
    """x / √ᾱ moves by dσ ε (Song et al., DDIM, equation 14): Euler's steps, and in log σ those of 2M."""
    schedule = Schedule(1000, "cosine")
    steps = schedule.subset(15, "beta")
    sigmas = [math.sqrt(1 / schedule.a[t] - 1) for t in steps]
    ours = {name: run(schedule, steps, name, clamp="none") for name in ("ddim", "dpm-solver++")}
    euler = solver = start() / schedule.a[steps[0]] ** 0.5
    h_before, x0_before = math.inf, solver
    for number, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        t, scale, end = steps[number], schedule.a[steps[number]] ** 0.5, schedule.a[steps[number + 1]] ** 0.5
        euler = euler + (following - sigma) * predict(euler * scale, t / 1000)
        torch.testing.assert_close(ours["ddim"][number], euler * end, rtol=1e-5, atol=1e-5)
        h, x0 = math.log(sigma / following), solver - sigma * predict(solver * scale, t / 1000)
        data = x0 + h / (2 * h_before) * (x0 - x0_before)  # the first step has no memory
        solver = following / sigma * solver + (1 - following / sigma) * data
        torch.testing.assert_close(ours["dpm-solver++"][number], solver * end, rtol=1e-5, atol=1e-5)
        h_before, x0_before = h, x0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm-solver++"])
def test_a_perfect_net_gives_the_image_back_and_no_noise_is_added_last(sampler):
    schedule, target = Schedule(), torch.rand(3, 2, 4, 4, dtype=torch.float64) - 0.5

    def perfect(x: torch.Tensor, t: int) -> torch.Tensor:
        a = schedule.a[t]
        return (x - math.sqrt(a) * target) / math.sqrt(1 - a)

    steps = list(sample(schedule, perfect, start(), schedule.subset(7), sampler, eta=1.0, draw=drawer()))
    assert [step.t for step in steps] == [*schedule.subset(7)[1:], 0]
    for step in steps:
        torch.testing.assert_close(step.x0, target)
    torch.testing.assert_close(steps[-1].x, target)


def test_clamps():
    x0 = torch.linspace(-4, 2, 1000, dtype=torch.float64).view(1, 1, 10, 100)
    assert clamp_x0(x0, "none") is x0
    assert clamp_x0(x0, "static").abs().max() == 1
    dynamic = clamp_x0(x0, "dynamic")
    limit = np.quantile(np.abs(x0.numpy()), 0.995)
    torch.testing.assert_close(dynamic, (x0 / limit).clamp(-1, 1))
    torch.testing.assert_close(clamp_x0(x0 / 8, "dynamic"), x0 / 8)


# ------------------------------------------------------------------------------------------------------------ guidance


class Classes(torch.nn.Module):
    """ε = class + 1 for the conditional net, -1 for the unconditional one; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x, time, classes=None, drop=None):
        self.calls.append(len(x))
        value = (classes + 1).double()
        if drop is not None:
            value = value.where(~drop, -1.0)
        return value.view(-1, 1, 1, 1).expand_as(x)


def test_guidance_is_the_extrapolation_and_w_0_is_one_pass():
    net, labels, x = Classes(), torch.tensor([0, 4]), torch.zeros(2, 1, 1, 1)
    for w, expected in ((0.0, [1, 5]), (0.5, [2, 8]), (3.0, [7, 23])):  # (1 + w) (class + 1) - w (-1)
        net.calls.clear()
        assert predictor(net, Schedule(), labels, w)(x, 500).flatten().tolist() == pytest.approx(expected)
        assert net.calls == ([2] if w == 0 else [4])
    within = predictor(net, Schedule(), labels, 3.0, interval=(0.2, 0.6))
    assert [within(x, t)[0].item() for t in (100, 400, 900)] == pytest.approx([1, 7, 1])


def test_nets_read_time_as_a_fraction_or_as_a_number_from_0():
    schedule, t = Schedule(400), torch.tensor([1, 200, 400])
    assert schedule.time(t, Classes()).tolist() == pytest.approx([1 / 400, 0.5, 1])
    counting = Classes()
    counting.counts_steps = True
    assert schedule.time(t, counting).tolist() == [0, 199, 399]


def test_noise_depends_on_the_seed_and_the_image_alone():
    one, other = ImageNoise(0, range(4), (1, 2, 2)), ImageNoise(0, [2, 7], (1, 2, 2))
    for _ in range(3):
        a, b = one(), other()
        assert torch.equal(a[2], b[0])
    assert not torch.equal(ImageNoise(1, range(4), (1, 2, 2))(), ImageNoise(0, range(4), (1, 2, 2))())
    draws = torch.stack([one() for _ in itertools.repeat(None, 50)])
    assert draws.std().item() == pytest.approx(1, abs=0.1)
