"""Synthetic digits for the three domains, 28x28.

mnistm  scikit-learn's optical handwritten digits (UCI, 1,797 of 8x8) brought to 28x28 with random
        affine and elastic variation (Simard et al., 2003), then the recipe of MNIST-M (Ganin et
        al., 2016, https://arxiv.org/abs/1505.07818): |patch − digit| with a random patch of a
        photograph.
usps    other digits of the same collection, rendered as USPS is: 16x16 grey, the digit filling the
        frame.
svhn    house numbers from the TrueType fonts that come with matplotlib, after the recipe of
        SynthDigits in the same paper: varied colour, position, orientation, background and blur,
        with neighbouring digits cut off by the border.

Nothing here needs torch or the network. Image k depends on (seed, domain, split, k) only. Its
random numbers are drawn in a fixed order, so a reordered line changes every image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

DOMAINS = ("mnistm", "svhn", "usps")
SPLITS = ("train", "val")
SIZE = 28
# Which share of the handwritten digits each split may use.
BASE_SHARES = {
    ("mnistm", "train"): 0.52,
    ("mnistm", "val"): 0.13,
    ("usps", "train"): 0.27,
    ("usps", "val"): 0.08,
}
FONTS = (  # those of matplotlib whose digits have plain shapes
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralBolIta.ttf",
    "cmb10.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
)


def image_rng(seed: int, domain: str, split: str, *key: int) -> np.random.Generator:
    """The random generator of one image (or of one block of ten labels)."""
    return np.random.default_rng([seed, DOMAINS.index(domain), SPLITS.index(split), *key])


def label_of(seed: int, domain: str, split: str, k: int) -> int:
    """The label of image k: every ten images in a row show every digit once, in random order."""
    block, position = divmod(k, 10)
    order = image_rng(seed, domain, split, block, 0).permutation(10)
    return int(order[position])


def draw_digit(seed: int, domain: str, split: str, k: int) -> tuple[np.ndarray, int]:
    """Image k of a split and its label: uint8 (28, 28, 3), for usps (28, 28)."""
    rng = image_rng(seed, domain, split, k)
    label = label_of(seed, domain, split, k)
    if domain == "svhn":
        return draw_svhn(label, rng), label
    images, _ = base_digits()
    candidates = base_pool(seed, domain, split)[label]
    base = images[rng.choice(candidates)]
    if domain == "mnistm":
        return draw_mnistm(base, rng), label
    return draw_usps(base, rng), label


# What is drawn from


@cache
def base_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's optical digits: float32 (1797, 8, 8) in 0–1, and their labels (1797,)."""
    from sklearn.datasets import load_digits  # takes a second or two to import

    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) in 0–16
    return (pixels.reshape(-1, 8, 8) / 16).astype(np.float32), labels


