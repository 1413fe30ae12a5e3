"""Drawn objects in two domains, 64x64: as flat clip art, and shaded as in a photograph.

Both start from the drawings of objects.py without outlines, where each part has one flat colour.

clipart  thick black outlines around all parts, one flat colour or none, a plain background
shaded   parts that bulge and are lit from one side, with texture, highlights and a shadow, in front
         of a cluttered background; then noise and blur

Place, size, tilt and colours do not depend on the class. Image k of a domain depends on the seed
and on k alone, and its class is k modulo 12.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from preparation.synthetic.digits import photographs, smooth_field
from preparation.synthetic.objects import CANVAS, COLOURS, DRAWERS, NAMES, RGB, SIZE, Pen

DOMAINS = ("clipart", "shaded")
FINE = 2 * SIZE  # both are drawn at twice their size
PAPER = (255, 255, 255)
INK = (0, 0, 0)


def draw_object(seed: int, domain: str, k: int) -> tuple[np.ndarray, int]:
    """Image k of a domain, uint8 (64, 64, 3), and its class, 0 to 11; the classes take turns."""
    label = k % len(NAMES)
    rng = np.random.default_rng([seed, 8, DOMAINS.index(domain), k])
    if domain == "clipart":
        return draw_clipart(label, rng), label
    return draw_shaded(label, rng), label


# The object, in flat colours


def any_colour(rng: np.random.Generator, change: float) -> RGB:
    """One of the eight colours, each channel changed by at most `change`."""
    base = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))])
    red, green, blue = np.clip(base + rng.uniform(-change, change, 3), 0, 255)
    return int(red), int(green), int(blue)


def place(
    drawn: np.ndarray, rng: np.random.Generator, tilt: float, slant: float, wobble: float
) -> np.ndarray:
    """Put a drawing (256, 256, 4) somewhere into a picture (128, 128, 4), often mirrored.

    It is tilted by up to `tilt` degrees, sheared by up to `slant`, and bent by up to `wobble`
    pixels. Each pixel is the nearest one of the drawing, so that colours stay flat.
    """
    angle = math.radians(rng.uniform(-tilt, tilt))
    shear = rng.uniform(-slant, slant)
    size = rng.uniform(0.7, 0.96)  # of the picture's side
    narrow = 1 + rng.uniform(-slant, slant)
    mirrored = -1 if rng.random() < 0.5 else 1
    room = FINE * (1 - size) / 2
    shift = rng.uniform(-room, room, 2)

    ys, xs = np.mgrid[:FINE, :FINE] - (FINE - 1) / 2
    ys = ys - shift[0] + wobble * smooth_field(rng, 5, FINE)
    xs = xs - shift[1] + wobble * smooth_field(rng, 5, FINE)
    scale = CANVAS / (FINE * size)
    rows = scale * (math.cos(angle) * ys + math.sin(angle) * xs)
    columns = scale * (math.cos(angle) * xs - math.sin(angle) * ys) / narrow
    columns = mirrored * (columns + shear * rows)

    rows = np.rint(rows + (CANVAS - 1) / 2).astype(int)
    columns = np.rint(columns + (CANVAS - 1) / 2).astype(int)
    inside = (rows >= 0) & (rows < CANVAS) & (columns >= 0) & (columns < CANVAS)
    placed = drawn[rows.clip(0, CANVAS - 1), columns.clip(0, CANVAS - 1)]
    placed[~inside] = 0
    return placed


def distance_to_edges(placed: np.ndarray) -> np.ndarray:
    """Each pixel's distance to the next border between two colours, float (height, width)."""
    from scipy import ndimage  # takes a moment to import

    colours = np.ascontiguousarray(placed).view(np.uint32)[..., 0]  # four bytes as one number
    edges = np.zeros(colours.shape, dtype=bool)
    edges[1:] |= colours[1:] != colours[:-1]
    edges[:, 1:] |= colours[:, 1:] != colours[:, :-1]
    return ndimage.distance_transform_edt(~edges)


# Clip art


def draw_clipart(label: int, rng: np.random.Generator) -> np.ndarray:
    """An object of a class as clip art, uint8 (64, 64, 3)."""
    pen = Pen(any_colour(rng, 18), 0, rng)
    DRAWERS[NAMES[label]](pen)
    placed = place(np.asarray(pen.image), rng, tilt=8, slant=0.06, wobble=1)

    is_filled = rng.random() < 0.7
    is_tinted = rng.random() < 0.4
    tint = tuple(rng.integers(200, 256, 3))
    reach = rng.uniform(1.3, 2.4)  # half the width of the lines, in pixels of the larger picture

    colours = placed[..., :3]
    picture = np.full_like(colours, PAPER)
    if is_filled:
        for shade in (pen.colour, pen.dark, pen.light):
            picture[(colours == shade).all(-1)] = pen.colour
    picture[colours.mean(-1) < 60] = INK  # wheels, the lamps that are off
    picture[placed[..., 3] == 0] = tint if is_tinted else PAPER
    ink = np.clip(reach + 0.5 - distance_to_edges(placed), 0, 1)  # 1 on a line, 0 beside it
    inked = np.uint8(picture * (1 - ink[..., None]))
    return np.asarray(Image.fromarray(inked).resize((SIZE, SIZE), Image.Resampling.BOX))


