"""What a drawn face looks like: the numbers it is painted from, and the attributes that follow.

The attributes are ten of CelebA's forty (Liu et al., 2015, https://arxiv.org/abs/1411.7766).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ATTRIBUTES = (  # in CelebA's order
    "Bald",
    "Black_Hair",
    "Blond_Hair",
    "Brown_Hair",
    "Eyeglasses",
    "Male",
    "Mustache",
    "No_Beard",
    "Smiling",
    "Young",
)
# Colours are RGB in 0–1. A pair is the darkest and the lightest of a kind.
HAIR_COLOURS = {
    "black": ((0.07, 0.06, 0.06), (0.16, 0.12, 0.11)),
    "brown": ((0.22, 0.13, 0.07), (0.40, 0.25, 0.15)),
    "blond": ((0.66, 0.50, 0.27), (0.90, 0.76, 0.50)),
    "red": ((0.42, 0.16, 0.07), (0.60, 0.28, 0.12)),
    "grey": ((0.48, 0.47, 0.46), (0.78, 0.77, 0.76)),
}
HAIR_SHARES_OF_YOUNG = (0.36, 0.32, 0.26, 0.06, 0.0)
HAIR_SHARES_OF_OLD = (0.2, 0.2, 0.15, 0.03, 0.42)
SKIN_TONES = np.array(  # from light to dark
    [
        (0.96, 0.81, 0.72),
        (0.91, 0.72, 0.60),
        (0.82, 0.61, 0.48),
        (0.64, 0.44, 0.32),
        (0.45, 0.29, 0.21),
    ]
)
BROWN_EYES = ((0.16, 0.09, 0.05), (0.3, 0.19, 0.1))
LIGHT_EYES = ((0.25, 0.38, 0.5), (0.35, 0.45, 0.33))
LIPS = ((0.88, 0.66, 0.64), (0.95, 0.78, 0.78))  # factors of the skin's colour
LIPSTICK = ((0.62, 0.12, 0.18), (0.85, 0.33, 0.38))


@dataclass
class Look:
    """What a face looks like. Lengths are pixels of the 64x64 picture, colours RGB in 0–1."""

    male: bool
    young: bool
    hair: str  # a key of HAIR_COLOURS, or "bald"
    cut: str  # "short", "long" or "bob"
    fringe: float  # 0 none … 1 down to the brows
    parting: float  # -1 left … 1 right
    glasses: str  # "none", "clear" or "dark"
    beard: float  # 0 shaven … 1 full
    moustache: float  # 0 shaven … 1 full
    smile: float  # -0.3 … 1
    mouth_open: float  # 0 … 1
    skin: np.ndarray
    hair_colour: np.ndarray
    eye_colour: np.ndarray
    lip_colour: np.ndarray
    width: float  # half width of the face
    jaw: float  # exponent of the lower contour: 1.6 pointed … 2.5 square
    yaw: float  # sideways shift of the features
    roll: float  # radians
    scale: float
    shift: tuple[float, float]
    light: tuple[float, float]  # direction the light comes from, x and y


def between(rng: np.random.Generator, pair: tuple[Sequence[float], Sequence[float]]) -> np.ndarray:
    """A random colour between two: one draw, which weights all three channels."""
    low, high = np.asarray(pair[0]), np.asarray(pair[1])
    return low + rng.random() * (high - low)


def random_hair(rng: np.random.Generator, male: bool, young: bool) -> str:
    """A key of HAIR_COLOURS, or "bald"."""
    shares = HAIR_SHARES_OF_YOUNG if young else HAIR_SHARES_OF_OLD
    hair = str(rng.choice(list(HAIR_COLOURS), p=shares))
    if male:
        bald = rng.random() < (0.08 if young else 0.3)
        if bald:
            return "bald"
    return hair


def random_cut(rng: np.random.Generator, male: bool) -> str:
    """The haircut: nearly always short for men."""
    if male and rng.random() < 0.9:
        return "short"
    return str(rng.choice(["long", "bob", "short"], p=[0.6, 0.25, 0.15]))


def skin_of(tone: float) -> np.ndarray:
    """The colour at a place of SKIN_TONES: 1.5 is halfway between numbers 1 and 2."""
    lighter = SKIN_TONES[int(tone)]
    darker = SKIN_TONES[int(tone) + 1]
    return lighter + (tone % 1) * (darker - lighter)


def random_glasses(rng: np.random.Generator) -> str:
    """Clear glasses for 15 %, dark ones for 3 %."""
    draw = rng.random()
    if draw <= 0.82:
        return "none"
    if draw <= 0.97:
        return "clear"
    return "dark"


def random_lips(rng: np.random.Generator, skin: np.ndarray, male: bool) -> np.ndarray:
    """The colour of the lips; half of the women wear lipstick."""
    lips = skin * between(rng, LIPS)
    if not male and rng.random() < 0.5:
        lips = 0.35 * lips + 0.65 * between(rng, LIPSTICK)
    return lips


def random_moustache(rng: np.random.Generator, moustached: bool, bearded: bool) -> float:
    """How full the moustache is: 0 without one; half of the bearded have one too."""
    if moustached or (bearded and rng.random() < 0.5):
        return rng.uniform(0.6, 1)
    return 0.0


def random_mouth_open(rng: np.random.Generator, smiling: bool) -> float:
    """How open the mouth is: mostly closed, unless it smiles."""
    if rng.random() < (0.75 if smiling else 0.12):
        return rng.uniform(0.2, 1)
    return 0.0


def random_look(rng: np.random.Generator) -> Look:
    """Draw the numbers of one face.

    The frequencies are near CelebA's, with rare attributes made less rare. The order of the draws
    is part of the result; Python evaluates the arguments of Look from top to bottom.
    """
    male = rng.random() < 0.45
    young = rng.random() < 0.7
    hair = random_hair(rng, male, young)
    bearded = male and rng.random() < 0.3
    moustached = male and rng.random() < 0.2
    tone = rng.random() ** 1.4 * (len(SKIN_TONES) - 1.01)
    skin = skin_of(tone)
    if hair in ("blond", "red") and tone > 2.2:
        hair = "black"
    smiling = rng.random() < 0.5
    brown_eyes = tone > 1.6 or rng.random() < 0.5
    glasses = random_glasses(rng)
    lip_colour = random_lips(rng, skin, male)
    return Look(
        male=male,
        young=young,
        hair=hair,
        cut=random_cut(rng, male),
        fringe=float(rng.random() * rng.random() * (0.7 if male else 1.0)),
        parting=rng.uniform(-1, 1),
        glasses=glasses,
        beard=rng.uniform(0.5, 1) if bearded else 0.0,
        moustache=random_moustache(rng, moustached, bearded),
        smile=rng.uniform(0.55, 1) if smiling else rng.uniform(-0.25, 0.1),
        mouth_open=random_mouth_open(rng, smiling),
        skin=skin * rng.uniform(0.94, 1.04),
        hair_colour=skin if hair == "bald" else between(rng, HAIR_COLOURS[hair]),
        eye_colour=between(rng, BROWN_EYES if brown_eyes else LIGHT_EYES),
        lip_colour=lip_colour,
        width=rng.uniform(18.2, 20.4) + (0.6 if male else -0.3),
        jaw=rng.uniform(1.85, 2.5) if male else rng.uniform(1.55, 2.0),
        yaw=rng.normal(0, 2.2),
        roll=rng.normal(0, 0.09),
        scale=rng.uniform(0.98, 1.12),
        shift=(rng.normal(0, 1.0), rng.normal(0, 0.8)),
        light=(rng.normal(0, 0.55), rng.uniform(-0.7, -0.05)),
    )


def attributes(look: Look) -> tuple[int, ...]:
    """The ten ATTRIBUTES of a look as CelebA writes them, 1 or -1.

    As in CelebA, No_Beard is -1 with any facial hair.
    """
    is_true = {
        "Bald": look.hair == "bald",
        "Black_Hair": look.hair == "black",
        "Blond_Hair": look.hair == "blond",
        "Brown_Hair": look.hair == "brown",
        "Eyeglasses": look.glasses != "none",
        "Male": look.male,
        "Mustache": look.moustache > 0,
        "No_Beard": look.beard == 0 and look.moustache == 0,
        "Smiling": look.smile > 0.3,
        "Young": look.young,
    }
    return tuple(1 if is_true[name] else -1 for name in ATTRIBUTES)
