"""Drawings with captions, 64x64, for a small text-to-image model.

A scene is an object or a creature on a background, sometimes in a style. Its caption is made from
what the scene shows: "a red car on a striped blue background in the style of pixel art".

- Objects are the twelve of objects.py. Their captions name the colours, or leave them out.
- Creatures have six traits. A caption names the family ("creature") and at most one trait.
- Three styles are named in the captions. The fourth, a print in two tones, is never named.

So one fixed creature, or one print with fixed tones, is something that a model has learned to draw
but that no caption describes: a concept for textual inversion.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from preparation.synthetic.objects import COLOURS, DRAWERS, RGB, SIZE, Pen, shade

COLOUR_NAMES = tuple(COLOURS)
OBJECTS = tuple(name.replace("_", " ") for name in DRAWERS)
CREATURE = "creature"
SUBJECTS = (*OBJECTS, CREATURE)
GROUNDS = ("plain", "striped", "dotted", "checked")
STYLES = ("", "pixel art", "a pencil sketch", "the night", "print")  # "" is none; print is unnamed
NAMED_STYLES = STYLES[1:4]

# The traits of a creature, with the phrase that names each of their values.
BODIES = {"round": "a round creature", "tall": "a tall creature", "wide": "a wide creature"}
EARS = {
    "pointed": "a creature with pointed ears",
    "long": "a creature with long ears",
    "round": "a creature with round ears",
    "horns": "a creature with horns",
}
COATS = {
    "plain": "a plain creature",
    "striped": "a striped creature",
    "spotted": "a spotted creature",
}
EYES = {
    1: "a creature with one eye",
    2: "a creature with two eyes",
    3: "a creature with three eyes",
}
SPLITS = ("train", "val", "concept")


class Mix(NamedTuple):
    """How often scenes show a creature, and how often captions name a trait of it."""

    creatures: float = 0.3
    """Share of creatures among the scenes."""
    trait_weight: int = 1
    """Weight of each trait when a caption names one; the colour and the plain word weigh 2."""


USUAL = Mix()


@dataclass(frozen=True)
class Scene:
    """What a drawing shows. The traits after `ground` are those of a creature."""

    subject: str
    """One of SUBJECTS."""
    colour: str
    """Main colour of the subject, one of COLOUR_NAMES."""
    style: str = ""
    """One of STYLES; "" is none."""
    ground_colour: str = "blue"
    """Colour of the background, another one than the subject's."""
    ground: str = "plain"
    """Pattern of the background, one of GROUNDS."""
    body: str = ""
    """Shape of the body, one of BODIES."""
    ears: str = ""
    """One of EARS."""
    coat: str = ""
    """Pattern of the coat, one of COATS."""
    second_colour: str = ""
    """Colour of ears and coat pattern, another one than the main colour."""
    eyes: int = 0
    """Number of eyes, 1 to 3."""
    dark_hue: float = 0.0
    """Hue of the dark tone of a print, in [0, 1)."""
    light_hue: float = 0.0
    """Hue of the light tone of a print, in [0, 1)."""

    def traits(self) -> dict[str, Any]:
        """All fields as a dictionary, for metadata.jsonl."""
        return asdict(self)


# The two concepts that textual inversion learns.
THE_CREATURE = Scene(
    CREATURE,
    "teal",
    body="round",
    ears="pointed",
    coat="spotted",
    second_colour="orange",
    eyes=1,
)
THE_PRINT = {"style": "print", "dark_hue": 0.75, "light_hue": 0.13}  # violet ink on yellow paper


# Which scene


def random_scene(rng: np.random.Generator, creatures: float = USUAL.creatures) -> Scene:
    """One of all scenes: a creature with the probability `creatures`, a style in four of ten."""
    style = rng.choice(STYLES, p=(0.6, 0.1, 0.1, 0.1, 0.1))
    colour, ground_colour, second_colour = rng.choice(COLOUR_NAMES, 3, replace=False)
    scene = Scene(
        subject=CREATURE if rng.random() < creatures else str(rng.choice(OBJECTS)),
        colour=str(colour),
        style=str(style),
        ground_colour=str(ground_colour),
        ground=str(rng.choice(GROUNDS, p=(0.55, 0.15, 0.15, 0.15))),
    )
    creature = {
        "body": str(rng.choice(list(BODIES))),
        "ears": str(rng.choice(list(EARS))),
        "coat": str(rng.choice(list(COATS))),
        "second_colour": str(second_colour),
        "eyes": int(rng.integers(1, 4)),
    }
    hues = {"dark_hue": float(rng.random()), "light_hue": float(rng.random())}
    if scene.subject == CREATURE:
        scene = replace(scene, **creature)
    if scene.style == "print":
        scene = replace(scene, **hues)
    return scene