# Shaded objects


def draw_shaded(label: int, rng: np.random.Generator) -> np.ndarray:
    """An object of a class as a photograph would show it, uint8 (64, 64, 3)."""
    pen = Pen(any_colour(rng, 40), 0, rng)
    DRAWERS[NAMES[label]](pen)
    placed = place(np.asarray(pen.image), rng, tilt=20, slant=0.15, wobble=2.5)
    alpha = (placed[..., 3:] > 0).astype(np.float32)  # (128, 128, 1)

    angle = rng.uniform(0.15, 0.85) * math.pi  # of the light, which comes from above
    light = np.array([math.cos(angle), -math.sin(angle), rng.uniform(0.7, 1.4)])
    light /= np.linalg.norm(light)
    surface = paint_surface(placed, light, rng)
    ground = clutter(rng)
    ground = ground * (1 - 0.55 * cast_shadow(alpha, light, rng))
    picture = ground + alpha * (surface - ground)
    return photograph(picture, rng)


def paint_surface(placed: np.ndarray, light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The object lit from the direction `light` (x, y, z), in 0–255, float (128, 128, 3)."""
    from scipy import ndimage

    # Each part bulges: its height rises like a quarter of a circle from its border.
    radius = rng.uniform(7, 13)
    rise = np.clip(distance_to_edges(placed) / radius, 0, 1)
    height = 0.7 * radius * np.sqrt(1 - (1 - rise) ** 2)
    height += 10 * ndimage.gaussian_filter((placed[..., 3] > 0).astype(np.float32), 8)
    height = ndimage.gaussian_filter(height, 1)
    height += rng.uniform(0, 0.8) * smooth_field(rng, 40, FINE)  # a rough skin
    slope_y, slope_x = np.gradient(height)
    normals = np.stack([-slope_x, -slope_y, np.ones_like(height)], axis=-1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)

    lambert = np.clip(normals @ light, 0, None)[..., None]
    halfway = light + np.array([0, 0, 1])  # between the light and the viewer
    halfway /= np.linalg.norm(halfway)
    gloss = rng.uniform(0, 110) * np.clip(normals @ halfway, 0, None)[..., None] ** 30
    colours = placed[..., :3] * texture(rng)[..., None]
    grey = colours.mean(-1, keepdims=True)
    colours = colours + rng.uniform(0, 0.35) * (grey - colours)
    return colours * (0.3 + 0.9 * lambert) + gloss


def texture(rng: np.random.Generator) -> np.ndarray:
    """Factors of brightness around 1, float (128, 128): blotches, grain and a weave or stripes."""
    ys, xs = np.mgrid[:FINE, :FINE] / FINE
    angle = rng.uniform(0, math.pi)
    along = xs * math.cos(angle) + ys * math.sin(angle) + 0.03 * smooth_field(rng, 6, FINE)
    stripes = np.sin(math.tau * rng.uniform(8, 22) * along)
    blotches = smooth_field(rng, int(rng.integers(5, 14)), FINE)
    grain = smooth_field(rng, 64, FINE)
    weights = rng.uniform(0, (0.15, 0.25, 0.2))
    return 1 + weights[0] * stripes + weights[1] * blotches + weights[2] * grain


def cast_shadow(alpha: np.ndarray, light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The object's shadow, which falls away from the light: 0–1, float (128, 128, 1)."""
    from scipy import ndimage

    reach = rng.uniform(5, 14)
    shift = (-reach * light[1], -reach * light[0], 0)
    shadow = ndimage.shift(alpha, shift, order=0)
    return ndimage.gaussian_filter(shadow, (3, 3, 0))


def clutter(rng: np.random.Generator) -> np.ndarray:
    """A background of a piece of a photograph and things before it, in 0–255, (128, 128, 3)."""
    photos = photographs()
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(60, 150))
    top = rng.integers(photo.shape[0] - side)
    left = rng.integers(photo.shape[1] - side)
    piece = Image.fromarray(photo[top : top + side, left : left + side])
    picture = piece.resize((FINE, FINE), Image.Resampling.BICUBIC)

    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(2, 7)):
        x, y = rng.uniform(-0.1, 1, 2) * FINE
        width, height = rng.uniform(0.1, 0.5, 2) * FINE
        colour = tuple(rng.integers(20, 235, 3))
        box = (x, y, x + width, y + height)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse(box, fill=colour)
        elif kind == 1:
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(x, y), (x + width, y + height / 2), (x + width / 3, y + height)], colour)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 4)))
    pixels = np.asarray(picture, np.float32)
    middle = pixels.mean((0, 1))
    faded = middle + rng.uniform(0.5, 0.9) * (pixels - middle)  # it is out of focus and hazy
    light = 1 + 0.25 * smooth_field(rng, 3, FINE)
    return faded * (light * texture(rng))[..., None]


def photograph(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Take a picture, 0–255 (128, 128, 3), with a camera: uint8 (64, 64, 3)."""
    cast = 1 + rng.uniform(-0.1, 0.1, 3)  # the colour of the light
    exposed = np.clip(picture * cast * rng.uniform(0.65, 1), 0, 250)  # the noise varies white too
    image = Image.fromarray(exposed.astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3)))
    small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    noisy = small + rng.normal(0, rng.uniform(2, 8), small.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
