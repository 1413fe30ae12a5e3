"""Drawn objects for zero-shot classification: twelve shapes in eight colours, 64x64.

Main colour, background, place, size and tilt do not depend on the class, with one exception. Of the
eight colours, the one with the number of the class (modulo 8) and the third one after it are held
out: training images never show the class in them, validation images in no others. Red and green
apples, orange and teal cars are for validation alone. Details keep colours of their own: wheels are
black, trunks brown, lamps red, yellow and green.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from preparation.synthetic.digits import SPLITS, photographs, smooth_field

RGB = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

SIZE = 64  # pixels of an image
CANVAS = 256  # pixels of the canvas an object is drawn on
COLOURS: dict[str, RGB] = {
    "red": (205, 40, 45),
    "orange": (238, 130, 35),
    "yellow": (242, 212, 55),
    "green": (55, 150, 60),
    "teal": (40, 165, 170),
    "blue": (45, 85, 205),
    "purple": (130, 60, 175),
    "pink": (240, 135, 185),
}


class Pen:
    """Draws on a canvas in units of 0 to 100, with outlines.

    It has a main colour, and lighter and darker shades of it.
    """

    def __init__(self, colour: RGB, outline: int, rng: np.random.Generator) -> None:
        """`outline` is the width of outlines in pixels; `rng` is for details that vary."""
        self.image = Image.new("RGBA", (CANVAS, CANVAS))
        self.draw = ImageDraw.Draw(self.image)
        self.rng = rng
        self.width = outline
        self.colour = colour
        self.edge = shade(colour, 0.35)
        self.dark = shade(colour, 0.65)
        self.light = shade(colour, 1.5)

    def _style(self, fill: RGB | None) -> dict[str, Any]:
        """Fill (the main colour if none is given) and outline."""
        fill = self.colour if fill is None else fill
        return {"fill": fill, "outline": self.edge, "width": self.width}

    def box(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        fill: RGB | None = None,
        rounding: float = 0,
    ) -> None:
        """A rectangle with rounded corners."""
        corners = scaled(x0, y0, x1, y1)
        self.draw.rounded_rectangle(corners, rounding * 2.56, **self._style(fill))

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None = None) -> None:
        """An ellipse."""
        self.draw.ellipse(scaled(x0, y0, x1, y1), **self._style(fill))

    def pie(self, box: Box, start: float, end: float, fill: RGB | None = None) -> None:
        """A piece of the ellipse in `box`, between two angles in degrees."""
        self.draw.pieslice(scaled(*box), start, end, **self._style(fill))

    def shape(self, *points: Point, fill: RGB | None = None) -> None:
        """A polygon."""
        self.draw.polygon([scaled_point(point) for point in points], **self._style(fill))

    def line(self, *points: Point, width: float = 3, fill: RGB | None = None) -> None:
        """A line, by default in the outline's colour."""
        fill = self.edge if fill is None else fill
        path = [scaled_point(point) for point in points]
        self.draw.line(path, fill, round(width * 2.56), joint="curve")

    def arc(
        self, box: Box, start: float, end: float, width: float = 3, fill: RGB | None = None
    ) -> None:
        """A part of the edge of the ellipse in `box`, by default in the outline's colour."""
        fill = self.edge if fill is None else fill
        self.draw.arc(scaled(*box), start, end, fill, round(width * 2.56))

    def spot(self, box: Box, fill: RGB) -> None:
        """An ellipse without an outline."""
        self.draw.ellipse(scaled(*box), fill=fill)


def scaled(*values: float) -> list[float]:
    """Units of 0 to 100 in pixels of the canvas."""
    return [value * CANVAS / 100 for value in values]


def scaled_point(point: Point) -> Point:
    """A point in pixels of the canvas."""
    x, y = point
    return x * CANVAS / 100, y * CANVAS / 100


def shade(colour: RGB, factor: float) -> RGB:
    """A darker colour (factor < 1) or one closer to white."""
    red, green, blue = colour
    if factor <= 1:
        return round(red * factor), round(green * factor), round(blue * factor)
    return lighter(red, factor), lighter(green, factor), lighter(blue, factor)


def lighter(value: int, factor: float) -> int:
    """A channel's value, closer to 255 by the factor."""
    return round(255 - (255 - value) / factor)


# One function for each class


def apple(p: Pen) -> None:
    """An apple with its stalk and a leaf."""
    p.line((50, 35), (p.rng.uniform(50, 60), 8), width=5, fill=(90, 60, 30))
    p.shape((53, 22), (66, 8), (82, 12), (70, 25), fill=(70, 140, 50))
    p.oval(12, 26, 58, 90)
    p.oval(42, 26, 88, 90)
    p.spot((18, 30, 82, 88), fill=p.colour)
    p.spot((24, 36, 36, 54), fill=p.light)


