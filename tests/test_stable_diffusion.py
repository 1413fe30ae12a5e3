"""models/stable_diffusion: against diffusers and open_clip, keys of the published file, traps."""

import json
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import stable_diffusion_unet
from models.network import Network
from models.stable_diffusion.text_encoder import FeedForward, TextEncoder
from models.stable_diffusion.unet import ResidualBlock, Transformer, Unet, time_embedding
from models.stable_diffusion.vae import LATENT_SCALE, Downsample, Vae

TINY_UNET = {"width": 32, "blocks": 1, "heads": 2, "context_width": 24, "groups": 8}
SMALL_UNET = {  # of a network that is trained from scratch on 64x64 images in patches of 2x2
    "in_channels": 12,
    "out_channels": 12,
    "width": 48,
    "multipliers": (1, 2, 4),
    "blocks": 1,
    "attention_levels": (1, 2),
    "heads": 4,
    "context_width": 40,
    "groups": 16,
}
WIDE_UNET = {"multipliers": (1,), "blocks": 1, "attention_levels": (0,)}  # level 0 of the full size
TINY_VAE = {"width": 16, "groups": 4, "blocks": 1}
WIDE_VAE = {"width": 512, "multipliers": (1,), "blocks": 1}  # the coarsest level of the full size
TINY_TEXT = {"vocabulary": 100, "width": 32, "layers": 3, "heads": 4, "length": 12}
WIDE_TEXT = {"vocabulary": 100, "layers": 1}  # one layer of the full size


def random_weights(net: nn.Module) -> dict[str, Tensor]:
    """A random value for every weight, also for those that start as zeros.

    Each layer keeps about the size of its input, so that all of them matter for the output.
    """
    rng = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in net.state_dict().items():
        noise = torch.randn(value.shape, generator=rng)
        if value.dim() > 1:
            noise *= value[0].numel() ** -0.5
        elif key.endswith("bias"):
            noise *= 0.1
        else:  # of a normalisation
            noise = 1 + 0.1 * noise
        weights[key] = noise
    return weights


def make(kind: Callable[..., nn.Module], **arguments) -> nn.Module:
    """A network with random weights, in eval mode.

    It is built without memory for its weights, as the one of a large file is.
    """
    with torch.device("meta"):
        net = kind(**arguments)
    net.load_state_dict(random_weights(net), assign=True)
    return net.eval()


def tiny_unet(**arguments) -> Unet:
    return make(Unet, **TINY_UNET | arguments)


def tiny_vae(**arguments) -> Vae:
    return make(Vae, **TINY_VAE | arguments)


def tiny_text(**arguments) -> TextEncoder:
    return make(TextEncoder, **TINY_TEXT | arguments)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(net: Unet) -> tuple[Tensor, Tensor, Tensor]:
    """8x8 latents, times and the states of five tokens for a batch of two."""
    arguments = net.config["arguments"]
    latents = normal(2, arguments["in_channels"], 8, 8, seed=1)
    context = normal(2, 5, arguments["context_width"], seed=2)
    return latents, torch.tensor([21, 981]), context


def error_of_largest(found: Tensor, expected: Tensor) -> float:
    """The largest difference, divided by the largest expected value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal up to the order of the sums in float32; here they agree to 4e-6."""
    assert expected.std() > 0.1
    assert error_of_largest(found, expected) < 2e-5


# The same networks in diffusers and open_clip


