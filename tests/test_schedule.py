"""diffusion/schedule.py: published values, the formulas of the papers, and subsets of the steps."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from diffusion.schedule import Schedule, spaced_steps


def images_and_noise() -> tuple[Tensor, Tensor]:
    """Three images and three noises, each (3, 1, 4, 4)."""
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=rng)
    return x0, noise


# β and ᾱ


def test_the_linear_schedule_has_the_published_values():
    """Ho et al. go from 1e-4 to 0.02; the last ᾱ of their code is 4.036e-5."""
    schedule = Schedule()
    assert schedule.betas[1].item() == pytest.approx(1e-4)
    assert schedule.betas[1000].item() == pytest.approx(0.02)
    assert schedule.alpha_bar[0] == 1
    assert schedule.alpha_bar[1] == pytest.approx(1 - 1e-4)
    assert schedule.alpha_bar[1000] == pytest.approx(4.0358e-5, rel=1e-4)
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert schedule.alpha_bar[1:] == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_short_schedule_reaches_pure_noise_unless_the_betas_are_as_given():
    assert Schedule(400).alpha_bar[400] < 1e-4
    last = Schedule(400, rule="as-given").alpha_bar[400]
    assert last == pytest.approx(np.prod(1 - np.linspace(1e-4, 0.02, 400)))
    assert last > 0.017  # its root, 13 % of the signal, is left


def test_ten_steps_as_given_leave_most_of_the_signal():
    schedule = Schedule(10, rule="as-given")
    assert schedule.alpha_bar[10] == pytest.approx(0.9037, abs=1e-4)


@pytest.mark.parametrize("timesteps", [2, 10, 15, 21, 100, 400, 999])
def test_a_respaced_schedule_has_the_noise_levels_of_1000_steps(timesteps):
    schedule = Schedule(timesteps, rule="respaced")
    assert schedule.alpha_bar[timesteps] < 1e-3
    assert schedule.betas[1:].min() > 0
    assert schedule.betas[1:].max() < 1
    every = Schedule(1000).alpha_bar
    kept = [every[round(1000 * t / timesteps)] for t in range(timesteps + 1)]
    assert schedule.alpha_bar == pytest.approx(kept, rel=1e-9)


def test_all_rules_are_the_same_for_1000_steps():
    linear = Schedule(1000)
    for rule in ("as-given", "respaced"):
        schedule = Schedule(1000, rule=rule)
        assert schedule.alpha_bar == linear.alpha_bar
        assert torch.equal(schedule.betas, linear.betas)
    with pytest.raises(ValueError, match="at most 1,000 steps, not 1,001"):
        Schedule(1001, rule="respaced")


def test_a_schedule_whose_betas_exceed_1_is_refused():
    with pytest.raises(ValueError, match=r"β would go from 0\.01 to 50"):
        Schedule(10, beta_end=0.5)


def test_the_cosine_schedule_is_the_formula_of_its_paper():
    schedule = Schedule(1000, "cosine")

    def f(t: int) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert schedule.alpha_bar[500] == pytest.approx(f(500) / f(0), rel=1e-9)
    assert schedule.betas[1000].item() == pytest.approx(0.999)


def test_the_configuration_makes_the_same_schedule():
    schedule = Schedule(50, "cosine", prediction="v")
    again = Schedule.from_config(schedule.to_config())
    assert again.alpha_bar == schedule.alpha_bar
    assert again.prediction == "v"
    assert Schedule.from_config({}).alpha_bar == Schedule().alpha_bar


@pytest.mark.parametrize(("as_given", "rule"), [(True, "as-given"), (False, "scaled")])
def test_the_configuration_of_an_older_checkpoint_is_understood(as_given, rule):
    old = {"steps": 50, "kind": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    schedule = Schedule.from_config(old | {"as_given": as_given, "prediction": "eps"})
    assert schedule.rule == rule
    assert schedule.alpha_bar == Schedule(50, rule=rule).alpha_bar
    counting = nn.Identity()
    counting.counts_steps = True
    assert schedule.time(torch.tensor([1, 50]), counting).tolist() == [0, 49]
    assert Schedule.from_config(schedule.to_config()).to_config() == schedule.to_config()


# Training and conversions


def test_the_forward_process_and_its_inverse():
    schedule = Schedule()
    steps = [1, 500, 1000]
    x0, noise = images_and_noise()
    x = schedule.q_sample(x0, torch.tensor(steps), noise)
    for row, t in enumerate(steps):
        a = schedule.alpha_bar[t]
        expected = math.sqrt(a) * x0[row] + math.sqrt(1 - a) * noise[row]
        torch.testing.assert_close(x[row], expected)
    for row, t in enumerate(steps[:2]):  # at t = 1000 hardly any signal is left
        found = schedule.x0_from_eps(x[row], t, noise[row])
        torch.testing.assert_close(found, x0[row], rtol=1e-3, atol=1e-3)
    score = schedule.score_from_eps(500, noise[1])
    torch.testing.assert_close(score, -noise[1] / math.sqrt(1 - schedule.alpha_bar[500]))


def test_min_snr_weights_of_a_network_that_predicts_noise():
    schedule = Schedule()
    weights = schedule.min_snr_weight(torch.tensor([1, 500, 1000]))
    snr = schedule.alpha_bar[1] / (1 - schedule.alpha_bar[1])
    assert weights[0].item() == pytest.approx(5 / snr, rel=1e-2)  # 1 - ᾱ_1 is small in float32
    assert weights[1:].tolist() == [1, 1]


def test_a_network_that_predicts_noise_has_the_noise_as_its_target():
    x0, noise = images_and_noise()
    assert torch.equal(Schedule().target(x0, torch.tensor([1, 500, 1000]), noise), noise)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_v_and_the_image_contain_the_noise(prediction):
    schedule = Schedule(prediction=prediction)
    t = torch.tensor([1, 250, 1000])
    x0, noise = images_and_noise()
    x = schedule.q_sample(x0, t, noise)
    target = schedule.target(x0, t, noise)
    found = schedule.eps_from_output(x, t, target)
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_every_prediction_contains_the_image(prediction):
    schedule = Schedule(prediction=prediction)
    x0, noise = images_and_noise()
    for t in (1, 250, 1000):
        steps = torch.full((len(x0),), t)
        x = schedule.q_sample(x0, steps, noise)
        found = schedule.x0_from_output(x, t, schedule.target(x0, steps, noise))
        torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)


def test_a_network_that_predicts_the_image_has_the_image_as_its_target():
    x0, noise = images_and_noise()
    schedule = Schedule(prediction="x0")
    assert torch.equal(schedule.target(x0, torch.tensor([1, 500, 1000]), noise), x0)


def test_v_is_the_derivative_of_x_t_by_the_angle():
    """The angle's cosine is √ᾱ_t (Salimans and Ho, 2022, appendix D)."""
    schedule = Schedule(prediction="v")
    steps = [1, 250, 1000]
    x0, noise = images_and_noise()
    v = schedule.target(x0, torch.tensor(steps), noise)
    h = 1e-4
    for row, t in enumerate(steps):
        angle = math.acos(math.sqrt(schedule.alpha_bar[t]))
        image = x0[row].double()
        eps = noise[row].double()
        ahead = math.cos(angle + h) * image + math.sin(angle + h) * eps
        behind = math.cos(angle - h) * image + math.sin(angle - h) * eps
        derivative = (ahead - behind) / (2 * h)
        torch.testing.assert_close(v[row].double(), derivative, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_weights_an_error_of_the_image_alike_for_all_predictions(prediction):
    """The weight times the factor from image errors to errors of the output is min(SNR, γ)."""
    schedule = Schedule(prediction=prediction)
    t = torch.tensor([1, 250, 1000])
    snr = torch.tensor([schedule.alpha_bar[k] / (1 - schedule.alpha_bar[k]) for k in t.tolist()])
    factor = {"eps": snr, "v": snr + 1, "x0": torch.ones(3)}[prediction]
    weights = schedule.min_snr_weight(t) * factor
    torch.testing.assert_close(weights, snr.clamp(max=5), rtol=1e-2, atol=0)  # 1 - ᾱ_1 in float32


def test_networks_read_time_as_a_fraction_or_as_a_number_from_0():
    schedule = Schedule(400)
    t = torch.tensor([1, 200, 400])
    net = nn.Identity()
    assert schedule.time(t, net).tolist() == pytest.approx([1 / 400, 0.5, 1])
    net.counts_steps = True
    assert schedule.time(t, net).tolist() == [1.5, 499, 999]  # as if T were 1,000
    every = torch.arange(1, 1001)
    assert torch.equal(Schedule(1000).time(every, net), (every - 1).float())


# Steps of a sampler


@pytest.mark.parametrize("count", [1, 2, 13, 50, 300, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "beta"])
def test_there_are_exactly_as_many_steps_as_asked_for(count, spacing):
    steps = spaced_steps(1000, count, spacing)
    assert len(steps) == count
    assert len(set(steps)) == count
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] >= 1
    assert steps[0] <= 1000
    if spacing == "leading":
        assert steps[-1] == 1
    else:
        assert steps[0] == 1000


def test_beta_spacing_follows_the_quantiles_of_its_distribution():
    quantiles = scipy.stats.beta(0.6, 0.6).ppf(np.arange(1, 19) / 18)
    assert spaced_steps(1000, 18, "beta")[::-1] == [round(1000 * q) for q in quantiles]
    by_trapezoidal_rule = [1000, 877, 637, 363, 123]
    assert spaced_steps(1000, 5, "beta") == by_trapezoidal_rule


def test_leading_steps_with_an_offset_are_the_courses():
    """The course counts 1, 21, …, 981 from 0, which are 2, 22, …, 982 counted from 1."""
    assert spaced_steps(1000, 50, "leading", 1) == list(range(982, 1, -20))


def test_numbers_of_steps_that_do_not_exist_are_refused():
    for count in (0, 1001):
        with pytest.raises(ValueError, match=f"must be between 1 and 1,000, not {count}"):
            spaced_steps(1000, count)
    with pytest.raises(ValueError, match="1000 steps would start at 1001"):
        spaced_steps(1000, 1000, "leading", 1)
