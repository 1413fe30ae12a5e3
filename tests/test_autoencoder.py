"""The autoencoder of faces: its latents, its training, and the networks that work in them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import p2_autoencoder
from common.checkpoints import load_net, load_weights
from common.data import normalise, to_uint8
from common.rng import make_rng
from models.autoencoder import Autoencoder
from models.latent_unet import LatentUnet
from p2_autoencoder import Reconstruct, Train, train
from tests.conftest import noise, save_images

SMALL = {"size": 16, "latent_channels": 2, "encoder_width": 16, "decoder_width": 16}


@pytest.fixture
def faces_dir(tmp_path: Path) -> Path:
    """Six 16x16 images."""
    return save_images(tmp_path / "faces", noise(6, size=16))


def small(faces_dir: Path, name: str, **options) -> Train:
    """A training of two epochs of three steps on tiny images."""
    defaults = {
        "data_dir": faces_dir,
        "output_dir": faces_dir.parent / name,
        "perceptual": "none",
        "epochs": 2,
        "batch_size": 2,
        "device": "cpu",
        "precision": "fp32",
    }
    return Train(**(defaults | SMALL | options))


def test_latents_have_mean_0_and_variance_1():
    torch.manual_seed(0)
    net = Autoencoder(**SMALL).train()
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    latents = net.encode(images)
    assert latents.shape == (64, *net.latent_shape) == (64, 2, 4, 4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert (latents.var((0, 2, 3)) - 1).abs().max() < 0.01
    assert net.decode(latents).shape == images.shape


def test_training_keeps_the_average_and_resumes_bit_for_bit(faces_dir, stop_in_step_1):
    whole = small(faces_dir, "whole")
    broken = small(faces_dir, "broken")
    train(whole)
    stop_in_step_1(train, broken)
    train(broken)
    one, config = load_weights(whole.output_dir / "model.safetensors")
    other, _ = load_weights(broken.output_dir / "model.safetensors")
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    state = torch.load(whole.output_dir / "last.pt", weights_only=True)
    assert torch.equal(one["decoder.0.weight"], state["ema"]["decoder.0.weight"])
    assert not torch.equal(one["decoder.0.weight"], state["net"]["decoder.0.weight"])
    assert config["net"] == "autoencoder"


def test_a_decoder_that_is_trained_further_reads_the_same_latents(faces_dir):
    first = small(faces_dir, "first", critic_weight=0.0)
    train(first)
    init = first.output_dir / "model.safetensors"
    further = small(faces_dir, "further", init=init, decoder_only=True)
    train(further)
    before, _ = load_weights(init)
    after, _ = load_weights(further.output_dir / "model.safetensors")
    for name, value in before.items():
        same = torch.equal(value, after[name])
        assert same != name.startswith("decoder"), name


def test_reconstructions_have_the_names_of_the_images(faces_dir):
    args = small(faces_dir, "run", epochs=1)
    train(args)
    checkpoint = args.output_dir / "model.safetensors"
    folder = faces_dir.parent / "reconstructed"
    p2_autoencoder.main(
        Reconstruct(checkpoint=checkpoint, image_dir=faces_dir, output_dir=folder, device="cpu")
    )
    names = [file.name for file in sorted(faces_dir.iterdir())]
    assert [file.name for file in sorted(folder.iterdir())] == names
    net, _ = load_net(checkpoint, {"autoencoder": Autoencoder})
    pixels = torch.from_numpy(np.asarray(Image.open(faces_dir / names[0]))).permute(2, 0, 1)
    with torch.inference_mode():
        decoded = to_uint8(net.decode(net.encode(normalise(pixels[None]))))[0]
    written = torch.from_numpy(np.asarray(Image.open(folder / names[0]))).permute(2, 0, 1)
    assert (decoded.int() - written.int()).abs().max() <= 1


def test_the_distance_of_features_is_0_for_equal_images(faces_dir, monkeypatch):
    timm = pytest.importorskip("timm")
    net = timm.create_model("tf_efficientnet_lite0").eval()
    monkeypatch.setattr(p2_autoencoder, "find_efficientnet", lambda *_: Path())
    monkeypatch.setattr(p2_autoencoder, "load_efficientnet", lambda path, flag: net)
    distance = p2_autoencoder.perceptual_distance(
        small(faces_dir, "run", perceptual="efficientnet"), torch.device("cpu")
    )
    images = torch.rand(2, 3, 32, 32, generator=make_rng("images")).requires_grad_()
    others = torch.rand(2, 3, 32, 32, generator=make_rng("others"))
    assert distance(images, images.detach()).item() == 0
    value = distance(images, others)
    value.backward()
    assert value.item() > 0
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_a_latent_net_keeps_its_autoencoder_frozen_and_in_eval_mode():
    unet = {"in_channels": 2, "size": 4, "width": 32, "multipliers": (1,), "attention": ()}
    net = LatentUnet(unet, SMALL).train()
    assert net.unet.training
    assert not net.autoencoder.standard.training
    assert not any(weight.requires_grad for weight in net.autoencoder.parameters())
    with pytest.raises(ValueError, match="the latents are"):
        LatentUnet(unet | {"size": 8}, SMALL)


def test_bad_input_is_named(faces_dir, tmp_path, error_of):
    def error(*words: object) -> str:
        options = ["--output-dir", tmp_path / "new", "--data-dir", faces_dir]
        return error_of(Train | Reconstruct, p2_autoencoder.main, "train", *options, *words)

    assert "--size 20: must be a multiple of 8" in error("--size", 20)
    assert "--encoder-width 17: must be a multiple of 16" in error("--encoder-width", 17)
    assert "--decoder-only: needs --init" in error("--decoder-only")
    missing = tmp_path / "none.safetensors"
    words = ["--size", 16, "--perceptual", "none"]
    assert f"--init {missing}: no such file" in error(*words, "--init", missing)