def prefixed(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The weights under the keys of the published file."""
    return {prefix + key: value for key, value in net.state_dict().items()}


def unet_of_diffusers(net: Unet) -> tuple[UNet2DConditionModel, dict[str, Tensor]]:
    """The same network on the meta device, and our weights under its keys."""
    arguments = net.config["arguments"]
    levels = range(len(arguments["multipliers"]))
    attends = [level in arguments["attention_levels"] for level in levels]
    down = ["CrossAttnDownBlock2D" if attending else "DownBlock2D" for attending in attends]
    up = ["CrossAttnUpBlock2D" if attending else "UpBlock2D" for attending in reversed(attends)]
    with torch.device("meta"):
        theirs = UNet2DConditionModel(
            in_channels=arguments["in_channels"],
            out_channels=arguments["out_channels"],
            block_out_channels=[arguments["width"] * m for m in arguments["multipliers"]],
            layers_per_block=arguments["blocks"],
            down_block_types=down,
            up_block_types=up,
            attention_head_dim=arguments["heads"],  # the number of heads, in spite of its name
            cross_attention_dim=arguments["context_width"],
            norm_num_groups=arguments["groups"],
        )
    weights = prefixed(net, "model.diffusion_model.")
    return theirs.eval(), convert_ldm_unet_checkpoint(weights, dict(theirs.config))


def vae_of_diffusers(net: Vae) -> tuple[AutoencoderKL, dict[str, Tensor]]:
    """The same network on the meta device, and our weights under its keys."""
    arguments = net.config["arguments"]
    levels = len(arguments["multipliers"])
    with torch.device("meta"):
        theirs = AutoencoderKL(
            in_channels=arguments["channels"],
            out_channels=arguments["channels"],
            latent_channels=arguments["latent_channels"],
            block_out_channels=[arguments["width"] * m for m in arguments["multipliers"]],
            layers_per_block=arguments["blocks"],
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            norm_num_groups=arguments["groups"],
        )
    weights = prefixed(net, "first_stage_model.")
    return theirs.eval(), convert_ldm_vae_checkpoint(weights, dict(theirs.config))


def text_of_open_clip(net: TextEncoder) -> TextTransformer:
    """The same network with our weights."""
    arguments = net.config["arguments"]
    theirs = TextTransformer(
        context_length=arguments["length"],
        vocab_size=arguments["vocabulary"],
        width=arguments["width"],
        heads=arguments["heads"],
        layers=arguments["layers"],
        act_layer=QuickGELU,
        pool_type="none",
        proj_type="none",
    )
    ours = {key.removeprefix("text_model."): value for key, value in net.state_dict().items()}
    weights = {
        "token_embedding.weight": ours["embeddings.token_embedding.weight"],
        "positional_embedding": ours["embeddings.position_embedding.weight"],
        "ln_final.weight": ours["final_layer_norm.weight"],
        "ln_final.bias": ours["final_layer_norm.bias"],
    }
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for number in range(arguments["layers"]):
        there = f"transformer.resblocks.{number}"
        here = f"encoder.layers.{number}"
        for kind in ("weight", "bias"):
            for theirs_name, our_name in names.items():
                weights[f"{there}.{theirs_name}.{kind}"] = ours[f"{here}.{our_name}.{kind}"]
            qkv = [ours[f"{here}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            weights[f"{there}.attn.in_proj_{kind}"] = torch.cat(qkv)
    theirs.load_state_dict(weights)
    return theirs.eval()


@pytest.mark.parametrize(
    "arguments", [TINY_UNET, SMALL_UNET, WIDE_UNET], ids=["tiny", "small", "wide"]
)
@torch.inference_mode()
def test_the_unet_is_that_of_diffusers(arguments):
    net = make(Unet, **arguments)
    theirs, weights = unet_of_diffusers(net)
    theirs.load_state_dict(weights, assign=True)
    x, t, context = inputs_of(net)
    assert_same(net(x, t, context), theirs(x, t, context).sample)


@pytest.mark.parametrize(
    ("arguments", "size"), [(TINY_VAE, 32), (WIDE_VAE, 8)], ids=["tiny", "wide"]
)
@torch.inference_mode()
def test_the_vae_is_that_of_diffusers(arguments, size):
    net = make(Vae, **arguments)
    theirs, weights = vae_of_diffusers(net)
    theirs.load_state_dict(weights, assign=True)
    images = normal(2, 3, size, size)
    expected = theirs.encode(images).latent_dist
    mean, log_variance = net.encode(images)
    assert_same(mean, expected.mean)
    assert_same(log_variance, expected.logvar)
    assert_same(net.decode(mean), theirs.decode(mean).sample)
    assert theirs.config.scaling_factor == LATENT_SCALE


@pytest.mark.parametrize("arguments", [TINY_TEXT, WIDE_TEXT], ids=["tiny", "wide"])
@torch.inference_mode()
def test_the_text_encoder_is_that_of_open_clip(arguments):
    net = make(TextEncoder, **arguments)
    theirs = text_of_open_clip(net)
    for length in (net.config["arguments"]["length"], 7):
        ids = torch.randint(100, (2, length), generator=torch.Generator().manual_seed(0))
        states = net(net.embed(ids))
        if length == 7:  # open_clip's mask is for the full length
            theirs.attn_mask = theirs.attn_mask[:7, :7]
        assert_same(states, theirs(ids))


# Keys and shapes of the published file


def shapes_of(weights: dict[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in weights.items()}


def test_all_keys_of_the_unet_and_the_vae_become_those_of_diffusers():
    """Its conversion is made for the published file; nothing may be missing or left over."""
    with torch.device("meta"):
        unet = Unet()
        vae = Vae()
    their_unet, unet_weights = unet_of_diffusers(unet)
    their_vae, vae_weights = vae_of_diffusers(vae)
    assert len(unet.state_dict()) == 686
    assert len(vae.state_dict()) == 248
    assert shapes_of(unet_weights) == shapes_of(their_unet.state_dict())
    assert shapes_of(vae_weights) == shapes_of(their_vae.state_dict())


def test_the_keys_are_those_of_the_published_file():
    """Some of each kind, among them those at which a wrong order of the layers would show."""
    with torch.device("meta"):
        unet = shapes_of(Unet().state_dict())
        vae = shapes_of(Vae().state_dict())
    in_the_unet = {
        "time_embed.2.weight": [1280, 1280],
        "input_blocks.0.0.weight": [320, 4, 3, 3],
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
        "input_blocks.3.0.op.weight": [320, 320, 3, 3],
        "input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
        "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.weight": [10240, 1280],
        "middle_block.1.proj_in.weight": [1280, 1280, 1, 1],
        "output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
        "output_blocks.5.2.conv.weight": [1280, 1280, 3, 3],
        "output_blocks.8.2.conv.weight": [640, 640, 3, 3],
        "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias": [320],
        "out.2.weight": [4, 320, 3, 3],
    }
    in_the_vae = {
        "encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1],
        "encoder.down.2.downsample.conv.weight": [512, 512, 3, 3],
        "encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
        "encoder.conv_out.weight": [8, 512, 3, 3],
        "quant_conv.weight": [8, 8, 1, 1],
        "post_quant_conv.bias": [4],
        "decoder.conv_in.weight": [512, 4, 3, 3],
        "decoder.up.3.upsample.conv.weight": [512, 512, 3, 3],
        "decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
        "decoder.up.0.block.2.conv2.weight": [128, 128, 3, 3],
        "decoder.norm_out.bias": [128],
    }
    assert {key: unet.get(key) for key in in_the_unet} == in_the_unet
    assert {key: vae.get(key) for key in in_the_vae} == in_the_vae


def test_all_keys_of_the_text_encoder_are_those_of_clip_vit_l_14():
    expected = {
        "embeddings.token_embedding.weight": [49408, 768],
        "embeddings.position_embedding.weight": [77, 768],
        "final_layer_norm.weight": [768],
        "final_layer_norm.bias": [768],
    }
    matrices = {
        **{f"self_attn.{name}_proj": [768, 768] for name in ("q", "k", "v", "out")},
        "mlp.fc1": [3072, 768],
        "mlp.fc2": [768, 3072],
    }
    for number in range(12):
        layer = f"encoder.layers.{number}"
        for name, shape in matrices.items():
            expected[f"{layer}.{name}.weight"] = shape
            expected[f"{layer}.{name}.bias"] = shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            expected[f"{layer}.{norm}.weight"] = [768]
            expected[f"{layer}.{norm}.bias"] = [768]
    with torch.device("meta"):
        found = shapes_of(TextEncoder().state_dict())
    assert len(found) == 196
    assert found == {f"text_model.{key}": shape for key, shape in expected.items()}


@pytest.mark.parametrize("tiny", [tiny_unet, tiny_vae, tiny_text])
def test_the_configuration_builds_the_same_network(tiny: Callable[[], Network]):
    net = tiny()
    arguments = json.loads(json.dumps(net.config["arguments"]))
    built = type(net)(**arguments)
    assert shapes_of(built.state_dict()) == shapes_of(net.state_dict())
    assert built.config == net.config


# The U-Net


def test_the_time_embedding_has_cosines_first():
    embedded = time_embedding(torch.tensor([0, 21]), 8)
    angles = torch.tensor([21.0 * 10000 ** (-i / 4) for i in range(4)])
    torch.testing.assert_close(embedded[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(embedded[1], torch.cat((angles.cos(), angles.sin())))


def test_group_norms_of_the_unet_have_two_epsilons():
    net = tiny_unet()
    of_residual_blocks = {net.out[0].eps}
    of_transformers = set()
    for module in net.modules():
        if isinstance(module, ResidualBlock):
            of_residual_blocks |= {module.in_layers[0].eps, module.out_layers[0].eps}
        elif isinstance(module, Transformer):
            of_transformers.add(module.norm.eps)
    assert of_residual_blocks == {1e-5}
    assert of_transformers == {1e-6}


@torch.inference_mode()
def test_time_and_text_change_the_predicted_noise():
    net = tiny_unet()
    x, t, context = inputs_of(net)
    x = x[:1].expand(2, -1, -1, -1)
    by_time = net(x, t, context[:1].expand(2, -1, -1))
    by_text = net(x, t[:1].expand(2), context)
    assert (by_time[0] - by_time[1]).abs().max() > 0.1
    assert (by_text[0] - by_text[1]).abs().max() > 0.1


@torch.inference_mode()
def test_extra_numbers_are_added_to_the_embedding_of_the_time():
    net = tiny_unet()
    x, t, context = inputs_of(net)
    plain = net(x, t, context)
    assert torch.equal(net(x, t, context, torch.zeros(2, 128)), plain)
    extra = normal(2, 128)
    with_extra = net(x, t, context, extra)
    assert (with_extra - plain).abs().max() > 0.1
    net.time_embed[2].bias += extra[0]
    torch.testing.assert_close(net(x, t, context)[0], with_extra[0], rtol=1e-4, atol=1e-5)


def test_a_new_unet_predicts_zeros():
    net = Unet(**TINY_UNET)
    x, t, context = inputs_of(net)
    output = net(x, t, context)
    assert torch.equal(output, torch.zeros_like(x))


def test_transformers_stand_on_the_levels_that_are_named_and_in_the_middle():
    net = Unet(**SMALL_UNET)
    found = [name for name, module in net.named_modules() if isinstance(module, Transformer)]
    assert found == [
        *("input_blocks.3.1", "input_blocks.5.1", "middle_block.1"),
        *("output_blocks.0.1", "output_blocks.1.1", "output_blocks.2.1", "output_blocks.3.1"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"heads": 3}, "split among 3 heads"), ({"groups": 7}, "num_groups")],
)
def test_widths_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Unet(**TINY_UNET | arguments)


def gradients(net: Unet) -> tuple[Tensor, dict[str, Tensor], int]:
    """Gradients of the text and of all parameters, and the numbers kept for the backward pass."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        if not isinstance(tensor, nn.Parameter):
            kept += tensor.numel()
        return tensor

    x, t, context = inputs_of(net)
    context.requires_grad_()
    net.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = net(x, t, context).square().mean()
    loss.backward()
    named = {name: parameter.grad for name, parameter in net.named_parameters()}
    return context.grad, named, kept


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(frozen):
    """Frozen as in textual inversion: in eval mode, with a gradient of the text alone."""
    net = tiny_unet().train(not frozen).requires_grad_(not frozen)
    expected_text, expected, kept = gradients(net)
    net.checkpointing = True
    found_text, found, kept_less = gradients(net)
    torch.testing.assert_close(found_text, expected_text, rtol=0, atol=0)
    assert found_text.abs().max() > 0
    assert kept_less < kept / 4
    for name, gradient in expected.items():
        assert (gradient is None) == frozen
        if not frozen:
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


@torch.inference_mode()
def test_checkpointing_changes_nothing_without_gradients():
    net = tiny_unet()
    inputs = inputs_of(net)
    expected = net(*inputs)
    net.checkpointing = True
    assert torch.equal(net(*inputs), expected)


# Precision and layout


@torch.inference_mode()
def test_bf16_changes_little_and_keeps_neighbouring_times_apart():
    """998 and 999 are the same number in bf16, whose rounding is 0.4 %."""
    unet = tiny_unet()
    x, _, context = inputs_of(unet)
    times = torch.tensor([998, 999])
    x[1] = x[0]
    context[1] = context[0]
    expected = unet(x, times, context)
    found = unet.bfloat16()(x, times, context)
    assert found.dtype == torch.bfloat16
    assert error_of_largest(found.float(), expected) < 0.05
    assert not torch.equal(found[0], found[1])

    vae = tiny_vae()
    images = normal(1, 3, 16, 16)
    mean, _ = vae.encode(images)
    image = vae.decode(mean)
    vae.bfloat16()
    assert error_of_largest(vae.encode(images.bfloat16())[0].float(), mean) < 0.05
    assert error_of_largest(vae.decode(mean.bfloat16()).float(), image) < 0.05

    text = tiny_text()
    ids = torch.arange(12)[None]
    states = text(text.embed(ids))
    text.bfloat16()
    assert error_of_largest(text(text.embed(ids)).float(), states) < 0.05


@torch.inference_mode()
def test_the_memory_layout_changes_nothing():
    unet = tiny_unet()
    inputs = inputs_of(unet)
    expected = unet(*inputs)
    unet.to(memory_format=torch.channels_last)
    assert_same(unet(*inputs), expected)
    vae = tiny_vae()
    images = normal(1, 3, 16, 16)
    mean, _ = vae.encode(images)
    image = vae.decode(mean)
    vae.to(memory_format=torch.channels_last)
    assert_same(vae.encode(images)[0], mean)
    assert_same(vae.decode(mean), image)


# The autoencoder


@torch.inference_mode()
def test_the_encoder_pads_the_right_and_the_lower_edge():
    down = make(Downsample, channels=4)
    x = normal(1, 4, 6, 6)
    padded = torch.zeros(1, 4, 7, 7)
    padded[:, :, :6, :6] = x
    expected = F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2)
    assert expected.shape == (1, 4, 3, 3)
    torch.testing.assert_close(down(x), expected)
    symmetric = F.conv2d(x, down.conv.weight, down.conv.bias, stride=2, padding=1)
    assert not torch.allclose(down(x), symmetric, atol=0.1)


