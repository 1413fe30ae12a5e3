"""Drawn objects for zero-shot classification: twelve shapes in eight colours on many backgrounds, 64x64.

Main colour, background, place, size and tilt are drawn without regard to the class, but for one rule: of the eight
colours, the one numbered as the class (modulo 8) and the third after it are held out. Training images never show the
class in them, validation images in no other: red and green apples, orange and teal cars are for validation alone.
Details keep colours of their own: wheels are black, trunks brown, lamps red, yellow and green.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from synthesis.digits import SPLITS, photographs, smooth_field

SIZE, CANVAS = 64, 256  # pixels of an image, and of the canvas an object is drawn on
COLOURS = {
    "red": (205, 40, 45),
    "orange": (238, 130, 35),
    "yellow": (242, 212, 55),
    "green": (55, 150, 60),
    "teal": (40, 165, 170),
    "blue": (45, 85, 205),
    "purple": (130, 60, 175),
    "pink": (240, 135, 185),
}
RGB = tuple[int, int, int]


class Pen:
    """Draws on a canvas in units of 0 to 100, with an outline, in a colour and its lighter and darker shades."""

    def __init__(self, colour: RGB, outline: int, rng: np.random.Generator) -> None:
        self.image = Image.new("RGBA", (CANVAS, CANVAS))
        self.draw, self.rng = ImageDraw.Draw(self.image), rng
        self.colour, self.edge, self.width = colour, shade(colour, 0.35), outline
        self.dark, self.light = shade(colour, 0.65), shade(colour, 1.5)

    def _style(self, fill: RGB | None) -> dict:
        return {"fill": self.colour if fill is None else fill, "outline": self.edge, "width": self.width}

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None = None, round_: float = 0) -> None:
        self.draw.rounded_rectangle([v * CANVAS / 100 for v in (x0, y0, x1, y1)], round_ * 2.56, **self._style(fill))

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None = None) -> None:
        self.draw.ellipse([v * CANVAS / 100 for v in (x0, y0, x1, y1)], **self._style(fill))

    def pie(self, box: tuple, start: float, end: float, fill: RGB | None = None) -> None:
        self.draw.pieslice([v * CANVAS / 100 for v in box], start, end, **self._style(fill))

    def shape(self, *points: tuple[float, float], fill: RGB | None = None) -> None:
        self.draw.polygon([(x * CANVAS / 100, y * CANVAS / 100) for x, y in points], **self._style(fill))

    def line(self, *points: tuple[float, float], width: float = 3, fill: RGB | None = None) -> None:
        scaled = [(x * CANVAS / 100, y * CANVAS / 100) for x, y in points]
        self.draw.line(scaled, self.edge if fill is None else fill, round(width * 2.56), joint="curve")

    def arc(self, box: tuple, start: float, end: float, width: float = 3, fill: RGB | None = None) -> None:
        box = [v * CANVAS / 100 for v in box]
        self.draw.arc(box, start, end, self.edge if fill is None else fill, round(width * 2.56))


def shade(colour: RGB, factor: float) -> RGB:
    """Darker (factor < 1) or, towards white, lighter."""
    if factor <= 1:
        return tuple(round(v * factor) for v in colour)
    return tuple(round(255 - (255 - v) / factor) for v in colour)


def apple(p: Pen) -> None:
    p.line((50, 35), (p.rng.uniform(50, 60), 8), width=5, fill=(90, 60, 30))
    p.shape((53, 22), (66, 8), (82, 12), (70, 25), fill=(70, 140, 50))
    p.oval(12, 26, 58, 90), p.oval(42, 26, 88, 90)
    p.draw.ellipse([0.18 * CANVAS, 0.3 * CANVAS, 0.82 * CANVAS, 0.88 * CANVAS], fill=p.colour)
    p.draw.ellipse([0.24 * CANVAS, 0.36 * CANVAS, 0.36 * CANVAS, 0.54 * CANVAS], fill=p.light)


def car(p: Pen) -> None:
    roof = p.rng.uniform(20, 30)
    p.shape((24, 50), (36, roof), (66, roof), (80, 50))
    p.shape((31, 48), (39, roof + 6), (49, roof + 6), (49, 48), fill=(215, 235, 245))
    p.shape((53, 48), (53, roof + 6), (63, roof + 6), (72, 48), fill=(215, 235, 245))
    p.box(5, 47, 95, 72, round_=7)
    for x in (16, 62):
        p.oval(x, 60, x + 23, 83, fill=(35, 35, 40)), p.oval(x + 7, 67, x + 16, 76, fill=(190, 190, 195))
    p.oval(87, 51, 94, 58, fill=(255, 245, 170))


def fish(p: Pen) -> None:
    p.shape((68, 50), (96, p.rng.uniform(22, 32)), (90, 50), (96, p.rng.uniform(68, 78)), fill=p.dark)
    p.shape((38, 30), (60, 12), (66, 34), fill=p.dark), p.shape((42, 70), (58, 86), (62, 66), fill=p.dark)
    p.oval(5, 25, 76, 75)
    for x in range(36, 62, 9):
        p.arc((x - 10, 36, x + 6, 64), -60, 60, width=2, fill=p.dark)
    p.oval(16, 39, 27, 50, fill=(255, 255, 255)), p.oval(19, 42, 25, 48, fill=(20, 20, 20))


def house(p: Pen) -> None:
    p.box(66, 12, 77, 40, fill=p.dark)
    p.box(17, 45, 83, 92)
    p.shape((8, 48), (50, p.rng.uniform(8, 18)), (92, 48), fill=p.dark)
    p.box(43, 64, 58, 92, fill=(105, 70, 45))
    for x in (23, 64):
        p.box(x, 56, x + 14, 71, fill=(250, 240, 180)), p.line((x + 7, 56), (x + 7, 71), width=1.5)


def ice_cream(p: Pen) -> None:
    p.shape((28, 48), (72, 48), (50, 97), fill=(222, 172, 105))
    for x in (38, 50, 62):
        p.line((x, 49), (50 + (x - 50) * 0.4, 78), width=1.5, fill=(165, 115, 60))
    if p.rng.random() < 0.5:
        p.oval(22, 24, 52, 56), p.oval(48, 24, 78, 56, fill=p.dark), p.oval(35, 4, 65, 36, fill=p.light)
    else:
        p.oval(22, 12, 78, 58)
    p.draw.ellipse([0.38 * CANVAS, 0.1 * CANVAS, 0.46 * CANVAS, 0.18 * CANVAS], fill=(255, 255, 255))


def key(p: Pen) -> None:
    p.arc((6, 30, 46, 70), 0, 360, width=10, fill=p.edge), p.arc((8, 32, 44, 68), 0, 360, width=6.5, fill=p.colour)
    p.box(42, 45, 96, 55)
    for x in (72, 84)[p.rng.integers(2) :]:
        p.box(x, 52, x + 8, p.rng.uniform(64, 72))
    p.box(60, 52, 67, 62)


def mushroom(p: Pen) -> None:
    p.shape((40, 45), (60, 45), (66, 92), (34, 92), fill=(240, 228, 205))
    p.pie((6, 10, 94, 98), 180, 360)
    for x, y, r in ((24, 40, 6), (44, 26, 8), (66, 32, 7), (80, 46, 4), (52, 46, 4)):
        x, y = x + p.rng.uniform(-3, 3), y + p.rng.uniform(-2, 2)
        p.draw.ellipse([v * CANVAS / 100 for v in (x - r, y - r, x + r, y + r)], fill=(250, 245, 235))


def sailing_boat(p: Pen) -> None:
    p.line((48, 6), (48, 74), width=4, fill=(95, 65, 40))
    p.shape((52, 8), (52, 66), (p.rng.uniform(82, 94), 66)), p.shape((44, 20), (44, 66), (16, 66), fill=p.light)
    p.shape((6, 72), (94, 72), (78, 92), (22, 92), fill=(140, 95, 60))


def star(p: Pen) -> None:
    inner = p.rng.uniform(17, 24)
    radii = [46, inner] * 5
    angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
    points = [(50 + r * math.cos(a), 52 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    p.shape(*points)


def traffic_light(p: Pen) -> None:
    p.box(45, 74, 55, 98, fill=(70, 70, 75))
    p.box(28, 3, 72, 77, round_=8)
    lit = p.rng.integers(3)
    for k, lamp in enumerate(((235, 45, 40), (250, 205, 40), (50, 195, 75))):
        p.oval(39, 8 + 22 * k, 61, 30 + 22 * k, fill=lamp if k == lit else shade(lamp, 0.35))


def tree(p: Pen) -> None:
    p.box(43, 60, 57, 97, fill=(110, 75, 45))
    if p.rng.random() < 0.5:
        p.oval(8, 32, 52, 72), p.oval(48, 32, 92, 72), p.oval(22, 5, 78, 62)
        p.draw.ellipse([v * CANVAS / 100 for v in (26, 30, 74, 68)], fill=p.colour)
    else:
        for y in (36, 20, 4):
            half = 16 + 0.75 * y
            p.shape((50, y), (50 - half, y + 36), (50 + half, y + 36))


def umbrella(p: Pen) -> None:
    p.line((50, 8), (50, 82), width=4, fill=(80, 60, 50)), p.arc((50, 72, 68, 94), 0, 180, width=4, fill=(80, 60, 50))
    p.pie((5, 14, 95, 96), 180, 360)
    for k in range(3):
        p.pie((5 + 30 * k, 48, 35 + 30 * k, 63), 180, 360, fill=(p.dark, p.light, p.dark)[k])
    for x in (35, 65):
        p.line((50, 15), (x, 54), width=1.5)


DRAWERS: dict[str, Callable[[Pen], None]] = {
    f.__name__: f
    for f in (apple, car, fish, house, ice_cream, key, mushroom, sailing_boat, star, traffic_light, tree, umbrella)
}
NAMES = tuple(DRAWERS)  # the position is the class id


def is_held_out(label: int, colour: int) -> bool:
    """Whether the pair of class and colour (numbers) is kept for validation: two of the eight colours of each class."""
    return (colour - label) % len(COLOURS) in (0, 3)


def background(rng: np.random.Generator) -> Image.Image:
    """Plain, gradient, stripes, blobs, noise or a piece of a photograph, in any two colours."""
    one, two = rng.uniform(30, 240, (2, 3))
    if (kind := rng.integers(6)) == 5:
        photo = photographs()[rng.integers(len(photographs()))]
        y, x = (rng.integers(side - SIZE) for side in photo.shape[:2])
        return Image.fromarray(photo[y : y + SIZE, x : x + SIZE])
    ys, xs = np.mgrid[:SIZE, :SIZE] / SIZE
    angle, count = rng.uniform(0, math.tau), rng.uniform(2, 6)
    along = xs * math.cos(angle) + ys * math.sin(angle)  # (height, width)
    mix = (
        np.zeros_like(xs),
        0.5 + 0.5 * along,
        np.sin(math.tau * count * along) > 0,
        0.5 + 0.5 * smooth_field(rng, int(rng.integers(3, 7)), SIZE),
        rng.uniform(0, 0.6, xs.shape),
    )[kind]
    pixels = one + (two - one) * np.clip(mix, 0, 1)[..., None]  # (height, width) → (height, width, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def draw_object(seed: int, split: str, label: int, k: int) -> np.ndarray:
    """Image number k of a class in a split, uint8 (64, 64, 3); it depends on these four alone."""
    rng = np.random.default_rng([seed, 7, SPLITS.index(split), label, k])
    allowed = [c for c in range(len(COLOURS)) if is_held_out(label, c) == (split == "val")]
    base = np.array(list(COLOURS.values())[rng.choice(allowed)])
    colour = tuple(int(v) for v in np.clip(base + rng.uniform(-18, 18, 3), 0, 255))
    pen = Pen(colour, int(rng.integers(2, 8)), rng)
    DRAWERS[NAMES[label]](pen)
    drawn = pen.image
    if rng.random() < 0.5:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawn = drawn.rotate(rng.uniform(-18, 18), Image.Resampling.BICUBIC, expand=True)
    side = round(SIZE * rng.uniform(0.5, 0.95))
    drawn = drawn.resize((side, side), Image.Resampling.LANCZOS)
    image = background(rng)
    place = tuple(int(v) for v in rng.integers(-2, SIZE - side + 3, 2))
    image.paste(drawn, place, drawn)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    pixels = np.asarray(image) * rng.uniform(0.75, 1.1) + rng.normal(0, rng.uniform(0, 8), (SIZE, SIZE, 3))
    return pixels.clip(0, 255).astype(np.uint8)
