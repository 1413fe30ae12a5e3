"""The frozen text-to-image models: Stable Diffusion v1 from its own file, or the small model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.checkpoints import (
    build_net,
    first_misfit,
    load_weights,
    refuse_damaged,
    tensors_under,
)
from common.cli import UserError
from common.device import Device, Precision, choose_device, has_fast_bf16
from diffusion.schedule import Schedule
from inversion.sampling import TextToImageModel
from inversion.tokens import VOCABULARY, Tokenizer
from models.network import shapes_only
from models.stable_diffusion.model import PREFIXES, StableDiffusion
from models.text_to_image import TextToImage

WhichModel = Literal["stable-diffusion", "small"]
# What sd-v1-4.ckpt holds besides the three networks: the schedule, the averaged U-Net of the full
# file, and CLIP's list 0, 1, …, 76.
IGNORED_NAMES = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
}
IGNORED_PREFIX = "model_ema."


class Loaded(NamedTuple):
    """A frozen model in eval mode on its device, its schedule, and which of the two it is."""

    net: TextToImageModel
    schedule: Schedule
    which: WhichModel
    device: torch.device


def load_model(path: Path, device: Device, precision: Precision) -> Loaded:
    """Load Stable Diffusion v1 (.ckpt or .safetensors) or a model of `train-model`.

    Raises UserError that names the file, and says what to do if it is not there.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; Stable Diffusion's is sd-v1-4.ckpt from "
            "https://huggingface.co/CompVis/stable-diffusion-v-1-4-original (4.3 GB), and "
            "`train-model` makes a small one"
        )
    chosen = torch.device(choose_device(device))
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(chosen.type) else "fp32"
    if path.suffix == ".safetensors":
        weights, config = load_weights(path, "MODEL")
        if config.get("net") == "text_to_image":
            return load_small(path, weights, config, chosen)
    else:
        weights = tensors_under(path, "MODEL")
    net = build_stable_diffusion(path, weights)
    if precision == "bf16":
        net.unet.to(torch.bfloat16)
    net.requires_grad_(False).eval().to(chosen)
    schedule = Schedule(kind="scaled-linear", beta_start=0.00085, beta_end=0.012)
    return Loaded(net, schedule, "stable-diffusion", chosen)


def random_steps(T: int, count: int, power: float, rng: torch.Generator) -> Tensor:
    """Random steps from 1 to T, int64 (count,), with a density proportional to t to the power.

    At large t the noise hides most of the image, so that the words have the most influence there.
    """
    if power == 0:
        return torch.randint(1, T + 1, (count,), generator=rng, device=rng.device)
    uniform = torch.rand(count, generator=rng, device=rng.device)
    return (T * uniform ** (1 / (1 + power))).ceil().clamp(1, T).long()


def image_errors(schedule: Schedule, output: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The squared error of each image (batch,), with the weights that its model is trained with.

    Stable Diffusion predicts the noise, and all steps count alike. The small model predicts the
    image. The error of v is that of the image times 1 / σ², which is large where little noise is
    left: the factor is at most 5.
    """
    errors = F.mse_loss(output.float(), schedule.target(x0, t, eps), reduction="none")
    errors = errors.flatten(1).mean(1)
    if schedule.prediction == "x0":
        _, sigma = schedule.coefficients(t)
        errors = errors * sigma.flatten().pow(-2).clamp(max=5)
    return errors


def load_small(
    path: Path, weights: dict[str, Tensor], config: dict, device: torch.device
) -> Loaded:
    """A model of `train-model`."""
    net = build_net(TextToImage, config, weights, f"MODEL {path}")
    net.requires_grad_(False).to(device)
    schedule = Schedule.from_config(config.get("schedule", {}))
    return Loaded(net, schedule, "small", device)


def build_stable_diffusion(path: Path, weights: dict[str, Tensor]) -> StableDiffusion:
    """The three networks with the weights of a file, in float32; the weights are not copied.

    Raises UserError that names the first key that is missing, unexpected or of another shape.
    """
    weights = dict(weights)
    with shapes_only():
        net = StableDiffusion()
    parts = {name: getattr(net, name) for name in PREFIXES}
    for name, prefix in PREFIXES.items():
        found = {}
        for key in [key for key in weights if key.startswith(prefix)]:
            value = weights.pop(key)
            if key not in IGNORED_NAMES:
                found[key.removeprefix(prefix)] = value
        misfit = first_misfit(parts[name].state_dict(), found)
        if misfit:
            raise UserError(f"MODEL {path}: is not Stable Diffusion v1 ({name}: {misfit})")
        refuse_damaged(f"MODEL {path}", found)
        floats = {key: value.float() for key, value in found.items()}
        parts[name].load_state_dict(floats, assign=True)
    for key in weights:
        if key not in IGNORED_NAMES and not key.startswith(IGNORED_PREFIX):
            raise UserError(f"MODEL {path}: is not Stable Diffusion v1 (unexpected key '{key}')")
    return net


# Prompts


def embed_prompts(model: TextToImageModel, ids: Tensor, rows: Tensor | None) -> Tensor:
    """Embeddings (batch, length, width) of token ids, in which learned words have their own rows.

    `rows` (learned vectors, width) are put in place at lookup, so that they are the only thing that
    a loss can change: the model's own table is not touched.
    """
    is_new = ids >= VOCABULARY
    known = model.embed(torch.where(is_new, 0, ids))
    if rows is None:
        return known
    new = rows[torch.where(is_new, ids - VOCABULARY, 0)]  # (batch, length, width)
    return torch.where(is_new[..., None], new.to(known.dtype), known)


def encode_prompts(
    loaded: Loaded, tokenizer: Tokenizer, prompts: Sequence[str], rows: Tensor | None
) -> Tensor:
    """States (prompts, length, width) of prompts."""
    ids = tokenizer(prompts).to(loaded.device)
    return loaded.net.encode_text(embed_prompts(loaded.net, ids, rows))


def word_ids(loaded: Loaded, word: str, flag: str = "--init") -> list[int]:
    """The token ids of a known word or words.

    Raises UserError if the model has never seen one of them.
    """
    ids = Tokenizer(loaded.net.length).encode(word)
    if not ids:
        raise UserError(f"{flag} {word!r}: holds no word")
    if isinstance(loaded.net, TextToImage):
        is_unknown = loaded.net.unknown(torch.tensor(ids, device=loaded.device))
        if is_unknown.any():
            raise UserError(f"{flag} {word}: the small model was not trained on this word")
    return ids


def rows_of(loaded: Loaded, ids: list[int]) -> Tensor:
    """The model's own embeddings (ids, width) of token ids."""
    return loaded.net.embed(torch.tensor([ids], device=loaded.device))[0].clone()