def test_group_norms_of_the_vae_have_one_epsilon():
    epsilons = {module.eps for module in tiny_vae().modules() if isinstance(module, nn.GroupNorm)}
    assert epsilons == {1e-6}


@torch.inference_mode()
def test_log_variances_are_clamped():
    net = tiny_vae()
    images = normal(1, 3, 16, 16)
    for bias, limit in ((100.0, 20.0), (-100.0, -30.0)):
        net.quant_conv.bias.fill_(bias)
        mean, log_variance = net.encode(images)
        assert (log_variance == limit).all()
        assert (mean.abs() > 90).all()


# The text encoder


@torch.inference_mode()
def test_a_later_token_changes_no_earlier_state():
    net = tiny_text()
    ids = torch.arange(10)[None]
    changed = ids.clone()
    changed[0, 6] = 50
    before = net(net.embed(ids))
    after = net(net.embed(changed))
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-6)
    assert ((after - before)[:, 6:].abs().amax(2) > 1e-3).all()
    shorter = net(net.embed(ids[:, :6]))
    torch.testing.assert_close(shorter, before[:, :6], rtol=0, atol=2e-6)  # order of the sums


@torch.inference_mode()
def test_the_activation_is_quick_gelu():
    net = make(FeedForward, width=8)
    x = normal(5, 8)
    h = F.linear(x, net.fc1.weight, net.fc1.bias)
    expected = F.linear(h / (1 + torch.exp(-1.702 * h)), net.fc2.weight, net.fc2.bias)
    torch.testing.assert_close(net(x), expected)
    plain = F.linear(F.gelu(h), net.fc2.weight, net.fc2.bias)
    assert (net(x) - plain).abs().max() > 1e-3


