r"""Export a network as ONNX, which other programs and browsers run, and check that it is the same.

    python tools/export.py checkpoints/wgangp_faces.safetensors --output-dir nets
    python tools/export.py checkpoints/ddpm_digits.safetensors --output-dir nets --noises 11

NAME.onnx maps batches of any size as the network does, and NAME.json describes it: its inputs and,
for a diffusion model, the steps of a sampler with their ᾱ; a score-based one has its levels σ.
A network for latents has its decoder in NAME_decoder.onnx, and one that reads text has its text
encoder in NAME_text.onnx. ONNX Runtime then runs each file; it must agree with PyTorch to 1e-4.

Computations are in float32. Weights that float16 holds exactly, as it does those of the released
files, are stored in float16 with a cast behind them. That halves the file and changes no number.

It needs the extra `export`: pip install '.[export]'
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.checkpoints import load_net
from common.cli import UserError, at_least, run_cli
from common.files import atomic_write, make_output_dir
from common.packages import refuse_missing
from common.rng import ImageNoise, make_rng
from diffusion.noise_levels import NoiseLevels, karras_levels
from diffusion.samplers import step_pairs
from diffusion.schedule import Schedule, Spacing, spaced_steps
from models.adaptation import AdaptationNet
from models.attention_unet import AttentionUnet
from models.attribute_classifier import AttributeClassifier
from models.autoencoder import Autoencoder
from models.context_unet import ContextUnet
from models.dann import DannNet
from models.ddim_unet import DdimUnet
from models.digit_classifier import DigitClassifier, DigitResNet
from models.gan import Generator, ProjectionGenerator
from models.latent_unet import LatentUnet
from models.nets import NETS
from models.network import Network
from models.noisy_classifier import NoisyClassifier
from models.text_to_image import CLIP_TOKENS, TextToImage

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_DIFFERENCE = 1e-4
DEFAULT_STEPS = 12
CLASSIFIERS = (DigitClassifier, DigitResNet, AttributeClassifier, AdaptationNet, NoisyClassifier)
DIGIT = (3, 28, 28)
FACE = (3, 64, 64)


@dataclass
class Export:
    """Write NAME.onnx and NAME.json, and NAME_decoder.onnx or NAME_text.onnx if there is one."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    """A released network, or model.safetensors of a run."""
    output_dir: Path
    """Folder to write to."""
    name: str | None = None
    """Name of the files, by default that of the checkpoint."""
    noises: int | None = None
    """Also write the noises of images 0, 1, … that the scripts draw for seed 0: NAME_noises.bin."""
    steps: int | None = None
    """Steps of a sampler, or noise levels, to describe in NAME.json; 12 if not given."""
    spacing: Spacing | None = None
    """Spacing of these steps, by default the checkpoint's, else dense at both ends (beta)."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"--name {self.name!r}: must consist of letters, digits, _ and -")
        at_least("--noises", self.noises, 1)
        at_least("--steps", self.steps, 1)


class Part(NamedTuple):
    """A module that becomes a file. `output` names what it returns."""

    file: str
    module: nn.Module
    output: str


class Decoder(nn.Module):
    """The decoder of an autoencoder as a module of its own."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (batch, *latent_shape) → images (batch, channels, size, size)."""
        return self.autoencoder.decode(latents)


class TextStates(nn.Module):
    """The text encoder of a text-to-image model as a module of its own."""

    def __init__(self, model: TextToImage) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (batch, length) of CLIP's vocabulary → states (batch, length, text_width)."""
        return self.model.encode_text(self.model.embed(ids))


