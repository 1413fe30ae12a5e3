"""Drawn faces: 64x64 portraits with known attributes, a small stand-in for CelebA.

Every face is a function of a few numbers (`looks.Look`): they are drawn at random first, the attributes are read from
them, and the picture is painted from them layer by layer (background, hair, neck, head, features, glasses, light).
Shapes are masks with soft edges and shading is a Lambert term on an ellipsoid plus Gaussian shadows and highlights.
The proportions follow the aligned and cropped CelebA (Liu et al. 2015, https://arxiv.org/abs/1411.7766): eyes about
22 pixels apart, the face about 44 pixels wide.
"""

import copy

import numpy as np
from PIL import Image

from synthesis.looks import Look, attributes, random_look

SIZE = 64  # pixels of the finished face
GRID = 80  # pixels it is painted at


def step(distance: np.ndarray, softness: float = 0.8) -> np.ndarray:
    """A mask from a signed distance in pixels: 1 where it is positive, with an edge `softness` pixels wide."""
    return np.clip(distance / softness + 0.5, 0, 1)


def stroke(distance: np.ndarray, width: float) -> np.ndarray:
    """A soft line, 1 where the distance to it is 0, `width` being its standard deviation in pixels."""
    return np.exp(-0.5 * (distance / width) ** 2)


def tinted(colour, factor: np.ndarray) -> np.ndarray:
    """A (3,) colour times a (GRID, GRID) factor: (3, GRID, GRID) float32."""
    return np.asarray(colour, np.float32)[:, None, None] * factor


def gauss(x: np.ndarray, y: np.ndarray, sx: float, sy: float) -> np.ndarray:
    """A Gaussian spot with standard deviations sx and sy, 1 in its centre."""
    return np.exp(-0.5 * ((x / sx) ** 2 + (y / sy) ** 2))


def smooth_noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """(GRID, GRID) float32 noise in about -1…1, interpolated from a (rows, columns) grid."""
    grid = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
    return np.asarray(grid.resize((GRID, GRID), Image.Resampling.BICUBIC))