def car(p: Pen) -> None:
    """A car from the side."""
    roof = p.rng.uniform(20, 30)
    glass = (215, 235, 245)
    p.shape((24, 50), (36, roof), (66, roof), (80, 50))
    p.shape((31, 48), (39, roof + 6), (49, roof + 6), (49, 48), fill=glass)
    p.shape((53, 48), (53, roof + 6), (63, roof + 6), (72, 48), fill=glass)
    p.box(5, 47, 95, 72, rounding=7)
    for x in (16, 62):
        p.oval(x, 60, x + 23, 83, fill=(35, 35, 40))
        p.oval(x + 7, 67, x + 16, 76, fill=(190, 190, 195))
    p.oval(87, 51, 94, 58, fill=(255, 245, 170))


def fish(p: Pen) -> None:
    """A fish that swims to the left."""
    p.shape(
        (68, 50), (96, p.rng.uniform(22, 32)), (90, 50), (96, p.rng.uniform(68, 78)), fill=p.dark
    )
    p.shape((38, 30), (60, 12), (66, 34), fill=p.dark)
    p.shape((42, 70), (58, 86), (62, 66), fill=p.dark)
    p.oval(5, 25, 76, 75)
    for x in range(36, 62, 9):
        p.arc((x - 10, 36, x + 6, 64), -60, 60, width=2, fill=p.dark)
    p.oval(16, 39, 27, 50, fill=(255, 255, 255))
    p.oval(19, 42, 25, 48, fill=(20, 20, 20))


def house(p: Pen) -> None:
    """A house with a door and two windows."""
    p.box(66, 12, 77, 40, fill=p.dark)
    p.box(17, 45, 83, 92)
    p.shape((8, 48), (50, p.rng.uniform(8, 18)), (92, 48), fill=p.dark)
    p.box(43, 64, 58, 92, fill=(105, 70, 45))
    for x in (23, 64):
        p.box(x, 56, x + 14, 71, fill=(250, 240, 180))
        p.line((x + 7, 56), (x + 7, 71), width=1.5)


def ice_cream(p: Pen) -> None:
    """A cone with one scoop or three."""
    p.shape((28, 48), (72, 48), (50, 97), fill=(222, 172, 105))
    for x in (38, 50, 62):
        p.line((x, 49), (50 + (x - 50) * 0.4, 78), width=1.5, fill=(165, 115, 60))
    if p.rng.random() < 0.5:
        p.oval(22, 24, 52, 56)
        p.oval(48, 24, 78, 56, fill=p.dark)
        p.oval(35, 4, 65, 36, fill=p.light)
    else:
        p.oval(22, 12, 78, 58)
    p.spot((38, 10, 46, 18), fill=(255, 255, 255))


def key(p: Pen) -> None:
    """A key with three teeth or two."""
    p.arc((6, 30, 46, 70), 0, 360, width=10, fill=p.edge)
    p.arc((8, 32, 44, 68), 0, 360, width=6.5, fill=p.colour)
    p.box(42, 45, 96, 55)
    teeth = (72, 84)
    skipped = p.rng.integers(2)
    for x in teeth[skipped:]:
        p.box(x, 52, x + 8, p.rng.uniform(64, 72))
    p.box(60, 52, 67, 62)


def mushroom(p: Pen) -> None:
    """A mushroom with spots on its cap."""
    p.shape((40, 45), (60, 45), (66, 92), (34, 92), fill=(240, 228, 205))
    p.pie((6, 10, 94, 98), 180, 360)
    spots = ((24, 40, 6), (44, 26, 8), (66, 32, 7), (80, 46, 4), (52, 46, 4))
    for x, y, radius in spots:
        x = x + p.rng.uniform(-3, 3)
        y = y + p.rng.uniform(-2, 2)
        p.spot((x - radius, y - radius, x + radius, y + radius), fill=(250, 245, 235))


def sailing_boat(p: Pen) -> None:
    """A boat with two sails."""
    p.line((48, 6), (48, 74), width=4, fill=(95, 65, 40))
    p.shape((52, 8), (52, 66), (p.rng.uniform(82, 94), 66))
    p.shape((44, 20), (44, 66), (16, 66), fill=p.light)
    p.shape((6, 72), (94, 72), (78, 92), (22, 92), fill=(140, 95, 60))


def star(p: Pen) -> None:
    """A star with five points."""
    inner = p.rng.uniform(17, 24)
    points = []
    for corner in range(10):
        radius = 46 if corner % 2 == 0 else inner
        angle = math.pi * corner / 5 - math.pi / 2
        points.append((50 + radius * math.cos(angle), 52 + radius * math.sin(angle)))
    p.shape(*points)


def traffic_light(p: Pen) -> None:
    """A traffic light with one lamp lit."""
    p.box(45, 74, 55, 98, fill=(70, 70, 75))
    p.box(28, 3, 72, 77, rounding=8)
    lamps = ((235, 45, 40), (250, 205, 40), (50, 195, 75))
    lit = p.rng.integers(len(lamps))
    for number, lamp in enumerate(lamps):
        colour = lamp if number == lit else shade(lamp, 0.35)
        p.oval(39, 8 + 22 * number, 61, 30 + 22 * number, fill=colour)