@torch.inference_mode()
def test_embeddings_are_rows_of_the_vocabulary_without_positions():
    net = tiny_text()
    ids = torch.tensor([[3, 99, 3]])
    table = net.state_dict()["text_model.embeddings.token_embedding.weight"]
    assert torch.equal(net.embed(ids), table[ids])
    states = net(net.embed(ids))
    assert not torch.allclose(states[0, 0], states[0, 2], atol=1e-2)


def test_a_gradient_reaches_the_embeddings():
    net = tiny_text().requires_grad_(False)
    embeddings = net.embed(torch.arange(12)[None]).requires_grad_()
    net(embeddings)[0, 4].sum().backward()
    reached = embeddings.grad[0].abs().amax(1) > 0
    assert reached.tolist() == [True] * 5 + [False] * 7


def test_texts_that_are_too_long_are_an_error():
    net = tiny_text()
    with pytest.raises(ValueError, match="13 tokens are too many: there are 12 positions"):
        net(torch.zeros(1, 13, 32))
    with pytest.raises(ValueError, match="split among 5 heads"):
        tiny_text(heads=5)


# The benchmark


def test_the_benchmark_prints_a_ratio(capsys):
    tiny = stable_diffusion_unet.Benchmark(width=32, size=8, repeats=1)
    stable_diffusion_unet.main(tiny)
    assert "x as fast" in capsys.readouterr().out