class Painter:
    """Paints one face; `rgb` is a float32 (3, GRID, GRID) picture in 0–1, (x, y) are coordinates in the face's frame.

    The frame's origin is between the eyes, y points down, the units are pixels of the finished picture. (u, v) are
    the same coordinates with the features moved by the yaw, most in the middle of the face.
    """

    def __init__(self, look: Look, rng: np.random.Generator):
        self.look, self.rng = look, rng
        axis = (np.arange(GRID, dtype=np.float32) + 0.5) * (SIZE / GRID)
        px, py = axis[None, :] - 32 - look.shift[0], axis[:, None] - 29 - look.shift[1]
        cos, sin = np.float32(np.cos(look.roll) / look.scale), np.float32(np.sin(look.roll) / look.scale)
        self.x, self.y = cos * px + sin * py, cos * py - sin * px
        self.u = self.x - np.float32(look.yaw) * np.clip(1 - (self.x / 22) ** 2, 0, 1)
        self.rgb = np.empty((3, GRID, GRID), np.float32)
        angle = np.arctan2(self.x - look.parting * 4, self.y + 26)
        table = rng.uniform(-1, 1, 160).astype(np.float32)
        wave = rng.uniform(0, 0.8) * np.sin(self.y * rng.uniform(0.2, 0.5)) * 0.06
        self.strands = np.interp((angle + wave) * 40 + 80, np.arange(160), table, period=160).astype(np.float32)

    def blend(self, alpha: np.ndarray, colour) -> None:
        """Lay a colour, (3,) or (3, GRID, GRID), over the picture with the given opacity."""
        for plane, value in zip(self.rgb, colour, strict=True):
            plane += alpha * (value - plane)

    def shade(self, amount: np.ndarray) -> None:
        """Darken (negative) or lighten (positive) the picture, in proportion to what is there."""
        self.rgb *= 1 + amount

    def band(self, top: float, bottom: float) -> "Painter":
        """A painter of the rows that show face coordinates y in top … bottom, sharing the picture: less to compute."""
        part = copy.copy(self)
        seen = np.flatnonzero(((self.y > top) & (self.y < bottom)).any(1))
        rows = slice(seen[0], seen[-1] + 1) if len(seen) else slice(0, 1)
        for name in ("x", "y", "u", "strands", "face"):
            setattr(part, name, getattr(self, name)[rows])
        part.rgb = self.rgb[:, rows]
        return part

    def background(self) -> None:
        rng = self.rng
        first, second = (rng.uniform(0.05, 0.95) + rng.uniform(0, 0.4) * rng.uniform(-1, 1, 3) for _ in range(2))
        if rng.random() < 0.4:  # a plain studio wall
            second = first
        ramp = 0.5 + 0.5 * smooth_noise(rng, 3, 3)
        self.rgb[:] = tinted(first, 1 - ramp) + tinted(second, ramp)
        for _ in range(rng.integers(0, 4)):  # blurred shapes behind the sitter
            cx, cy = rng.uniform(-34, 34), rng.uniform(-34, 34)
            box = np.maximum(np.abs(self.x - cx) - rng.uniform(3, 16), np.abs(self.y - cy) - rng.uniform(3, 30))
            colour = rng.uniform(0, 0.8) + rng.uniform(-0.2, 0.2, 3)
            self.blend(step(-box, rng.uniform(2, 8)) * rng.uniform(0.2, 0.7), colour)
        self.shade(0.06 * smooth_noise(rng, 24, 24))

    def hair_tint(self) -> np.ndarray:
        """(3, GRID, GRID) hair with strands, lit from above."""
        light = 1 + 0.32 * self.strands + 0.35 * gauss(self.x - 12 * self.look.light[0], self.y + 18, 14, 4)
        return tinted(self.look.hair_colour, light)

    def body(self) -> None:
        """Hair behind the head, neck, shoulders and clothes."""
        look, rng, x, y = self.look, self.rng, self.x, self.y
        if look.cut != "short" and look.hair != "bald":
            length = 40 if look.cut == "long" else rng.uniform(12, 20)
            spread = rng.uniform(23, 27)
            drop = np.clip(y + 2, None, 0) / 24.5 + (y > 0) * y * rng.uniform(-0.008, 0.008)
            outline = (1 - np.hypot(x / (spread + 1.2 * self.strands), drop)) * 20
            self.long_hair = np.minimum(outline, length - y + 3 * self.strands)
            self.blend(step(self.long_hair, 1.5), self.hair_tint() * 0.75)
        neck = 12.5 if look.male else 9.5
        self.blend(step(neck + 0.03 * (y - 25) ** 2 * (y > 25) - np.abs(x), 1.5) * step(y - 12), look.skin * 0.72)
        self.shade(-0.35 * gauss(x, y - 28, 13, 5))
        collar = y - 31.5 + np.clip(8 - 0.7 * np.abs(x), 0, 9) * rng.uniform(-1, 0.3) - 0.012 * x**2
        cloth = rng.uniform(0, 0.9, 3) if rng.random() < 0.6 else np.full(3, rng.choice([0.05, 0.1, 0.9]))
        self.blend(step(collar, 1.2), tinted(cloth, 1 + 0.15 * smooth_noise(rng, 12, 12)))

    def head(self) -> None:
        """Ears and the skin of the head with its shading; sets `face`, the mask of the skin."""
        look, x, y, u = self.look, self.x, self.y, self.u
        for side in (-1, 1):
            ear = gauss(x - side * (look.width + 0.6) - 0.4 * look.yaw, y - 3, 2.2, 4.2)
            shell = 0.82 - 0.2 * gauss(x - side * look.width, y - 3, 1.2, 2.2)
            self.blend(step(ear - 0.45, 0.2), tinted(look.skin, shell))
        top, bottom, level = 25.0, 26.5 if look.male else 25.0, 2.0
        t = np.where(y < level, (level - y) / top, (y - level) / bottom)
        power = np.where(y < level, t**2, t**look.jaw)
        half = look.width * np.sqrt(np.clip(1 - power, 0, None))
        self.face = step(half - np.abs(x), 1.2) * step(1 - t, 0.05)
        nx, ny = np.clip(x / (look.width + 3), -1, 1), np.clip((y - level) / 32, -1, 1)
        nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0.02, 1))
        lx, ly = look.light
        lambert = (nx * lx + ny * ly + nz) / np.sqrt(lx**2 + ly**2 + 1)
        tone = 0.42 + 0.66 * np.clip(lambert, 0, None)
        warmth = 0.09 * (tone - 1)  # shadows are warmer than lights
        self.blend(self.face, tinted(look.skin, tone) * np.stack([1 - warmth, np.ones_like(tone), 1 + warmth]))
        cheeks = gauss(np.abs(u) - 11, y - 9, 4.5, 3.5)
        self.blend(self.face * cheeks * (0.08 if look.male else 0.16), look.skin * (1.0, 0.6, 0.58))
        highlights = 0.10 * cheeks + 0.10 * gauss(u, y + 13, 9, 4) + 0.08 * gauss(u, y - 25, 4, 2.5)
        hollows = 0.22 * gauss(np.abs(u) - 17, y - 14, 3.5, 7) + 0.14 * gauss(u, y - 22, 5.5, 1.3)
        self.shade(self.face * (highlights - hollows))
        folds = np.abs(np.abs(u) - 6.5 - 0.45 * (y - 10)) + 4 * step(np.abs(y - 13.5) - 3.8, 1)
        depth = (0.06 if look.young else 0.24) + 0.1 * max(look.smile, 0)
        self.shade(-self.face * depth * stroke(folds, 1))
        if not look.young:  # lines of the forehead and bags under the eyes
            lines = np.cos((y + 11) * 1.9) ** 8 * gauss(u, y + 13, 9, 3)
            self.shade(-self.face * (0.14 * lines + 0.16 * gauss(np.abs(u) - 10, y - 4.3, 4, 0.8)))

    def eyes(self) -> None:
        """Sockets, whites, irises, lids, lashes and brows."""
        look, u, y = self.look, self.u, self.y
        rng = self.rng
        ex = np.abs(u) - 10.2  # both eyes at once: positive is outward
        self.shade(-0.30 * gauss(ex + 1, y + 1.2, 5.6, 2.9) - 0.20 * gauss(np.abs(u) - 4.6, y + 1.2, 1.6, 3.2))
        half_width, opening = rng.uniform(3.6, 4.3), rng.uniform(1.35, 1.95) - 0.25 * max(look.smile, 0)
        arch = np.clip(1 - (ex / half_width) ** 2, 0, 1)
        tilt = rng.uniform(-0.12, 0.03) * ex
        upper, lower = -opening * 1.15 * arch**0.7 + tilt, opening * 0.8 * arch + tilt
        inside = step(np.minimum(y - upper, lower - y), 0.8) * step(half_width - np.abs(ex), 0.8)
        self.blend(inside, tinted((0.80, 0.77, 0.75), 1 - 0.25 * gauss(ex, y - upper, 6, 0.9)))
        gaze = rng.normal(0, 0.5)
        radius = np.hypot(np.where(u > 0, ex - gaze, ex + gaze), y + 0.1)
        self.blend(inside * step(1.95 - radius, 0.9), look.eye_colour)
        self.blend(inside * step(1.0 - radius, 0.8), (0.02, 0.02, 0.02))
        glint = np.hypot(np.where(u > 0, ex - gaze, -ex - gaze) - 0.7, y + 0.8)
        self.blend(inside * step(0.6 - glint, 0.6), (0.95, 0.95, 0.95))
        lash = stroke(y - upper, 0.5 if look.male else 0.75) * step(half_width + 0.7 - np.abs(ex), 1)
        self.blend(lash * (0.65 if look.male else 0.9), (0.07, 0.05, 0.05))
        rim = stroke(y - lower, 0.45) * step(half_width - np.abs(ex), 1)
        crease = stroke(y - upper + 1.7, 0.55) * step(half_width - np.abs(ex), 1.5)
        self.shade(-0.28 * rim - 0.22 * crease)
        height, bend = rng.uniform(5.3, 6.4), rng.uniform(0.015, 0.05)
        curve = -height + bend * (ex - 1) ** 2 + rng.uniform(-0.1, 0.05) * ex
        thickness = rng.uniform(1.0, 1.4) if look.male else rng.uniform(0.6, 0.95)
        thickness = thickness * (1 - 0.05 * np.clip(ex + 2, 0, 6))  # thinner outwards
        brow = stroke(y - curve, thickness) * step(5.6 - np.abs(ex - 0.2), 1.6)
        colour = look.skin * 0.4 if look.hair == "bald" else look.hair_colour * 0.45 + look.skin * 0.1
        self.blend(brow * (0.85 + 0.12 * self.strands), colour)

    def nose(self) -> None:
        look, rng = self.look, self.rng
        u, y = self.u - 0.5 * look.yaw, self.y
        wide = rng.uniform(3.4, 4.4) + (0.3 if look.male else 0)
        tip = rng.uniform(10.3, 12)
        bridge = gauss(u, y - 4, 1.3, 5) * 0.13 + gauss(u, y - tip + 1.2, 1.7, 1.5) * 0.17
        side = 1 if look.light[0] > 0 else -1
        flank = gauss(u + side * 2.6, y - 6, 1.2, 4.5) * (0.1 + 0.12 * abs(look.light[0]))
        flank += gauss(u - side * 2.6, y - 6, 1.2, 4.5) * 0.06
        wings = gauss(np.abs(u) - wide, y - tip, 0.8, 1.5) * 0.24
        under = gauss(u, y - tip - 1.8, wide * 0.8, 0.8) * 0.32
        self.shade(bridge - flank - wings - under)
        self.blend(0.75 * gauss(np.abs(u) - wide * 0.52, y - tip - 1.3, 1.0, 0.6), look.skin * 0.22)
        self.shade(-0.1 * gauss(u, y - tip - 3.6, 0.8, 1.2))

    def mouth(self) -> np.ndarray:
        """Paints lips and teeth; returns the mask of the lips."""
        look, rng = self.look, self.rng
        u, y = self.u - 0.2 * look.yaw, self.y
        half = rng.uniform(6.0, 7.2) + 1.6 * max(look.smile, 0)
        level = rng.uniform(17.2, 18.4)
        arch = np.clip(1 - (u / half) ** 2, 0, 1)
        line = level + look.smile * (1.6 * arch - 1.0)  # the corners rise as the smile grows
        gap = look.mouth_open * (1.9 + 0.7 * max(look.smile, 0)) * arch
        cupid = 1 - 0.35 * stroke(u, 0.9)
        full = rng.uniform(0.8, 1.15) * (0.85 if look.male else 1.1)
        upper, lower = line - gap * 0.35 - 1.7 * full * arch**0.8 * cupid, line + gap * 0.65 + 2.2 * full * arch**0.7
        lips = step(np.minimum(y - upper, lower - y), 1.0) * step(half - np.abs(u), 1.5)
        shape = 1 - 0.22 * step(line - y, 1.5) + 0.18 * gauss(u, y - (lower - 1.1), 3, 0.7)
        self.blend(lips * 0.9, tinted(look.lip_colour, shape))
        inner = step(np.minimum(y - line + gap * 0.35, line + gap * 0.65 - y), 0.8) * step(half - 1 - np.abs(u), 1.5)
        if look.mouth_open > 0:
            self.blend(inner, (0.25, 0.08, 0.08))
            teeth = inner * step(line + gap * 0.45 - y, 0.8)
            self.blend(teeth * 0.92, tinted((0.93, 0.91, 0.87), 1 - 0.3 * (u / half) ** 2))
        else:
            self.blend(0.7 * stroke(y - line, 0.5) * step(half + 0.4 - np.abs(u), 1.2), look.lip_colour * 0.35)
        corners = gauss(np.abs(u) - half - 0.4, y - (level - look.smile), 1.0, 0.9)
        self.shade(-0.25 * corners - 0.18 * gauss(u, y - level - 4.6, 4.5, 1.0))
        return lips

    def mouth_and_beard(self) -> None:
        look, u, y = self.look, self.u, self.y
        lips = self.mouth()
        if not look.male:
            return
        grain = smooth_noise(self.rng, 64, 64)[: len(y)]
        colour = tinted(look.skin * 0.25 if look.hair == "bald" else look.hair_colour * 0.8, 1 + 0.3 * grain)
        jaw = step(y - 14 + 1.1 * np.clip(9 - np.abs(u), 0, None) * (y < 15), 4)
        jaw *= step(np.abs(u) * 0.9 + (y - 13) * 0.8 - 10.5, 4)
        full = self.face * (1 - lips) * np.clip(jaw * (1 + 0.35 * grain), 0, 1)
        if look.beard == 0:
            self.shade(-0.06 * full)  # the shadow of a shave
        else:
            self.blend(full * look.beard * 0.9, colour)
        stripe = y - 14.9 - 0.012 * u**2 - 0.5 * look.smile * (1 - np.abs(u) / 7)
        lip = stroke(stripe, 1.15) * step(7.4 - np.abs(u), 2) * (1 - 0.5 * lips)
        self.blend(np.clip(lip * look.moustache * (1.15 + 0.3 * grain), 0, 0.95), colour)

    def hair(self) -> None:
        """The hair in front: crown, hairline, fringe and, for long cuts, the strands beside the face."""
        look, rng, x, y = self.look, self.rng, self.x, self.y
        if look.hair == "bald":
            self.shade(self.face * 0.22 * gauss(x - 14 * look.light[0], y + 17, 5, 3))
            return
        volume = rng.uniform(0.5, 4.5) if look.cut == "short" else rng.uniform(2, 4)
        outer = np.hypot(x / (look.width + 1.2 + 0.7 * volume), (y + 1.5) / (23.5 + volume))
        outer = (1 - outer) * 20 + 0.7 * self.strands
        receding = 0 if look.young or not look.male else rng.uniform(0, 4)
        side = np.abs(x - 4 * look.parting)
        line = -15 - receding + (8.5 - 0.12 * side) * look.fringe + 1.2 * self.strands * (0.3 + look.fringe)
        line = line + (9.5 + receding) * (side / 17) ** 4
        crown = np.minimum(outer, np.minimum(line - y, (3 if look.male else 8) - y))
        self.blend(step(crown, 1.6), self.hair_tint())
        self.shade(-0.28 * self.face * stroke(np.clip(y - line, 0, None) + 4 * (y < line), 1.6))
        if look.cut != "short":
            inner = look.width - rng.uniform(0, 2) - 0.006 * (y - 6) ** 2 + 0.7 * self.strands
            lock = np.minimum(np.minimum(np.abs(x) - inner, y + 14), self.long_hair)
            self.blend(step(lock, 1.6), self.hair_tint() * 0.9)

    def glasses(self) -> None:
        look, rng, u, y = self.look, self.rng, self.u, self.y
        wide, high, power = rng.uniform(6.2, 7.4), rng.uniform(4.2, 5.4), rng.uniform(2, 4)
        reach = ((np.abs(np.abs(u) - 10) / wide) ** power + (np.abs(y - 0.6) / high) ** power) ** (1 / power)
        ring = (reach - 1) * 5
        frame = rng.uniform(0.02, 0.2, 3) if rng.random() < 0.8 else (0.6, 0.52, 0.38)
        opacity, lens = (0.9, (0.05, 0.05, 0.06)) if look.glasses == "dark" else (0.06, (0.9, 0.95, 1.0))
        self.blend(step(-ring, 1) * opacity, lens)
        bridge = step(0.55 - np.abs(y + 0.6), 0.8) * step(3.6 - np.abs(u), 1)
        arm = step(0.55 - np.abs(y + 0.8), 0.8) * step(np.abs(u) - 10 - wide, 1)
        arm *= step(look.width + 0.5 - np.abs(self.x), 1)
        thick = rng.uniform(0.35, 0.75)
        self.blend(np.maximum(step(thick - np.abs(ring), 0.9), np.maximum(bridge, arm)) * 0.92, frame)

    def finish(self) -> np.ndarray:
        """Exposure, white balance, contrast and camera noise; returns uint8 (SIZE, SIZE, 3)."""
        rng = self.rng
        gain = rng.uniform(0.85, 1.12) * (1 + rng.normal(0, 0.025, 3))
        rgb = np.clip(self.rgb * gain.astype(np.float32)[:, None, None], 0, 1)
        rgb = np.clip(0.5 + (rgb - 0.5) * rng.uniform(0.95, 1.15), 0, 1)
        picture = np.ascontiguousarray((rgb * 255).astype(np.uint8).transpose(1, 2, 0))  # → (GRID, GRID, 3)
        small = Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        noisy = np.asarray(small, np.float32) + rng.normal(0, rng.uniform(0.5, 2.5), (SIZE, SIZE, 1)).astype(np.float32)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def draw_face(rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
    """One face, uint8 (64, 64, 3), and its ten looks.ATTRIBUTES as 1 or -1."""
    look = random_look(rng)
    painter = Painter(look, rng)
    painter.background()
    painter.body()
    painter.head()
    painter.band(-11, 9).eyes()
    painter.band(-14, 20).nose()
    painter.band(5, 32).mouth_and_beard()
    painter.hair()
    if look.glasses != "none":
        painter.band(-9, 9).glasses()
    return painter.finish(), attributes(look)