class TextDenoiser(nn.Module):
    """The other part of a text-to-image model, which reads the states of a prompt."""

    def __init__(self, model: TextToImage) -> None:
        super().__init__()
        self.model = model
        self.shape = model.shape
        self.counts_steps = model.counts_steps

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Noisy x (batch, *shape), steps (batch,) and states → the prediction."""
        return self.model.predict(x, t, states)


def require_packages() -> None:
    """Raise UserError if a package of the extra `export` is missing."""
    for package in PACKAGES:
        message = (
            f"tools/export.py: the package {package} is missing; "
            "pip install '.[export]' in the project's folder installs it"
        )
        refuse_missing(package, message)


def parts_of(net: Network, name: str) -> list[Part]:
    """The files that a network becomes; none for a network that is not exported."""
    if isinstance(net, LatentUnet):
        decoder = Decoder(net.autoencoder)
        return [Part(name, net.unet, "prediction"), Part(f"{name}_decoder", decoder, "images")]
    if isinstance(net, TextToImage):
        text = Part(f"{name}_text", TextStates(net), "states")
        return [Part(name, TextDenoiser(net), "prediction"), text]
    if isinstance(net, DdimUnet | ContextUnet | AttentionUnet):
        return [Part(name, net, "prediction")]
    if isinstance(net, Generator | ProjectionGenerator):
        return [Part(name, net, "images")]
    if isinstance(net, DannNet):
        return [Part(name, net, "log_probabilities")]
    if isinstance(net, CLASSIFIERS):
        return [Part(name, net, "logits")]
    return []


def noise_shape(net: nn.Module) -> tuple[int, ...] | None:
    """The shape of the noise that an image is made from; None for a classifier."""
    if isinstance(net, Generator | ProjectionGenerator):
        return (net.latent,)
    if isinstance(net, DdimUnet | LatentUnet | TextToImage | TextDenoiser):
        return net.shape
    if isinstance(net, ContextUnet | AttentionUnet):
        return (net.config["arguments"]["in_channels"], 28, 28)
    return None


def image_shape(classifier: nn.Module) -> tuple[int, int, int]:
    """The shape of the images that a classifier reads."""
    if isinstance(classifier, AdaptationNet):
        size = classifier.config["arguments"]["size"]
        return (3, size, size)
    return FACE if isinstance(classifier, AttributeClassifier) else DIGIT


def draw_inputs(module: nn.Module, count: int) -> dict[str, Tensor]:
    """Random inputs of a batch of `count`, by the names of the arguments of `forward`."""
    rng = make_rng(0, "export", count)
    if isinstance(module, Generator | ProjectionGenerator):
        return {"latents": torch.randn((count, module.latent), generator=rng)}
    if isinstance(module, Decoder):
        shape = module.autoencoder.latent_shape
        return {"latents": torch.randn((count, *shape), generator=rng)}
    if isinstance(module, TextStates):
        shape = (count, module.model.length)
        return {"ids": torch.randint(CLIP_TOKENS, shape, generator=rng)}
    if isinstance(module, NoisyClassifier):
        x = torch.randn((count, *module.shape), generator=rng)
        return {"x": x, "t": (999 * torch.rand(count, generator=rng)).round()}
    shape = noise_shape(module)
    if shape is None:
        return {"images": 2 * torch.rand((count, *image_shape(module)), generator=rng) - 1}

    inputs = {"x": torch.randn((count, *shape), generator=rng)}
    time = torch.rand(count, generator=rng)
    counts_steps = getattr(module, "counts_steps", False)
    inputs["t"] = (999 * time).round() if counts_steps else time
    arguments: dict[str, Any] = getattr(module, "config", {}).get("arguments", {})
    classes = arguments.get("n_classes", 0)
    if classes:
        inputs["classes"] = torch.randint(classes, (count,), generator=rng)
        inputs["drop"] = torch.rand(count, generator=rng) < 0.5
    if isinstance(module, TextDenoiser):
        shape = (count, module.model.length, module.model.text_width)
        inputs["states"] = torch.randn(shape, generator=rng)
    attributes = arguments.get("n_attributes", 0)
    if attributes:
        states = torch.randint(3, (count, attributes), generator=rng)
        inputs["attributes"] = states.float() - 1  # 1, -1, or 0 for unknown
    return inputs


def to_onnx(part: Part) -> Any:
    """The module as an ONNX model whose batch may have any size.

    Nothing is optimised: ONNX Runtime does that when it loads a file, and here it would multiply
    the scales of BatchNorm into weights, which float16 would then no longer hold.
    """
    inputs = draw_inputs(part.module, 2)
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in inputs}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(
            part.module, (), kwargs=inputs, dynamic_shapes=shapes, strict=True
        )
        program = torch.onnx.export(
            graph,
            input_names=list(inputs),
            output_names=[part.output],
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for item in (*model.graph.node, *model.graph.value_info, model.graph, model):
        del item.metadata_props[:]  # lines of Python code, and the folders they lie in
    return model


def halve_what_is_exact(model: Any) -> int:
    """Store weights in float16, with a cast behind them, where that changes no number.

    Returns how many tensors it stored so. Small ones stay as they are.
    """
    import onnx  # pyright: ignore[reportMissingImports]

    casts = []
    for stored in model.graph.initializer:
        if stored.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(stored)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size < 256 or not np.array_equal(half.astype(np.float32), values):
            continue
        name = stored.name
        stored.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}_half"))
        cast = onnx.helper.make_node("Cast", [stored.name], [name], to=onnx.TensorProto.FLOAT)
        casts.append(cast)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return len(casts)


@torch.inference_mode()
def largest_difference(content: bytes, module: nn.Module) -> float:
    """The largest difference between ONNX Runtime and PyTorch, over batches of 1 and 3.

    Where the largest output exceeds 1, the difference is that share of it.
    """
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    differences = []
    for count in (1, 3):
        inputs = draw_inputs(module, count)
        expected = module(**inputs)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        scale = expected.abs().max().clamp(min=1)
        differences.append((torch.from_numpy(found) - expected).abs().max() / scale)
    return torch.stack(differences).max().item()


def export_part(part: Part) -> tuple[bytes, str]:
    """The content of a part's file, and a line about it. Raises UserError if it is not the same."""
    model = to_onnx(part)
    halves = halve_what_is_exact(model)
    content = model.SerializeToString()
    difference = largest_difference(content, part.module)
    line = (
        f"{part.file}.onnx: {len(content):,} bytes, {halves} tensors in float16; "
        f"largest difference from PyTorch {difference:.1e}"
    )
    if not difference <= LARGEST_DIFFERENCE:  # also for NaN
        raise UserError(f"{line}, more than {LARGEST_DIFFERENCE:g}; nothing was written")
    return content, line