def tree(p: Pen) -> None:
    """A leafy tree or a fir."""
    p.box(43, 60, 57, 97, fill=(110, 75, 45))
    if p.rng.random() < 0.5:
        p.oval(8, 32, 52, 72)
        p.oval(48, 32, 92, 72)
        p.oval(22, 5, 78, 62)
        p.spot((26, 30, 74, 68), fill=p.colour)
    else:
        for y in (36, 20, 4):
            half = 16 + 0.75 * y
            p.shape((50, y), (50 - half, y + 36), (50 + half, y + 36))


def umbrella(p: Pen) -> None:
    """An open umbrella."""
    wood = (80, 60, 50)
    p.line((50, 8), (50, 82), width=4, fill=wood)
    p.arc((50, 72, 68, 94), 0, 180, width=4, fill=wood)
    p.pie((5, 14, 95, 96), 180, 360)
    p.pie((5, 48, 35, 63), 180, 360, fill=p.dark)
    p.pie((35, 48, 65, 63), 180, 360, fill=p.light)
    p.pie((65, 48, 95, 63), 180, 360, fill=p.dark)
    for x in (35, 65):
        p.line((50, 15), (x, 54), width=1.5)


DRAWERS: dict[str, Callable[[Pen], None]] = {
    "apple": apple,
    "car": car,
    "fish": fish,
    "house": house,
    "ice_cream": ice_cream,
    "key": key,
    "mushroom": mushroom,
    "sailing_boat": sailing_boat,
    "star": star,
    "traffic_light": traffic_light,
    "tree": tree,
    "umbrella": umbrella,
}
NAMES = tuple(DRAWERS)  # the position is the class id


# The picture


def is_held_out(label: int, colour: int) -> bool:
    """Whether this class in this colour (both numbers) is for validation alone."""
    return (colour - label) % len(COLOURS) in (0, 3)


def random_colour(rng: np.random.Generator, label: int, split: str) -> RGB:
    """One of the colours that the class may have in this split, slightly changed."""
    wants_held_out = split == "val"
    numbers = range(len(COLOURS))
    allowed = [number for number in numbers if is_held_out(label, number) == wants_held_out]
    base = np.array(list(COLOURS.values())[rng.choice(allowed)])
    red, green, blue = np.clip(base + rng.uniform(-18, 18, 3), 0, 255)
    return int(red), int(green), int(blue)


def background(rng: np.random.Generator) -> Image.Image:
    """Plain, gradient, stripes, blobs or noise in any two colours, or a piece of a photograph."""
    one, two = rng.uniform(30, 240, (2, 3))
    kind = rng.integers(6)
    if kind == 5:
        photo = photographs()[rng.integers(len(photographs()))]
        y = rng.integers(photo.shape[0] - SIZE)
        x = rng.integers(photo.shape[1] - SIZE)
        return Image.fromarray(photo[y : y + SIZE, x : x + SIZE])
    ys, xs = np.mgrid[:SIZE, :SIZE] / SIZE
    angle = rng.uniform(0, math.tau)
    count = rng.uniform(2, 6)
    along = xs * math.cos(angle) + ys * math.sin(angle)  # (height, width)
    # All five are computed whichever is taken, so that every image draws as many random numbers.
    plain = np.zeros_like(xs)
    gradient = 0.5 + 0.5 * along
    stripes = np.sin(math.tau * count * along) > 0
    blobs = 0.5 + 0.5 * smooth_field(rng, int(rng.integers(3, 7)), SIZE)
    noise = rng.uniform(0, 0.6, xs.shape)
    mix = (plain, gradient, stripes, blobs, noise)[kind]
    pixels = one + (two - one) * np.clip(mix, 0, 1)[..., None]  # (height, width, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def draw_object(seed: int, split: str, label: int, k: int) -> np.ndarray:
    """Image number k of a class in a split, uint8 (64, 64, 3); it depends on these four alone."""
    rng = np.random.default_rng([seed, 7, SPLITS.index(split), label, k])
    colour = random_colour(rng, label, split)
    pen = Pen(colour, int(rng.integers(2, 8)), rng)
    draw = DRAWERS[NAMES[label]]
    draw(pen)

    drawn = pen.image
    if rng.random() < 0.5:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawn = drawn.rotate(rng.uniform(-18, 18), Image.Resampling.BICUBIC, expand=True)
    side = round(SIZE * rng.uniform(0.5, 0.95))
    drawn = drawn.resize((side, side), Image.Resampling.LANCZOS)

    image = background(rng)
    left, top = rng.integers(-2, SIZE - side + 3, 2)
    image.paste(drawn, (int(left), int(top)), drawn)  # with its own transparency
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    brightness = rng.uniform(0.75, 1.1)
    noise = rng.normal(0, rng.uniform(0, 8), (SIZE, SIZE, 3))
    pixels = np.asarray(image) * brightness + noise
    return pixels.clip(0, 255).astype(np.uint8)
