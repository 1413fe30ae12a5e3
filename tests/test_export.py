"""tools/export.py: the exported networks are those of PyTorch, and their description is right."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoints import load_net
from common.cli import UserError
from common.files import ROOT
from common.rng import ImageNoise
from diffusion.noise_levels import karras_levels
from diffusion.schedule import Schedule, spaced_steps
from models.adaptation import AdaptationNet
from models.autoencoder import Autoencoder
from models.context_unet import ContextUnet
from models.dann import DannDeep
from models.ddim_unet import DdimUnet
from models.gan import Generator
from models.latent_unet import LatentUnet
from models.noisy_classifier import NoisyClassifier
from models.scene_classifier import SceneClassifier
from models.text_to_image import TextToImage
from tests.conftest import save_net
from tests.golden import fill
from tools import export
from tools.export import Export


def missing_package() -> str:
    """The first package of the extra `export` that is not installed; empty if all are."""
    for package in export.PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            return package
    return ""


needs_onnx = pytest.mark.skipif(
    bool(missing_package()), reason=f"no {missing_package()}: pip install '.[export]'"
)
SCHEDULE = {"steps": 40, "kind": "cosine", "prediction": "v", "counted_to": 1_000}
LEVELS = {"sigma_min": 0.02, "sigma_max": 50.0, "sigma_data": 1.0, "parametrization": "edm"}


def small_unet() -> DdimUnet:
    return DdimUnet(3, 28, 8, multipliers=(1, 2), attention=(7,), blocks=1, patch=2)


def small_latent_unet() -> LatentUnet:
    unet = {"in_channels": 4, "size": 16, "width": 8, "multipliers": (1,), "attention": (16,)}
    autoencoder = {"encoder_width": 8, "decoder_width": 8}
    return LatentUnet(unet | {"blocks": 1, "n_attributes": 3}, autoencoder)


def small_adaptation_net() -> AdaptationNet:
    return AdaptationNet("resnet18", 4, "backbone", 32, width=16, dense=8, hidden=8)


def small_noisy_classifier() -> NoisyClassifier:
    unet = {"in_channels": 3, "size": 16, "width": 8, "multipliers": (1, 2), "attention": (8,)}
    return NoisyClassifier(unet | {"blocks": 1}, n_attributes=3)


def small_text_to_image() -> TextToImage:
    sizes = {"width": 32, "multipliers": (1, 2), "attention_levels": (1,), "heads": 2}
    return TextToImage((3, 5, 8), size=32, text_width=16, text_layers=1, length=6, **sizes)


NETS = {
    "dann_resnet": small_adaptation_net,
    "noisy_classifier": small_noisy_classifier,
    "text_to_image": small_text_to_image,
    "generator": lambda: Generator(8, 4),
    "dann": lambda: DannDeep(width=8, hidden=0),
    "context_unet": lambda: ContextUnet(3, 8, 10),
    "latent_unet": small_latent_unet,
}


@pytest.mark.parametrize("package", export.PACKAGES)
def test_a_missing_package_is_one_line_that_says_what_installs_it(
    package, tmp_path, monkeypatch, error_of
):
    for name in export.PACKAGES:  # those before it may be missing here, too
        monkeypatch.setitem(sys.modules, name, torch)
    monkeypatch.setitem(sys.modules, package, None)
    words = (tmp_path / "net.safetensors", "--output-dir", tmp_path / "out")
    error = error_of(Export, export.main, *words)
    assert f"the package {package} is missing" in error
    assert "pip install '.[export]'" in error
    assert not list(tmp_path.iterdir())


def write(tmp_path: Path, net: torch.nn.Module, **config: object) -> Export:
    """A checkpoint `net.safetensors` and the command that exports it."""
    file = save_net(net, tmp_path / "net.safetensors", **config)
    return Export(file, output_dir=tmp_path / "out")


def run_onnx(file: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(output)


@needs_onnx
@pytest.mark.parametrize("name", NETS)
def test_a_file_maps_batches_of_any_size_as_pytorch_does(name, tmp_path, capsys):
    net = fill(NETS[name]())
    args = write(tmp_path, net)
    export.main(args)
    assert "largest difference from PyTorch" in capsys.readouterr().out
    about = json.loads((args.output_dir / "net.json").read_text())
    loaded, _ = load_net(args.checkpoint, export.NETS)
    for part in export.parts_of(loaded, "net"):
        inputs = export.draw_inputs(part.module, 5)
        shapes = {argument: list(value.shape[1:]) for argument, value in inputs.items()}
        assert about["files"][f"{part.file}.onnx"] == {"inputs": shapes, "output": part.output}
        with torch.inference_mode():
            expected = part.module(**inputs)
        found = run_onnx(args.output_dir / f"{part.file}.onnx", inputs)
        assert found.shape == expected.shape
        assert expected.std() > 0.01
        scale = max(1.0, expected.abs().max().item())
        assert (found - expected).abs().max() <= scale * export.LARGEST_DIFFERENCE


@needs_onnx
def test_numbers_that_float16_holds_are_stored_so_and_others_are_not(tmp_path):
    onnx = importlib.import_module("onnx")
    torch.manual_seed(0)
    net = Generator(8, 8).eval()
    full = export.to_onnx(export.Part("net", net, "images"))
    assert export.halve_what_is_exact(full) == 0
    halves = Generator(8, 8).eval()
    halves.load_state_dict({key: value.half().float() for key, value in net.state_dict().items()})
    model = export.to_onnx(export.Part("net", halves, "images"))
    before = model.ByteSize()
    assert export.halve_what_is_exact(model) == 5  # the weights of the convolutions
    assert model.ByteSize() < 0.6 * before
    onnx.checker.check_model(model)
    assert export.largest_difference(model.SerializeToString(), halves) < 1e-5


@needs_onnx
def test_no_line_or_folder_of_this_machine_is_in_a_file(tmp_path):
    content = export.to_onnx(export.Part("net", Generator(4, 4).eval(), "images"))
    assert str(ROOT).encode() not in content.SerializeToString()
    assert b"stack_trace" not in content.SerializeToString()


@needs_onnx
def test_nothing_is_written_if_the_results_differ(tmp_path, monkeypatch):
    args = write(tmp_path, Generator(8, 4))
    monkeypatch.setattr(export, "largest_difference", lambda content, module: float("nan"))
    with pytest.raises(UserError, match=r"largest difference from PyTorch nan, more than 0\.0001"):
        export.main(args)
    assert not list(args.output_dir.iterdir())


def test_the_steps_of_the_sampler_are_described(tmp_path):
    args = write(tmp_path, small_unet(), schedule=SCHEDULE)
    net, config = load_net(args.checkpoint, export.NETS)
    schedule = Schedule.from_config(SCHEDULE)
    sampling = export.describe(net, config, [], args)["sampling"]
    assert sampling["timesteps"] == 40
    assert sampling["prediction"] == "v"
    rows = sampling["steps"]
    steps = spaced_steps(40, 12, "beta")
    assert [row["t"] for row in rows] == steps
    assert [row["alpha_bar"] for row in rows] == [schedule.alpha_bar[t] for t in steps]
    following = [row["alpha_bar"] for row in rows[1:]]
    assert [row["previous_alpha_bar"] for row in rows] == [*following, 1.0]
    assert rows[0]["time"] == 999  # the last of 1,000 steps, counted from 0
    args.steps = 41
    with pytest.raises(UserError, match="--steps 41: the network was trained with 40 steps"):
        export.describe(net, config, [], args)


def test_the_levels_of_a_score_based_model_are_described(tmp_path):
    args = write(tmp_path, small_latent_unet(), noise_levels=LEVELS)
    args.steps = 5
    net, config = load_net(args.checkpoint, export.NETS)
    sampling = export.describe(net, config, [], args)["sampling"]
    rows = sampling.pop("levels")
    assert sampling == LEVELS
    assert [row["sigma"] for row in rows] == karras_levels(50.0, 0.02, 5)
    assert [rows[0]["time"], rows[-1]["time"]] == pytest.approx([1_000, 0])
    middle = 1_000 * math.log(rows[2]["sigma"] / 0.02) / math.log(50 / 0.02)
    assert rows[2]["time"] == pytest.approx(middle)


def test_the_names_of_the_classes_are_described(tmp_path):
    names = ["bed", "desk", "lamp", "mug"]
    args = write(tmp_path, small_adaptation_net(), class_names=names)
    net, config = load_net(args.checkpoint, export.NETS)
    assert export.describe(net, config, [], args)["classes"] == names


def test_a_score_based_model_has_no_spacing(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "require_packages", lambda: None)
    args = write(tmp_path, small_latent_unet(), noise_levels=LEVELS)
    args.spacing = "beta"
    with pytest.raises(UserError, match=r"--spacing beta: .* is no diffusion model"):
        export.main(args)


@needs_onnx
def test_a_text_encoder_knows_the_same_tokens(tmp_path):
    """Its input are CLIP's tokens; those that the model does not know are one."""
    args = write(tmp_path, fill(small_text_to_image()), schedule=SCHEDULE | {"steps": 1_000})
    export.main(args)
    ids = torch.tensor([[3, 5, 8, 49_407, 3, 3], [3, 5, 8, 7, 3, 3], [3, 8, 5, 7, 3, 3]])
    states = run_onnx(args.output_dir / "net_text.onnx", {"ids": ids})
    assert torch.allclose(states[0], states[1])
    assert not torch.allclose(states[1], states[2])