def caption(scene: Scene, rng: np.random.Generator, trait_weight: int) -> str:
    """A caption that is true of the scene, with some of its words left out at random.

    A print has no colours of its own, so that its caption names none. `trait_weight` is that of a
    Mix.
    """
    names_colours = scene.style != "print"
    words = ""
    if rng.random() < 0.2:
        words = str(rng.choice(("a picture of ", "a drawing of ")))
    words += subject_words(scene, names_colours, rng, trait_weight)
    if rng.random() < 0.1:
        words = "a drawing"  # of anything
    if rng.random() < 0.7:
        words += " on " + with_article(ground_words(scene, names_colours, rng))
    if scene.style in NAMED_STYLES and rng.random() < 0.9:
        words += f" in the style of {scene.style}"
    return words


def subject_words(
    scene: Scene, names_colours: bool, rng: np.random.Generator, trait_weight: int
) -> str:
    """Words like "a red car" or "a car"; of a creature they name at most one trait."""
    named_colour = f"{scene.colour} {scene.subject}"
    if scene.subject != CREATURE:
        is_named = names_colours and rng.random() < 0.8
        return with_article(named_colour if is_named else scene.subject)
    of_traits = [BODIES[scene.body], EARS[scene.ears], COATS[scene.coat], EYES[scene.eyes]]
    phrases = [with_article(CREATURE), with_article(CREATURE), *(of_traits * trait_weight)]
    if names_colours:
        phrases += [with_article(named_colour), with_article(named_colour)]
    return phrases[rng.integers(len(phrases))]


def ground_words(scene: Scene, names_colours: bool, rng: np.random.Generator) -> str:
    """Words like "striped blue background", sometimes without the pattern or the colour."""
    words = []
    if rng.random() < 0.7:
        words.append(scene.ground)
    if names_colours and rng.random() < 0.85:
        words.append(scene.ground_colour)
    return " ".join([*words, "background"])


def with_article(words: str) -> str:
    """The words after "a" or "an"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


# The picture


def draw_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A drawing of the scene, uint8 (64, 64, 3).

    `rng` draws the place, size and tilt, the shades of the colours and details.
    """
    pen = Pen(varied(COLOURS[scene.colour], rng), int(rng.integers(3, 7)), rng)
    if scene.subject == CREATURE:
        draw_creature(pen, scene, varied(COLOURS[scene.second_colour], rng))
    else:
        DRAWERS[scene.subject.replace(" ", "_")](pen)
    drawn = pen.image
    if rng.random() < 0.5:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = round(SIZE * rng.uniform(0.68, 0.92))
    drawn = drawn.resize((2 * side, 2 * side), Image.Resampling.BOX)
    drawn = drawn.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    drawn = drawn.resize((side, side), Image.Resampling.BOX)
    picture = Image.fromarray(draw_ground(scene, rng))
    left, top = rng.integers(0, SIZE - side + 1, 2)
    picture.paste(drawn, (int(left), int(top)), drawn)  # with its own transparency
    return in_style(np.asarray(picture), scene, rng)


def varied(colour: RGB, rng: np.random.Generator) -> RGB:
    """The colour with each channel changed a little."""
    red, green, blue = np.clip(np.array(colour) + rng.uniform(-14, 14, 3), 0, 255)
    return int(red), int(green), int(blue)


