"""What a drawn face looks like: the numbers it is painted from, and the CelebA attributes that follow from them.

Attributes as in CelebA (Liu et al. 2015, https://arxiv.org/abs/1411.7766), ten of its forty.
"""

from dataclasses import dataclass

import numpy as np

ATTRIBUTES = (  # ten of CelebA's forty, in CelebA's order
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
HAIR_COLOURS = {
    "black": ((0.07, 0.06, 0.06), (0.16, 0.12, 0.11)),
    "brown": ((0.22, 0.13, 0.07), (0.40, 0.25, 0.15)),
    "blond": ((0.66, 0.50, 0.27), (0.90, 0.76, 0.50)),
    "red": ((0.42, 0.16, 0.07), (0.60, 0.28, 0.12)),
    "grey": ((0.48, 0.47, 0.46), (0.78, 0.77, 0.76)),
}
SKIN_TONES = np.array(
    [(0.96, 0.81, 0.72), (0.91, 0.72, 0.60), (0.82, 0.61, 0.48), (0.64, 0.44, 0.32), (0.45, 0.29, 0.21)]
)
BROWN_EYES, LIGHT_EYES = ((0.16, 0.09, 0.05), (0.3, 0.19, 0.1)), ((0.25, 0.38, 0.5), (0.35, 0.45, 0.33))


@dataclass
class Look:
    """What a face looks like. Lengths are in pixels of the 64x64 picture, colours are RGB in 0–1."""

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


def between(rng: np.random.Generator, low, high):
    """One uniform draw; per component for a pair of colours, with one weight for all three channels."""
    return np.asarray(low) + rng.random() * (np.asarray(high) - np.asarray(low))


def random_look(rng: np.random.Generator) -> Look:
    """Draw the parameters of one face; the frequencies are near CelebA's, with rare attributes made less rare."""
    male, young = rng.random() < 0.45, rng.random() < 0.7
    shares = [0.36, 0.32, 0.26, 0.06, 0.0] if young else [0.2, 0.2, 0.15, 0.03, 0.42]
    hair = str(rng.choice(list(HAIR_COLOURS), p=shares))
    if male and rng.random() < (0.08 if young else 0.3):
        hair = "bald"
    bearded, moustached = male and rng.random() < 0.3, male and rng.random() < 0.2
    tone = rng.random() ** 1.4 * (len(SKIN_TONES) - 1.01)
    skin = SKIN_TONES[int(tone)] + (tone % 1) * (SKIN_TONES[int(tone) + 1] - SKIN_TONES[int(tone)])
    if hair in ("blond", "red") and tone > 2.2:
        hair = "black"
    smiling = rng.random() < 0.5
    brown_eyes = tone > 1.6 or rng.random() < 0.5
    glasses = ("none", "clear", "dark")[np.searchsorted([0.82, 0.97], rng.random())]
    lip = skin * between(rng, (0.88, 0.66, 0.64), (0.95, 0.78, 0.78))
    if not male and rng.random() < 0.5:
        lip = 0.35 * lip + 0.65 * between(rng, (0.62, 0.12, 0.18), (0.85, 0.33, 0.38))
    return Look(
        male=male,
        young=young,
        hair=hair,
        cut="short" if male and rng.random() < 0.9 else str(rng.choice(["long", "bob", "short"], p=[0.6, 0.25, 0.15])),
        fringe=float(rng.random() * rng.random() * (0.7 if male else 1.0)),
        parting=rng.uniform(-1, 1),
        glasses=glasses,
        beard=rng.uniform(0.5, 1) if bearded else 0.0,
        moustache=rng.uniform(0.6, 1) if moustached or (bearded and rng.random() < 0.5) else 0.0,
        smile=rng.uniform(0.55, 1) if smiling else rng.uniform(-0.25, 0.1),
        mouth_open=rng.uniform(0.2, 1) if rng.random() < (0.75 if smiling else 0.12) else 0.0,
        skin=skin * rng.uniform(0.94, 1.04),
        hair_colour=skin if hair == "bald" else between(rng, *HAIR_COLOURS[hair]),
        eye_colour=between(rng, *(BROWN_EYES if brown_eyes else LIGHT_EYES)),
        lip_colour=lip,
        width=rng.uniform(18.2, 20.4) + (0.6 if male else -0.3),
        jaw=rng.uniform(1.85, 2.5) if male else rng.uniform(1.55, 2.0),
        yaw=rng.normal(0, 2.2),
        roll=rng.normal(0, 0.09),
        scale=rng.uniform(0.98, 1.12),
        shift=(rng.normal(0, 1.0), rng.normal(0, 0.8)),
        light=(rng.normal(0, 0.55), rng.uniform(-0.7, -0.05)),
    )


def attributes(look: Look) -> tuple[int, ...]:
    """The ten ATTRIBUTES of a look as CelebA writes them: 1 or -1. No_Beard, as there, is -1 with any facial hair."""
    truth = {
        "Bald": look.hair == "bald",
        "Eyeglasses": look.glasses != "none",
        "Male": look.male,
        "Mustache": look.moustache > 0,
        "No_Beard": look.beard == 0 and look.moustache == 0,
        "Smiling": look.smile > 0.3,
        "Young": look.young,
    } | {f"{colour.title()}_Hair": look.hair == colour for colour in ("black", "blond", "brown")}
    return tuple(1 if truth[name] else -1 for name in ATTRIBUTES)
