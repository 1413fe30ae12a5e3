"""How well learned words show their concepts, with the small text-to-image model.

Four rows for the drawn creature and the drawn print of preparation/synthetic/scenes.py:

known word   the prompt with the word that training starts from: the floor
learned      the prompt with the learned word
described    the prompt with the traits in words; a caption of training names at most one of them
drawn        drawings of the concept itself in the scenes of the prompts: the ceiling

The image and text scores are those of the grader's rule with a small CLIP, the traits those that an
independent classifier sees. CLIP and classifier have learned from drawings of another seed.

Two more pictures: the prompts with the word after every so many steps of its training, and both
words in one prompt.

    python experiments/inversion.py --words runs/p3/words/words.safetensors \
        --clip runs/p3/clip-scenes/model.safetensors \
        --classifier runs/classifier/scenes/model.safetensors --output-dir runs/p3/inversion
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from common.cli import UserError, in_range, is_seed, run_cli
from common.data import to_uint8
from common.device import Device
from common.figures import save_grid, save_image, save_labelled, save_table
from common.files import atomic_write, make_output_dir
from common.progress import show_progress
from inversion.concepts import read_words
from inversion.models import Loaded, encode_prompts, load_model
from inversion.sampling import Sampling, sample
from inversion.tokens import Tokenizer
from metrics.inversion import best_five, image_features, scores_of
from metrics.scenes import hits, load_scene_classifier, see
from p3_textual_inversion import SMALL_MODEL, STYLES
from preparation.synthetic import scenes
from zeroshot.loading import Clip, load_clip

ROWS = ("known word", "learned", "described", "drawn")
NAMES = ("creature", "print")
# The prompts of the drawn INPUT.json, and the scenes that they ask for.
CREATURE_SCENES = (
    {"ground": "plain", "ground_colour": "blue"},
    {"ground": "striped", "ground_colour": "pink"},
)
PRINT_SCENES = ({"subject": "car"}, {"subject": "house", "ground": "striped"})
TOGETHER = "A <new1> on a plain blue background in the style of <new2>."
CREATURE_TRAITS = ("body", "ears", "coat", "second_colour", "eyes", "colour")
PRINT_TRAITS = ("style", "dark_hue", "light_hue")


@dataclass(kw_only=True)
class Compare:
    """Compare learned words with known words, with descriptions and with drawings."""

    words: Path
    """File of the two learned words, <new1> and <new2>. Their snapshots may lie beside it."""
    clip: Path
    """CLIP of `p3_clip_zeroshot.py pretrain --captioned`."""
    classifier: Path
    """Classifier of `evaluate.py train-scenes`."""
    output_dir: Path
    """Folder for the tables and pictures."""
    model: Path = SMALL_MODEL
    """Model of `p3_textual_inversion.py train-model`."""
    count: int = 25
    """Images of each prompt."""
    steps: int = 50
    """Steps of the sampler."""
    guidance: float = 3.0
    """Guidance scale."""
    seed: int = 0
    """Seed of the noise."""
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        in_range("--count", self.count, 5, 10_000)
        in_range("--steps", self.steps, 1, 1_000)
        in_range("--guidance", self.guidance, 0, 100)
        is_seed("--seed", self.seed)


def main(args: Compare) -> None:
    """Draw all rows of both concepts, measure them, and write the tables and pictures."""
    loaded = load_model(args.model, args.device, "fp32")
    if loaded.which != "small":
        raise UserError(f"--model {args.model}: is Stable Diffusion; this is for the small model")
    words = read_words(args.words, "--words")
    for word in ("<new1>", "<new2>"):
        if word not in words or words[word].shape[1] != loaded.net.text_width:
            raise UserError(f"--words {args.words}: has no {word} of this model")
    clip = load_clip("ViT-B-32", "openai", args.clip, "--clip")
    classifier = load_scene_classifier(args.classifier)
    make_output_dir(args.output_dir)
    started = time.monotonic()

    table = [["concept", "images", "image score", "text score", "hidden traits, %"]]
    details = [["concept", "images", "trait", "%"]]
    results: dict[str, Any] = {}
    for concept, name in enumerate(NAMES):
        drawings = np.stack([scenes.draw_concept(0, concept, k)[0] for k in range(5)])
        sources = save_pixels(to_pixels(drawings), args.output_dir / "sources" / name)
        source_features = image_features(clip, sources)
        pictures = []
        for row in ROWS:
            pixels = images_of_row(row, concept, args, loaded, words)  # one tensor for each prompt
            pictures += [some[:1] for some in pixels]
            scores = score(pixels, concept, clip, source_features, args.output_dir / row / name)
            shown = traits_shown(torch.cat(pixels), concept, classifier, loaded.device)
            mean = float(np.mean(list(shown.values())))
            table.append([name, row, f"{scores[0]:.1f}", f"{scores[1]:.1f}", f"{mean:.1f}"])
            details += [[name, row, trait, f"{percent:.1f}"] for trait, percent in shown.items()]
            results[f"{name}, {row}"] = {
                "image": scores[0],
                "text": scores[1],
                "traits": shown,
                "hidden_traits": mean,
            }
        columns = [f"prompt {number}" for number in range(len(pictures) // len(ROWS))]
        picture = torch.cat(pictures)
        save_labelled(picture, args.output_dir / f"{name}.png", list(ROWS), columns, name)
        draw_progress(concept, args, loaded, words)
    together = images_of(TOGETHER, 8, args, loaded, words)
    save_grid(together, args.output_dir / "together.png", columns=8)
    for name in NAMES:
        results[name] = way_covered(results, name)
    save_table(table, args.output_dir / "table")
    save_table(details, args.output_dir / "traits")
    results["seconds"] = round(time.monotonic() - started, 1)
    results["arguments"] = asdict(args)
    content = json.dumps(results, indent=1, default=str) + "\n"
    atomic_write(args.output_dir / "result.json", content)
    print((args.output_dir / "table.md").read_text())


def way_covered(results: dict[str, Any], name: str) -> dict[str, float]:
    """How far from the floor to the ceiling the learned word comes, and what the text loses."""
    floor = results[f"{name}, known word"]
    learned = results[f"{name}, learned"]
    ceiling = results[f"{name}, drawn"]
    way = ceiling["image"] - floor["image"]
    return {
        "way_from_floor_to_ceiling": (learned["image"] - floor["image"]) / way if way else 0.0,
        "text_score_change": learned["text"] - floor["text"],
    }


def images_of_row(
    row: str, concept: int, args: Compare, loaded: Loaded, words: dict[str, Tensor]
) -> list[Tensor]:
    """Images uint8 (count, 3, 64, 64) of each prompt of a concept."""
    if row == "drawn":
        return [drawn(concept, prompt, args) for prompt in range(len(scenes.PROMPTS[concept]))]
    prompts = prompts_of(row, concept)
    shown = show_progress(prompts, len(prompts), f"{row}, prompts")
    return [images_of(prompt, args.count, args, loaded, words) for prompt in shown]


def images_of(
    prompt: str, count: int, args: Compare, loaded: Loaded, words: dict[str, Tensor]
) -> Tensor:
    """Images uint8 (count, 3, 64, 64) of a prompt, in which learned words may stand."""
    tokenizer = Tokenizer(loaded.net.length, {word: len(rows) for word, rows in words.items()})
    vectors = torch.cat(list(words.values())).to(loaded.device)
    empty = encode_prompts(loaded, tokenizer, [""], vectors)
    states = encode_prompts(loaded, tokenizer, [prompt], vectors).expand(count, -1, -1)
    sampling = Sampling(args.steps, args.guidance)
    images = sample(loaded.net, loaded.schedule, states, empty, args.seed, range(count), sampling)
    return to_uint8(images).cpu()


def draw_progress(concept: int, args: Compare, loaded: Loaded, words: dict[str, Tensor]) -> None:
    """Draw the prompts with the word after every so many steps, if its snapshots are there."""
    file = args.words.parent / str(concept) / "snapshots.safetensors"
    if not file.is_file():
        return
    word = f"<new{concept + 1}>"
    prompts = prompts_of("learned", concept)
    pictures = []
    rows = []
    snapshots = sorted(read_words(file, "--words").items())
    for name, vectors in show_progress(snapshots, len(snapshots), "snapshots"):
        rows.append(f"step {int(name.removeprefix('step_'))}")
        then = words | {word: vectors}
        pictures += [images_of(prompt, 2, args, loaded, then) for prompt in prompts]
    columns = [f"prompt {number}" for number in range(len(prompts)) for _ in range(2)]
    path = args.output_dir / f"progress_{NAMES[concept]}.png"
    save_labelled(torch.cat(pictures), path, rows, columns)


def prompts_of(row: str, concept: int) -> list[str]:
    """The prompts of a row."""
    prompts = scenes.PROMPTS[concept]
    if row == "learned":
        return [prompt.format(f"<new{concept + 1}>") for prompt in prompts]
    if concept == 0:
        what = scenes.CREATURE if row == "known word" else description()
        return [prompt.format(what) for prompt in prompts]
    if row == "known word":
        return [prompt.format(STYLES["small"]) for prompt in prompts]
    return [prompt.format("yellow and purple") for prompt in prompts]


def description() -> str:
    """The traits of the fixed creature in words of the captions."""
    creature = scenes.THE_CREATURE
    shape = f"{creature.body} {creature.coat} {creature.colour} creature"
    return f"{shape} with {creature.ears} ears with one eye"


def drawn(concept: int, prompt: int, args: Compare) -> Tensor:
    """Drawings of the concept in the scene that a prompt asks for."""
    images = []
    for k in range(args.count):
        rng = np.random.default_rng([args.seed, 10, concept, prompt, k])
        if concept == 0:
            scene = replace(scenes.THE_CREATURE, **CREATURE_SCENES[prompt])
        else:
            scene = scenes.random_scene(rng)
            while scene.subject == scenes.CREATURE:
                scene = scenes.random_scene(rng)
            scene = replace(scene, **scenes.THE_PRINT, **PRINT_SCENES[prompt])
        images.append(scenes.draw_scene(scene, rng))
    return to_pixels(np.stack(images))


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (n, height, width, 3) → uint8 (n, 3, height, width)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def save_pixels(pixels: Tensor, folder: Path) -> list[Path]:
    """Write images uint8 (n, 3, height, width); returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{k}.png" for k in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        save_image(image, path)
    return paths


def score(
    pixels: Sequence[Tensor], concept: int, clip: Clip, source_features: Tensor, folder: Path
) -> tuple[float, float]:
    """Image and text score by the grader's rule, the means over the prompts."""
    plain = scenes.input_json()[str(concept)]["prompt_4_clip_eval"]
    scores = []
    for number, some in enumerate(pixels):
        paths = save_pixels(some, folder / str(number))
        scores.append(best_five(*scores_of(clip, paths, source_features, plain[number])))
    means = np.mean(scores, axis=0)
    return float(means[0]), float(means[1])


def traits_shown(
    pixels: Tensor, concept: int, classifier: Any, device: torch.device
) -> dict[str, float]:
    """How many images are seen with each hidden trait of the concept, in %."""
    seen = see(classifier, pixels, device)
    if concept == 0:
        wanted = {trait: getattr(scenes.THE_CREATURE, trait) for trait in CREATURE_TRAITS}
    else:
        wanted = {trait: scenes.THE_PRINT[trait] for trait in PRINT_TRAITS}
    return {
        trait: 100 * hits(seen, trait, value).float().mean().item()
        for trait, value in wanted.items()
    }


if __name__ == "__main__":
    run_cli(Compare, main)
