"""Networks of the diffusion problems and classifiers of digits.

Published keys and outputs, conditioning on class and time, attention, gradients.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoints import load_net, load_weights
from models.attention_unet import AttentionUnet
from models.attention_unet import SelfAttention as HeadedAttention
from models.context_unet import ContextUnet
from models.ddim_unet import DdimUnet, SelfAttention, Sinusoid
from models.digit_classifier import DigitClassifier, DigitResNet
from tests.golden import fill, image

GOLDEN = Path(__file__).resolve().parent / "golden"
OUTPUTS = json.loads((GOLDEN / "diffusion_outputs.json").read_text())
CLASSES = torch.tensor([3, 8])
TIMES = torch.tensor([0.25, 0.9])
KEEP = torch.tensor([False, False])
DROP = torch.tensor([True, True])


def tiny_context(**arguments) -> ContextUnet:
    return fill(ContextUnet(n_feat=16, **arguments))


def tiny_attention() -> AttentionUnet:
    return fill(AttentionUnet(width=16))


def tiny_ddim(**arguments) -> DdimUnet:
    small = {"size": 16, "width": 16, "multipliers": (1, 2), "attention": (8,), "blocks": 1}
    return fill(DdimUnet(**small | arguments))


def tiny_ddim_with_classes() -> DdimUnet:
    return tiny_ddim(n_classes=10)


def conditional() -> list[tuple[nn.Module, Tensor]]:
    """Each network that knows classes, with noisy images that fit it."""
    return [
        (tiny_context(), image(2, 3, 28)),
        (tiny_attention(), image(2, 3, 28)),
        (tiny_ddim_with_classes(), image(2, 3, 16)),
    ]


def shapes_of(net: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in net.state_dict().items()}


def assert_golden(output: Tensor, name: str) -> None:
    """Compare with outputs that are recorded to 1e-7 in float32.

    1e-4 relative, and 2e-5 for values near zero (their spread is 3), allows for another order of
    the sums; here they agree to 1e-5.
    """
    golden = OUTPUTS[name]
    assert list(output.shape) == golden["shape"]
    values = output.flatten()
    assert values[:8].tolist() == pytest.approx(golden["first8"], rel=1e-4, abs=2e-5)
    assert values[-8:].tolist() == pytest.approx(golden["last8"], rel=1e-4, abs=2e-5)
    assert values.double().mean().item() == pytest.approx(golden["mean"], rel=1e-4)
    assert values.double().std().item() == pytest.approx(golden["std"], rel=1e-4)


# Published networks


@pytest.mark.parametrize(
    ("net", "arguments", "name"),
    [
        (ContextUnet, {"n_feat": 128}, "context_unet_128"),
        (ContextUnet, {"n_feat": 256}, "context_unet_256"),
        (DdimUnet, {}, "course_ddim_unet"),
    ],
)
def test_published_keys_and_shapes(net, arguments, name):
    published = json.loads((GOLDEN / f"{name}.json").read_text())
    with torch.device("meta"):
        assert shapes_of(net(**arguments)) == published


@torch.inference_mode()
def test_context_unet_gives_the_golden_outputs():
    net = fill(ContextUnet(flipped_one_hot=True))
    x = image(2, 3, 28)
    assert_golden(net(x, TIMES, CLASSES, KEEP), "context_unet_128 mask 0")
    assert_golden(net(x, TIMES, CLASSES, DROP), "context_unet_128 mask 1")


@torch.inference_mode()
def test_ddim_unet_gives_the_golden_outputs():
    net = fill(DdimUnet())
    assert sum(parameter.numel() for parameter in net.parameters()) == 113_673_219
    assert_golden(net(image(2, 3, 64), torch.tensor([7.0, 903.0])), "course_ddim_unet")


def test_a_checkpoint_of_the_public_script_loads(tmp_path):
    """Its file has the whole DDPM: the network under nn_model., and the schedule's buffers."""
    net = tiny_context(in_channels=1, n_classes=20, flipped_one_hot=True)
    content = {f"nn_model.{key}": value for key, value in net.state_dict().items()}
    content["alpha_t"] = torch.ones(401)
    torch.save(content, tmp_path / "model.pth")
    weights, _ = load_weights(tmp_path / "model.pth")
    arguments = ContextUnet.arguments_of(weights)
    assert arguments == net.config["arguments"]
    ContextUnet(**arguments).load_state_dict(weights, strict=True)