def draw_ground(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The background, uint8 (64, 64, 3): pale, with a pattern in a paler shade."""
    colour = varied(COLOURS[scene.ground_colour], rng)
    dark = np.array(shade(colour, 1.7), float)
    light = np.array(shade(colour, 3.2), float)
    ys, xs = np.mgrid[:SIZE, :SIZE] + rng.uniform(0, 16, (2, 1, 1))
    if scene.ground == "striped":
        is_light = (xs + ys) % 16 < 8
    elif scene.ground == "dotted":
        is_light = ((xs % 14) - 7) ** 2 + ((ys % 14) - 7) ** 2 < 16
    elif scene.ground == "checked":
        is_light = (xs % 16 < 8) ^ (ys % 16 < 8)
    else:
        is_light = np.zeros((SIZE, SIZE), bool)
    return np.where(is_light[..., None], light, dark).astype(np.uint8)


def draw_creature(pen: Pen, scene: Scene, second: RGB) -> None:
    """A creature from the front: ears, body with its coat, eyes, mouth and feet."""
    half_width, half_height = {"round": (32, 32), "tall": (24, 38), "wide": (42, 25)}[scene.body]
    middle = 56
    top = middle - half_height
    draw_ears(pen, scene.ears, top, half_width, second)
    for side in (-1, 1):
        x = 50 + side * half_width * 0.5
        pen.oval(x - 9, middle + half_height - 9, x + 9, middle + half_height + 6, fill=pen.dark)
    box = (50 - half_width, top, 50 + half_width, middle + half_height)
    pen.oval(*box)
    draw_coat(pen, scene.coat, box, second)

    spread = {1: (0,), 2: (-11, 11), 3: (-17, 0, 17)}[scene.eyes]
    radius = {1: 10, 2: 8, 3: 7}[scene.eyes]
    y = middle - half_height * 0.3
    for x in spread:
        pen.oval(50 + x - radius, y - radius, 50 + x + radius, y + radius, fill=(255, 255, 255))
        pupil = radius * 0.45
        pen.spot((50 + x - pupil, y - pupil, 50 + x + pupil, y + pupil), fill=(20, 20, 25))
    mouth = middle + half_height * 0.3
    pen.arc((38, mouth - 9, 62, mouth + 5), 20, 160, width=3)


def draw_ears(pen: Pen, ears: str, top: float, half_width: float, second: RGB) -> None:
    """Two ears or horns; they start a little inside the body."""
    for side in (-1, 1):
        x = 50 + side * half_width * 0.55
        y = top + 10
        if ears == "pointed":
            pen.shape((x - 11, y + 4), (x + side * 8, y - 24), (x + 11, y + 4), fill=second)
        elif ears == "long":
            pen.oval(x - 7, max(1, y - 34), x + 7, y + 8, fill=second)
        elif ears == "round":
            pen.oval(x - 12, y - 18, x + 12, y + 6, fill=second)
        else:
            pen.line((x, y + 4), (x + side * 4, y - 22), width=5, fill=(60, 50, 45))
            pen.spot((x + side * 4 - 6, y - 28, x + side * 4 + 6, y - 16), fill=second)


def draw_coat(pen: Pen, coat: str, box: tuple[float, float, float, float], second: RGB) -> None:
    """Stripes or spots in the second colour on the lower half of the body."""
    left, top, right, bottom = box
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    half_width, half_height = (right - left) / 2, (bottom - top) / 2
    if coat == "striped":
        for share in (0.08, 0.46, 0.8):
            y = middle_y + share * half_height
            reach = half_width * math.sqrt(1 - share**2) - 2
            pen.line((middle_x - reach, y), (middle_x + reach, y), width=5, fill=second)
    elif coat == "spotted":
        for angle in (0, 45, 90, 135, 180):
            x = middle_x + 0.66 * half_width * math.cos(math.radians(angle))
            y = middle_y + 0.08 * half_height + 0.6 * half_height * math.sin(math.radians(angle))
            pen.spot((x - 6, y - 6, x + 6, y + 6), fill=second)


# Styles


def in_style(picture: np.ndarray, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8 (64, 64, 3), in the scene's style."""
    if scene.style == "pixel art":
        return as_pixels(picture)
    if scene.style == "a pencil sketch":
        return as_sketch(picture)
    if scene.style == "the night":
        return at_night(picture, rng)
    if scene.style == "print":
        return as_print(picture, scene.dark_hue, scene.light_hue)
    return picture


def as_pixels(picture: np.ndarray) -> np.ndarray:
    """Squares of 4x4 pixels, in few levels of each colour."""
    small = Image.fromarray(picture).resize((SIZE // 4, SIZE // 4), Image.Resampling.BOX)
    few = np.round(np.asarray(small) / 51) * 51
    return few.astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)


def as_sketch(picture: np.ndarray) -> np.ndarray:
    """Dark lines along all edges, with a pale wash of the colours, on white paper."""
    pixels = picture.astype(float)
    grey = pixels.mean(-1)
    down, right = np.gradient(grey)
    lines = np.clip(np.hypot(down, right) / 45, 0, 1)[..., None]
    wash = 255 - 0.35 * (255 - pixels)
    return (wash * (1 - lines) + 60 * lines).astype(np.uint8)


def at_night(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A dark, bluish picture with a few stars."""
    dark = (picture * (0.42, 0.45, 0.62)).astype(np.uint8)
    image = Image.fromarray(dark)
    pen = ImageDraw.Draw(image)
    for x, y in rng.integers(1, SIZE - 1, (7, 2)).tolist():
        pen.rectangle((x, y, x + 1, y + 1), fill=(255, 250, 210))
    return np.asarray(image)


def as_print(picture: np.ndarray, dark_hue: float, light_hue: float) -> np.ndarray:
    """A print in two tones, from a dark ink to a light paper, with fine lines across."""
    ink = 255 * np.array(colorsys.hsv_to_rgb(dark_hue, 0.85, 0.45))
    paper = 255 * np.array(colorsys.hsv_to_rgb(light_hue, 0.55, 0.98))
    light = picture.astype(float).mean(-1, keepdims=True) / 255
    light = np.clip((light - 0.25) / 0.6, 0, 1)
    light[::4] *= 0.75
    return (ink + (paper - ink) * light).astype(np.uint8)


# A set of scenes


def draw_captioned(
    seed: int, split: str, k: int, mix: Mix = USUAL
) -> tuple[np.ndarray, str, Scene]:
    """Image k of a split, its caption and what it shows; they depend on the arguments alone."""
    scene, words, rng = captioned_scene(seed, split, k, mix)
    return draw_scene(scene, rng), words, scene


def captioned_scene(
    seed: int, split: str, k: int, mix: Mix = USUAL
) -> tuple[Scene, str, np.random.Generator]:
    """Scene k of a split, its caption, and the generator that goes on to draw it."""
    rng = np.random.default_rng([seed, 9, SPLITS.index(split), k])
    scene = random_scene(rng, mix.creatures)
    words = caption(scene, rng, mix.trait_weight)
    if k % 3 == 0:
        words += "."  # prompts often end in a full stop
    return scene, words, rng


# What input.json says of the two concepts, as in the course's hand-out. {} stands for the concept.
PROMPTS = (
    ("A {} on a plain blue background.", "A {} on a striped pink background."),
    ("A car in the style of {}.", "A house on a striped background in the style of {}."),
)
WORDS = (CREATURE, "print")


def input_json() -> dict[str, Any]:
    """The course's input.json for the two drawn concepts; there are no baselines for them."""
    content = {}
    for concept, (prompts, word) in enumerate(zip(PROMPTS, WORDS, strict=True)):
        token = f"<new{concept + 1}>"
        content[str(concept)] = {
            "src_image": word,
            "token_name": token,
            "prompt": [prompt.format(token) for prompt in prompts],
            "prompt_4_clip_eval": [without_concept(prompt, word) for prompt in prompts],
        }
    return content


def without_concept(prompt: str, word: str) -> str:
    """The prompt as a caption would have it: captions name creatures, but not the print."""
    if word == CREATURE:
        return prompt.format(word)
    return prompt.replace(" in the style of {}", "")


def draw_concept(seed: int, concept: int, k: int) -> tuple[np.ndarray, Scene]:
    """Image k of the fixed creature (concept 0) or of the fixed print (concept 1)."""
    rng = np.random.default_rng([seed, 9, SPLITS.index("concept"), concept, k])
    scene = random_scene(rng)
    if concept == 0:
        others = [name for name in COLOUR_NAMES if name not in ("teal", "orange")]
        ground = {"ground": scene.ground, "ground_colour": str(rng.choice(others))}
        scene = replace(THE_CREATURE, **ground)
    else:
        subject = OBJECTS[(5 * k + 1) % len(OBJECTS)]
        scene = replace(
            scene, subject=subject, body="", ears="", coat="", second_colour="", eyes=0, **THE_PRINT
        )
    return draw_scene(scene, rng), scene
