"""diffusion/guidance.py for attributes, where the right answer is known."""

import math

import pytest
import torch
from torch import Tensor, nn

from common.rng import make_rng
from diffusion.guidance import (
    attribute_eps,
    classifier_gradient,
    composed_eps,
    log_probability,
    shifted_eps,
)
from diffusion.samplers import ancestral_step, ddim_step
from diffusion.schedule import Schedule
from models.ddim_unet import DdimUnet
from models.noisy_classifier import NoisyClassifier

SLOPE = 0.7  # of the logistic classifier


class Logistic(nn.Module):
    """Two attributes of a number x: p(1 | x) = sigmoid(SLOPE x) and sigmoid(-SLOPE x)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first = SLOPE * x.flatten(1).sum(1)
        return torch.stack((first, -first), 1)


def numbers(*values: float) -> Tensor:
    """Images of one pixel."""
    return torch.tensor(values).view(-1, 1, 1, 1)


# The gradient


def test_the_log_probability_is_a_sum_over_what_is_asked():
    logits = torch.tensor([[2.0, -1.0, 5.0]])
    asked = torch.tensor([[1.0, -3.0, 0.0]])  # the second with a weight of 3, the third not at all
    expected = math.log(1 / (1 + math.exp(-2))) + 3 * math.log(1 / (1 + math.exp(-1)))
    assert log_probability(logits, asked).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("asked", "sign"), [([1.0, 0.0], 1), ([-1.0, 0.0], -1), ([0.0, 1.0], -1)])
def test_the_gradient_is_that_of_a_logistic_classifier(asked, sign):
    """d/dx log sigmoid(y a x) = y a sigmoid(-y a x)."""
    x = numbers(-1.0, 0.0, 2.0)
    gradient = classifier_gradient(
        Logistic(), Schedule(1000), x, 5, torch.tensor([asked]).expand(3, -1)
    )
    expected = sign * SLOPE * torch.sigmoid(-sign * SLOPE * x)
    torch.testing.assert_close(gradient, expected)


def test_the_gradient_works_in_inference_mode_and_in_float32_under_autocast():
    seen = []

    class Spy(Logistic):
        def forward(self, x, t):
            seen.append((x @ x.transpose(2, 3)).dtype)  # autocast would make this bfloat16
            return super().forward(x, t)

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        x = numbers(1.0)
        asked = torch.ones(1, 2)
        gradient = classifier_gradient(Spy(), Schedule(1000), x, 5, asked)
    assert gradient.dtype == torch.float32
    assert not gradient.requires_grad
    assert seen == [torch.float32]


def fill_zeros(net: nn.Module) -> None:
    """Give residual branches, which start with zeros, weights of their own."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


@pytest.fixture
def classifier() -> NoisyClassifier:
    """A classifier of three attributes of 8x8 images, not trained."""
    torch.manual_seed(0)
    unet = DdimUnet(3, 8, 32, (1, 2), (4,), blocks=1)
    net = NoisyClassifier(unet.config["arguments"], n_attributes=3, dropout=0.5)
    fill_zeros(net)
    return net.eval().requires_grad_(False)


def test_a_classifier_starts_as_the_way_down_of_its_unet(classifier):
    torch.manual_seed(5)
    unet = DdimUnet(**classifier.config["arguments"]["unet"])
    fill_zeros(unet)
    before = classifier.head.weight.clone()
    classifier.start_from(unet)
    assert torch.equal(classifier.head.weight, before)
    middle = []
    unet.mid2.register_forward_hook(lambda module, inputs, output: middle.append(output))
    classifier.mid[1].register_forward_hook(lambda module, inputs, output: middle.append(output))
    x = torch.randn(2, 3, 8, 8, generator=make_rng(0))
    t = torch.tensor([10.0, 900.0])
    unet.eval()(x, t)
    classifier(x, t)
    assert torch.equal(*middle)


def test_the_gradient_of_an_image_does_not_depend_on_its_batch(classifier):
    x = torch.randn(4, 3, 8, 8, generator=make_rng(0))
    asked = torch.tensor([[1.0, -2.0, 0.0]]).expand(4, -1)
    schedule = Schedule(1000)
    whole = classifier_gradient(classifier, schedule, x, 500, asked)
    alone = classifier_gradient(classifier, schedule, x[2:3], 500, asked[2:3])
    assert alone.abs().max() > 1e-4
    torch.testing.assert_close(whole[2:3], alone, atol=1e-6, rtol=1e-4)


def test_an_attribute_that_is_not_asked_has_no_influence(classifier):
    x = torch.randn(1, 3, 8, 8, generator=make_rng(0))
    asked = torch.tensor([[1.0, 0.0, 0.0]])
    before = classifier_gradient(classifier, Schedule(1000), x, 500, asked)
    with torch.no_grad():
        classifier.head.weight[1:].normal_()
    after = classifier_gradient(classifier, Schedule(1000), x, 500, asked)
    assert torch.equal(before, after)


def test_the_classifier_reads_the_step(classifier):
    x = torch.randn(1, 3, 8, 8, generator=make_rng(0))
    one = classifier(x, torch.tensor([10.0]))
    assert one.shape == (1, 3)
    assert not torch.allclose(one, classifier(x, torch.tensor([900.0])))


# What it does to a step