def describe(net: Network, config: dict[str, Any], parts: list[Part], args: Export) -> dict:
    """The content of NAME.json."""
    files = {}
    for part in parts:
        inputs = {
            name: list(value.shape[1:]) for name, value in draw_inputs(part.module, 1).items()
        }
        files[f"{part.file}.onnx"] = {"inputs": inputs, "output": part.output}
    about: dict[str, Any] = {"net": config.get("net"), "files": files}
    for key in ("domains", "domain", "source", "target", "attributes", "size"):
        if key in config:
            about[key] = config[key]
    if isinstance(net, AttributeClassifier):
        about["attributes"] = net.attributes
    if isinstance(net, TextToImage):
        about["patch"] = net.patch  # channels become squares of so many pixels: F.pixel_shuffle
    if isinstance(net, AdaptationNet):
        about["classes"] = config.get("class_names")
    if "schedule" in config:
        about["sampling"] = describe_sampling(net, config, args)
    if "noise_levels" in config:
        about["sampling"] = describe_levels(config["noise_levels"], args)
    return about


def describe_levels(noise_levels: dict[str, Any], args: Export) -> dict[str, Any]:
    """The levels σ of a score-based model's sampler, and the time that the network reads for each.

    It reads x / √(σ² + σ_data²). `NoiseLevels.denoise` makes the clean image of its output.
    """
    levels = NoiseLevels(**noise_levels)
    count = DEFAULT_STEPS if args.steps is None else args.steps
    rows = []
    for sigma in karras_levels(levels.sigma_max, levels.sigma_min, count):
        time = levels.time(torch.tensor([sigma], dtype=torch.float64))
        rows.append({"sigma": sigma, "time": float(time)})
    return {**levels.to_config(), "levels": rows}


def describe_sampling(net: Network, config: dict[str, Any], args: Export) -> dict[str, Any]:
    """The steps of a sampler: for each its number, what the network reads for it, and its ᾱ."""
    schedule = Schedule.from_config(config["schedule"])
    sampling = config.get("sampling", {})
    count = min(DEFAULT_STEPS, schedule.T) if args.steps is None else args.steps
    if count > schedule.T:
        raise UserError(f"--steps {count}: the network was trained with {schedule.T:,} steps")
    spacing = args.spacing or sampling.get("spacing", "beta")
    rows = []
    for t, previous in step_pairs(spaced_steps(schedule.T, count, spacing)):
        row = {
            "t": t,
            "time": float(schedule.time(torch.tensor([t]), net)),
            "alpha_bar": schedule.alpha_bar[t],
            "previous_alpha_bar": schedule.alpha_bar[previous],
        }
        rows.append(row)
    return {
        "timesteps": schedule.T,
        "prediction": schedule.prediction,
        "clamp": sampling.get("clamp", "static"),
        "spacing": spacing,
        "steps": rows,
    }


def draw_noises(net: Network, count: int, args: Export) -> Tensor:
    """The noises of images 0 … count - 1 that the scripts draw for seed 0, (count, *shape)."""
    shape = noise_shape(net)
    if shape is None:
        raise UserError(f"--noises {count}: {args.checkpoint} makes no images from noise")
    return ImageNoise(0, range(count), shape)()


def main(args: Export) -> None:
    """Export and check all parts, then write the files."""
    require_packages()
    net, config = load_net(args.checkpoint, NETS, "CHECKPOINT")
    name = args.name or args.checkpoint.stem
    parts = parts_of(net, name)
    if not parts:
        raise UserError(
            f"CHECKPOINT {args.checkpoint}: is the network '{config['net']}', which is not exported"
        )
    has_spacing = "schedule" in config
    has_steps = has_spacing or "noise_levels" in config
    for option, value, is_possible in (
        ("--steps", args.steps, has_steps),
        ("--spacing", args.spacing, has_spacing),
    ):
        if value is not None and not is_possible:
            raise UserError(
                f"{option} {value}: {args.checkpoint} is no diffusion model; leave it out"
            )
    about = describe(net, config, parts, args)
    make_output_dir(args.output_dir)
    contents = {}
    if args.noises is not None:
        noises = draw_noises(net, args.noises, args)
        file = f"{name}_noises.bin"
        contents[file] = noises.numpy().astype("<f4").tobytes()  # the lowest byte first
        about["noises"] = {"file": file, "seed": 0, "shape": list(noises.shape)}
    for part in parts:
        contents[f"{part.file}.onnx"], line = export_part(part)
        print(line)
    contents[f"{name}.json"] = (json.dumps(about, indent=1) + "\n").encode()
    for file, content in contents.items():
        atomic_write(args.output_dir / file, content)
    print(f"{', '.join(contents)}: {args.output_dir}")


if __name__ == "__main__":
    run_cli(Export, main)
