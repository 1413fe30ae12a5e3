"""What is learned and drawn: the course's INPUT.json, templates, and files of learned words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from common.checkpoints import load_weights
from common.cli import UserError
from common.files import atomic_write
from common.json_files import read_json

Kind = Literal["object", "style"]

# Captions of the training images, in which {} is the new word. The small model has seen few words:
# those of the captions of preparation/synthetic/scenes.py.
SMALL_TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "object": (
        "a {}",
        "a picture of a {}",
        "a drawing of a {}",
        "a {} on a background",
        "a {} on a plain background",
    ),
    "style": (
        "a drawing in the style of {}",
        "a drawing on a background in the style of {}",
        "a picture of a drawing in the style of {}",
    ),
}
TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "object": (
        "a photo of a {}",
        "a photo of one {}",
        "a photo of the {}",
        "a photo of my {}",
        "a picture of a {}",
        "a picture of the {}",
        "a close view of a {}",
        "a bright photo of the {}",
        "a dark photo of the {}",
        "a good photo of a {}",
        "a cropped photo of the {}",
        "a {} in a photo",
        "a drawing of the {}",
        "the {} seen from near",
        "the {} seen from far",
    ),
    "style": (
        "a painting in the style of {}",
        "a picture in the style of {}",
        "a drawing in the style of {}",
        "the whole painting, in the style of {}",
        "a bright painting in the style of {}",
        "a dark painting in the style of {}",
        "a large painting in the style of {}",
        "a small painting in the style of {}",
        "a part of a painting in the style of {}",
        "art in the style of {}",
        "a scene in the style of {}",
    ),
}
NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")  # of a concept: it becomes the name of a folder
WORD = re.compile(r"[^\s/\\]{1,60}")
PLACEHOLDER = re.compile(r"<[^\s<>]+>")
LARGEST_SCORE = 1_000
LONGEST_TEXT = 1_000  # characters
MOST_CONCEPTS = 100
MOST_PROMPTS = 1_000


@dataclass(frozen=True)
class Concept:
    """One entry of INPUT.json."""

    name: str
    """Its key, such as "0": the folder of its images and of its results."""
    source: str
    """What its images show, in words (src_image)."""
    word: str
    """The word to learn, such as <new1> (token_name)."""
    prompts: tuple[str, ...]
    """Prompts with the word."""
    plain_prompts: tuple[str, ...]
    """The same prompts in known words, for the text score (prompt_4_clip_eval)."""
    baselines: tuple[tuple[float, float], ...]
    """Image score and text score to beat, for each prompt; empty if the file gives none."""

    @property
    def kind(self) -> Kind:
        """A style if all prompts ask for "the style of" it, otherwise an object."""
        phrase = f"style of {self.word}".lower()
        return "style" if all(phrase in prompt.lower() for prompt in self.prompts) else "object"


def read_concepts(path: Path) -> list[Concept]:
    """The concepts of INPUT.json, in the file's order.

    Raises UserError that names the file, the concept and the key for everything that is missing, of
    another type, or not safe as the name of a folder, and for a prompt without its word.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not 1 <= len(content) <= MOST_CONCEPTS:
        raise UserError(f'{path}: not of the form {{"0": {{"token_name": …}}, "1": …}}')
    concepts = [read_concept(path, name, entry) for name, entry in content.items()]
    words = [concept.word for concept in concepts]
    for word in words:
        if words.count(word) > 1:
            raise UserError(f"{path}: two concepts have the token_name {word}")
    for concept in concepts:
        for prompt in concept.prompts:
            for placeholder in PLACEHOLDER.findall(prompt):
                if placeholder not in words:
                    raise UserError(
                        f"{path}: concept {concept.name!r}: {placeholder} in the prompt "
                        f"{prompt[:60]!r} is the token_name of no concept"
                    )
    return concepts


def is_word(text: str) -> bool:
    """Whether a text can be a learned word: up to 60 characters without spaces and slashes."""
    return WORD.fullmatch(text) is not None