def split_base(labels: np.ndarray, seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Deal the base digits out to (domain, split), class by class, so that no two share one.

    `labels` are ints 0–9 (n,). Returns indices into them; together they are a permutation of all n.
    """
    rng = np.random.default_rng(seed)
    parts: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in BASE_SHARES}
    cuts = np.cumsum(list(BASE_SHARES.values()))[:-1]
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        places = np.rint(cuts * len(members)).astype(int)
        for key, share in zip(parts, np.split(members, places), strict=True):
            parts[key].append(share)
    return {key: np.concatenate(shares) for key, shares in parts.items()}


@cache
def base_pool(seed: int, domain: str, split: str) -> list[np.ndarray]:
    """For every digit, the indices of the base digits that (domain, split) may use."""
    _, labels = base_digits()
    indices = split_base(labels, seed)[domain, split]
    return [indices[labels[indices] == digit] for digit in range(10)]


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """scikit-learn's two photographs at three scales each, uint8 (height, width, 3)."""
    from sklearn.datasets import load_sample_images

    photos = []
    for pixels in load_sample_images().images:
        image = Image.fromarray(pixels)
        for scale in (1.0, 0.7, 0.45):
            size = (round(image.width * scale), round(image.height * scale))
            photos.append(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
    return tuple(photos)


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts."""
    import matplotlib  # only for the folder of its fonts

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / name, size)


# Handwriting


def smooth_field(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """(size, size) float32 noise in about -1…1, interpolated from a grid of cells x cells."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def handwrite(
    base: np.ndarray, rng: np.random.Generator, size: int = SIZE, height: float = 20
) -> np.ndarray:
    """Write an 8x8 digit in 0–1 as pen strokes in 0–1, float32 (size, size).

    It becomes about `height` pixels tall, as MNIST's digits are. A cubic spline through the 8x8
    cells is read at coordinates that a random affine map and a smooth random field have moved. Its
    grey ramp is then made steep, so that strokes are crisp and their width varies with the
    threshold.
    """
    from scipy import ndimage  # takes a moment to import

    turn = rng.normal(0, 0.1)
    shear = rng.normal(0.05, 0.18)
    zoom_y = rng.uniform(0.88, 1.08)
    zoom_x = rng.uniform(0.8, 1.08)
    cos = np.cos(turn)
    sin = np.sin(turn)
    affine = np.array(
        [
            [cos / zoom_y, -sin / zoom_y],
            [(sin + shear * cos) / zoom_x, (cos - shear * sin) / zoom_x],
        ]
    )
    pixels_to_cells = 8 / height * affine
    shift = rng.uniform(-1, 1, (2, 1, 1))  # in pixels
    grid = np.mgrid[:size, :size] - (size - 1) / 2 - shift  # rows and columns (2, size, size)
    elastic = 0.38 * np.stack([smooth_field(rng, 4, size), smooth_field(rng, 4, size)])  # in cells
    where = np.einsum("ij,jhw->ihw", pixels_to_cells, grid) + elastic + 3.5 + 2
    value = ndimage.map_coordinates(np.pad(base, 2), where, order=3, mode="constant")

    surroundings = ndimage.gaussian_filter(value, height / 7)  # keeps faint strokes, thins blots
    threshold = rng.uniform(0.16, 0.27) + rng.uniform(0.7, 0.85) * surroundings
    steepness = rng.uniform(3.5, 5.5)
    return np.clip((value - threshold) * steepness + 0.5, 0, 1).astype(np.float32)


def random_patch(photos: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random crop, uint8 (28, 28, 3), of one of the photographs (each at least that large)."""
    photo = photos[int(rng.integers(len(photos)))]
    top = rng.integers(0, photo.shape[0] - SIZE + 1)
    left = rng.integers(0, photo.shape[1] - SIZE + 1)
    return photo[top : top + SIZE, left : left + SIZE]


def mnistm_blend(digit: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """The recipe of MNIST-M, |patch − digit| in every channel.

    uint8 (28, 28) and (28, 28, 3) → uint8 (28, 28, 3). The digit is to be 0 or 255: the published
    set's strokes have hard edges, because any ink of MNIST's counts as full ink.
    """
    difference = patch.astype(np.int16) - digit.astype(np.int16)[..., None]
    return np.abs(difference).astype(np.uint8)


def draw_mnistm(base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A handwritten digit blended with a piece of a photograph, uint8 (28, 28, 3)."""
    digit = np.where(handwrite(base, rng) > 0.25, np.uint8(255), np.uint8(0))
    patch = random_patch(photographs(), rng)
    if rng.random() < 0.5:
        patch = patch[:, ::-1]
    return mnistm_blend(digit, patch)


def draw_usps(base: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A digit as the post office scanned it, uint8 (28, 28).

    Written large, cut at its bounding box, fitted into 16x16, softened, and resized to 28x28.
    """
    ink = handwrite(base, rng, size=44, height=34)
    rows = np.flatnonzero((ink > 0.3).any(1))
    columns = np.flatnonzero((ink > 0.3).any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    aspect = ink.shape[1] / ink.shape[0]
    stretch = rng.uniform(0.95, 1.35) if aspect > 0.5 else 0.85
    width = int(np.clip(round(16 * aspect * stretch), 3, 16))
    digit = Image.fromarray(np.uint8(255 * ink)).resize((width, 16), Image.Resampling.BOX)
    frame = Image.new("L", (16, 16))
    frame.paste(digit, ((16 - width) // 2, 0))

    frame = frame.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    bright = np.asarray(frame, np.float32) * rng.uniform(1.0, 1.25)
    scan = Image.fromarray(np.uint8(np.clip(bright, 0, 255)))
    return np.asarray(scan.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


# House numbers


def random_digits(rng: np.random.Generator) -> str:
    """None to two random digits."""
    count = rng.integers(0, 3)
    return "".join(str(digit) for digit in rng.integers(0, 10, count))


def number_mask(label: int, rng: np.random.Generator) -> Image.Image:
    """A house number with `label` in the middle, as a greyscale mask of twice the size, 56x56."""
    size = 2 * SIZE
    face = font(FONTS[rng.integers(len(FONTS))], int(rng.integers(40, 66)))
    left = random_digits(rng)
    right = random_digits(rng)
    spacing = rng.uniform(-2, 6)
    weight = int(rng.random() < 0.35)  # 1 is a bolder stroke

    mask = Image.new("L", (3 * size, 3 * size))
    draw = ImageDraw.Draw(mask)
    digit = str(label)
    middle = 1.5 * size
    width = face.getlength(digit)
    left_end = middle - width / 2 - spacing
    right_start = middle + width / 2 + spacing
    draw.text((middle, middle), digit, 255, face, anchor="mm", stroke_width=weight)
    draw.text((left_end, middle), left, 255, face, anchor="rm", stroke_width=weight)
    draw.text((right_start, middle), right, 255, face, anchor="lm", stroke_width=weight)

    turn = rng.normal(0, 0.1)
    shear = rng.normal(0, 0.12)
    zoom_x = rng.uniform(0.85, 1.35)
    zoom_y = rng.uniform(0.9, 1.15)
    shift_x, shift_y = rng.uniform(-5, 5, 2)
    # The mask is read at (a x + b y + c, d x + e y + f) for each pixel (x, y) of the result.
    a = np.cos(turn) * zoom_x
    b = (np.sin(turn) + shear) * zoom_x
    d = -np.sin(turn) * zoom_y
    e = np.cos(turn) * zoom_y
    centre_x = size / 2 + shift_x
    centre_y = size / 2 + shift_y
    c = middle - a * centre_x - b * centre_y
    f = middle - d * centre_x - e * centre_y
    matrix = (a, b, c, d, e, f)
    return mask.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """A colour (3,), often close to grey; it may lie a little outside 0–1."""
    brightness = rng.uniform(0.05, 0.95)
    strength = rng.uniform(0, 0.3)
    return brightness + strength * rng.uniform(-1, 1, 3)


def two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Background and digit colour, float32 (3,) in 0–1, which differ in brightness.

    Their means are at least 0.15 apart.
    """
    while True:
        ground = random_colour(rng)
        ink = random_colour(rng)
        if abs(ground.mean() - ink.mean()) > 0.15 + 0.25 * rng.random():
            ground = np.clip(ground, 0, 1).astype(np.float32)
            return ground, np.clip(ink, 0, 1).astype(np.float32)


def draw_svhn(label: int, rng: np.random.Generator) -> np.ndarray:
    """One house number, uint8 (28, 28, 3)."""
    size = 2 * SIZE
    ground, ink = two_colours(rng)
    mask = np.asarray(number_mask(label, rng), np.float32)[..., None] / 255  # (size, size, 1)
    light = rng.uniform(0, 0.35) * smooth_field(rng, 3, size)
    roughness = rng.uniform(0, 0.12) * smooth_field(rng, 20, size)
    wall = 1 + light + roughness
    picture = ground * wall[..., None]  # (size, size, 3)
    if rng.random() < 0.25:  # the edge of the plate, or a door frame
        row, column = np.mgrid[:size, :size] - size / 2
        angle = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.1)
        reach = rng.uniform(18, 27)
        beyond = row * np.sin(angle) + column * np.cos(angle) > reach
        picture[beyond] = rng.uniform(0, 0.9) + rng.uniform(-0.1, 0.1, 3)
    if rng.random() < 0.3:  # the shadow of raised digits
        offset = tuple(rng.integers(-4, 5, 2))
        depth = rng.uniform(0.2, 0.6)
        picture = picture * (1 - depth * np.roll(mask, offset, (0, 1)))
    shine = 1 + rng.uniform(0, 0.25) * smooth_field(rng, 3, size)
    picture = picture + mask * (ink * shine[..., None] - picture)

    image = Image.fromarray(np.uint8(255 * np.clip(picture, 0, 1)))
    radius = rng.uniform(0.3, 3.2) * rng.uniform(0.4, 1)
    image = image.filter(ImageFilter.GaussianBlur(radius))
    small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    noisy = small + rng.normal(0, rng.uniform(0.5, 6), small.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
