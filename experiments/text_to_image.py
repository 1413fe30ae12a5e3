"""Does the small text-to-image model draw what the prompt says?

Prompts name a subject and a colour, a background, or a style. An independent classifier, which has
learned from drawings of another seed, says which of them it sees.

    python experiments/text_to_image.py --classifier runs/classifier/scenes/model.safetensors \
        --output-dir runs/p3/text-to-image
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from common.cli import UserError, at_least, each_once, in_range, is_seed, run_cli
from common.data import to_uint8
from common.device import Device
from common.figures import save_grid, save_table
from common.files import atomic_write, make_output_dir
from common.progress import show_progress
from inversion.models import Loaded, encode_prompts, load_model
from inversion.sampling import Sampling, sample
from inversion.tokens import Tokenizer
from metrics.scenes import hits, load_scene_classifier, see
from models.scene_classifier import SceneClassifier
from p3_textual_inversion import SMALL_MODEL
from preparation.synthetic import scenes

BATCH = 26  # images computed at a time


@dataclass(kw_only=True)
class Measure:
    """Measure how often the small model draws what a prompt says."""

    classifier: Path
    """Classifier of `evaluate.py train-scenes`."""
    output_dir: Path
    """Folder for the table and a picture."""
    model: Path = SMALL_MODEL
    """Model of `p3_textual_inversion.py train-model`."""
    guidances: tuple[float, ...] = (1.0, 3.0, 5.0)
    """Guidance scales; 1 is none."""
    count: int = 2
    """Images of each prompt."""
    steps: int = 25
    """Steps of the sampler."""
    seed: int = 0
    """Seed of the noise."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        each_once("--guidances", self.guidances)
        for guidance in self.guidances:
            in_range("--guidances", guidance, 0, 100)
        at_least("--count", self.count, 1)
        in_range("--steps", self.steps, 1, 1_000)
        is_seed("--seed", self.seed)


# The traits of a creature that a caption can name, one at a time, and how often each is drawn.
CREATURE_TRAITS: dict[str, dict[Any, str]] = {
    "body": scenes.BODIES,
    "ears": scenes.EARS,
    "coat": scenes.COATS,
    "eyes": scenes.EYES,
}
TRAIT_COUNT = 6


class Prompt(NamedTuple):
    """A prompt, and the traits that it asks for."""

    text: str
    traits: dict[str, Any]


def all_prompts() -> list[Prompt]:
    """Subjects in all colours, backgrounds, subjects in all named styles, traits of creatures."""
    prompts = []
    for subject in scenes.SUBJECTS:
        for colour in scenes.COLOUR_NAMES:
            text = scenes.with_article(f"{colour} {subject}")
            prompts.append(Prompt(text, {"subject": subject, "colour": colour}))
    for ground in scenes.GROUNDS:
        for colour in scenes.COLOUR_NAMES:
            text = f"a drawing on a {ground} {colour} background"
            prompts.append(Prompt(text, {"ground": ground, "ground_colour": colour}))
    for subject in scenes.SUBJECTS:
        for style in scenes.NAMED_STYLES:
            text = f"{scenes.with_article(subject)} in the style of {style}"
            prompts.append(Prompt(text, {"style": style}))
    for trait, phrases in CREATURE_TRAITS.items():
        for value, text in phrases.items():
            prompts += [Prompt(text, {trait: value})] * TRAIT_COUNT
    return prompts


def main(args: Measure) -> None:
    """Draw all prompts at each guidance scale and write the table."""
    loaded = load_model(args.model, args.device, "fp32")
    if loaded.which != "small":
        raise UserError(f"--model {args.model}: is Stable Diffusion; this is for the small model")
    classifier = load_scene_classifier(args.classifier)
    make_output_dir(args.output_dir)
    started = time.monotonic()
    prompts = [prompt for prompt in all_prompts() for _ in range(args.count)]
    header = ["guidance", "subject, %", "colour, %", "background, %", "its colour, %", "style, %"]
    table = [[*header, *[f"{trait}, %" for trait in CREATURE_TRAITS]]]
    results: dict[str, Any] = {}
    for guidance in args.guidances:
        sampling = Sampling(args.steps, guidance)
        pixels = draw(prompts, sampling, args.seed, loaded)
        shares = shares_right(prompts, pixels, classifier, loaded.device)
        results[f"guidance {guidance:g}"] = shares
        columns = ("subject", "colour", "ground", "ground_colour", "style", *CREATURE_TRAITS)
        table.append([f"{guidance:g}", *[f"{shares[trait]:.1f}" for trait in columns]])
        print(" | ".join(table[-1]), flush=True)
        first = pixels[:: args.count][: len(scenes.SUBJECTS) * len(scenes.COLOUR_NAMES)]
        file = args.output_dir / f"guidance_{guidance:g}.png"
        save_grid(first, file, columns=len(scenes.COLOUR_NAMES))
    save_table(table, args.output_dir / "table", f"{len(prompts):,} images of {args.model.name}")
    results["images"] = len(prompts)
    results["seconds"] = round(time.monotonic() - started, 1)
    results["arguments"] = asdict(args)
    content = json.dumps(results, indent=1, default=str) + "\n"
    atomic_write(args.output_dir / "result.json", content)
    print((args.output_dir / "table.md").read_text())


def draw(prompts: list[Prompt], sampling: Sampling, seed: int, loaded: Loaded) -> Tensor:
    """One image for each prompt, uint8 (n, 3, 64, 64); image k has noise k."""
    tokenizer = Tokenizer(loaded.net.length)
    empty = encode_prompts(loaded, tokenizer, [""], None)
    parts = []
    starts = range(0, len(prompts), BATCH)
    for start in show_progress(starts, len(starts), f"guidance {sampling.guidance:g}"):
        some = prompts[start : start + BATCH]
        states = encode_prompts(loaded, tokenizer, [prompt.text for prompt in some], None)
        numbers = range(start, start + len(some))
        images = sample(loaded.net, loaded.schedule, states, empty, seed, numbers, sampling)
        parts.append(to_uint8(images).cpu())
    return torch.cat(parts)


def shares_right(
    prompts: list[Prompt], pixels: Tensor, classifier: SceneClassifier, device: torch.device
) -> dict[str, float]:
    """How many of the images whose prompt names a trait are seen with it, in %."""
    seen = see(classifier, pixels, device)
    right: dict[str, list[bool]] = {}
    for k, prompt in enumerate(prompts):
        for trait, value in prompt.traits.items():
            right.setdefault(trait, []).append(bool(hits(seen, trait, value)[k]))
    return {trait: 100 * sum(values) / len(values) for trait, values in right.items()}


if __name__ == "__main__":
    run_cli(Measure, main)