def read_concept(path: Path, name: str, entry: Any) -> Concept:
    """One entry of INPUT.json, checked."""
    where = f"{path}: concept {name!r}"
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: the name may only have letters, digits, - and _")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: is not an object with token_name, prompt, …")
    word = text_at(entry, "token_name", where)
    if not is_word(word):
        raise UserError(f"{where}: token_name {word!r} must be one word, such as <new1>")
    prompts = texts_at(entry, "prompt", where)
    for prompt in prompts:
        if word not in prompt:
            raise UserError(f"{where}: the prompt {prompt!r} does not have the word {word}")
    plain_prompts: tuple[str, ...] = ()
    if "prompt_4_clip_eval" in entry:
        plain_prompts = texts_at(entry, "prompt_4_clip_eval", where)
        if len(plain_prompts) != len(prompts):
            raise UserError(f"{where}: prompt_4_clip_eval has not as many entries as prompt")
    return Concept(
        name=name,
        source=text_at(entry, "src_image", where) if "src_image" in entry else "",
        word=word,
        prompts=prompts,
        plain_prompts=plain_prompts,
        baselines=baselines_at(entry, len(prompts), where),
    )


def text_at(entry: dict[str, Any], key: str, where: str) -> str:
    """A text that is not empty. Raises UserError for anything else."""
    if key not in entry:
        raise UserError(f"{where}: has no {key}")
    text = entry[key]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {key} is not a text: {str(text)[:60]}")
    return text


def texts_at(entry: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of texts. Raises UserError for anything else, such as one text alone."""
    if key not in entry:
        raise UserError(f"{where}: has no {key}")
    texts = entry[key]
    if not isinstance(texts, list) or not 1 <= len(texts) <= MOST_PROMPTS:
        raise UserError(f"{where}: {key} is not a list of texts")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: {key} has an entry that is not a text: {str(text)[:60]}")
        if len(text) > LONGEST_TEXT:
            raise UserError(f"{where}: {key} has an entry of more than {LONGEST_TEXT:,} characters")
    return tuple(texts)


def baselines_at(
    entry: dict[str, Any], prompts: int, where: str
) -> tuple[tuple[float, float], ...]:
    """The pairs of scores to beat, one for each prompt; empty if there are none."""
    pairs = entry.get("baseline", [])
    if pairs == []:
        return ()
    if not isinstance(pairs, list) or len(pairs) != prompts:
        raise UserError(f"{where}: baseline needs one pair of scores for each prompt")
    scores = []
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(is_score(score) for score in pair):
            raise UserError(f"{where}: baseline has an entry that is not [image, text]: {pair}")
        scores.append((float(pair[0]), float(pair[1])))
    return tuple(scores)


def templates_of(kind: Kind, model: str) -> tuple[str, ...]:
    """Captions for a kind of word, in words that the model ("stable-diffusion", "small") knows."""
    return (SMALL_TEMPLATES if model == "small" else TEMPLATES)[kind]


def is_score(value: Any) -> bool:
    """Whether a value of INPUT.json is a number that a score can reach."""
    return type(value) in (int, float) and abs(value) <= LARGEST_SCORE


# Learned words


def save_words(path: Path, words: Mapping[str, Tensor]) -> None:
    """Write {word: (vectors, width)} as .safetensors, which diffusers and web interfaces read."""
    content = {word: rows.detach().float().cpu().contiguous() for word, rows in words.items()}
    atomic_write(path, lambda file: safetensors.torch.save_file(content, file))


def read_words(path: Path, flag: str = "--embeddings") -> dict[str, Tensor]:
    """The learned words of a file: {word: (vectors, width)}, float32.

    The file is ours, one of diffusers' ({word: (width,) or (vectors, width)}, .safetensors or
    .bin), or one of a web interface, which has one word and calls it emb_params or *. Such a word
    gets the name of the file in angle brackets, with - for spaces. Raises UserError that names the
    file.
    """
    words = {}
    for key, rows in load_weights(path, flag)[0].items():
        name = key.removeprefix("string_to_param.")
        word = f"<{'-'.join(path.stem.split())}>" if name in ("emb_params", "*") else name
        is_plain = rows.layout == torch.strided and rows.device.type == "cpu"
        if not is_plain or not rows.is_floating_point() or rows.ndim not in (1, 2):
            raise UserError(f"{flag} {path}: {key!r} is not the embedding of a word")
        rows = rows.detach().float()
        if rows.ndim == 1:
            rows = rows[None]
        if not is_word(word) or not 1 <= len(rows) <= 75:
            raise UserError(f"{flag} {path}: {key!r} is not the embedding of a word")
        if not rows.isfinite().all():
            raise UserError(f"{flag} {path}: {key!r} has values that are not finite")
        words[word] = rows
    return words
