"""Scores of textual inversion, as the course's grader computes them with CLIP ViT-B/32.

The image score of a drawing is 100 times the mean cosine of its CLIP features with those of the
concept's images. The text score is 100 times the cosine with the features of the prompt in known
words. Of the 25 drawings of a prompt, the five with the highest image + 2.5 text score count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.cli import UserError
from common.data import decode_image, list_images
from common.processes import gather_shares, my_share
from common.progress import show_progress
from inversion.concepts import Concept
from zeroshot.loading import Clip

if TYPE_CHECKING:
    from accelerate import Accelerator

COUNTED = {".png", ".jpg", ".jpeg", ".bmp", ".gif"}  # the grader reads all of these
BEST = 5
TEXT_WEIGHT = 2.5


@dataclass(frozen=True)
class PromptScore:
    """The scores of one prompt's drawings."""

    concept: str
    """Key of the concept in INPUT.json."""
    prompt: str
    """The prompt in known words."""
    image: float
    """Image score of the five best drawings."""
    text: float
    """Text score of the same five."""
    all_image: float
    """Image score of all drawings."""
    all_text: float
    """Text score of all drawings."""
    baseline: tuple[float, float] | None
    """The image and the text score to beat."""

    @property
    def passes(self) -> bool | None:
        """Whether both scores reach the baseline; None if there is none."""
        if self.baseline is None:
            return None
        return self.image >= self.baseline[0] and self.text >= self.baseline[1]


def best_five(image_scores: np.ndarray, text_scores: np.ndarray) -> tuple[float, float]:
    """The mean image and text scores of the five drawings with the highest image + 2.5 text."""
    order = np.argsort(-(image_scores + TEXT_WEIGHT * text_scores), kind="stable")
    best = order[:BEST]
    return float(image_scores[best].mean()), float(text_scores[best].mean())


def score_concepts(
    out: Path,
    concepts: Sequence[Concept],
    sources: Path,
    clip: Clip,
    count: int,
    accelerator: Accelerator | None = None,
) -> list[PromptScore]:
    """The scores of OUT/<concept>/<prompt>/, with the concepts' images in SOURCES/<concept>/.

    The processes of `accelerator` share the images, and each gets all scores. Raises UserError for
    a folder that has not exactly `count` images, for broken images, and for a concept whose prompts
    are not given in known words.
    """
    folders = {}
    for concept in concepts:
        if not concept.plain_prompts:
            raise UserError(
                f"concept {concept.name!r}: INPUT.json needs its prompts in known words "
                "(prompt_4_clip_eval) for the text score"
            )
        for number, _ in enumerate(concept.plain_prompts):
            folder = out / concept.name / str(number)
            folders[concept.name, number] = drawings_in(folder, count)
    scores = []
    for concept in concepts:
        source_features = image_features(clip, list_images(sources / concept.name), accelerator)
        for number, prompt in enumerate(concept.plain_prompts):
            paths = folders[concept.name, number]
            image_scores, text_scores = scores_of(clip, paths, source_features, prompt, accelerator)
            image, text = best_five(image_scores, text_scores)
            scores.append(
                PromptScore(
                    concept=concept.name,
                    prompt=prompt,
                    image=image,
                    text=text,
                    all_image=float(image_scores.mean()),
                    all_text=float(text_scores.mean()),
                    baseline=concept.baselines[number] if concept.baselines else None,
                )
            )
    return scores


def scores_of(
    clip: Clip,
    paths: Sequence[Path],
    source_features: Tensor,
    prompt: str,
    accelerator: Accelerator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Image scores and text scores (n,) of drawings.

    `source_features` are the unit vectors (m, features) of the concept's images.
    """
    features = image_features(clip, paths, accelerator)
    image_scores = 100 * (features @ source_features.T).mean(1)
    text_scores = 100 * (features @ text_features(clip, prompt))
    return image_scores.numpy(), text_scores.numpy()


def drawings_in(folder: Path, count: int) -> list[Path]:
    """The drawings in a folder. Raises UserError unless there are exactly `count`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in COUNTED)
    if len(paths) != count:
        raise UserError(f"{folder}: holds {len(paths)} images; the grader wants exactly {count}")
    return paths


@torch.inference_mode()
def image_features(
    clip: Clip, paths: Sequence[Path], accelerator: Accelerator | None = None
) -> Tensor:
    """Unit vectors (n, features) of image files; the processes of `accelerator` share them."""
    device = next(clip.net.parameters()).device
    features = []
    mine = my_share(paths, accelerator)
    what = f"{paths[0].parent}, images"
    for path in show_progress(mine, len(mine), what):
        pixels = decode_image(path).transpose(1, 2, 0)  # (height, width, 3)
        image = clip.preprocess(Image.fromarray(pixels))[None].to(device)
        features.append(clip.net.encode_image(image).float().cpu())
    return F.normalize(torch.cat(gather_shares(features, accelerator)), dim=1)


@torch.inference_mode()
def text_features(clip: Clip, text: str) -> Tensor:
    """The unit vector (features,) of a text."""
    device = next(clip.net.parameters()).device
    features = clip.net.encode_text(clip.tokenizer([text]).to(device)).float().cpu()
    return F.normalize(features, dim=1)[0]


def table_of_scores(scores: Sequence[PromptScore]) -> list[list[str]]:
    """The scores as a table."""
    rows = [["concept", "prompt", "image, 5 best", "text, 5 best", "image", "text", "to beat", ""]]
    for score in scores:
        to_beat = ""
        verdict = ""
        if score.baseline is not None:
            to_beat = f"{score.baseline[0]:g} / {score.baseline[1]:g}"
            verdict = "passes" if score.passes else "fails"
        values = (score.image, score.text, score.all_image, score.all_text)
        numbers = [f"{value:.2f}" for value in values]
        rows.append([score.concept, score.prompt, *numbers, to_beat, verdict])
    return rows


def summary(scores: Sequence[PromptScore]) -> dict[str, Any]:
    """Means over the prompts, and how many pass."""
    passed = [score.passes for score in scores if score.passes is not None]
    return {
        "image": float(np.mean([score.image for score in scores])),
        "text": float(np.mean([score.text for score in scores])),
        "passed": sum(passed),
        "with_baseline": len(passed),
        "prompts": len(scores),
    }