def test_context_unet_does_not_recognise_other_weights():
    assert ContextUnet.arguments_of(tiny_ddim().state_dict()) == {}


@pytest.mark.parametrize(
    "make",
    [tiny_context, tiny_attention, tiny_ddim_with_classes, DigitClassifier, DigitResNet],
)
def test_the_configuration_builds_the_same_network(make):
    net = make()
    arguments = json.loads(json.dumps(net.config["arguments"]))
    built = type(net)(**arguments)
    assert shapes_of(built) == shapes_of(net)
    assert built.config == net.config


# Conditioning


@torch.inference_mode()
def test_dropped_rows_forget_their_class():
    t = torch.tensor([0.3, 0.3])
    for net, x in conditional():
        dropped = net(x, t, CLASSES, DROP)
        for label in range(10):
            same_class = torch.tensor([label, label])
            output = net(x, t, same_class, DROP)
            torch.testing.assert_close(output, dropped, rtol=0, atol=0)
        torch.testing.assert_close(net(x, t), dropped, rtol=0, atol=0)  # no class at all
        kept = net(x, t, CLASSES)
        torch.testing.assert_close(kept, net(x, t, CLASSES, KEEP), rtol=0, atol=0)
        assert (kept - dropped).abs().amax((1, 2, 3)).min() > 1e-3

        # Dropping one row leaves the other alone, up to the order of sums in a batch.
        first_dropped = net(x, t, CLASSES, torch.tensor([True, False]))
        torch.testing.assert_close(first_dropped[0], dropped[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(first_dropped[1], kept[1], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_every_class_and_time_gives_another_output():
    for net, x in conditional():
        assert net(x, TIMES, CLASSES).shape == x.shape
        x = x[:1].expand(10, -1, -1, -1)
        by_class = net(x, torch.full((10,), 0.5), torch.arange(10))
        by_time = net(x, torch.arange(10) / 10, torch.zeros(10, dtype=torch.long))
        for outputs in (by_class, by_time):
            assert torch.pdist(outputs.flatten(1)).min() > 1e-3


@pytest.mark.parametrize("flipped", [False, True])
def test_one_hot_rows_are_those_of_the_public_script(flipped):
    net = tiny_context(n_classes=20, flipped_one_hot=flipped)
    classes = torch.tensor([3, 18, 7])
    mask = torch.tensor([0.0, 1.0, 0.0])
    public = F.one_hot(classes, 20) * (-1 * (1 - mask))[:, None]
    rows = net.context(classes, mask.bool(), 3)
    torch.testing.assert_close(rows, public if flipped else -public)
    assert rows[0, 3] == (-1 if flipped else 1)


@torch.inference_mode()
def test_a_flipped_network_is_the_plain_one_with_flipped_weights():
    plain = tiny_context()
    flipped = tiny_context(flipped_one_hot=True)
    for embedding in (flipped.contextembed1, flipped.contextembed2):
        embedding.model[0].weight.neg_()
    x = image(2, 3, 28)
    expected = plain(x, TIMES, CLASSES)
    torch.testing.assert_close(flipped(x, TIMES, CLASSES), expected, rtol=0, atol=0)


@torch.inference_mode()
def test_bf16_keeps_neighbouring_times_apart():
    """0.899 and 0.900 are the same number in bf16."""
    x = image(1, 3, 28)
    for net in (tiny_context(), tiny_attention()):
        with torch.autocast("cpu", torch.bfloat16):
            earlier = net(x, torch.tensor([0.899]), CLASSES[:1])
            later = net(x, torch.tensor([0.900]), CLASSES[:1])
        assert not torch.equal(earlier, later)


def test_sinusoid_is_sines_then_cosines():
    embedded = Sinusoid(8)(torch.tensor([0.0, 21.0]))
    angles = torch.tensor([21.0 * 10000 ** (-2 * i / 8) for i in range(4)])
    torch.testing.assert_close(embedded[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(embedded[1], torch.cat((angles.sin(), angles.cos())))


@torch.inference_mode()
def test_time_enters_the_ddim_unet_as_published():
    """The golden outputs hardly depend on the time, by 1e-5 of their spread: tested on its own."""
    net = tiny_ddim(multipliers=(2,))
    assert net.counts_steps
    x = image(2, 16, 8)
    t = torch.tensor([21.0, 981.0])
    time = net.time[3](F.silu(net.time[1](Sinusoid(16)(t))))
    block = net.down2.resblocks
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias)))
    h = h + block.time[1](F.silu(time))[:, :, None, None]
    h = block.conv2(F.silu(F.group_norm(h, 8, block.norm2.weight, block.norm2.bias)))
    torch.testing.assert_close(block(x, net.time(t)), h + block.skip(x))


def test_classes_for_a_network_without_them_are_an_error():
    with pytest.raises(ValueError, match="n_classes is 0"):
        tiny_ddim()(image(2, 3, 16), TIMES, CLASSES)


# Attention. Both are compared in float32, with another order of the sums.


@torch.inference_mode()
def test_attention_of_the_ddim_unet_is_the_explicit_softmax():
    net = fill(SelfAttention(64))
    x = image(2, 64, 5)
    q, k, v = net.qkv(net.norm(x)).flatten(2).chunk(3, dim=1)  # (batch, channels, positions)
    weights = (torch.einsum("bcq,bck->bqk", q, k) / 64**0.5).softmax(-1)
    attended = torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape)
    torch.testing.assert_close(net(x), x + net.out(attended), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_attention_of_the_attention_unet_is_the_explicit_softmax():
    net = fill(HeadedAttention(16, heads=4))
    x = image(2, 16, 5)
    rows = x.permute(0, 2, 3, 1).reshape(2, 25, 16)
    q, k, v = net.qkv(net.ln(rows)).chunk(3, dim=-1)
    heads = []
    for number in range(4):
        part = slice(4 * number, 4 * number + 4)
        weights = (q[..., part] @ k[..., part].mT / 4**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    rows = rows + net.out(torch.cat(heads, -1))
    rows = rows + net.ff_self(rows)
    expected = rows.reshape(2, 5, 5, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_unet_has_the_shapes_that_reports_print():
    with torch.device("meta"):
        shapes = shapes_of(AttentionUnet())
    printed = {
        "label_emb.weight": [10, 256],
        "conv1.wconv.0.weight": [64, 3, 3, 3],
        "down1.conv.1.wconv.0.weight": [128, 64, 3, 3],
        "down1.emb_layer.1.weight": [128, 256],
        "down2.conv.1.wconv.3.weight": [128, 128, 3, 3],
        "bottom.1.wconv.0.weight": [256, 256, 3, 3],
        "bottom.2.wconv.0.weight": [128, 256, 3, 3],
        "upsample1.weight": [128, 128, 4, 4],
        "up1.conv.0.wconv.0.weight": [256, 256, 3, 3],
        "up1.conv.1.wconv.0.weight": [64, 256, 3, 3],
        "upsample2.weight": [64, 64, 4, 4],
        "up2.conv.0.wconv.0.weight": [128, 128, 3, 3],
        "up2.emb_layer.1.weight": [64, 256],
    }
    assert {key: shapes[key] for key in printed} == printed


# Training and settings


def test_gradients_reach_every_parameter():
    """In eval mode, because batch statistics would remove the biases before BatchNorm."""
    for net, x in conditional():
        net(x, TIMES, CLASSES).square().mean().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() >= 1e-9, name


def make_other_ddim() -> DdimUnet:
    return DdimUnet(
        size=32, width=32, multipliers=(1, 2, 3), attention=(8, 16), blocks=1, dropout=0.1
    )


def test_a_new_ddim_unet_predicts_zeros_whatever_dropout_does():
    x = image(2, 3, 32)
    output = make_other_ddim()(x, torch.tensor([0.0, 999.0]))
    assert torch.equal(output, torch.zeros_like(x))


def test_a_ddim_unet_drops_out_in_training_only():
    net = fill(make_other_ddim())
    x = image(2, 3, 32)
    t = torch.tensor([0.0, 999.0])
    torch.testing.assert_close(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def test_a_ddim_unet_attends_at_the_sizes_that_are_named():
    attending = []
    for name, module in make_other_ddim().named_children():
        if isinstance(getattr(module, "attention", None), SelfAttention):
            attending.append(name)
    assert attending == ["down4", "down6", "mid1", "up1", "up2", "up4", "up5"]


def test_groups_have_at_least_four_channels():
    """GroupNorm over single channels would remove the time that was added to them."""
    for module in make_other_ddim().modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_channels >= 4 * module.num_groups


@torch.inference_mode()
def test_patches_are_pixels_of_more_channels():
    """A position has the pixels of its square, channel by channel; the layers are the same."""
    net = tiny_ddim(patch=2, size=32)
    plain = tiny_ddim(in_channels=12)
    plain.load_state_dict(net.state_dict())
    x = image(2, 3, 32)
    t = torch.tensor([3.0, 700.0])
    squares = x.view(2, 3, 16, 2, 16, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 16, 16)
    output = plain(squares, t).view(2, 3, 2, 2, 16, 16)
    expected = output.permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 32, 32)
    torch.testing.assert_close(net(x, t), expected)


@torch.inference_mode()
def test_the_memory_layout_changes_nothing():
    t = torch.tensor([0.1, 0.7])
    for net, x in conditional():
        expected = net(x, t, CLASSES)
        net.to(memory_format=torch.channels_last)
        output = net(x.to(memory_format=torch.channels_last), t, CLASSES)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)  # order of the sums


# Classifiers of digits


def test_digit_classifier_is_the_courses_network(tmp_path):
    net = fill(DigitClassifier())
    file = tmp_path / "Classifier.pth"
    torch.save({"state_dict": net.state_dict(), "optimizer": {}}, file)
    loaded, _ = load_net(file, {"digit_classifier": DigitClassifier})
    # The sizes of the course's file: 3-6-16 channels of 5x5, then 256-128-64-10.
    sizes = [list(weight.shape) for weight in loaded.parameters() if weight.dim() > 1]
    convolutions = [[6, 3, 5, 5], [16, 6, 5, 5]]
    linear = [[128, 256], [64, 128], [10, 64]]
    assert sizes == convolutions + linear
    pool_and_relu = [nn.MaxPool2d(2), nn.ReLU()]
    layers = [net.conv1, *pool_and_relu, net.conv2, *pool_and_relu, nn.Flatten()]
    layers += [net.fc1, nn.ReLU(), net.fc2, nn.ReLU(), net.fc3]
    x = image(2, 3, 28)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), nn.Sequential(*layers)(x))


def test_digit_resnet_ignores_brightness_and_contrast():
    net = fill(DigitResNet())
    x = image(2, 3, 28)
    assert net.features(x).shape == (2, 128)
    # The 1e-5 under the root of the normalisation is the only difference.
    torch.testing.assert_close(net(0.5 * x - 0.2), net(x), rtol=1e-3, atol=1e-3)


def test_gradients_reach_every_parameter_of_digit_resnet():
    net = fill(DigitResNet())
    net(image(2, 3, 28)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name