@pytest.mark.parametrize("t", [300, 600])
def test_a_step_moves_the_mean_by_the_variance_times_the_gradient(t):
    """Dhariwal and Nichol's condition_mean: the mean of DDPM moves by s σ² ∇ log p.

    The noise's shift does the same to DDPM, and to DDIM with η = 1, to first order in β. With
    η = 0, where the ODE is followed, the shift is half of it.
    """
    schedule = Schedule(1000, beta_start=1e-4, beta_end=1e-3, rule="as-given")
    scale = 2.5
    x = numbers(0.8)
    eps = numbers(-0.3)
    gradient = classifier_gradient(Logistic(), schedule, x, t, torch.tensor([[scale, 0.0]]))
    assert gradient.item() > 0
    guided = shifted_eps(schedule, eps, gradient, t)

    def move(step) -> float:
        """How far guidance moves what `step(x0, eps)` returns."""
        ends = [step(schedule.x0_from_eps(x, t, some), some) for some in (eps, guided)]
        return (ends[1] - ends[0]).item()

    beta = 1 - schedule.alpha_bar[t] / schedule.alpha_bar[t - 1]
    expected = beta * gradient.item()  # the scale is in the gradient
    ddpm = move(lambda x0, _: ancestral_step(schedule, x, x0, t, t - 1, None))
    random = move(lambda x0, eps: ddim_step(schedule, x0, eps, t, t - 1, eta=1.0))
    without_noise = move(lambda x0, eps: ddim_step(schedule, x0, eps, t, t - 1))
    assert ddpm == pytest.approx(expected, rel=0.01)
    assert random == pytest.approx(expected, rel=0.01)
    assert without_noise == pytest.approx(expected / 2, rel=0.01)


def test_guided_samples_of_a_gaussian_have_the_mean_of_the_posterior():
    """x_0 ~ N(0, 1) and p(y | x_0) ∝ exp(c x_0): given y, x_0 ~ N(c, 1).

    Both have known scores at every step: -x_t, and the gradient of log p(y | x_t), √ᾱ_t c.
    """
    schedule = Schedule(1000)
    c = 0.9
    x = torch.randn(4000, 1, 1, 1, generator=make_rng(0))
    for t in range(1000, 0, -10):
        previous = max(t - 10, 0)
        alpha_bar = schedule.alpha_bar[t]
        eps = math.sqrt(1 - alpha_bar) * x
        gradient = torch.full_like(x, math.sqrt(alpha_bar) * c)
        eps = shifted_eps(schedule, eps, gradient, t)
        x = ddim_step(schedule, schedule.x0_from_eps(x, t, eps), eps, t, previous)
    assert x.mean().item() == pytest.approx(c, abs=0.05)
    assert x.std().item() == pytest.approx(1, abs=0.05)


# Composition


class Weighted(nn.Module):
    """Its noise is the sum of the attributes times 1, 10, …; batch sizes are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, time: Tensor, attributes: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        value = (attributes * torch.tensor([1.0, 10.0])).sum(1)
        return value.view(-1, 1, 1, 1) + torch.zeros_like(x)


def test_terms_are_composed_with_their_weights_in_one_batch():
    net = Weighted()
    terms = torch.tensor([[1.0, 0.0], [0.0, -1.0]])[:, None].expand(-1, 2, -1)
    eps = composed_eps(net, Schedule(1000), numbers(0.0, 0.0), 5, terms, torch.tensor([3.0, 2.0]))
    assert eps.flatten().tolist() == [3 - 20] * 2
    assert net.batches == [6]


def conditional_net() -> DdimUnet:
    """A network of 8x8 images with two attributes and random weights everywhere."""
    torch.manual_seed(0)
    net = DdimUnet(3, 8, 32, (1, 2), (4,), blocks=1, n_attributes=2)
    for parameter in net.parameters():
        if not parameter.abs().any():
            nn.init.normal_(parameter, std=0.1)
    return net.eval()


@torch.no_grad()
def test_all_unknown_is_unconditional_and_unknown_is_not_absent():
    net = conditional_net()
    x = torch.randn(1, 3, 8, 8, generator=make_rng(0))
    schedule = Schedule(1000)
    plain = attribute_eps(net, schedule, x, 500, None)
    unknown = attribute_eps(net, schedule, x, 500, torch.zeros(1, 2))
    absent = attribute_eps(net, schedule, x, 500, torch.tensor([[0.0, -1.0]]))
    present = attribute_eps(net, schedule, x, 500, torch.tensor([[0.0, 1.0]]))
    assert torch.equal(plain, unknown)
    assert not torch.allclose(absent, plain)
    assert not torch.allclose(present, plain)
    assert not torch.allclose(present, absent)


@torch.no_grad()
def test_a_new_embedding_adds_nothing():
    torch.manual_seed(0)
    net = DdimUnet(3, 8, 32, (1, 2), (4,), blocks=1, n_attributes=2).eval()
    nn.init.normal_(net.get_parameter("out.2.weight"))
    x = torch.randn(1, 3, 8, 8, generator=make_rng(0))
    t = torch.tensor([5.0])
    assert torch.equal(net(x, t), net(x, t, attributes=torch.ones(1, 2)))


def test_attributes_for_a_network_without_them_are_refused():
    net = DdimUnet(3, 8, 32, (1, 2), (4,), blocks=1)
    with pytest.raises(ValueError, match="n_attributes is 0"):
        net(torch.zeros(1, 3, 8, 8), torch.zeros(1), attributes=torch.ones(1, 2))