def test_the_noises_are_those_that_the_scripts_draw(tmp_path, monkeypatch):
    args = write(tmp_path, Generator(8, 4))
    args.noises = 3
    monkeypatch.setattr(export, "require_packages", lambda: None)
    monkeypatch.setattr(export, "export_part", lambda part: (b"", ""))
    export.main(args)
    about = json.loads((args.output_dir / "net.json").read_text())["noises"]
    assert about == {"file": "net_noises.bin", "seed": 0, "shape": [3, 8]}
    found = np.fromfile(args.output_dir / "net_noises.bin", "<f4").reshape(3, 8)
    assert np.array_equal(found, ImageNoise(0, range(3), (8,))().numpy())


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (Autoencoder, {}, "is the network 'autoencoder', which is not exported"),
        (
            lambda: SceneClassifier({"colour": 3}),
            {},
            "is the network 'scene_classifier', which is not exported",
        ),
    ],
)
def test_networks_that_are_not_exported_are_refused(make, config, message, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "require_packages", lambda: None)
    with pytest.raises(UserError, match=message):
        export.main(write(tmp_path, make(), **config))
    assert not (tmp_path / "out").exists()


def test_a_classifier_has_no_noises(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "require_packages", lambda: None)
    args = write(tmp_path, DannDeep(width=8, hidden=0))
    args.noises = 2
    with pytest.raises(UserError, match=r"--noises 2: .* makes no images from noise"):
        export.main(args)


@pytest.mark.parametrize("make", [lambda: Generator(8, 4), lambda: DannDeep(width=8, hidden=0)])
@pytest.mark.parametrize("option", [{"steps": 3}, {"spacing": "beta"}])
def test_only_a_diffusion_model_has_steps(make, option, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "require_packages", lambda: None)
    args = replace(write(tmp_path, make()), **option)
    ((name, value),) = option.items()
    with pytest.raises(UserError, match=f"--{name} {value}: .* is no diffusion model"):
        export.main(args)
    assert not args.output_dir.exists()
