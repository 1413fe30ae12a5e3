"""Drawn faces: 64x64 portraits with known attributes, a small stand-in for CelebA.

Every face is a function of a few numbers (`looks.Look`). They are drawn at random first, the
attributes are read from them, and the picture is painted from them layer by layer: background,
hair, neck, head, features, glasses, light. Shapes are masks with soft edges; shading is a Lambert
term on an ellipsoid plus Gaussian shadows and highlights. The proportions follow the aligned and
cropped CelebA (Liu et al., 2015, https://arxiv.org/abs/1411.7766): eyes about 22 pixels apart, the
face about 44 pixels wide.

The order of the random draws and of the float32 operations is part of the result: other pixels
would be other data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from PIL import Image

from preparation.synthetic.looks import Look, attributes, random_look

SIZE = 64  # pixels of the finished face
GRID = 80  # pixels it is painted at

Colour = Sequence[float] | np.ndarray


# Masks


def step(distance: np.ndarray, softness: float = 0.8) -> np.ndarray:
    """A mask from a signed distance in pixels: 1 where it is positive.

    Its edge is `softness` pixels wide.
    """
    return np.clip(distance / softness + 0.5, 0, 1)


def stroke(distance: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """A soft line: 1 where the distance to it is 0. `width` is its standard deviation in pixels."""
    return np.exp(-0.5 * (distance / width) ** 2)


def gauss(x: np.ndarray, y: np.ndarray, sx: float, sy: float) -> np.ndarray:
    """A Gaussian spot with standard deviations sx and sy, 1 in its centre."""
    return np.exp(-0.5 * ((x / sx) ** 2 + (y / sy) ** 2))


def tinted(colour: Colour, factor: np.ndarray) -> np.ndarray:
    """A colour (3,) times a factor (GRID, GRID): float32 (3, GRID, GRID)."""
    return np.asarray(colour, np.float32)[:, None, None] * factor


def smooth_noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """(GRID, GRID) float32 noise in about -1…1, interpolated from a (rows, columns) grid."""
    grid = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(grid.resize((GRID, GRID), Image.Resampling.BICUBIC))


# The painter


class Painter:
    """Paints one face into `rgb`, a float32 picture (3, GRID, GRID) in 0–1.

    (x, y) are coordinates in the face's frame: the origin is between the eyes, y points down, the
    unit is a pixel of the finished picture. u is x with the features moved by the yaw, most in the
    middle of the face.
    """

    def __init__(self, look: Look, rng: np.random.Generator) -> None:
        self.look = look
        self.rng = rng
        axis = (np.arange(GRID, dtype=np.float32) + 0.5) * (SIZE / GRID)
        px = axis[None, :] - 32 - look.shift[0]
        py = axis[:, None] - 29 - look.shift[1]
        cos = np.float32(np.cos(look.roll) / look.scale)
        sin = np.float32(np.sin(look.roll) / look.scale)
        self.x = cos * px + sin * py
        self.y = cos * py - sin * px
        self.u = self.x - np.float32(look.yaw) * np.clip(1 - (self.x / 22) ** 2, 0, 1)
        self.rgb = np.empty((3, GRID, GRID), np.float32)
        self.strands = self._strands()
        self.face: np.ndarray  # mask of the skin; painted by `head`
        self.long_hair: np.ndarray  # signed distance into the hair; set by `body` for long cuts

    def _strands(self) -> np.ndarray:
        """Brightness of strands of hair that fan out from the parting: (GRID, GRID) in -1…1."""
        rng = self.rng
        angle = np.arctan2(self.x - self.look.parting * 4, self.y + 26)
        table = rng.uniform(-1, 1, 160).astype(np.float32)
        wave = rng.uniform(0, 0.8) * np.sin(self.y * rng.uniform(0.2, 0.5)) * 0.06
        places = (angle + wave) * 40 + 80
        return np.interp(places, np.arange(160), table, period=160).astype(np.float32)

    def band(self, top: float, bottom: float) -> Painter:
        """A painter of the rows that show face coordinates y in top … bottom: less to compute.

        It shares the picture with this one.
        """
        part = copy.copy(self)
        seen = np.flatnonzero(((self.y > top) & (self.y < bottom)).any(1))
        rows = slice(seen[0], seen[-1] + 1) if len(seen) else slice(0, 1)
        part.x = self.x[rows]
        part.y = self.y[rows]
        part.u = self.u[rows]
        part.strands = self.strands[rows]
        part.face = self.face[rows]
        part.rgb = self.rgb[:, rows]
        return part

    def blend(self, alpha: np.ndarray, colour: Colour) -> None:
        """Lay a colour, (3,) or (3, GRID, GRID), over the picture with the given opacity."""
        for plane, value in zip(self.rgb, colour, strict=True):
            plane += alpha * (value - plane)

    def shade(self, amount: np.ndarray) -> None:
        """Darken (negative) or lighten (positive) the picture, in proportion to what is there."""
        self.rgb *= 1 + amount

    def hair_tint(self) -> np.ndarray:
        """Hair with strands, lit from above: (3, GRID, GRID)."""
        shine = gauss(self.x - 12 * self.look.light[0], self.y + 18, 14, 4)
        light = 1 + 0.32 * self.strands + 0.35 * shine
        return tinted(self.look.hair_colour, light)

    # Behind the face

    def background(self) -> None:
        """Two colours that flow into each other, and a few blurred shapes."""
        rng = self.rng
        first = random_backdrop(rng)
        second = random_backdrop(rng)
        if rng.random() < 0.4:  # a plain studio wall
            second = first
        ramp = 0.5 + 0.5 * smooth_noise(rng, 3, 3)
        self.rgb[:] = tinted(first, 1 - ramp) + tinted(second, ramp)
        for _ in range(rng.integers(0, 4)):
            centre_x = rng.uniform(-34, 34)
            centre_y = rng.uniform(-34, 34)
            beyond_x = np.abs(self.x - centre_x) - rng.uniform(3, 16)
            beyond_y = np.abs(self.y - centre_y) - rng.uniform(3, 30)
            box = np.maximum(beyond_x, beyond_y)
            colour = rng.uniform(0, 0.8) + rng.uniform(-0.2, 0.2, 3)
            mask = step(-box, rng.uniform(2, 8)) * rng.uniform(0.2, 0.7)
            self.blend(mask, colour)
        self.shade(0.06 * smooth_noise(rng, 24, 24))

    def body(self) -> None:
        """Hair behind the head, neck, shoulders and clothes."""
        look, rng = self.look, self.rng
        x, y = self.x, self.y
        if look.cut != "short" and look.hair != "bald":
            length = 40 if look.cut == "long" else rng.uniform(12, 20)
            spread = rng.uniform(23, 27)
            drop = np.clip(y + 2, None, 0) / 24.5 + (y > 0) * y * rng.uniform(-0.008, 0.008)
            outline = (1 - np.hypot(x / (spread + 1.2 * self.strands), drop)) * 20
            self.long_hair = np.minimum(outline, length - y + 3 * self.strands)
            self.blend(step(self.long_hair, 1.5), self.hair_tint() * 0.75)

        width = 12.5 if look.male else 9.5
        neck = width + 0.03 * (y - 25) ** 2 * (y > 25) - np.abs(x)
        self.blend(step(neck, 1.5) * step(y - 12), look.skin * 0.72)
        self.shade(-0.35 * gauss(x, y - 28, 13, 5))  # the shadow of the chin

        neckline = np.clip(8 - 0.7 * np.abs(x), 0, 9) * rng.uniform(-1, 0.3)
        collar = y - 31.5 + neckline - 0.012 * x**2
        if rng.random() < 0.6:
            cloth = rng.uniform(0, 0.9, 3)
        else:
            cloth = np.full(3, rng.choice([0.05, 0.1, 0.9]))
        self.blend(step(collar, 1.2), tinted(cloth, 1 + 0.15 * smooth_noise(rng, 12, 12)))

    # The head

    def head(self) -> None:
        """Ears and skin, with its shading. Sets `face`, the mask of the skin."""
        self._ears()
        self._skin()
        self._relief()
        self._lines()

    def _ears(self) -> None:
        look, x, y = self.look, self.x, self.y
        for side in (-1, 1):
            ear = gauss(x - side * (look.width + 0.6) - 0.4 * look.yaw, y - 3, 2.2, 4.2)
            shell = 0.82 - 0.2 * gauss(x - side * look.width, y - 3, 1.2, 2.2)
            self.blend(step(ear - 0.45, 0.2), tinted(look.skin, shell))

    def _skin(self) -> None:
        """The outline of the head, filled and lit as an ellipsoid."""
        look, x, y = self.look, self.x, self.y
        level = 2.0  # where the head is widest
        top = 25.0
        bottom = 26.5 if look.male else 25.0
        t = np.where(y < level, (level - y) / top, (y - level) / bottom)
        power = np.where(y < level, t**2, t**look.jaw)
        half = look.width * np.sqrt(np.clip(1 - power, 0, None))
        self.face = step(half - np.abs(x), 1.2) * step(1 - t, 0.05)

        nx = np.clip(x / (look.width + 3), -1, 1)
        ny = np.clip((y - level) / 32, -1, 1)
        nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0.02, 1))
        lx, ly = look.light
        lambert = (nx * lx + ny * ly + nz) / np.sqrt(lx**2 + ly**2 + 1)
        tone = 0.42 + 0.66 * np.clip(lambert, 0, None)
        warmth = 0.09 * (tone - 1)  # shadows are warmer than lights
        tint = np.stack([1 - warmth, np.ones_like(tone), 1 + warmth])
        self.blend(self.face, tinted(look.skin, tone) * tint)

    def _relief(self) -> None:
        """Cheeks, forehead and chin."""
        look, u, y = self.look, self.u, self.y
        cheeks = gauss(np.abs(u) - 11, y - 9, 4.5, 3.5)
        blush = 0.08 if look.male else 0.16
        self.blend(self.face * cheeks * blush, look.skin * (1.0, 0.6, 0.58))
        forehead = gauss(u, y + 13, 9, 4)
        chin = gauss(u, y - 25, 4, 2.5)
        highlights = 0.10 * cheeks + 0.10 * forehead + 0.08 * chin
        jaws = gauss(np.abs(u) - 17, y - 14, 3.5, 7)
        under_lip = gauss(u, y - 22, 5.5, 1.3)
        hollows = 0.22 * jaws + 0.14 * under_lip
        self.shade(self.face * (highlights - hollows))

    def _lines(self) -> None:
        """Folds beside the mouth; for the old also forehead lines and bags under the eyes."""
        look, u, y = self.look, self.u, self.y
        folds = np.abs(np.abs(u) - 6.5 - 0.45 * (y - 10)) + 4 * step(np.abs(y - 13.5) - 3.8, 1)
        depth = (0.06 if look.young else 0.24) + 0.1 * max(look.smile, 0)
        self.shade(-self.face * depth * stroke(folds, 1))
        if not look.young:
            lines = np.cos((y + 11) * 1.9) ** 8 * gauss(u, y + 13, 9, 3)
            bags = gauss(np.abs(u) - 10, y - 4.3, 4, 0.8)
            self.shade(-self.face * (0.14 * lines + 0.16 * bags))

    # The features

    def eyes(self) -> None:
        """Sockets, whites, irises, lids and lashes, for both eyes at once."""
        look, rng = self.look, self.rng
        u, y = self.u, self.y
        ex = np.abs(u) - 10.2  # from the eye's centre; positive is outward
        sockets = gauss(ex + 1, y + 1.2, 5.6, 2.9)
        inner_corners = gauss(np.abs(u) - 4.6, y + 1.2, 1.6, 3.2)
        self.shade(-0.30 * sockets - 0.20 * inner_corners)

        half_width = rng.uniform(3.6, 4.3)
        opening = rng.uniform(1.35, 1.95) - 0.25 * max(look.smile, 0)
        arch = np.clip(1 - (ex / half_width) ** 2, 0, 1)
        tilt = rng.uniform(-0.12, 0.03) * ex
        upper = -opening * 1.15 * arch**0.7 + tilt
        lower = opening * 0.8 * arch + tilt
        inside = step(np.minimum(y - upper, lower - y), 0.8) * step(half_width - np.abs(ex), 0.8)
        lid_shadow = 1 - 0.25 * gauss(ex, y - upper, 6, 0.9)
        self.blend(inside, tinted((0.80, 0.77, 0.75), lid_shadow))

        gaze = rng.normal(0, 0.5)
        radius = np.hypot(np.where(u > 0, ex - gaze, ex + gaze), y + 0.1)
        self.blend(inside * step(1.95 - radius, 0.9), look.eye_colour)
        self.blend(inside * step(1.0 - radius, 0.8), (0.02, 0.02, 0.02))
        glint = np.hypot(np.where(u > 0, ex - gaze, -ex - gaze) - 0.7, y + 0.8)
        self.blend(inside * step(0.6 - glint, 0.6), (0.95, 0.95, 0.95))

        lash_width = 0.5 if look.male else 0.75
        lash_opacity = 0.65 if look.male else 0.9
        lash = stroke(y - upper, lash_width) * step(half_width + 0.7 - np.abs(ex), 1)
        self.blend(lash * lash_opacity, (0.07, 0.05, 0.05))
        rim = stroke(y - lower, 0.45) * step(half_width - np.abs(ex), 1)
        crease = stroke(y - upper + 1.7, 0.55) * step(half_width - np.abs(ex), 1.5)
        self.shade(-0.28 * rim - 0.22 * crease)

    def brows(self) -> None:
        """The eyebrows, in a shade of the hair."""
        look, rng = self.look, self.rng
        u, y = self.u, self.y
        ex = np.abs(u) - 10.2
        height = rng.uniform(5.3, 6.4)
        bend = rng.uniform(0.015, 0.05)
        curve = -height + bend * (ex - 1) ** 2 + rng.uniform(-0.1, 0.05) * ex
        thickness = rng.uniform(1.0, 1.4) if look.male else rng.uniform(0.6, 0.95)
        thickness = thickness * (1 - 0.05 * np.clip(ex + 2, 0, 6))  # thinner outwards
        brow = stroke(y - curve, thickness) * step(5.6 - np.abs(ex - 0.2), 1.6)
        if look.hair == "bald":
            colour = look.skin * 0.4
        else:
            colour = look.hair_colour * 0.45 + look.skin * 0.1
        self.blend(brow * (0.85 + 0.12 * self.strands), colour)

    def nose(self) -> None:
        """Bridge, tip, wings and nostrils, by light and shadow alone."""
        look, rng = self.look, self.rng
        u, y = self.u - 0.5 * look.yaw, self.y
        width = rng.uniform(3.4, 4.4) + (0.3 if look.male else 0)
        tip = rng.uniform(10.3, 12)
        bridge = gauss(u, y - 4, 1.3, 5) * 0.13 + gauss(u, y - tip + 1.2, 1.7, 1.5) * 0.17
        side = 1 if look.light[0] > 0 else -1  # where the light comes from
        flank = gauss(u + side * 2.6, y - 6, 1.2, 4.5) * (0.1 + 0.12 * abs(look.light[0]))
        flank += gauss(u - side * 2.6, y - 6, 1.2, 4.5) * 0.06
        wings = gauss(np.abs(u) - width, y - tip, 0.8, 1.5) * 0.24
        under = gauss(u, y - tip - 1.8, width * 0.8, 0.8) * 0.32
        self.shade(bridge - flank - wings - under)
        nostrils = gauss(np.abs(u) - width * 0.52, y - tip - 1.3, 1.0, 0.6)
        self.blend(0.75 * nostrils, look.skin * 0.22)
        self.shade(-0.1 * gauss(u, y - tip - 3.6, 0.8, 1.2))

    def mouth(self) -> np.ndarray:
        """Paint lips and teeth; returns the mask of the lips."""
        look, rng = self.look, self.rng
        u, y = self.u - 0.2 * look.yaw, self.y
        half = rng.uniform(6.0, 7.2) + 1.6 * max(look.smile, 0)
        level = rng.uniform(17.2, 18.4)
        arch = np.clip(1 - (u / half) ** 2, 0, 1)
        line = level + look.smile * (1.6 * arch - 1.0)  # the corners rise as the smile grows
        gap = look.mouth_open * (1.9 + 0.7 * max(look.smile, 0)) * arch
        cupid = 1 - 0.35 * stroke(u, 0.9)
        full = rng.uniform(0.8, 1.15) * (0.85 if look.male else 1.1)
        upper = line - gap * 0.35 - 1.7 * full * arch**0.8 * cupid
        lower = line + gap * 0.65 + 2.2 * full * arch**0.7
        lips = step(np.minimum(y - upper, lower - y), 1.0) * step(half - np.abs(u), 1.5)
        shape = 1 - 0.22 * step(line - y, 1.5) + 0.18 * gauss(u, y - (lower - 1.1), 3, 0.7)
        self.blend(lips * 0.9, tinted(look.lip_colour, shape))
        if look.mouth_open > 0:
            between_lips = np.minimum(y - line + gap * 0.35, line + gap * 0.65 - y)
            inner = step(between_lips, 0.8) * step(half - 1 - np.abs(u), 1.5)
            self.blend(inner, (0.25, 0.08, 0.08))
            teeth = inner * step(line + gap * 0.45 - y, 0.8)
            self.blend(teeth * 0.92, tinted((0.93, 0.91, 0.87), 1 - 0.3 * (u / half) ** 2))
        else:
            closed = stroke(y - line, 0.5) * step(half + 0.4 - np.abs(u), 1.2)
            self.blend(0.7 * closed, look.lip_colour * 0.35)
        corners = gauss(np.abs(u) - half - 0.4, y - (level - look.smile), 1.0, 0.9)
        under = gauss(u, y - level - 4.6, 4.5, 1.0)
        self.shade(-0.25 * corners - 0.18 * under)
        return lips

    def mouth_and_beard(self) -> None:
        """The mouth, and for men a beard or the shadow of a shave, and a moustache."""
        look, u, y = self.look, self.u, self.y
        lips = self.mouth()
        if not look.male:
            return
        grain = smooth_noise(self.rng, 64, 64)[: len(y)]
        base = look.skin * 0.25 if look.hair == "bald" else look.hair_colour * 0.8
        colour = tinted(base, 1 + 0.3 * grain)
        jaw = step(y - 14 + 1.1 * np.clip(9 - np.abs(u), 0, None) * (y < 15), 4)
        jaw *= step(np.abs(u) * 0.9 + (y - 13) * 0.8 - 10.5, 4)
        full = self.face * (1 - lips) * np.clip(jaw * (1 + 0.35 * grain), 0, 1)
        if look.beard == 0:
            self.shade(-0.06 * full)
        else:
            self.blend(full * look.beard * 0.9, colour)
        stripe = y - 14.9 - 0.012 * u**2 - 0.5 * look.smile * (1 - np.abs(u) / 7)
        lip = stroke(stripe, 1.15) * step(7.4 - np.abs(u), 2) * (1 - 0.5 * lips)
        moustache = lip * look.moustache * (1.15 + 0.3 * grain)
        self.blend(np.clip(moustache, 0, 0.95), colour)

    # In front of the face

    def hair(self) -> None:
        """Crown, hairline, fringe and, for long cuts, the strands beside the face."""
        look, rng = self.look, self.rng
        x, y = self.x, self.y
        if look.hair == "bald":
            self.shade(self.face * 0.22 * gauss(x - 14 * look.light[0], y + 17, 5, 3))
            return
        volume = rng.uniform(0.5, 4.5) if look.cut == "short" else rng.uniform(2, 4)
        outer = np.hypot(x / (look.width + 1.2 + 0.7 * volume), (y + 1.5) / (23.5 + volume))
        outer = (1 - outer) * 20 + 0.7 * self.strands
        receding = 0 if look.young or not look.male else rng.uniform(0, 4)
        side = np.abs(x - 4 * look.parting)
        fringe = (8.5 - 0.12 * side) * look.fringe
        line = -15 - receding + fringe + 1.2 * self.strands * (0.3 + look.fringe)
        line = line + (9.5 + receding) * (side / 17) ** 4
        lowest = 3 if look.male else 8
        crown = np.minimum(outer, np.minimum(line - y, lowest - y))
        self.blend(step(crown, 1.6), self.hair_tint())
        shadow = stroke(np.clip(y - line, 0, None) + 4 * (y < line), 1.6)
        self.shade(-0.28 * self.face * shadow)
        if look.cut != "short":
            inner = look.width - rng.uniform(0, 2) - 0.006 * (y - 6) ** 2 + 0.7 * self.strands
            beside = np.minimum(np.abs(x) - inner, y + 14)
            lock = np.minimum(beside, self.long_hair)
            self.blend(step(lock, 1.6), self.hair_tint() * 0.9)

    def glasses(self) -> None:
        """Lenses, rims, bridge and arms."""
        look, rng = self.look, self.rng
        u, y = self.u, self.y
        width = rng.uniform(6.2, 7.4)
        height = rng.uniform(4.2, 5.4)
        power = rng.uniform(2, 4)  # 2 is round, 4 nearly square
        across = (np.abs(np.abs(u) - 10) / width) ** power
        down = (np.abs(y - 0.6) / height) ** power
        reach = (across + down) ** (1 / power)
        ring = (reach - 1) * 5
        frame = rng.uniform(0.02, 0.2, 3) if rng.random() < 0.8 else (0.6, 0.52, 0.38)
        if look.glasses == "dark":
            self.blend(step(-ring, 1) * 0.9, (0.05, 0.05, 0.06))
        else:
            self.blend(step(-ring, 1) * 0.06, (0.9, 0.95, 1.0))
        bridge = step(0.55 - np.abs(y + 0.6), 0.8) * step(3.6 - np.abs(u), 1)
        arm = step(0.55 - np.abs(y + 0.8), 0.8) * step(np.abs(u) - 10 - width, 1)
        arm *= step(look.width + 0.5 - np.abs(self.x), 1)
        thick = rng.uniform(0.35, 0.75)
        rim = step(thick - np.abs(ring), 0.9)
        metal = np.maximum(rim, np.maximum(bridge, arm))
        self.blend(metal * 0.92, frame)

    def finish(self) -> np.ndarray:
        """Exposure, white balance, contrast and camera noise; returns uint8 (SIZE, SIZE, 3)."""
        rng = self.rng
        gain = rng.uniform(0.85, 1.12) * (1 + rng.normal(0, 0.025, 3))
        rgb = np.clip(self.rgb * gain.astype(np.float32)[:, None, None], 0, 1)
        rgb = np.clip(0.5 + (rgb - 0.5) * rng.uniform(0.95, 1.15), 0, 1)
        picture = (rgb * 255).astype(np.uint8).transpose(1, 2, 0)  # → (GRID, GRID, 3)
        large = Image.fromarray(np.ascontiguousarray(picture))
        small = np.asarray(large.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
        noise = rng.normal(0, rng.uniform(0.5, 2.5), (SIZE, SIZE, 1)).astype(np.float32)
        return np.clip(np.rint(small + noise), 0, 255).astype(np.uint8)


def random_backdrop(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) for the background."""
    brightness = rng.uniform(0.05, 0.95)
    strength = rng.uniform(0, 0.4)
    return brightness + strength * rng.uniform(-1, 1, 3)


def draw_face(rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    """One face, uint8 (64, 64, 3), and its ten looks.ATTRIBUTES as 1 or -1."""
    look = random_look(rng)
    painter = Painter(look, rng)
    painter.background()
    painter.body()
    painter.head()
    around_eyes = painter.band(-11, 9)
    around_eyes.eyes()
    around_eyes.brows()
    painter.band(-14, 20).nose()
    painter.band(5, 32).mouth_and_beard()
    painter.hair()
    if look.glasses != "none":
        painter.band(-9, 9).glasses()
    return painter.finish(), attributes(look)
